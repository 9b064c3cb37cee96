// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "gemma4/cache_update.hpp"
#include "gemma4/platform.hpp"

/// The contract of a simulated cache format: one small functor that says what a format would read back.
///
/// A simulated format stores dequantise(quantise(x)) in the uncompressed bf16 cache, so that an idea has its accuracy
/// before it has a kernel. What it measures is the error of the format plus that of one rounding to bf16 (2^-9
/// relative); what it does not save is memory: `row_bytes` says what a real one would take.
///
/// Host and device compile the same functor and must get the same bits. Two habits are enough for that:
///   - +, *, / and sqrt are rounded correctly on both sides, but either compiler may fuse a * b + c into one rounding.
///     So a product that is added to something is exact (two floats, multiplied in double), or it is `product(a, b)`.
///     A conversion to double and back does not keep them apart: g++ 12 removes it and fuses.
///   - nothing of exp, log or pow: tables are made on the host and travel inside the functor.
namespace gemma4 {

/// How large a quantiser may be: a table of 1024 levels. It is a kernel's parameter, of which CUDA 12.1 takes 32764 B.
inline constexpr std::size_t kMaxQuantiserBytes = 4352;

/// `roundtrip` is host and device code (GEMMA4_HD) and is called once for each `block_size` consecutive values of a
/// vector, by one thread, in no promised order; it replaces them by what the format would read back. The values it is
/// given are finite; what it writes may be infinite where the format would overflow. `n` is block_size(head_dim).
/// The functor is copied into shared memory on the device, so it holds its tables and no pointers.
template <class T>
concept Quantiser = std::is_trivially_copyable_v<T> && std::equality_comparable<T> &&
                    sizeof(T) <= kMaxQuantiserBytes&& requires(const T quantiser, CacheSide side, float* values, int n,
                                                               std::int64_t head_dim, std::string_view stem) {
  { quantiser.block_size(head_dim) } -> std::same_as<std::int64_t>;       // values that share a scale; divides head_dim
  { quantiser.roundtrip(side, values, n) } -> std::same_as<void>;         // values [n], in place
  { quantiser.row_bytes(side, head_dim) } -> std::same_as<std::int64_t>;  // of one vector, scales and norms included
  { T::kGrammar } -> std::convertible_to<std::string_view>;               // of the stem, for --help
  { quantiser.name() } -> std::same_as<std::string>;                      // the stem: "k4v3", "q8_0"
  { T::parse(stem) } -> std::same_as<std::optional<T>>;                   // parse(name()) == *this; else nullopt
};

/// Who computes one block together: `lane` of `size`, which meet at sync(). The host is a team of one.
struct LoneTeam {
  static constexpr int kSize = 1;
  [[nodiscard]] GEMMA4_HD static constexpr int lane() { return 0; }
  GEMMA4_HD static constexpr void sync() {}
};

/// A quantiser whose search is too long for one thread of a device: a warp takes a block. `roundtrip_by` is called by
/// every lane, on the same `values` and `scratch` in memory that they share, and leaves the bits of `roundtrip`.
template <class T>
concept TeamQuantiser = Quantiser<T> &&
    requires(const T quantiser, CacheSide side, float* values, int n, typename T::template Scratch<512>& scratch) {
  { quantiser.template roundtrip_by<LoneTeam>(side, values, n, scratch) } -> std::same_as<void>;
};

/// The one NaN that a simulated cache stores: what a float NaN becomes on the device. x86 makes others.
[[nodiscard]] GEMMA4_HD constexpr float quiet_nan() {
  return bit_cast<float>(std::uint32_t{0x7FFFFFFFu});
}

/// a * b rounded to float before anything is added to it: a sum that is fused already cannot be fused again, and adding
/// zero cannot be dropped, because it turns -0 into 0.
[[nodiscard]] GEMMA4_HD inline float product(float a, float b) {
  return fmaf(a, b, 0.0f);
}

/// max |x| of `n` values by their bits, in which NaN is above infinity and infinity above every number.
[[nodiscard]] GEMMA4_HD constexpr float block_magnitude(const float* values, int n) {
  std::uint32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(values[i]) & 0x7FFFFFFFu;
    largest = bits > largest ? bits : largest;
  }
  return bit_cast<float>(largest);
}

/// Whether every value is a number.
[[nodiscard]] GEMMA4_HD constexpr bool is_finite_block(const float* values, int n) {
  return bit_cast<std::uint32_t>(block_magnitude(values, n)) < 0x7F800000u;
}

/// One block through the quantiser. A block that holds a NaN or an infinity reads back as NaN, all of it: an idea's
/// rounding to integers cannot hide it.
template <Quantiser TQuantiser>
GEMMA4_HD void roundtrip_block(const TQuantiser& quantiser, CacheSide side, float* values, int n) {
  if (is_finite_block(values, n)) return quantiser.roundtrip(side, values, n);
  for (int i = 0; i < n; ++i) values[i] = quiet_nan();
}

/// The longest tail or sink of a simulated format, in tokens.
inline constexpr int kMaxExactTokens = 4096;

/// How many of the chunk's tokens a format with a tail takes at a time: the largest divisor of n_token that is at most
/// 16 and at most the tail. So all pieces of a chunk have one length, and one plan serves them.
[[nodiscard]] constexpr std::int64_t tail_piece(std::int64_t n_token, std::int64_t tail) {
  constexpr std::int64_t kLongest = 16;
  std::int64_t piece = tail < kLongest ? tail : kLongest;
  while (piece > 1 && n_token % piece != 0) --piece;
  return piece < 1 ? 1 : piece;
}

namespace detail {

/// Removes `-<word><count>` from the end of `name`. @return the count, 1 to kMaxExactTokens; 0 where it is not there
constexpr int take_exact_tokens(std::string_view& name, std::string_view word) {
  const std::size_t at = name.rfind(word);
  if (at == name.npos) return 0;
  const std::string_view digits = name.substr(at + word.size());
  if (digits.empty() || digits.size() > 4 || digits.front() == '0') return 0;
  int count = 0;
  for (const char digit : digits) {
    if (digit < '0' || digit > '9') return 0;
    count = 10 * count + (digit - '0');
  }
  if (count > kMaxExactTokens) return 0;
  name = name.substr(0, at);
  return count;
}

}  // namespace detail

/// A cache format that is a quantiser, with the signed Hadamard rotation around it or without, and with some tokens
/// exact or none. Its name is `sim-<stem>[-had][-tail<n>][-sink<n>]`. With the rotation a vector is rotated, quantised,
/// read back and rotated back before it is stored, so that attention over the flat cache needs no change.
///
/// -tail<n>: the newest n tokens are bf16; a token is quantised, from that bf16, when the token n places behind it is
/// stored. A chunk goes in pieces of tail_piece() tokens: the last query of a piece of s sees n exact tokens, itself
/// included, the first n + 1 - s, so never more than a cache that decodes would have; token by token it is exact for
/// each query. A sequence that is rewound has lost its tail.
/// -sink<n>: the tokens at positions below n are bf16 for good.
template <Quantiser TQuantiser>
struct Simulated {
  TQuantiser quantiser;
  bool hadamard = false;
  std::uint64_t seed = 0;  ///< of the rotation, not part of the name; the same seed rotates as TQ4 does
  int tail = 0;            ///< newest tokens that are exact
  int sink = 0;            ///< first tokens that are exact
  bool operator==(const Simulated&) const = default;

  static constexpr std::int64_t kRecordTokens = 1, kRingValueBytes = 2;
  static constexpr bool kUnpacksForPrefill = false, kStoredByPrologue = false, kReadsKeysFromValues = false;

  [[nodiscard]] static std::string grammar() {
    return "sim-" + std::string(TQuantiser::kGrammar) + "[-had][-tail<n>][-sink<n>]";
  }

  /// The format of a name, seed 0; nothing where the name is another's.
  [[nodiscard]] static std::optional<Simulated> parse(std::string_view name) {
    constexpr std::string_view kPrefix = "sim-", kSuffix = "-had";
    if (!name.starts_with(kPrefix)) return std::nullopt;
    name.remove_prefix(kPrefix.size());
    const int sink = detail::take_exact_tokens(name, "-sink");
    const int tail = detail::take_exact_tokens(name, "-tail");
    const bool hadamard = name.ends_with(kSuffix);
    if (hadamard) name.remove_suffix(kSuffix.size());
    const std::optional<TQuantiser> quantiser = TQuantiser::parse(name);
    if (!quantiser) return std::nullopt;
    return Simulated{.quantiser = *quantiser, .hadamard = hadamard, .tail = tail, .sink = sink};
  }
  [[nodiscard]] std::string name() const {
    return "sim-" + quantiser.name() + (hadamard ? "-had" : "") + (tail > 0 ? "-tail" + std::to_string(tail) : "") +
           (sink > 0 ? "-sink" + std::to_string(sink) : "");
  }

  /// Bytes that a real format would take for one vector that is quantised.
  [[nodiscard]] std::int64_t row_bytes(CacheSide side, std::int64_t head_dim) const {
    return quantiser.row_bytes(side, head_dim);
  }
  /// Tokens of a cache that are bf16 in place of that.
  [[nodiscard]] std::int64_t exact_tokens() const { return std::int64_t{tail} + sink; }
  /// Bytes that it does take: bf16.
  [[nodiscard]] static constexpr std::int64_t allocated_row_bytes(CacheSide /*side*/, std::int64_t head_dim) {
    return 2 * head_dim;
  }
  [[nodiscard]] static constexpr std::int64_t rotation_bytes(std::int64_t /*head_dim*/) { return 0; }
  [[nodiscard]] Simulated with_seed(std::uint64_t to) const { return {quantiser, hadamard, to, tail, sink}; }
};

}  // namespace gemma4

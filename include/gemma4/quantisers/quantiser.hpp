// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <concepts>
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

/// `roundtrip` is host and device code (GEMMA4_HD) and is called once for each `block_size` consecutive values of a
/// vector, by one thread, in no promised order; it replaces them by what the format would read back. The values it is
/// given are finite; what it writes may be infinite where the format would overflow. `n` is block_size(head_dim).
/// The functor is copied into shared memory on the device, so it holds its tables and no pointers.
template <class T>
concept Quantiser = std::is_trivially_copyable_v<T> && std::equality_comparable<T> && sizeof(T) <= 3072 &&
                    requires(const T quantiser, CacheSide side, float* values, int n, std::int64_t head_dim,
                             std::string_view stem) {
  { quantiser.block_size(head_dim) } -> std::same_as<std::int64_t>;       // values that share a scale; divides head_dim
  { quantiser.roundtrip(side, values, n) } -> std::same_as<void>;         // values [n], in place
  { quantiser.row_bytes(side, head_dim) } -> std::same_as<std::int64_t>;  // of one vector, scales and norms included
  { T::kGrammar } -> std::convertible_to<std::string_view>;               // of the stem, for --help
  { quantiser.name() } -> std::same_as<std::string>;                      // the stem: "k4v3", "q8_0"
  { T::parse(stem) } -> std::same_as<std::optional<T>>;                   // parse(name()) == *this; else nullopt
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

/// One block through the quantiser. A block that holds a NaN or an infinity reads back as NaN, all of it: an idea's
/// rounding to integers cannot hide it.
template <Quantiser TQuantiser>
GEMMA4_HD void roundtrip_block(const TQuantiser& quantiser, CacheSide side, float* values, int n) {
  const bool finite = bit_cast<std::uint32_t>(block_magnitude(values, n)) < 0x7F800000u;
  if (finite) return quantiser.roundtrip(side, values, n);
  for (int i = 0; i < n; ++i) values[i] = quiet_nan();
}

/// A cache format that is a quantiser, with the signed Hadamard rotation around it or without. Its name is
/// `sim-<stem>[-had]`. With the rotation a vector is rotated, quantised, read back and rotated back before it is
/// stored, so that attention over the flat cache needs no change.
template <Quantiser TQuantiser>
struct Simulated {
  TQuantiser quantiser;
  bool hadamard = false;
  std::uint64_t seed = 0;  ///< of the rotation, not part of the name; the same seed rotates as TQ4 does
  bool operator==(const Simulated&) const = default;

  static constexpr std::int64_t kRecordTokens = 1, kRingValueBytes = 2;
  static constexpr bool kUnpacksForPrefill = false, kStoredByPrologue = false, kReadsKeysFromValues = false;

  [[nodiscard]] static std::string grammar() { return "sim-" + std::string(TQuantiser::kGrammar) + "[-had]"; }

  /// The format of a name, seed 0; nothing where the name is another's.
  [[nodiscard]] static std::optional<Simulated> parse(std::string_view name) {
    constexpr std::string_view kPrefix = "sim-", kSuffix = "-had";
    if (!name.starts_with(kPrefix)) return std::nullopt;
    name.remove_prefix(kPrefix.size());
    const bool hadamard = name.ends_with(kSuffix);
    if (hadamard) name.remove_suffix(kSuffix.size());
    const std::optional<TQuantiser> quantiser = TQuantiser::parse(name);
    if (!quantiser) return std::nullopt;
    return Simulated{.quantiser = *quantiser, .hadamard = hadamard};
  }
  [[nodiscard]] std::string name() const { return "sim-" + quantiser.name() + (hadamard ? "-had" : ""); }

  /// Bytes that a real format would take for one vector.
  [[nodiscard]] std::int64_t row_bytes(CacheSide side, std::int64_t head_dim) const {
    return quantiser.row_bytes(side, head_dim);
  }
  /// Bytes that it does take: bf16.
  [[nodiscard]] static constexpr std::int64_t allocated_row_bytes(CacheSide /*side*/, std::int64_t head_dim) {
    return 2 * head_dim;
  }
  [[nodiscard]] static constexpr std::int64_t rotation_bytes(std::int64_t /*head_dim*/) { return 0; }
  [[nodiscard]] Simulated with_seed(std::uint64_t to) const { return {quantiser, hadamard, to}; }
};

}  // namespace gemma4

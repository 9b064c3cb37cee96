// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <charconv>
#include <concepts>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "gemma4/cache_update.hpp"
#include "gemma4/error.hpp"
#include "gemma4/tq4_format.hpp"

/// What a cache format is, and those that store K and V as they are read by a kernel of their own.
///
/// A format is a type: its name, the bytes of a row, what it needs beside the cache. gemma4/cache_formats.hpp lists all
/// of them; reference/cache/ and cuda/cache/ hold a cache type for each, and one that is missing does not compile.
namespace gemma4 {

/// A format of the flat cache of the full-attention layers.
template <class TFormat>
concept CacheFormat = std::equality_comparable<TFormat> &&
    requires(const TFormat& format, std::string_view name, CacheSide side, std::int64_t n, std::uint64_t seed) {
  { TFormat::grammar() } -> std::same_as<std::string>;               // its part of the grammar of --cache
  { TFormat::parse(name) } -> std::same_as<std::optional<TFormat>>;  // nothing: another format's; throws: misspelt
  { format.name() } -> std::same_as<std::string>;                    // without its seed; parse() reads it back
  { format.with_seed(seed) } -> std::same_as<TFormat>;               // of everything random in it
  {
    format.allocated_row_bytes(side, n)
    } -> std::same_as<std::int64_t>;                                  // of a stored vector of n values, as allocated
  { format.row_bytes(side, n) } -> std::same_as<std::int64_t>;        // what the idea would take; simulated: less
  { format.rotation_bytes(n) } -> std::same_as<std::int64_t>;         // of its own on a device, for head_dim n
  { TFormat::kRecordTokens } -> std::convertible_to<std::int64_t>;    // tokens that a device stores together
  { TFormat::kUnpacksForPrefill } -> std::convertible_to<bool>;       // K and V of a head go through scratch as bf16
  { TFormat::kStoredByPrologue } -> std::convertible_to<bool>;        // else K and V are laid beside the cache first
  { TFormat::kRingValueBytes } -> std::convertible_to<std::int64_t>;  // of the sliding layers' rings beside it
  { TFormat::kReadsKeysFromValues } -> std::convertible_to<bool>;     // for layers whose K is their V alone
};

/// float32, in the reference alone: what rounding costs.
struct F32Format {
  static constexpr std::string_view kGrammar = "f32";
  static constexpr std::int64_t kRecordTokens = 1, kRingValueBytes = 4;
  static constexpr bool kUnpacksForPrefill = false, kStoredByPrologue = true, kReadsKeysFromValues = false;
  [[nodiscard]] static std::string grammar() { return std::string(kGrammar); }
  [[nodiscard]] static std::optional<F32Format> parse(std::string_view name) {
    return name == kGrammar ? std::optional(F32Format{}) : std::nullopt;
  }
  [[nodiscard]] static std::string name() { return std::string(kGrammar); }
  [[nodiscard]] static F32Format with_seed(std::uint64_t /*seed*/) { return {}; }
  [[nodiscard]] static constexpr std::int64_t allocated_row_bytes(CacheSide /*side*/, std::int64_t head_dim) {
    return 4 * head_dim;
  }
  [[nodiscard]] static constexpr std::int64_t row_bytes(CacheSide side, std::int64_t head_dim) {
    return allocated_row_bytes(side, head_dim);
  }
  [[nodiscard]] static constexpr std::int64_t rotation_bytes(std::int64_t /*head_dim*/) { return 0; }
  bool operator==(const F32Format&) const = default;
};

/// bfloat16: the uncompressed baseline.
struct Bf16Format {
  static constexpr std::string_view kGrammar = "bf16";
  static constexpr std::int64_t kRecordTokens = 1, kRingValueBytes = 2;
  static constexpr bool kUnpacksForPrefill = false, kStoredByPrologue = true, kReadsKeysFromValues = false;
  [[nodiscard]] static std::string grammar() { return std::string(kGrammar); }
  [[nodiscard]] static std::optional<Bf16Format> parse(std::string_view name) {
    return name == kGrammar ? std::optional(Bf16Format{}) : std::nullopt;
  }
  [[nodiscard]] static std::string name() { return std::string(kGrammar); }
  [[nodiscard]] static Bf16Format with_seed(std::uint64_t /*seed*/) { return {}; }
  [[nodiscard]] static constexpr std::int64_t allocated_row_bytes(CacheSide /*side*/, std::int64_t head_dim) {
    return 2 * head_dim;
  }
  [[nodiscard]] static constexpr std::int64_t row_bytes(CacheSide side, std::int64_t head_dim) {
    return allocated_row_bytes(side, head_dim);
  }
  [[nodiscard]] static constexpr std::int64_t rotation_bytes(std::int64_t /*head_dim*/) { return 0; }
  bool operator==(const Bf16Format&) const = default;
};

namespace detail {

/// Removes `prefix` from the front of `text` if it is there, and tells whether it was.
constexpr bool take(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

/// A digit from `low` to `high` at the front of `text`, removed.
constexpr std::optional<int> take_bits(std::string_view& text, char low = '2', char high = '4') {
  if (text.empty() || text.front() < low || text.front() > high) return std::nullopt;
  const int bits = text.front() - '0';
  text.remove_prefix(1);
  return bits;
}

}  // namespace detail

/// TurboQuant (gemma4/tq4_format.hpp).
///
///   tq4[-k<bits>v<bits>][-cut][-raw][-haar]       bits is 2, 3 or 4; k4v4 is the default
///   tq4-peer = tq4-cut-raw-haar                   the format of a peer
///
/// -cut: codebook of the density cut at three sigma; -raw: stored norm not corrected; -haar: dense Haar rotation. The
/// parts come in this order. A row takes 4 bits a value whatever its codebook's width.
struct Tq4Format {
  Tq4Options options = {};

  static constexpr std::string_view kGrammar = "tq4[-k<bits>v<bits>][-cut][-raw][-haar] (bits 2 to 4) | tq4-peer";
  /// Rows of one KV head come in records of this many tokens on the device: one bulk copy brings a record.
  static constexpr std::int64_t kRecordTokens = 16;
  static constexpr std::int64_t kRingValueBytes = 2;
  static constexpr bool kUnpacksForPrefill = true, kStoredByPrologue = true, kReadsKeysFromValues = false;

  [[nodiscard]] static std::string grammar() { return std::string(kGrammar); }
  [[nodiscard]] static std::optional<Tq4Format> parse(std::string_view name) {
    Tq4Format format;
    std::string_view rest = name;
    if (!detail::take(rest, "tq4") || (!rest.empty() && rest.front() != '-')) return std::nullopt;
    if (rest == "-peer") rest = "-cut-raw-haar";
    if (detail::take(rest, "-k")) {
      const std::optional<int> k_bits = detail::take_bits(rest);
      const bool has_v = k_bits && detail::take(rest, "v");
      const std::optional<int> v_bits = has_v ? detail::take_bits(rest) : std::nullopt;
      require(v_bits.has_value(), "cache '", name, "': the widths read k<bits>v<bits> with 2, 3 or 4 bits each, as in ",
              "tq4-k4v3; the grammar is ", kGrammar);
      format.options.k_bits = *k_bits;
      format.options.v_bits = *v_bits;
    }
    if (detail::take(rest, "-cut")) format.options.codebook = CodebookKind::kCutAtThreeSigma;
    if (detail::take(rest, "-raw")) format.options.norm = NormKind::kRaw;
    if (detail::take(rest, "-haar")) format.options.rotation = RotationKind::kDenseHaar;
    require(rest.empty(), "cache '", name, "': '", rest, "' is not understood here; the grammar is ", kGrammar);
    return format;
  }
  [[nodiscard]] std::string name() const {
    std::string name = "tq4";
    if (options.k_bits != 4 || options.v_bits != 4) name += concat("-k", options.k_bits, "v", options.v_bits);
    if (options.codebook == CodebookKind::kCutAtThreeSigma) name += "-cut";
    if (options.norm == NormKind::kRaw) name += "-raw";
    if (options.rotation == RotationKind::kDenseHaar) name += "-haar";
    return name;
  }
  [[nodiscard]] Tq4Format with_seed(std::uint64_t seed) const {
    Tq4Format seeded = *this;
    seeded.options.seed = seed;
    return seeded;
  }
  [[nodiscard]] static constexpr std::int64_t allocated_row_bytes(CacheSide /*side*/, std::int64_t head_dim) {
    return tq4_row_bytes(head_dim);
  }
  [[nodiscard]] static constexpr std::int64_t row_bytes(CacheSide side, std::int64_t head_dim) {
    return allocated_row_bytes(side, head_dim);
  }
  /// Dense, and its transpose, f32; signs alone take none.
  [[nodiscard]] constexpr std::int64_t rotation_bytes(std::int64_t head_dim) const {
    return options.rotation == RotationKind::kDenseHaar ? 2 * head_dim * head_dim * 4 : 0;
  }
  bool operator==(const Tq4Format&) const = default;
};

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "gemma4/error.hpp"
#include "gemma4/tq4_format.hpp"

/// The name of a cache format, as a command line takes it and a table column shows it.
///
///   f32 | bf16 | tq4[-k<bits>v<bits>][-cut][-raw][-haar]       bits is 2, 3 or 4; k4v4 is the default
///   tq4-peer = tq4-cut-raw-haar                                 the format of a peer
///
/// -cut: codebook of the density cut at three sigma; -raw: stored norm not corrected; -haar: dense Haar rotation. The
/// parts come in this order. The seed of the rotation is not part of the name.
namespace gemma4 {

enum class CacheKind { kF32, kBf16, kTq4 };

/// What the flat cache of the full-attention layers holds.
struct CacheSpec {
  CacheKind kind = CacheKind::kBf16;
  Tq4Options tq4;  ///< with kTq4 only
  bool operator==(const CacheSpec&) const = default;
};

inline constexpr std::string_view kCacheSpecGrammar =
    "f32 | bf16 | tq4[-k<bits>v<bits>][-cut][-raw][-haar] (bits 2 to 4) | tq4-peer";

namespace detail {

/// Removes `prefix` from the front of `text` if it is there, and tells whether it was.
constexpr bool take(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

/// The digit 2, 3 or 4 at the front of `text`, removed.
constexpr std::optional<int> take_bits(std::string_view& text) {
  if (text.empty() || text.front() < '2' || text.front() > '4') return std::nullopt;
  const int bits = text.front() - '0';
  text.remove_prefix(1);
  return bits;
}

}  // namespace detail

/// The spec that `name` stands for, seed 0. @throws std::invalid_argument naming what was not understood, and the
/// grammar
inline CacheSpec parse_cache_spec(std::string_view name) {
  if (name == "f32") return {CacheKind::kF32, {}};
  if (name == "bf16") return {CacheKind::kBf16, {}};
  CacheSpec spec{CacheKind::kTq4, {}};
  std::string_view rest = name;
  require(detail::take(rest, "tq4") && (rest.empty() || rest.front() == '-'), "cache '", name,
          "' is not one of: ", kCacheSpecGrammar);
  const std::string_view parts = rest == "-peer" ? "-cut-raw-haar" : rest;
  rest = parts;
  if (detail::take(rest, "-k")) {
    const std::optional<int> k_bits = detail::take_bits(rest);
    const bool has_v = k_bits && detail::take(rest, "v");
    const std::optional<int> v_bits = has_v ? detail::take_bits(rest) : std::nullopt;
    require(v_bits.has_value(), "cache '", name, "': the widths read k<bits>v<bits> with 2, 3 or 4 bits each, as in ",
            "tq4-k4v3; the grammar is ", kCacheSpecGrammar);
    spec.tq4.k_bits = *k_bits;
    spec.tq4.v_bits = *v_bits;
  }
  if (detail::take(rest, "-cut")) spec.tq4.codebook = CodebookKind::kCutAtThreeSigma;
  if (detail::take(rest, "-raw")) spec.tq4.norm = NormKind::kRaw;
  if (detail::take(rest, "-haar")) spec.tq4.rotation = RotationKind::kDenseHaar;
  require(rest.empty(), "cache '", name, "': '", rest, "' is not understood here; the grammar is ", kCacheSpecGrammar);
  return spec;
}

/// The name of a spec in the grammar above, without its seed: parse_cache_spec(to_string(spec)) == spec for seed 0.
inline std::string to_string(const CacheSpec& spec) {
  if (spec.kind == CacheKind::kF32) return "f32";
  if (spec.kind == CacheKind::kBf16) return "bf16";
  std::string name = "tq4";
  if (spec.tq4.k_bits != 4 || spec.tq4.v_bits != 4) name += concat("-k", spec.tq4.k_bits, "v", spec.tq4.v_bits);
  if (spec.tq4.codebook == CodebookKind::kCutAtThreeSigma) name += "-cut";
  if (spec.tq4.norm == NormKind::kRaw) name += "-raw";
  if (spec.tq4.rotation == RotationKind::kDenseHaar) name += "-haar";
  return name;
}

/// Bytes of one stored K or V vector of head_dim values. A TQ4 row takes 4 bits a value whatever its codebook's width.
[[nodiscard]] constexpr std::int64_t cache_row_bytes(CacheKind kind, std::int64_t head_dim) {
  switch (kind) {
    case CacheKind::kF32:
      return 4 * head_dim;
    case CacheKind::kBf16:
      return 2 * head_dim;
    case CacheKind::kTq4:
      return tq4_row_bytes(head_dim);
  }
  return 0;
}

}  // namespace gemma4

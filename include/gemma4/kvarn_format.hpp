// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "gemma4/cache_format.hpp"
#include "gemma4/cache_update.hpp"
#include "gemma4/error.hpp"

namespace gemma4 {

/// KVarN (L. K. Muller et al., arXiv:2606.03458), simulated, in the reference alone: scales of tokens and of channels
/// at once, for tiles of 128 tokens of a head.
///
///   sim-kvarn-k<bits>v<bits>       bits 2 to 8; the paper's choice is k4v2
///
/// A tile X [128, head_dim] is rotated (signed Hadamard along the channels) and divided by a scale of each token and of
/// each channel, t[i] and c[j], until both its rows and its columns have deviation 1: in turn, a column's scale takes
/// its deviation up, then a row's. The rest is rounded to the nearest of 2^bits equal steps between the least and the
/// largest value, of each channel for K and of each token for V:
///   read back: t[i] (low[j] + step[j] code)  for K,  c[j] (low[i] + step[i] code)  for V
/// where low and step have the other scale in them and all are bf16. Row: bits * head_dim / 8 bytes, and the scales of
/// a tile spread over its tokens.
///
/// What a tile needs is there when its last token is: until then its tokens are exact. A chunk goes in pieces of up to
/// 16 tokens that end where a tile does; the piece that completes one attends to it quantised.
struct KvarnFormat {
  int k_bits = 4;
  int v_bits = 2;
  std::uint64_t seed = 0;  ///< of the rotation, not part of the name
  bool operator==(const KvarnFormat&) const = default;

  static constexpr std::string_view kGrammar = "sim-kvarn-k<bits>v<bits> (reference)";
  static constexpr std::int64_t kTileTokens = 128, kRounds = 8, kPiece = 16;
  static constexpr std::int64_t kRecordTokens = 1, kRingValueBytes = 2;
  static constexpr bool kUnpacksForPrefill = false, kStoredByPrologue = true, kReadsKeysFromValues = false;

  [[nodiscard]] static std::string grammar() { return std::string(kGrammar); }
  [[nodiscard]] static std::optional<KvarnFormat> parse(std::string_view name) {
    if (!detail::take(name, "sim-kvarn-k")) return std::nullopt;
    const std::optional<int> k = detail::take_bits(name, '2', '8');
    if (!k || !detail::take(name, "v")) return std::nullopt;
    const std::optional<int> v = detail::take_bits(name, '2', '8');
    if (!v || !name.empty()) return std::nullopt;
    return KvarnFormat{.k_bits = *k, .v_bits = *v};
  }
  [[nodiscard]] std::string name() const { return concat("sim-kvarn-k", k_bits, "v", v_bits); }
  [[nodiscard]] KvarnFormat with_seed(std::uint64_t to) const { return {k_bits, v_bits, to}; }

  /// Of a token, a tile's scales shared out: low and step of each channel and a scale of each token for K, low and step
  /// of each token and a scale of each channel for V.
  [[nodiscard]] std::int64_t row_bytes(CacheSide side, std::int64_t head_dim) const {
    constexpr std::int64_t kScale = 2;
    const bool is_key = side == CacheSide::kKey;
    const std::int64_t codes = ((is_key ? k_bits : v_bits) * head_dim + 7) / 8;
    const std::int64_t a_tile = is_key ? 2 * head_dim + kTileTokens : 2 * kTileTokens + head_dim;
    return codes + (a_tile * kScale + kTileTokens - 1) / kTileTokens;
  }
  /// A tile that is not full, as bf16.
  [[nodiscard]] static constexpr std::int64_t exact_tokens() { return kTileTokens; }
  [[nodiscard]] static constexpr std::int64_t allocated_row_bytes(CacheSide /*side*/, std::int64_t head_dim) {
    return 2 * head_dim;
  }
  [[nodiscard]] static constexpr std::int64_t rotation_bytes(std::int64_t /*head_dim*/) { return 0; }
};

}  // namespace gemma4

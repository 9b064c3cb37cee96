// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "gemma4/float16.hpp"
#include "gemma4/quantisers/quantiser.hpp"

/// Recipe "add a simulated cache format": this file, and the name E4m3Token in the list of gemma4/quantisers.hpp.
namespace gemma4::recipes {

/// e4m3 (4 bits of exponent, 3 of fraction, largest 448) with a bf16 scale a token: sim-e4m3[-had].
struct E4m3Token {
  static constexpr std::string_view kGrammar = "e4m3";
  bool operator==(const E4m3Token&) const = default;
  [[nodiscard]] std::int64_t block_size(std::int64_t head_dim) const { return head_dim; }
  [[nodiscard]] std::int64_t row_bytes(CacheSide, std::int64_t head_dim) const { return head_dim + 2; }
  [[nodiscard]] std::string name() const { return "e4m3"; }
  [[nodiscard]] static std::optional<E4m3Token> parse(std::string_view stem) {
    return stem == "e4m3" ? std::optional(E4m3Token{}) : std::nullopt;
  }

  GEMMA4_HD void roundtrip(CacheSide, float* values, int n) const {
    const float scale = to_float(to_bf16(block_magnitude(values, n) / 448.0f));
    for (int i = 0; i < n; ++i) values[i] = scale == 0.0f ? 0.0f : scale * nearest(values[i] / scale);
  }

  /// Ties to even. Below 2^-6 the numbers are multiples of 2^-9, above they have 4 significant bits.
  [[nodiscard]] GEMMA4_HD static float nearest(float x) {
    if (fabsf(x) < 0x1p-6f) return rintf(x * 0x1p9f) * 0x1p-9f;
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    return bit_cast<float>((bits + 0x7FFFFu + ((bits >> 20) & 1u)) & 0xFFF00000u);
  }
};

}  // namespace gemma4::recipes

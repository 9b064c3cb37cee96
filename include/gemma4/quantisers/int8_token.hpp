// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "gemma4/cache_update.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/platform.hpp"
#include "gemma4/quantisers/quantiser.hpp"

namespace gemma4 {

/// int8 with a scale a token (one for each head's vector of it): scale = bf16(max|x| / 127), code = x / scale to the
/// nearest integer (ties to even) within +-127, read back as scale * code. The scale is bf16 because that has the range
/// of float: no vector overflows it. It is up to 2^-9 too small, which moves the largest value by a quarter of a step.
/// Row: head_dim bytes and the scale.
struct Int8Token {
  static constexpr std::string_view kGrammar = "int8";
  bool operator==(const Int8Token&) const = default;

  [[nodiscard]] std::int64_t block_size(std::int64_t head_dim) const { return head_dim; }

  GEMMA4_HD void roundtrip(CacheSide, float* values, int n) const {
    const float scale = to_float(to_bf16(block_magnitude(values, n) / 127.0f));
    for (int i = 0; i < n; ++i) {
      const float code = scale == 0.0f ? 0.0f : rintf(values[i] / scale);
      values[i] = scale * fminf(fmaxf(code, -127.0f), 127.0f);
    }
  }

  [[nodiscard]] std::int64_t row_bytes(CacheSide, std::int64_t head_dim) const {
    return head_dim + static_cast<std::int64_t>(sizeof(Bf16));
  }

  [[nodiscard]] std::string name() const { return "int8"; }
  [[nodiscard]] static std::optional<Int8Token> parse(std::string_view stem) {
    return stem == "int8" ? std::optional(Int8Token{}) : std::nullopt;
  }
};
static_assert(Quantiser<Int8Token>);

}  // namespace gemma4

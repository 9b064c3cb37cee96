// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "gemma4/cache_update.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/gguf/block_formats.hpp"
#include "gemma4/platform.hpp"
#include "gemma4/quantisers/quantiser.hpp"

/// Blocks of 32 values with an f16 scale, as llama.cpp stores a cache of q8_0 or q4_0 (ggml's quantize_row_q8_0_ref and
/// quantize_row_q4_0_ref). As there, codes are chosen for the scale in float and read back with the scale in f16, so
/// that a scale beyond 65504 reads back as infinity (NaN where the code is 0), and one below 2^-25 as zeros.
namespace gemma4 {

/// q8_0: d = max|x| / 127, code = round(x / d), ties away from zero. 34 bytes a block.
struct Q80Cache {
  static constexpr std::string_view kGrammar = "q8_0";
  bool operator==(const Q80Cache&) const = default;

  [[nodiscard]] std::int64_t block_size(std::int64_t) const { return Q80Block::kSize; }

  GEMMA4_HD void roundtrip(CacheSide, float* values, int n) const {
    const float d = block_magnitude(values, n) / 127.0f, stored = to_float(to_f16(d));
    // product(), because a library may round by adding a half. A d below the smallest f16 may have no finite inverse,
    // and its codes are not seen.
    const float inverse = stored == 0.0f ? 0.0f : 1.0f / d;
    for (int i = 0; i < n; ++i) values[i] = stored * roundf(product(values[i], inverse));
  }

  [[nodiscard]] std::int64_t row_bytes(CacheSide, std::int64_t head_dim) const {
    return head_dim / Q80Block::kSize * static_cast<std::int64_t>(sizeof(Q80Block));
  }

  [[nodiscard]] std::string name() const { return "q8_0"; }
  [[nodiscard]] static std::optional<Q80Cache> parse(std::string_view stem) {
    return stem == "q8_0" ? std::optional(Q80Cache{}) : std::nullopt;
  }
};
static_assert(Quantiser<Q80Cache>);

/// q4_0: d = m / -8 for the value m of the largest magnitude (the first of equals), which so gets the code 0 of 0 to
/// 15; code = min(15, trunc(x / d + 8.5)), read back as d * (code - 8). 18 bytes a block.
struct Q40Cache {
  static constexpr std::string_view kGrammar = "q4_0";
  static constexpr std::int64_t kBlockSize = 32, kBlockBytes = 18;
  bool operator==(const Q40Cache&) const = default;

  [[nodiscard]] std::int64_t block_size(std::int64_t) const { return kBlockSize; }

  GEMMA4_HD void roundtrip(CacheSide, float* values, int n) const {
    float largest = 0.0f;
    for (int i = 0; i < n; ++i) largest = fabsf(values[i]) > fabsf(largest) ? values[i] : largest;
    const float d = largest / -8.0f, stored = to_float(to_f16(d));
    const float inverse = stored == 0.0f ? 0.0f : 1.0f / d;
    for (int i = 0; i < n; ++i) {
      // Two roundings, as in ggml built without fused multiply-add: the fused sum turns a tie.
      const float code = truncf(product(values[i], inverse) + 8.5f);
      values[i] = stored * (fminf(code, 15.0f) - 8.0f);
    }
  }

  [[nodiscard]] std::int64_t row_bytes(CacheSide, std::int64_t head_dim) const {
    return head_dim / kBlockSize * kBlockBytes;
  }

  [[nodiscard]] std::string name() const { return "q4_0"; }
  [[nodiscard]] static std::optional<Q40Cache> parse(std::string_view stem) {
    return stem == "q4_0" ? std::optional(Q40Cache{}) : std::nullopt;
  }
};
static_assert(Quantiser<Q40Cache>);

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "gemma4/cache_update.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/platform.hpp"
#include "gemma4/quantisers/quantiser.hpp"
#include "gemma4/quantisers/unit_codebook.hpp"

namespace gemma4 {

/// The construction of TQ4 (tq4_format.hpp) with 2 to 8 bits for K and for V apart: a code for each value from the
/// Lloyd-Max table of N(0, 1/head_dim), and one norm for the vector, corrected, in bf16.
///   y = x sqrt(head_dim) / |x|,  level[i] = nearest(y[i]),  norm = bf16(|x| / |c|) for c = level / sqrt(head_dim)
///   read back: norm * c
/// With the Hadamard rotation and 2 to 4 bits it is what a TQ4 cache of the default options reads back, within
/// rounding: TQ4 divides by |x| before it rotates, this after. Row: ceil(bits * head_dim / 8) bytes and the norm.
struct ScalarCodes {
  static constexpr std::string_view kGrammar = "k<bits>v<bits>";
  int k_bits = 0;
  int v_bits = 0;
  UnitCodebook k_table;
  UnitCodebook v_table;
  bool operator==(const ScalarCodes&) const = default;

  /// @throws std::invalid_argument unless both widths are 2 to 8 bits
  [[nodiscard]] static ScalarCodes make(int k_bits, int v_bits) {
    return {k_bits, v_bits, solve_unit_codebook(k_bits), solve_unit_codebook(v_bits)};
  }

  [[nodiscard]] std::int64_t block_size(std::int64_t head_dim) const { return head_dim; }

  GEMMA4_HD void roundtrip(CacheSide side, float* values, int n) const {
    const UnitCodebook& table = side == CacheSide::kKey ? k_table : v_table;
    double squares = 0.0;
    for (int i = 0; i < n; ++i) squares += static_cast<double>(values[i]) * static_cast<double>(values[i]);  // exact
    const double length = sqrt(squares), root = sqrt(static_cast<double>(n));
    const double to_unit = length == 0.0 ? 0.0 : root / length;
    double level_squares = 0.0;
    for (int i = 0; i < n; ++i) {
      values[i] = table.nearest(static_cast<float>(static_cast<double>(values[i]) * to_unit));
      level_squares += static_cast<double>(values[i]) * static_cast<double>(values[i]);  // exact
    }
    const float norm = to_float(to_bf16(static_cast<float>(length * root / sqrt(level_squares))));
    const double sigma = 1.0 / root;
    for (int i = 0; i < n; ++i) {
      values[i] = norm * static_cast<float>(static_cast<double>(values[i]) * sigma);
    }
  }

  [[nodiscard]] std::int64_t row_bytes(CacheSide side, std::int64_t head_dim) const {
    const int bits = side == CacheSide::kKey ? k_bits : v_bits;
    return (bits * head_dim + 7) / 8 + static_cast<std::int64_t>(sizeof(Bf16));
  }

  [[nodiscard]] std::string name() const { return concat('k', k_bits, 'v', v_bits); }
  [[nodiscard]] static std::optional<ScalarCodes> parse(std::string_view stem) {
    const auto width = [](char digit) { return digit >= '2' && digit <= '8' ? digit - '0' : 0; };
    if (stem.size() != 4 || stem[0] != 'k' || stem[2] != 'v') return std::nullopt;
    const int k_bits = width(stem[1]), v_bits = width(stem[3]);
    if (k_bits == 0 || v_bits == 0) return std::nullopt;
    return make(k_bits, v_bits);
  }
};
static_assert(Quantiser<ScalarCodes>);

}  // namespace gemma4

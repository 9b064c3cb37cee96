// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <vector>

#include "gemma4/float16.hpp"
#include "gemma4/gguf/block_dequantise.hpp"
#include "tests/support/random_weights.hpp"

/// What products with quantised weights are held to: magnitudes from which error bounds follow.
namespace gemma4::testkit {

/// Decoded weights, and for each the sum of the magnitudes of which the format makes it: |d s q| + |dmin m|.
struct DequantisedWeights {
  std::vector<float> value, parts;  ///< [rows, cols]
};

/// Where a block holds the f16 step of its minima, or its one offset; nothing for the types without.
[[nodiscard]] inline std::optional<std::size_t> place_of_minimum(TensorType type) {
  switch (type) {
    case TensorType::kQ4_1:
    case TensorType::kQ5_1:
    case TensorType::kQ4K:
    case TensorType::kQ5K:
      return 2;
    case TensorType::kQ2K:
      return 82;
    default:
      return std::nullopt;
  }
}

/// Where a block holds the f16 step of its codes or scales.
[[nodiscard]] inline std::size_t place_of_step(TensorType type) {
  switch (type) {
    case TensorType::kQ6K:
      return 208;
    case TensorType::kQ3K:
      return 108;
    case TensorType::kQ2K:
      return 80;
    default:
      return 0;
  }
}

[[nodiscard]] inline DequantisedWeights dequantise_with_parts(const OwnedMatrix& matrix) {
  const auto size = static_cast<std::size_t>(matrix.rows * matrix.cols);
  DequantisedWeights weights{std::vector<float>(size), std::vector<float>(size)};
  dequantise_row(matrix.type, matrix.bytes, weights.value);
  if (const std::optional<std::size_t> at_min = place_of_minimum(matrix.type)) {
    std::vector<std::byte> without_min = matrix.bytes;
    const auto step = static_cast<std::size_t>(block_bytes(matrix.type));
    for (std::size_t at = *at_min; at < without_min.size(); at += step) without_min[at] = without_min[at + 1] = {};
    dequantise_row(matrix.type, without_min, weights.parts);
    for (std::size_t i = 0; i < size; ++i) {
      weights.parts[i] = std::abs(weights.parts[i]) + std::abs(weights.parts[i] - weights.value[i]);
    }
  } else {
    for (std::size_t i = 0; i < size; ++i) weights.parts[i] = std::abs(weights.value[i]);
  }
  return weights;
}

/// Normal values, rounded to bf16 so that both storage types hold them.
[[nodiscard]] inline std::vector<float> random_activations(std::int64_t count, std::uint32_t seed, float scale = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& value : x) value = to_float(to_bf16(normal(random)));
  return x;
}

/// Step of the activation block that index k of a row lies in, for codes from -levels to levels.
[[nodiscard]] inline double block_step(std::span<const float> x, std::size_t k, int levels) {
  double largest = 0;
  for (std::size_t i = k / 32 * 32; i < std::min(x.size(), k / 32 * 32 + 32); ++i) {
    largest = std::max(largest, static_cast<double>(std::abs(x[i])));
  }
  return largest / levels;
}

/// Row x with every block of 32 rounded to multiples of its step.
[[nodiscard]] inline std::vector<float> rounded_in_blocks(std::span<const float> x, int levels) {
  std::vector<float> rounded(x.begin(), x.end());
  for (std::size_t k = 0; k < x.size(); ++k) {
    const double step = block_step(x, k, levels);
    if (step > 0) rounded[k] = static_cast<float>(step * std::nearbyint(static_cast<double>(x[k]) / step));
  }
  return rounded;
}

/// Bounds of |out - exact| for one row of activations.
struct LinearBound {
  std::vector<double> certain;  ///< every rounding at its worst: sum s / 2 |w|
  std::vector<double> likely;   ///< independent roundings: 4 sqrt(sum s^2 w^2), missed once in 4e13 (Hoeffding)
};

/// @param eight_bit whether the activations are rounded to 8 bits (packed weights), or not at all
/// Float rounding: a lane's term has at most 6 roundings, the tree over the lanes 5, then one addition for each 32
/// groups of the row (1 and K / 32 for the plain types' chain).
[[nodiscard]] inline LinearBound linear_bound(std::span<const float> x, const DequantisedWeights& weights,
                                              bool eight_bit) {
  const std::size_t cols = x.size(), rows = weights.value.size() / cols;
  const double n_rounding = 12.0 + static_cast<double>(cols) / (eight_bit ? 1024.0 : 32.0);
  std::vector<double> step(cols);
  for (std::size_t k = 0; k < cols; ++k) step[k] = eight_bit ? block_step(x, k, 127) : 0.0;
  LinearBound bound;
  for (std::size_t n = 0; n < rows; ++n) {
    double certain = 0, squares = 0, magnitude = 0, tiny = 0;
    for (std::size_t k = 0; k < cols; ++k) {
      const double w = std::abs(static_cast<double>(weights.value[n * cols + k]));
      const double parts = static_cast<double>(weights.parts[n * cols + k]);
      certain += 0.50005 * step[k] * w;  // step and code are computed in float: 127 * 3 * 2^-23 beyond a half
      squares += step[k] * step[k] * w * w;
      magnitude += parts * (std::abs(static_cast<double>(x[k])) + step[k]);
      tiny += parts * 0x1p-110;  // blocks below it become zero
    }
    const double rounding = n_rounding * 0x1p-24 * magnitude + (eight_bit ? tiny : 0.0) + 0x1p-120;
    bound.certain.push_back(certain + rounding);
    bound.likely.push_back(4.0 * std::sqrt(squares) + rounding);
  }
  return bound;
}

}  // namespace gemma4::testkit

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <span>

#include "gemma4/error.hpp"

namespace gemma4 {

/// How far a vector is from another: its direction, and its length of error.
struct VectorComparison {
  double cosine = 1;          ///< 1 for two zero vectors
  double relative_error = 0;  ///< |actual - expected| / |expected|
};

/// @throws std::invalid_argument when the lengths differ
[[nodiscard]] inline VectorComparison compare_vectors(std::span<const float> actual, std::span<const float> expected) {
  require(actual.size() == expected.size(), "compare_vectors: ", actual.size(), " values against ", expected.size());
  double dot = 0, actual_square = 0, expected_square = 0, error_square = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const auto a = static_cast<double>(actual[i]), e = static_cast<double>(expected[i]);
    dot += a * e;
    actual_square += a * a;
    expected_square += e * e;
    error_square += (a - e) * (a - e);
  }
  if (error_square == 0) return {};
  return {.cosine = dot / std::sqrt(actual_square * expected_square),
          .relative_error = std::sqrt(error_square / expected_square)};
}

/// Field by field the worse of two; what is no number is worse than any.
[[nodiscard]] inline VectorComparison worse(const VectorComparison& a, const VectorComparison& b) {
  return {.cosine = a.cosine <= b.cosine || std::isnan(a.cosine) ? a.cosine : b.cosine,
          .relative_error = a.relative_error >= b.relative_error || std::isnan(a.relative_error) ? a.relative_error
                                                                                                 : b.relative_error};
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "gemma4/quantisers/quantiser.hpp"
#include "gemma4/rotation.hpp"

/// What the tests of quantisers draw and compare.
namespace gemma4::testkit {

[[nodiscard]] inline std::vector<float> normal_values(std::uint64_t seed, std::int64_t count, float scale = 1.0f) {
  std::vector<float> values;
  for (const double x : haar_gaussians(seed, count)) values.push_back(scale * static_cast<float>(x));
  return values;
}

[[nodiscard]] inline double length_of(const std::vector<float>& x) {
  double squares = 0.0;
  for (const float value : x) squares += static_cast<double>(value) * value;
  return std::sqrt(squares);
}

[[nodiscard]] inline double relative_error(const std::vector<float>& actual, const std::vector<float>& expected) {
  std::vector<float> difference(actual.size());
  for (std::size_t i = 0; i < actual.size(); ++i) difference[i] = actual[i] - expected[i];
  return length_of(difference) / length_of(expected);
}

/// A whole vector, block by block.
template <class TQuantiser>
[[nodiscard]] std::vector<float> roundtrip(const TQuantiser& quantiser, CacheSide side, std::vector<float> x) {
  const auto block = quantiser.block_size(static_cast<std::int64_t>(x.size()));
  for (std::size_t at = 0; at < x.size(); at += static_cast<std::size_t>(block)) {
    roundtrip_block(quantiser, side, &x[at], static_cast<int>(block));
  }
  return x;
}

}  // namespace gemma4::testkit

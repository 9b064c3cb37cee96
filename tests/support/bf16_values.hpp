// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

#include "gemma4/float16.hpp"

/// What tests of bf16 kernels do with whole arrays.
namespace gemma4::testkit {

[[nodiscard]] inline std::vector<Bf16> narrow(std::span<const float> values) {
  std::vector<Bf16> out(values.size());
  std::transform(values.begin(), values.end(), out.begin(), [](float value) { return to_bf16(value); });
  return out;
}

[[nodiscard]] inline std::vector<float> widen(std::span<const Bf16> values) {
  std::vector<float> out(values.size());
  std::transform(values.begin(), values.end(), out.begin(), [](Bf16 value) { return to_float(value); });
  return out;
}

/// a b / (|a| |b|) over all elements, in double.
template <class T, class TOther>
[[nodiscard]] double cosine(const std::vector<T>& a, const std::vector<TOther>& b) {
  double ab = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const auto x = static_cast<double>(a[i]), y = static_cast<double>(b[i]);
    ab += x * y, aa += x * x, bb += y * y;
  }
  return ab / std::sqrt(aa * bb);
}

}  // namespace gemma4::testkit

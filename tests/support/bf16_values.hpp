// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
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

/// How many values differ in their bits, and where the first is.
[[nodiscard]] inline testing::AssertionResult same_bits(const std::vector<Bf16>& found,
                                                        const std::vector<Bf16>& expected) {
  if (found.size() != expected.size()) {
    return testing::AssertionFailure() << found.size() << " values, not " << expected.size();
  }
  std::int64_t n_different = 0, first = -1;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (found[i].bits == expected[i].bits) continue;
    if (n_different++ == 0) first = static_cast<std::int64_t>(i);
  }
  if (n_different == 0) return testing::AssertionSuccess();
  const auto at = static_cast<std::size_t>(first);
  return testing::AssertionFailure() << n_different << " of " << expected.size() << " values differ, the first, "
                                     << first << ", is " << to_float(found[at]) << " instead of "
                                     << to_float(expected[at]);
}

}  // namespace gemma4::testkit

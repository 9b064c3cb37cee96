// SPDX-License-Identifier: Apache-2.0
#include "gemma4/attention_bound.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/close.hpp"

/// A bound that is too wide lets every fault through, so its size is asserted too: the formula with figures in which
/// every term counts, worked out by hand. What it must grow with is in attention_contract_test.cpp.
namespace {

using namespace gemma4;

TEST(AttentionBound, IsTheFormulaTermByTerm) {
  const AttentionRounding all{.unit = 1e-3,
                              .weight_unit = 1e-2,
                              .output_unit = 1e-3,
                              .longest_sum = 10,
                              .n_rescale = 2,
                              .rotation_roundings = 5};
  // d = 1e-3 ((64 + 6 + 5) 3 + 5 (2 + 1)) + 1e-2 = 0.25; sums 2e-3 (10 + 2) + 5e-3; V = 2.
  EXPECT_TRUE(testkit::close(attention_bound(all, 64, 3.0, 2.0), 2 * (std::expm1(0.5) + 0.029 + 0.001), 1e-12));
  // Float and one block of keys: d = u (70 S + 10), so 2 u (70 S + 10) + 2 u 3 to first order.
  const double float_bound = 2 * 0x1p-24 * (70 * 3 + 10) + 2 * 0x1p-24 * 3;
  EXPECT_TRUE(testkit::close(attention_bound({}, 64, 3.0, 1.0), float_bound, 1e-4 * float_bound));
  EXPECT_LT(attention_bound({}, 512, 10.0, 1.0), 1e-3) << "far below what a wrong key does";
}

}  // namespace

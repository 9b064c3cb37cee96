// SPDX-License-Identifier: Apache-2.0
#include "reference/lm_head.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/random_matrix.hpp"
#include "tests/support/random_weights.hpp"

namespace {

using namespace gemma4;
using reference::Matrix;

RC_GTEST_PROP(LmHead, IsTheCappedProductWithTheTable, ()) {
  const auto table = testkit::random_weights(TensorType::kQ6K, *rc::gen::inRange<std::int64_t>(1, 200), 256,
                                             *rc::gen::arbitrary<std::uint32_t>());
  const Matrix<double> x =
      testkit::random_matrix<double>(*rc::gen::arbitrary<std::uint64_t>(), 2, 256) * *rc::gen::element(0.1, 1.0, 10.0);
  Matrix<double> raw(2, table.rows), logits(2, table.rows);
  reference::quantized_linear<double>(x, table.view(), raw);
  reference::lm_head<double>(x, table.view(), 30.0f, logits);
  std::vector<double> expected;
  for (Eigen::Index i = 0; i < raw.size(); ++i) expected.push_back(30.0 * std::tanh(raw.data()[i] / 30.0));
  testkit::rc_require(testkit::close(std::span(logits.data(), expected.size()), expected, 1e-12));
  RC_ASSERT(logits.cwiseAbs().maxCoeff() <= 30.0);
}

TEST(LmHead, TheCapShows) {  // the control: uncapped logits are not within the cap
  const auto table = testkit::random_weights(TensorType::kF32, 16, 256, 5);
  const Matrix<double> x = testkit::random_matrix<double>(6, 1, 256) * 20;
  Matrix<double> raw(1, 16);
  reference::quantized_linear<double>(x, table.view(), raw);
  EXPECT_GT(raw.cwiseAbs().maxCoeff(), 30.0);
}

TEST(LmHead, RefusesACapThatIsNotPositive) {
  const auto table = testkit::random_weights(TensorType::kF32, 4, 256, 5);
  Matrix<float> x = Matrix<float>::Zero(1, 256), logits(1, 4);
  EXPECT_THROW(reference::lm_head<float>(x, table.view(), 0.0f, logits), std::invalid_argument);
}

}  // namespace

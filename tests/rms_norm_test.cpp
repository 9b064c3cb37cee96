// SPDX-License-Identifier: Apache-2.0
#include "reference/rms_norm.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/random_matrix.hpp"

namespace {

using namespace gemma4;
using reference::Matrix;

std::vector<double> flat(const Matrix<double>& m) {
  return {m.data(), m.data() + m.size()};
}

Matrix<double> any_matrix(Eigen::Index rows, Eigen::Index cols) {
  return testkit::random_matrix<double>(*rc::gen::arbitrary<std::uint64_t>(), rows, cols);
}

RC_GTEST_PROP(RmsNorm, OutputHasUnitMeanSquareWithoutWeight, ()) {
  const auto width = *rc::gen::inRange(1, 600);
  const Matrix<double> x = any_matrix(3, width) * 10.0 + Matrix<double>::Constant(3, width, 0.5);
  Matrix<double> out(3, width);
  reference::rms_norm<double>(x, {}, 1e-12f, out);
  for (Eigen::Index row = 0; row < 3; ++row) {
    if (x.row(row).squaredNorm() / width < 1e-6) continue;  // epsilon would show
    testkit::rc_require(testkit::close(out.row(row).squaredNorm() / width, 1.0, 2e-6));
  }
}

RC_GTEST_PROP(RmsNorm, ScaleOfTheInputCancelsAndWeightMultiplies, ()) {
  const auto width = *rc::gen::inRange(1, 300);
  const Matrix<double> x = any_matrix(2, width) + Matrix<double>::Constant(2, width, 2.0);
  std::vector<float> weight(static_cast<std::size_t>(width));
  for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = 0.25f * static_cast<float>(i % 9) - 1.0f;
  Matrix<double> plain(2, width), scaled(2, width);
  reference::rms_norm<double>(x, {}, 1e-30f, plain);
  reference::rms_norm<double>(x * 8.0, weight, 1e-30f, scaled);
  for (Eigen::Index i = 0; i < width; ++i) plain.col(i) *= static_cast<double>(weight[static_cast<std::size_t>(i)]);
  testkit::rc_require(testkit::close(flat(scaled), flat(plain), 1e-12));
}

TEST(RmsNorm, KnownValues) {
  Matrix<double> x(1, 4);
  x << 1, -2, 3, -4;  // mean square 7.5
  const std::vector<float> weight = {1, 1, 2, 0.5f};
  Matrix<double> out(1, 4);
  reference::rms_norm<double>(x, weight, 0.5f, out);  // divisor sqrt(8)
  const double s = 1 / std::sqrt(8.0);
  EXPECT_TRUE(testkit::close(flat(out), std::vector<double>{s, -2 * s, 6 * s, -2 * s}, 1e-15));
  // The family's earlier models multiply by 1 + weight: that must not pass.
  EXPECT_FALSE(testkit::close(flat(out), std::vector<double>{2 * s, -4 * s, 9 * s, -6 * s}, 1e-3));
}

TEST(RmsNorm, HeadsAreNormalisedApart) {
  Matrix<double> x(1, 4);
  x << 3, 4, 300, 400;
  auto heads = reference::as_heads(x, 2);
  reference::rms_norm<double>(heads, {}, 1e-30f, heads);
  EXPECT_TRUE(testkit::close(x(0, 0), x(0, 2), 1e-12)) << "two heads of the same direction become equal";
  EXPECT_TRUE(testkit::close(x.squaredNorm(), 4.0, 1e-12));
}

TEST(RmsNorm, ZeroRowStaysZero) {
  Matrix<float> x = Matrix<float>::Zero(2, 8);
  reference::rms_norm<float>(x, {}, 1e-6f, x);
  EXPECT_EQ(x.cwiseAbs().maxCoeff(), 0.0f);
}

TEST(RmsNorm, RefusesAWeightOfAnotherWidth) {
  Matrix<float> x = Matrix<float>::Ones(1, 8), out(1, 8);
  const std::vector<float> weight(7, 1.0f);
  EXPECT_THROW(
      try { reference::rms_norm<float>(x, weight, 1e-6f, out); } catch (const std::invalid_argument& error) {
        EXPECT_NE(std::string(error.what()).find("weight has 7 values, x has width 8"), std::string::npos);
        throw;
      },
      std::invalid_argument);
}

}  // namespace

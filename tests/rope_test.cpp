// SPDX-License-Identifier: Apache-2.0
#include "reference/rope.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <cstdint>
#include <vector>

#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/random_matrix.hpp"

namespace {

using namespace gemma4;
using reference::Matrix;

constexpr std::int64_t kLastPosition = 262143;

std::vector<double> flat(const Matrix<double>& m) {
  return {m.data(), m.data() + m.size()};
}

Matrix<double> any_matrix(Eigen::Index rows, Eigen::Index cols) {
  return testkit::random_matrix<double>(*rc::gen::arbitrary<std::uint64_t>(), rows, cols);
}

AttentionConfig any_attention() {
  const bool full = *rc::gen::arbitrary<bool>();
  const std::int64_t head_dim = *rc::gen::element(64, 128, 256, 512);
  return {.head_dim = head_dim,
          .n_head_kv = 1,
          .rope_theta = full ? 1e6 : 1e4,
          .rope_pairs = full ? head_dim / 8 : head_dim / 2};
}

/// The definition, one pair at a time, in complex numbers: (a + ib) e^{i angle}.
Matrix<double> by_definition(const Matrix<double>& x, std::int64_t position, const AttentionConfig& attention) {
  Matrix<double> out = x;
  const std::int64_t half = attention.head_dim / 2;
  for (Eigen::Index t = 0; t < x.rows(); ++t) {
    for (Eigen::Index head = 0; head < x.cols(); head += attention.head_dim) {
      for (std::int64_t i = 0; i < attention.rope_pairs; ++i) {
        const double frequency = std::exp(-2.0 * static_cast<double>(i) / static_cast<double>(attention.head_dim) *
                                          std::log(attention.rope_theta));
        const auto turned = std::complex<double>(x(t, head + i), x(t, head + i + half)) *
                            std::polar(1.0, frequency * static_cast<double>(position + t));
        out(t, head + i) = turned.real();
        out(t, head + i + half) = turned.imag();
      }
    }
  }
  return out;
}

RC_GTEST_PROP(Rope, EqualsTheDefinitionAtEveryPosition, ()) {
  const AttentionConfig attention = any_attention();
  const std::int64_t position = *rc::gen::inRange<std::int64_t>(0, kLastPosition + 1);
  Matrix<double> x = any_matrix(3, 2 * attention.head_dim);
  const Matrix<double> expected = by_definition(x, position, attention);
  reference::rope<double>(x, position, attention);
  // pow and exp(log) differ by an ulp or two of the frequency, times the angle: 2.6e5 * 4e-16, on values up to sqrt(2).
  testkit::rc_require(testkit::close(flat(x), flat(expected), 1e-9));
}

RC_GTEST_PROP(Rope, ScoresDependOnTheDistanceAlone, ()) {
  const AttentionConfig attention = any_attention();
  const std::int64_t position = *rc::gen::inRange<std::int64_t>(0, kLastPosition - 4000);
  const std::int64_t shift = *rc::gen::inRange<std::int64_t>(1, 2000);
  const Matrix<double> q = any_matrix(1, attention.head_dim), k = any_matrix(1, attention.head_dim);
  const auto score = [&](std::int64_t q_position, std::int64_t k_position) {
    Matrix<double> a = q, b = k;
    reference::rope<double>(a, q_position, attention);
    reference::rope<double>(b, k_position, attention);
    return a.row(0).dot(b.row(0));
  };
  testkit::rc_require(
      testkit::close(score(position + 7, position), score(position + shift + 7, position + shift), 1e-7));
}

TEST(Rope, AnotherDistanceGivesAnotherScore) {  // the control of the property above
  const AttentionConfig attention{.head_dim = 64, .n_head_kv = 1, .rope_theta = 1e4, .rope_pairs = 32};
  Matrix<double> q = Matrix<double>::Ones(1, 64), k = q;
  reference::rope<double>(q, 107, attention);
  reference::rope<double>(k, 100, attention);
  const double near = q.row(0).dot(k.row(0));
  Matrix<double> k2 = Matrix<double>::Ones(1, 64);
  reference::rope<double>(k2, 99, attention);
  EXPECT_FALSE(testkit::close(q.row(0).dot(k2.row(0)), near, 1e-2));
}

RC_GTEST_PROP(Rope, FloatStaysWithinItsRoundingAtTheLastPosition, ()) {
  const AttentionConfig attention = any_attention();
  const Matrix<double> x = any_matrix(1, attention.head_dim);
  Matrix<double> expected = x.cast<float>().cast<double>();
  reference::rope<double>(expected, kLastPosition, attention);
  Matrix<float> actual = x.cast<float>();
  reference::rope<float>(actual, kLastPosition, attention);
  // cos and sin rounded once each, two products and a sum: 4 half-ulps on values up to sqrt(2). A float angle would
  // miss by 2.6e5 * 6e-8 = 0.016.
  testkit::rc_require(testkit::close(flat(actual.cast<double>()), flat(expected), 4 * 0x1p-24 * 1.5));
}

TEST(Rope, PartialRotationLeavesTheRestUntouched) {
  const AttentionConfig full = gemma4_31b().full;
  Matrix<double> x = testkit::random_matrix<double>(1, 2, full.head_dim);
  const Matrix<double> before = x;
  reference::rope<double>(x, 5000, full);
  const Eigen::Index half = full.head_dim / 2, pairs = full.rope_pairs;
  EXPECT_EQ(x.middleCols(pairs, half - pairs), before.middleCols(pairs, half - pairs));
  EXPECT_EQ(x.rightCols(half - pairs), before.rightCols(half - pairs));
  EXPECT_NE(x.leftCols(pairs), before.leftCols(pairs));
  EXPECT_NE(x.middleCols(half, pairs), before.middleCols(half, pairs));
}

TEST(Rope, PositionZeroIsTheIdentity) {
  Matrix<double> x = testkit::random_matrix<double>(2, 1, 256);
  const Matrix<double> before = x;
  reference::rope<double>(x, 0, gemma4_31b().sliding);
  EXPECT_EQ(x, before);
}

TEST(Rope, RefusesAWidthThatIsNoWholeNumberOfHeads) {
  Matrix<double> x = Matrix<double>::Zero(1, 300);
  EXPECT_THROW(reference::rope<double>(x, 0, gemma4_31b().sliding), std::invalid_argument);
}

}  // namespace

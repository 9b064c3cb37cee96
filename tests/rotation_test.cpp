// SPDX-License-Identifier: Apache-2.0
#include "reference/rotation.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/close.hpp"
#include "tests/support/property.hpp"

namespace {

using namespace gemma4;
using reference::Matrix;
using reference::Rotation;
using testkit::close;
using testkit::rc_require;

constexpr double kFloatUnit = 0x1p-24;  // half a unit in the last place of 1

template <class Scalar>
std::vector<Scalar> flat(const Matrix<Scalar>& m) {
  return {m.data(), m.data() + m.size()};
}

Matrix<double> normal_rows(std::uint64_t seed, Eigen::Index rows, Eigen::Index cols) {
  const std::vector<double> values = haar_gaussians(seed, rows * cols);
  return Eigen::Map<const Matrix<double>>(values.data(), rows, cols);
}

/// R itself, row-major: R applied to the unit vectors gives its columns as rows.
template <class Scalar>
Matrix<Scalar> matrix_of(const Rotation<Scalar>& rotation) {
  Matrix<Scalar> units = Matrix<Scalar>::Identity(rotation.head_dim(), rotation.head_dim());
  rotation.forward(units);
  return units.transpose();
}

RotationKind any_kind() {
  return *rc::gen::element(RotationKind::kSignedHadamard, RotationKind::kDenseHaar);
}
/// Dense matrices of 256 and 512 cost 10 and 70 ms to draw, so they come seldom.
std::int64_t any_head_dim(RotationKind kind) {
  const std::size_t seldom = kind == RotationKind::kDenseHaar ? 1 : 20;
  return *rc::gen::weightedElement<std::int64_t>({{20, 64}, {20, 128}, {seldom, 256}, {seldom, 512}});
}

/// Bound of |error|, relative to |x|, of one float application. Butterflies: log2 D levels of additions, one product
/// with the sign and one with a rounded scale, each within one rounding of a vector whose length is kept. Dense: D
/// products and additions a coordinate, |R_row| |x| = |x|, and the rounded entries of R (one more).
double application_error(RotationKind kind, std::int64_t head_dim) {
  const auto width = static_cast<double>(head_dim);
  return kFloatUnit * (kind == RotationKind::kSignedHadamard ? std::log2(width) + 3.0 : width + 1.0);
}

TEST(Rotation, WordsAreThoseOfSplitMix64) {
  // The published first outputs of SplitMix64 seeded with 1234567.
  constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15u;
  EXPECT_EQ(mix_bits(1234567 + kGolden), 6457827717110365317u);
  EXPECT_EQ(mix_bits(1234567 + 2 * kGolden), 3203168211198807973u);
}

TEST(Rotation, SeedsKeepTheirMeaning) {
  // Frozen: a cache written today must be read tomorrow, and on the other side.
  EXPECT_EQ(random_word(42, RandomStream::kHadamardSigns, 0), 0x57e1faba65107204u);
  EXPECT_EQ(random_word(42, RandomStream::kHaarGaussians, 0), 0xfc991bca1a1aa1aeu);
  const auto pattern = [](std::uint64_t seed) {
    std::string text;
    for (const int sign : hadamard_signs(seed, 64)) text += sign < 0 ? '-' : '+';
    return text;
  };
  EXPECT_EQ(pattern(0), "--+--+-++-+++--+---+------++++++++---+++-+---+++++-+-+-+++-+--++");
  EXPECT_EQ(pattern(1), "+-+-+--+++--+--+--++-+--++--++-+--+-++++--+-+---+---+-+-+++++++-");
  const double normals[] = {-0.058934594984266404, 0.15258565579227662, -0.46391455073710047, -1.0697009635541599,
                            -0.75023738208926427,  0.71844404189566047, -0.56875243343966475, 0.42725078745550116};
  EXPECT_TRUE(close(haar_gaussians(42, 8), normals, 1e-14));
}

TEST(Rotation, GaussiansHaveTheMomentsOfTheNormal) {
  constexpr int kCount = 1 << 18;
  double moment[5] = {};
  for (const double x : haar_gaussians(5, kCount)) {
    for (int power = 1; power <= 4; ++power) moment[power] += std::pow(x, power) / kCount;
  }
  // Five standard errors: the variances of x, x^2, x^3, x^4 are 1, 2, 15, 96.
  EXPECT_TRUE(close(moment[1], 0.0, 5.0 * std::sqrt(1.0 / kCount)));
  EXPECT_TRUE(close(moment[2], 1.0, 5.0 * std::sqrt(2.0 / kCount)));
  EXPECT_TRUE(close(moment[3], 0.0, 5.0 * std::sqrt(15.0 / kCount)));
  EXPECT_TRUE(close(moment[4], 3.0, 5.0 * std::sqrt(96.0 / kCount)));
}

TEST(Rotation, HadamardIsHTimesTheSigns) {
  for (const std::int64_t head_dim : {64, 512}) {
    const auto signs = hadamard_signs(9, head_dim);
    const double scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
    Matrix<double> expected(head_dim, head_dim), unsigned_h(head_dim, head_dim);
    for (std::int64_t i = 0; i < head_dim; ++i) {
      for (std::int64_t j = 0; j < head_dim; ++j) {
        const bool odd = std::popcount(static_cast<std::uint64_t>(i & j)) % 2 == 1;
        unsigned_h(i, j) = odd ? -scale : scale;
        expected(i, j) = signs[static_cast<std::size_t>(j)] * unsigned_h(i, j);
      }
    }
    const auto actual = flat(matrix_of(Rotation<double>::signed_hadamard(head_dim, 9)));
    EXPECT_TRUE(close(actual, flat(expected), 1e-15));
    EXPECT_FALSE(close(actual, flat(unsigned_h), 1e-3)) << "negative control: without the signs";
  }
}

TEST(Rotation, HaarMatrixIsTheOrthogonalFactorOfTheGaussians) {
  // G = L Q with L lower triangular and a positive diagonal: the transpose of G^T = Q^T U.
  constexpr std::int64_t kHeadDim = 128;
  const Matrix<double> gaussians = normal_rows(4, kHeadDim, kHeadDim);
  const Matrix<double> q = matrix_of(Rotation<double>::dense_haar(kHeadDim, 4));
  const Matrix<double> lower = gaussians * q.transpose();
  for (Eigen::Index i = 0; i < kHeadDim; ++i) {
    EXPECT_GT(lower(i, i), 0.0);
    for (Eigen::Index j = i + 1; j < kHeadDim; ++j) ASSERT_TRUE(close(lower(i, j), 0.0, 1e-12)) << i << ", " << j;
  }
  EXPECT_FALSE(close(lower(100, 3), 0.0, 1e-12)) << "negative control: below the diagonal";
}

TEST(Rotation, IsOrthogonalToOneMillionth) {
  for (const auto kind : {RotationKind::kSignedHadamard, RotationKind::kDenseHaar}) {
    for (const std::int64_t head_dim : {64, 128, 256, 512}) {
      const Matrix<double> r = matrix_of(Rotation<float>::make(kind, head_dim, 11)).cast<double>();
      const Matrix<double> one = Matrix<double>::Identity(head_dim, head_dim);
      EXPECT_TRUE(close(flat<double>(r * r.transpose()), flat(one), 1e-6)) << head_dim;
      Matrix<double> bent = r;
      bent(3, 5) += 1e-4;
      EXPECT_FALSE(close(flat<double>(bent * bent.transpose()), flat(one), 1e-6)) << "negative control";
    }
  }
}

/// The Gaussians made orthogonal from top to bottom, each row swept `n_sweep` times (gemma4/rotation.hpp: twice).
Matrix<double> swept(std::uint64_t seed, std::int64_t head_dim, int n_sweep) {
  Matrix<double> m = normal_rows(seed, head_dim, head_dim);
  for (Eigen::Index r = 0; r < head_dim; ++r) {
    for (int sweep = 0; sweep < n_sweep; ++sweep) {
      for (Eigen::Index above = 0; above < r; ++above) m.row(r) -= m.row(r).dot(m.row(above)) * m.row(above);
    }
    m.row(r).normalize();
  }
  return m;
}

/// Largest entry of |R R^T - 1|, summed in long double.
double distance_from_orthogonal(const Matrix<double>& r) {
  const Matrix<long double> wide = r.cast<long double>();
  const Matrix<long double> one = Matrix<long double>::Identity(r.rows(), r.rows());
  return static_cast<double>((wide * wide.transpose() - one).cwiseAbs().maxCoeff());
}

TEST(Rotation, HaarMatrixIsOrthogonalToRounding) {
  // The last sweep takes at most head_dim components off a row of length near 1, each of them next to nothing: one
  // rounding of the row each. One sweep leaves what the condition of the Gaussians makes of a rounding; these seeds are
  // among the worst.
  constexpr double kDoubleUnit = 0x1p-53;
  const std::pair<std::int64_t, std::uint64_t> cases[] = {{64, 3}, {64, 20}, {128, 2}, {128, 3}};
  for (const auto& [head_dim, seed] : cases) {
    const std::vector<double> values = haar_matrix(seed, head_dim);
    const Matrix<double> r = Eigen::Map<const Matrix<double>>(values.data(), head_dim, head_dim);
    const double bound = static_cast<double>(head_dim) * kDoubleUnit;
    EXPECT_LE(distance_from_orthogonal(r), bound) << head_dim << ", seed " << seed;
    EXPECT_LE(distance_from_orthogonal(swept(seed, head_dim, 2)), bound) << head_dim << ", seed " << seed;
    EXPECT_GT(distance_from_orthogonal(swept(seed, head_dim, 1)), 2 * bound) << "negative control: one sweep";
    EXPECT_TRUE(close(flat(r), flat(swept(seed, head_dim, 2)), 1e-12)) << "and it is this matrix";
  }
}

RC_GTEST_PROP(Rotation, InverseUndoesForward, (std::uint64_t seed)) {
  const RotationKind kind = any_kind();
  const std::int64_t head_dim = any_head_dim(kind);
  const auto rotation = Rotation<float>::make(kind, head_dim, seed);
  const Matrix<float> x = normal_rows(seed + 1, *rc::gen::inRange(1, 40), head_dim).cast<float>();
  Matrix<float> y = x;
  rotation.forward(y);
  std::vector<double> bounds;
  for (Eigen::Index r = 0; r < x.rows(); ++r) {
    const double length = x.row(r).cast<double>().norm();
    rc_require(close(y.row(r).cast<double>().norm(), length, application_error(kind, head_dim) * length), "length");
    bounds.insert(bounds.end(), static_cast<std::size_t>(head_dim), 2.0 * application_error(kind, head_dim) * length);
  }
  RC_ASSERT(!close(flat(y), flat(x), bounds));  // negative control: a rotation that does nothing
  rotation.inverse(y);
  rc_require(close(flat(y), flat(x), bounds), "inverse");
}

RC_GTEST_PROP(Rotation, FloatAgreesWithDouble, (std::uint64_t seed)) {
  const RotationKind kind = any_kind();
  const std::int64_t head_dim = any_head_dim(kind);
  const Matrix<float> x = normal_rows(seed, 3, head_dim).cast<float>();
  Matrix<float> narrow = x;
  Matrix<double> wide = x.cast<double>();
  Rotation<float>::make(kind, head_dim, seed).forward(narrow);
  Rotation<double>::make(kind, head_dim, seed).forward(wide);
  const double bound = application_error(kind, head_dim) * x.cast<double>().rowwise().norm().maxCoeff();
  rc_require(close(flat(narrow), flat(wide), bound));
}

RC_GTEST_PROP(Rotation, ASeedIsOneTransformAndAnotherSeedIsAnother, (std::uint64_t seed)) {
  const RotationKind kind = any_kind();
  const std::int64_t head_dim = any_head_dim(kind);
  const Matrix<float> x = normal_rows(7, 2, head_dim).cast<float>();
  const auto rotated = [&](std::uint64_t with) {
    Matrix<float> y = x;
    Rotation<float>::make(kind, head_dim, with).forward(y);
    return y;
  };
  RC_ASSERT(rotated(seed) == rotated(seed));
  RC_ASSERT(rotated(seed) != rotated(seed + 1));
}

RC_GTEST_PROP(Rotation, HadamardOfARowDoesNotDependOnItsNeighbours, (std::uint64_t seed)) {
  const std::int64_t head_dim = any_head_dim(RotationKind::kSignedHadamard);
  const auto rotation = Rotation<float>::signed_hadamard(head_dim, seed);
  const Matrix<float> x = normal_rows(seed, *rc::gen::inRange(1, 50), head_dim).cast<float>();
  Matrix<float> together = x;
  rotation.forward(together);
  for (Eigen::Index r = 0; r < x.rows(); ++r) {
    Matrix<float> alone = x.row(r);
    rotation.forward(alone);
    RC_ASSERT(alone == together.row(r));
  }
}

TEST(Rotation, RowsApartAreRotatedWhereTheyLie) {
  for (const auto kind : {RotationKind::kSignedHadamard, RotationKind::kDenseHaar}) {
    const auto rotation = Rotation<float>::make(kind, 64, 1);
    const Matrix<float> before = normal_rows(3, 20, 200).cast<float>();
    Matrix<float> wide = before;
    rotation.forward(wide.middleCols(100, 64));
    EXPECT_EQ(wide.leftCols(100), before.leftCols(100));
    EXPECT_EQ(wide.rightCols(36), before.rightCols(36));
    Matrix<float> packed = before.middleCols(100, 64);
    rotation.forward(packed);
    EXPECT_TRUE(close(flat<float>(wide.middleCols(100, 64)), flat(packed), 1e-5));
  }
}

TEST(Rotation, HadamardSpreadsASpikeEvenly) {
  const auto rotation = Rotation<float>::signed_hadamard(256, 2);
  Matrix<float> spike = Matrix<float>::Zero(1, 256);
  spike(0, 77) = 3.0f;
  rotation.forward(spike);
  for (Eigen::Index i = 0; i < 256; ++i) EXPECT_FLOAT_EQ(std::abs(spike(0, i)), 3.0f / 16.0f);
}

TEST(Rotation, MisuseIsRefused) {
  EXPECT_THROW(Rotation<float>::signed_hadamard(96, 0), std::invalid_argument);
  EXPECT_THROW(Rotation<float>::signed_hadamard(0, 0), std::invalid_argument);
  EXPECT_THROW(Rotation<float>::dense_haar(-2, 0), std::invalid_argument);
  EXPECT_THROW(Rotation<float>::dense(Matrix<float>::Identity(4, 5)), std::invalid_argument);
  EXPECT_THROW(Rotation<float>::dense(2.0f * Matrix<float>::Identity(4, 4)), std::invalid_argument);
  Matrix<float> with_nan = Matrix<float>::Identity(4, 4);
  with_nan(0, 3) = std::nanf("");
  EXPECT_THROW(Rotation<float>::dense(with_nan), std::invalid_argument);
  EXPECT_NO_THROW(Rotation<float>::dense(Matrix<float>::Identity(4, 4)));
  Matrix<float> narrow = Matrix<float>::Zero(2, 64);
  EXPECT_THROW(Rotation<float>::signed_hadamard(128, 0).forward(narrow), std::invalid_argument);
  EXPECT_THROW(Rotation<float>::dense_haar(128, 0).inverse(narrow), std::invalid_argument);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include "reference/tq4_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/tq4_rows.hpp"

/// What a compressed vector means: codes, norms, scale and edges.
namespace {

using namespace gemma4;
using namespace gemma4::testkit;
using reference::CacheSide;
using reference::Matrix;
using reference::Tq4Codec;
using Rows = Tq4Rows;

RC_GTEST_PROP(Tq4Cache, ScaledByAPowerOfTwoOnlyTheNormChanges, (std::uint64_t seed)) {
  const Tq4Codec<float> codec(any_head_dim(), any_options());
  const int exponent = *rc::gen::inRange(-60, 61);
  const Matrix<float> x = normal_rows(seed, 3, codec.head_dim());
  const Rows once = compress(codec, CacheSide::kKey, x);
  const Rows scaled = compress<float>(codec, CacheSide::kKey, x * std::ldexp(1.0f, exponent));
  RC_ASSERT(once.codes == scaled.codes);
  for (std::size_t i = 0; i < once.norms.size(); ++i) {
    RC_ASSERT(to_float(scaled.norms[i]) == std::ldexp(to_float(once.norms[i]), exponent));
  }
  RC_ASSERT(compress<float>(codec, CacheSide::kKey, -x).codes != once.codes);  // negative control: not blind to x
}

/// Rows of whole numbers from -7 to 7: times any power of two that a float has, they are exact.
Matrix<float> whole_rows(std::uint64_t seed, Eigen::Index rows, Eigen::Index cols) {
  return normal_rows(seed, rows, cols).unaryExpr([](float x) { return std::clamp(std::round(3 * x), -7.0f, 7.0f); });
}

template <class Scalar>
void expect_codes_at_every_scale() {
  for (const std::int64_t head_dim : {64, 512}) {
    for (const auto norm_kind : {NormKind::kCorrected, NormKind::kRaw}) {
      const Tq4Codec<Scalar> codec(head_dim, {.norm = norm_kind, .k_bits = 4, .v_bits = 3, .seed = 4});
      const Matrix<Scalar> x = whole_rows(17, 100, head_dim).template cast<Scalar>();
      for (const auto side : {CacheSide::kKey, CacheSide::kValue}) {
        const Rows once = compress(codec, side, x);
        // 2^-149 is the smallest float: a length or a quotient in float has few bits left there, and the square of
        // 2^70 none.
        for (const int exponent : {-149, -140, -126, -70, 70, 110, 119}) {
          const Matrix<Scalar> small = x * static_cast<Scalar>(std::ldexp(1.0, exponent));
          const Rows scaled = compress<Scalar>(codec, side, small);
          EXPECT_EQ(scaled.codes, once.codes) << head_dim << " x 2^" << exponent;
          for (Eigen::Index r = 0; r < x.rows(); ++r) {
            double levels = 1.0;
            if (norm_kind == NormKind::kCorrected) {
              double squares = 0.0;
              for (Eigen::Index i = 0; i < head_dim; ++i) {
                squares += std::pow(codec.codebook(side).centroids[static_cast<std::size_t>(code_at(scaled, r, i))], 2);
              }
              levels = std::sqrt(squares);
            }
            const double norm = std::ldexp(x.row(r).template cast<double>().norm() / levels, exponent);
            // Half a step of bf16: relative, and 2^-134 where its numbers end.
            EXPECT_TRUE(
                close(to_float(scaled.norms[static_cast<std::size_t>(r)]), norm, std::max(kBf16Unit * norm, 0x1p-134)))
                << head_dim << " x 2^" << exponent;
          }
        }
      }
    }
  }
}

TEST(Tq4Cache, RowsOfAnyFloatScaleHaveTheSameCodes) {
  expect_codes_at_every_scale<float>();
}
TEST(Tq4Cache, RowsOfAnyFloatScaleHaveTheSameCodesInDouble) {
  expect_codes_at_every_scale<double>();
}

RC_GTEST_PROP(Tq4Cache, CodesAndNormFollowTheFormula, (std::uint64_t seed)) {
  const std::int64_t head_dim = any_head_dim();
  const Tq4Options options = any_options();
  const Tq4Codec<double> codec(head_dim, options);
  const Matrix<double> x = normal_rows(seed, 1, head_dim).cast<double>();
  for (const auto side : {CacheSide::kKey, CacheSide::kValue}) {
    const Rows rows = compress(codec, side, x);
    const Codebook book =
        solve_codebook(options.codebook, side == CacheSide::kKey ? options.k_bits : options.v_bits, head_dim);
    RC_ASSERT(codec.codebook(side) == book);
    Matrix<double> y = x / x.norm();
    codec.rotation().forward(y);
    double squares = 0.0;
    for (Eigen::Index i = 0; i < head_dim; ++i) {
      const int code = code_at(rows, 0, i);
      RC_ASSERT(code == codebook_index(book, y(0, i)));
      squares += std::pow(book.centroids[static_cast<std::size_t>(code)], 2);
    }
    const double norm = options.norm == NormKind::kCorrected ? x.norm() / std::sqrt(squares) : x.norm();
    rc_require(close(to_float(rows.norms[0]), norm, kBf16Unit * norm), "norm");
    Matrix<double> rotated(1, head_dim);
    codec.decompress_rotated(side, rows.code_view(), rows.norm_view(), rotated);
    for (Eigen::Index i = 0; i < head_dim; ++i) {
      const double level = book.centroids[static_cast<std::size_t>(code_at(rows, 0, i))];
      RC_ASSERT(rotated(0, i) == static_cast<double>(to_float(rows.norms[0])) * level);
    }
  }
}

TEST(Tq4Cache, WidthsOfKAndVReallyDiffer) {
  const Matrix<float> x = normal_rows(2, 100, 128);
  const auto error = [&](const Tq4Codec<float>& codec, CacheSide side) {
    return (decompress(codec, side, compress(codec, side, x)) - x).squaredNorm() / x.squaredNorm();
  };
  for (const int k_bits : {2, 3, 4}) {
    for (const int v_bits : {2, 3, 4}) {
      const Tq4Codec<float> codec(128, {.k_bits = k_bits, .v_bits = v_bits});
      const Rows k = compress(codec, CacheSide::kKey, x), v = compress(codec, CacheSide::kValue, x);
      EXPECT_EQ(k == v, k_bits == v_bits) << k_bits << ", " << v_bits;
      for (const auto& [rows, bits] : {std::pair{&k, k_bits}, std::pair{&v, v_bits}}) {
        int largest = 0;
        for (Eigen::Index i = 0; i < x.size(); ++i) largest = std::max(largest, code_at(*rows, i / 128, i % 128));
        EXPECT_EQ(largest, (1 << bits) - 1);
      }
      // A bit less costs between 3.2 and 3.7 times the error.
      const double ratio = error(codec, CacheSide::kKey) / error(codec, CacheSide::kValue);
      EXPECT_TRUE(close(std::log(ratio), (v_bits - k_bits) * std::log(3.45), 0.15 * std::abs(v_bits - k_bits) + 1e-6));
    }
  }
}

TEST(Tq4Cache, ZeroNanAndInfinityStayInTheirRow) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  for (const auto rotation : {RotationKind::kSignedHadamard, RotationKind::kDenseHaar}) {
    const Tq4Codec<float> codec(64, {.rotation = rotation});
    const Matrix<float> clean = normal_rows(1, 6, 64);
    Matrix<float> x = clean;
    x.row(1).setZero();
    x(2, 7) = nan;
    x(3, 9) = -infinity;
    x.row(4).setConstant(3e38f);  // finite, but its length is not
    const Rows rows = compress(codec, CacheSide::kKey, x), expected = compress(codec, CacheSide::kKey, clean);
    for (const Eigen::Index r : {0, 5}) {
      EXPECT_EQ(rows.codes.row(r), expected.codes.row(r));
      EXPECT_EQ(rows.norms[static_cast<std::size_t>(r)], expected.norms[static_cast<std::size_t>(r)]);
    }
    EXPECT_EQ(rows.norms[1].bits, 0);
    EXPECT_TRUE((rows.codes.row(1).array() == 0x77).all());
    EXPECT_TRUE(std::isnan(to_float(rows.norms[2])));
    EXPECT_EQ(to_float(rows.norms[3]), infinity);
    EXPECT_EQ(to_float(rows.norms[4]), infinity);
    const Matrix<float> back = decompress(codec, CacheSide::kKey, rows);
    EXPECT_TRUE(back.row(0).allFinite() && back.row(5).allFinite());
    EXPECT_TRUE((back.row(1).array() == 0.0f).all());
    EXPECT_TRUE(back.row(2).array().isNaN().all());
  }
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include "reference/tq4_cache.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/tq4_rows.hpp"

/// How far a decompressed vector is from the original, and how long it is: derived from the codebook's moments on the
/// sphere.
namespace {

using namespace gemma4;
using namespace gemma4::testkit;
using reference::CacheSide;
using reference::Matrix;
using reference::Tq4Codec;

/// What a rotated unit vector y and its levels c have in common on average: <y, c> and |c|^2. The density of a
/// coordinate of y is proportional to (1 - t^2)^((head_dim - 3) / 2); Simpson's rule between the boundaries, nothing is
/// assumed to be normal.
struct SphereMoments {
  double dot, squares;

  [[nodiscard]] double error() const { return 1.0 - 2.0 * dot + squares; }  ///< |y - c|^2
};

SphereMoments sphere_moments(const Codebook& book, std::int64_t head_dim) {
  constexpr int kIntervals = 400;
  const auto density = [&](double t) {
    return t * t >= 1.0 ? 0.0 : std::pow(1.0 - t * t, 0.5 * static_cast<double>(head_dim - 3));
  };
  double mass = 0.0, dot = 0.0, squares = 0.0, lower = -1.0;
  for (int i = 0; i < book.n_level; ++i) {
    const double upper = i + 1 == book.n_level ? 1.0 : book.boundaries[static_cast<std::size_t>(i)];
    const double level = book.centroids[static_cast<std::size_t>(i)];
    const double step = (upper - lower) / kIntervals;
    for (int j = 0; j <= kIntervals; ++j) {
      const double t = lower + j * step;
      const double weight = step / 3.0 * (j == 0 || j == kIntervals ? 1.0 : j % 2 == 1 ? 4.0 : 2.0) * density(t);
      mass += weight;
      dot += weight * t * level;
      squares += weight * level * level;
    }
    lower = upper;
  }
  const double scale = static_cast<double>(head_dim) / mass;
  return {scale * dot, scale * squares};
}

struct Sample {
  double mean, tolerance;  // five standard errors
};
Sample summary(const Eigen::ArrayXd& values) {
  const double mean = values.mean();
  const double deviation = std::sqrt((values - mean).square().mean());
  return {mean, 5.0 * deviation / std::sqrt(static_cast<double>(values.size()))};
}

TEST(Tq4Cache, RoundTripErrorIsTheCodebooksDistortion) {
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    const Matrix<float> x = normal_rows(static_cast<std::uint64_t>(head_dim), 768'000 / head_dim, head_dim);
    for (const int bits : {2, 3, 4}) {
      for (const auto kind : {CodebookKind::kFull, CodebookKind::kCutAtThreeSigma}) {
        for (const auto norm : {NormKind::kRaw, NormKind::kCorrected}) {
          const Tq4Codec<float> codec(head_dim, {.codebook = kind, .norm = norm, .k_bits = bits, .seed = 3});
          const Matrix<float> back = decompress(codec, CacheSide::kKey, compress(codec, CacheSide::kKey, x));
          const auto [mean, tolerance] = summary((back - x).cast<double>().rowwise().squaredNorm().array() /
                                                 x.cast<double>().rowwise().squaredNorm().array());
          const double expected = sphere_moments(codec.k_codebook(), head_dim).error();
          // Rounding the norm adds at most its square. Correcting it takes the part along y out of the error,
          // |y - c/|c||^2 = e - b^2/4 - e b/2 + ... for e = |y - c|^2, b = |c|^2 - 1; with an error in no particular
          // direction E[b^2] = 4 e/head_dim + e^2 and |E[b]| <= 2 e, so that the change is below e (2/head_dim + 2 e).
          const double rounding = kBf16Unit * kBf16Unit;
          const double correction =
              norm == NormKind::kRaw ? 0.0 : expected * (2.0 / static_cast<double>(head_dim) + 2.0 * expected);
          EXPECT_TRUE(close(mean, expected, tolerance + rounding + correction)) << head_dim << " x " << bits;
          if (bits == 4 && head_dim == 512 && norm == NormKind::kRaw) {
            const auto other = kind == CodebookKind::kFull ? CodebookKind::kCutAtThreeSigma : CodebookKind::kFull;
            EXPECT_FALSE(
                close(mean, sphere_moments(solve_codebook(other, 4, head_dim), head_dim).error(), tolerance + rounding))
                << "negative control: the other codebook";
          }
        }
      }
    }
  }
}

TEST(Tq4Cache, FourBitsOfTheFullTableErrByLessThanOnePercent) {
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    const auto error = [&](CodebookKind kind) {
      return sphere_moments(solve_codebook(kind, 4, head_dim), head_dim).error();
    };
    EXPECT_TRUE(close(error(CodebookKind::kFull), 0.0095, 4e-4)) << head_dim;
    EXPECT_GT(error(CodebookKind::kCutAtThreeSigma), 1.015 * error(CodebookKind::kFull)) << head_dim;
  }
  // The gap at the head width of the 31B model.
  EXPECT_TRUE(close(sphere_moments(solve_codebook(CodebookKind::kCutAtThreeSigma, 4, 512), 512).error() /
                        sphere_moments(solve_codebook(CodebookKind::kFull, 4, 512), 512).error(),
                    1.048, 1e-3));
}

TEST(Tq4Cache, CorrectedNormKeepsTheLengthAndTheRawOneShortens) {
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    for (const auto rotation : {RotationKind::kSignedHadamard, RotationKind::kDenseHaar}) {
      const Matrix<float> x = normal_rows(8, 1000, head_dim);
      const auto ratios = [&](NormKind norm) {
        const Tq4Codec<float> codec(head_dim, {.rotation = rotation, .norm = norm, .seed = 1});
        const Matrix<double> back =
            decompress(codec, CacheSide::kValue, compress(codec, CacheSide::kValue, x)).cast<double>();
        return Eigen::ArrayXd(back.rowwise().norm().array() / x.cast<double>().rowwise().norm().array());
      };
      // Every vector keeps its length but for the rounding of its norm and of the float rotation back (below 1e-5),
      // and the roundings average out.
      const Eigen::ArrayXd kept = ratios(NormKind::kCorrected);
      EXPECT_LE((kept - 1.0).abs().maxCoeff(), kBf16Unit + 1e-5) << head_dim;
      EXPECT_TRUE(close(summary(kept).mean, 1.0, summary(kept).tolerance)) << head_dim;
      // Negative control: a raw norm leaves the length of the levels.
      const auto [mean, tolerance] = summary(ratios(NormKind::kRaw));
      const double levels =
          std::sqrt(sphere_moments(solve_codebook(CodebookKind::kFull, 4, head_dim), head_dim).squares);
      EXPECT_TRUE(close(mean, levels, tolerance + 1e-5)) << head_dim;
      EXPECT_LT(mean, 0.998) << head_dim;
    }
  }
}

}  // namespace

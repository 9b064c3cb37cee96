// SPDX-License-Identifier: Apache-2.0
#include "reference/tq4_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gemma4/rotation.hpp"
#include "gemma4/tq4_golden.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"

namespace {

using namespace gemma4;
using reference::CacheSide;
using reference::Matrix;
using reference::Rotation;
using reference::tq4_cache_update;
using reference::Tq4CacheBuffer;
using reference::Tq4Codec;
using testkit::close;
using testkit::rc_require;

constexpr double kBf16Unit = 0x1p-8;  // the largest relative error of rounding to bf16

/// Compressed rows outside a cache.
struct Rows {
  Matrix<std::uint8_t> codes;  // [n, head_dim/2]
  std::vector<Tq4Norm> norms;  // [n]

  [[nodiscard]] View<const std::uint8_t, 2> code_view() const {
    return make_view(codes.data(), codes.rows(), codes.cols());
  }
  [[nodiscard]] View<const Tq4Norm, 1> norm_view() const { return make_view(norms.data(), norms.size()); }
  bool operator==(const Rows& other) const { return codes == other.codes && norms == other.norms; }
};

template <class Scalar>
Rows compress(const Tq4Codec<Scalar>& codec, CacheSide side, const Matrix<Scalar>& x) {
  Rows rows{Matrix<std::uint8_t>(x.rows(), x.cols() / 2), std::vector<Tq4Norm>(static_cast<std::size_t>(x.rows()))};
  codec.compress(side, x, make_view(rows.codes.data(), x.rows(), x.cols() / 2), make_view(rows.norms.data(), x.rows()));
  return rows;
}

template <class Scalar>
Matrix<Scalar> decompress(const Tq4Codec<Scalar>& codec, CacheSide side, const Rows& rows) {
  Matrix<Scalar> out(rows.codes.rows(), 2 * rows.codes.cols());
  codec.decompress(side, rows.code_view(), rows.norm_view(), out);
  return out;
}

Matrix<float> normal_rows(std::uint64_t seed, Eigen::Index rows, Eigen::Index cols) {
  const std::vector<double> values = haar_gaussians(seed, rows * cols);
  return Eigen::Map<const Matrix<double>>(values.data(), rows, cols).cast<float>();
}

std::int64_t any_head_dim() {
  return *rc::gen::element<std::int64_t>(64, 128, 256, 512);
}

/// Every format but the dense rotation, whose matrix takes long to draw; both norms, both codebooks, all widths.
Tq4Options any_options() {
  return {.rotation = RotationKind::kSignedHadamard,
          .codebook = *rc::gen::element(CodebookKind::kFull, CodebookKind::kCutAtThreeSigma),
          .norm = *rc::gen::element(NormKind::kCorrected, NormKind::kRaw),
          .k_bits = *rc::gen::inRange(2, 5),
          .v_bits = *rc::gen::inRange(2, 5),
          .seed = *rc::gen::arbitrary<std::uint64_t>()};
}

int code_at(const Rows& rows, Eigen::Index row, Eigen::Index i) {
  const std::uint8_t byte = rows.codes(row, i / 2);
  return i % 2 == 0 ? byte >> 4 : byte & 15;
}

// ---- Golden cases: caches that an independent implementation compressed.

class Tq4CacheGolden : public testing::TestWithParam<const char*> {
 protected:
  Tq4Golden golden = read_tq4_golden(std::string(GEMMA4_TEST_DATA) + "/tq4/" + GetParam() + ".gguf");
  std::int64_t head_dim = golden.shape.head_dim;

  template <class Scalar>
  Matrix<Scalar> matrix(const std::vector<float>& values) const {
    return Eigen::Map<const Matrix<float>>(values.data(), static_cast<Eigen::Index>(values.size()) / head_dim, head_dim)
        .template cast<Scalar>();
  }
  template <class Scalar>
  Matrix<Scalar> rows(CacheSide side) const {
    return matrix<Scalar>(side == CacheSide::kKey ? golden.k : golden.v);
  }
  template <class Scalar>
  Tq4Codec<Scalar> codec() const {
    return {Rotation<Scalar>::dense(matrix<Scalar>(golden.rotation)), golden.codebook, golden.codebook, NormKind::kRaw};
  }
  Matrix<std::uint8_t> peer_codes(CacheSide side) const {
    const std::vector<std::uint8_t>& bytes = side == CacheSide::kKey ? golden.k_codes : golden.v_codes;
    return Eigen::Map<const Matrix<std::uint8_t>>(
        bytes.data(), static_cast<Eigen::Index>(bytes.size()) / (head_dim / 2), head_dim / 2);
  }
};

struct Comparison {
  std::int64_t n_code = 0, n_different = 0, n_unexplained = 0;
};

/// Counts the codes that differ from the peer's, and among them those whose rotated value lies farther than 1e-5 from
/// every boundary: rounding cannot explain these.
Comparison compare(const Rows& ours, const Matrix<std::uint8_t>& peer, const Tq4Codec<double>& codec,
                   Matrix<double> x) {
  for (Eigen::Index r = 0; r < x.rows(); ++r) x.row(r) /= std::max(x.row(r).norm(), 1e-300);
  codec.rotation().forward(x);
  const Codebook& book = codec.k_codebook();
  const Rows theirs{peer, {}};
  Comparison result;
  for (Eigen::Index r = 0; r < x.rows(); ++r) {
    for (Eigen::Index i = 0; i < x.cols(); ++i, ++result.n_code) {
      if (code_at(ours, r, i) == code_at(theirs, r, i)) continue;
      ++result.n_different;
      const bool tie = std::any_of(book.boundaries.begin(), book.boundaries.end(),
                                   [&](float edge) { return std::abs(x(r, i) - edge) <= 1e-5; });
      if (!tie) ++result.n_unexplained;
    }
  }
  return result;
}

TEST_P(Tq4CacheGolden, CodesEqualThePeersAwayFromTies) {
  const auto float_codec = codec<float>();
  const auto double_codec = codec<double>();
  for (const auto& [side, name] : {std::pair{CacheSide::kKey, "k"}, std::pair{CacheSide::kValue, "v"}}) {
    const auto x = rows<double>(side);
    const auto peer = peer_codes(side);
    for (const Rows& ours : {compress(double_codec, side, x), compress<float>(float_codec, side, x.cast<float>())}) {
      const Comparison found = compare(ours, peer, double_codec, x);
      EXPECT_EQ(found.n_unexplained, 0) << name;
      // A value falls within 1e-5 of one of 15 boundaries with probability below 15 * 2e-5 * density(0), where
      // density(0) = sqrt(head_dim / 2 pi), so ties are rare as well as explained.
      const double ties = 3e-4 * std::sqrt(static_cast<double>(head_dim) / 6.28) * static_cast<double>(found.n_code);
      EXPECT_LE(static_cast<double>(found.n_different), ties + 5.0 * std::sqrt(ties) + 1.0) << name;
      RecordProperty(std::string(name) + "_ties", std::to_string(found.n_different));
    }
  }
}

TEST_P(Tq4CacheGolden, AnotherRotationCodebookOrNibbleOrderShows) {  // negative control
  const auto right = codec<double>();
  const auto x = rows<double>(CacheSide::kKey);
  const auto peer = peer_codes(CacheSide::kKey);
  const auto unexplained = [&](const Rows& ours) { return compare(ours, peer, right, x).n_unexplained; };
  const Matrix<double> transposed = matrix<double>(golden.rotation).transpose();
  const Tq4Codec<double> turned(Rotation<double>::dense(transposed), right.k_codebook(), right.v_codebook(),
                                NormKind::kRaw);
  EXPECT_GT(unexplained(compress(turned, CacheSide::kKey, x)), x.size() / 2);
  const Codebook full = solve_codebook(CodebookKind::kFull, 4, head_dim);
  const Tq4Codec<double> other(right.rotation(), full, full, NormKind::kRaw);
  EXPECT_GT(unexplained(compress(other, CacheSide::kKey, x)), x.size() / 100);
  Rows swapped = compress(right, CacheSide::kKey, x);
  swapped.codes =
      swapped.codes.unaryExpr([](std::uint8_t b) { return static_cast<std::uint8_t>((b << 4) | (b >> 4)); });
  EXPECT_GT(unexplained(swapped), x.size() / 2);
}

TEST_P(Tq4CacheGolden, NormsAreThePeersWithinTheRoundingOfStorage) {
  const auto float_codec = codec<float>();
  const Tq4Codec<float> corrected(float_codec.rotation(), float_codec.k_codebook(), float_codec.v_codebook(),
                                  NormKind::kCorrected);
  for (const auto& [side, name] : {std::pair{CacheSide::kKey, "k"}, std::pair{CacheSide::kValue, "v"}}) {
    const auto x = rows<float>(side);
    const std::vector<float>& peer = side == CacheSide::kKey ? golden.k_norm : golden.v_norm;
    std::vector<double> bounds;  // ours is rounded to bf16, and the peer's may be too
    for (const float norm : peer) bounds.push_back(2.0 * kBf16Unit * norm);
    EXPECT_TRUE(close(compress(float_codec, side, x).norms, peer, bounds)) << name;
    const Rows longer = compress(corrected, side, x);
    double mean_ratio = 0.0;
    for (std::size_t i = 0; i < peer.size(); ++i) mean_ratio += to_float(longer.norms[i]) / peer[i];
    EXPECT_GT(mean_ratio / static_cast<double>(peer.size()), 1.003) << "negative control: the corrected norm is larger";
  }
}

INSTANTIATE_TEST_SUITE_P(Peer, Tq4CacheGolden,
                         testing::Values("tq4-d64-h4x2-q1-kv40of64", "tq4-d128-h6x1-q7-kv33of48",
                                         "tq4-d256-h16x2-q1-kv96of128", "tq4-d512-h8x1-q5-kv72of96",
                                         "tq4-d512-h32x4-q1-kv100of128"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

// ---- What a compressed vector means.

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

// ---- The update of a cache.

/// Some positions of [0, buffer_len), each once, in any order.
std::vector<std::int32_t> any_positions(std::int64_t buffer_len) {
  std::vector<std::int32_t> all(static_cast<std::size_t>(buffer_len));
  std::iota(all.begin(), all.end(), 0);
  for (std::size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[*rc::gen::inRange<std::size_t>(0, i)]);
  all.resize(*rc::gen::inRange<std::size_t>(1, all.size() + 1));
  return all;
}

constexpr std::uint8_t kPoisonCode = 0xA5;
constexpr Tq4Norm kPoisonNorm{0xFFA5};  // a NaN that no rounding makes

Tq4CacheBuffer poisoned(std::int64_t batch, std::int64_t n_head_kv, std::int64_t buffer_len, std::int64_t head_dim) {
  Tq4CacheBuffer buffer(batch, n_head_kv, buffer_len, head_dim);
  for (const auto codes : {buffer.k_codes(), buffer.v_codes()}) std::fill(codes.begin(), codes.end(), kPoisonCode);
  for (const auto norms : {buffer.k_norm(), buffer.v_norm()}) std::fill(norms.begin(), norms.end(), kPoisonNorm);
  return buffer;
}

RC_GTEST_PROP(Tq4Cache, RowsGoToTheirPositionsAndNoOtherByteChanges, (std::uint64_t seed)) {
  const auto batch = *rc::gen::inRange<std::int64_t>(1, 3), n_head_kv = *rc::gen::inRange<std::int64_t>(1, 4);
  const auto buffer_len = *rc::gen::inRange<std::int64_t>(1, 12);
  const Tq4Codec<float> codec(any_head_dim(), any_options());
  const std::vector<std::int32_t> positions = any_positions(buffer_len);
  const auto n_new = static_cast<std::int64_t>(positions.size());
  const Matrix<float> k = normal_rows(2 * seed, batch * n_new * n_head_kv, codec.head_dim());
  const Matrix<float> v = normal_rows(2 * seed + 1, batch * n_new * n_head_kv, codec.head_dim());
  Tq4CacheBuffer buffer = poisoned(batch, n_head_kv, buffer_len, codec.head_dim());
  const auto as_view = [&](const Matrix<float>& m) {
    return View<const float, 4>(make_view(m.data(), batch, n_new, n_head_kv, codec.head_dim()));
  };
  tq4_cache_update<float>(codec, as_view(k), as_view(v), positions, buffer.view());
  const auto check = [&](CacheSide side, const Matrix<float>& x, View<std::uint8_t, 4> codes, View<Tq4Norm, 3> norms) {
    const Rows rows = compress(codec, side, x);
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t h = 0; h < n_head_kv; ++h) {
        for (std::int32_t p = 0; p < buffer_len; ++p) {
          const auto found = std::find(positions.begin(), positions.end(), p);
          const bool is_new = found != positions.end();
          const auto row = is_new ? (b * n_new + (found - positions.begin())) * n_head_kv + h : 0;
          for (std::int64_t j = 0; j < codec.head_dim() / 2; ++j) {
            RC_ASSERT(codes(b, h, p, j) == (is_new ? rows.codes(row, j) : kPoisonCode));
          }
          RC_ASSERT(norms(b, h, p) == (is_new ? rows.norms[static_cast<std::size_t>(row)] : kPoisonNorm));
        }
      }
    }
  };
  check(CacheSide::kKey, k, buffer.view().k_codes, buffer.view().k_norm);
  check(CacheSide::kValue, v, buffer.view().v_codes, buffer.view().v_norm);
}

TEST(Tq4Cache, PiecesOfAUpdateMakeTheWhole) {
  // Any chunk length gives the same bytes; one head of it reads back through tq4_rows.
  const Tq4Codec<float> codec(64, {});
  const Matrix<float> k = normal_rows(1, 21 * 2, 64), v = normal_rows(2, 21 * 2, 64);
  const auto part = [&](const Matrix<float>& m, std::int64_t first, std::int64_t count) {
    return View<const float, 4>(make_view(m.row(2 * first).data(), 1, count, 2, 64));
  };
  const auto filled = [&](std::int64_t chunk) {
    Tq4CacheBuffer buffer = poisoned(1, 2, 24, 64);
    for (std::int64_t first = 0; first < 21; first += chunk) {
      std::vector<std::int32_t> positions(static_cast<std::size_t>(std::min<std::int64_t>(chunk, 21 - first)));
      std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(first));
      const auto count = static_cast<std::int64_t>(positions.size());
      tq4_cache_update<float>(codec, part(k, first, count), part(v, first, count), positions, buffer.view());
    }
    return buffer;
  };
  const Tq4CacheBuffer whole = filled(21);
  for (const std::int64_t chunk : {1, 4, 16, 20}) EXPECT_EQ(filled(chunk), whole) << chunk;
  const auto [codes, norms] = reference::tq4_rows(whole.view().v_codes, whole.view().v_norm, 0, 1, 3, 5);
  Matrix<float> rotated(5, 64), back(5, 64);
  codec.decompress_rotated(CacheSide::kValue, codes, norms, rotated);
  codec.decompress(CacheSide::kValue, codes, norms, back);
  for (Eigen::Index t = 0; t < 5; ++t) {
    const auto row = v.row(2 * (3 + t) + 1);
    EXPECT_LE((back.row(t) - row).squaredNorm(), 0.02f * row.squaredNorm());
    EXPECT_GT((rotated.row(t) - row).squaredNorm(), 0.2f * row.squaredNorm()) << "negative control: not rotated back";
    EXPECT_GT((back.row(t) - v.row(2 * (3 + t))).squaredNorm(), 0.2f * row.squaredNorm()) << "the other head";
  }
}

TEST(Tq4Cache, MisuseIsRefusedByNameAndWritesNothing) {
  const Tq4Codec<float> codec(64, {});
  const auto refused = [&](std::vector<std::int32_t> positions, std::vector<std::string> words, auto bend) {
    const auto n_new = static_cast<std::int64_t>(positions.size());
    const Matrix<float> x = normal_rows(1, n_new * 2, 64);
    View<const float, 4> k = make_view(x.data(), 1, n_new, 2, 64), v = k;
    Tq4CacheBuffer buffer = poisoned(1, 2, 8, 64);
    const Tq4CacheBuffer before = buffer.clone();
    Tq4CacheView cache = buffer.view();
    bend(k, v, cache);
    try {
      tq4_cache_update<float>(codec, k, v, positions, cache);
      ADD_FAILURE() << "accepted, expected a refusal that says " << words.front();
    } catch (const std::invalid_argument& error) {
      const std::string message = error.what();
      for (const std::string& word : words) EXPECT_NE(message.find(word), std::string::npos) << message;
    }
    EXPECT_EQ(buffer, before);
  };
  const auto straight = [](auto&, auto&, auto&) {};
  refused({0, 8}, {"tq4_cache_update", "positions[1] is 8", "buffer_len = 8"}, straight);
  refused({-3, 1}, {"positions[0] is -3"}, straight);
  refused({7, 2, 7}, {"positions[0]", "positions[2]", "both 7"}, straight);
  refused({0, 1}, {"k has extent 3 on axis 1", "= 2"}, [](auto& k, auto&, auto&) { k.extent[1] = 3; });
  refused({0, 1}, {"v has extent 128 on axis 3", "head_dim = 64"}, [](auto&, auto& v, auto&) { v.extent[3] = 128; });
  refused({0, 1}, {"v_codes", "buffer_len"}, [](auto&, auto&, auto& c) { c.v_codes.extent[2] = 9; });
  refused({0, 1}, {"k_norm", "n_head_kv"}, [](auto&, auto&, auto& c) { c.k_norm.extent[1] = 1; });
  refused({0, 1}, {"rows of 64 bytes", "32"}, [](auto&, auto&, auto& c) { c.k_codes.extent[3] = 64; });
  EXPECT_THROW(Tq4Codec<float>(96, {}), std::invalid_argument);
  EXPECT_THROW(Tq4Codec<float>(1024, {}), std::invalid_argument);
  EXPECT_THROW(Tq4Codec<float>(64, {.k_bits = 5}), std::invalid_argument);
  EXPECT_THROW(Tq4Codec<float>(64, {.v_bits = 1}), std::invalid_argument);
  Matrix<float> out(3, 64);
  const Rows rows = compress<float>(codec, CacheSide::kKey, Matrix<float>::Zero(2, 64));
  EXPECT_THROW(codec.decompress(CacheSide::kKey, rows.code_view(), rows.norm_view(), out), std::invalid_argument);
}

TEST(Tq4Cache, ABufferHoldsWhatTheFormatSays) {
  const Tq4CacheBuffer buffer(1, 4, 1000, 512);
  EXPECT_EQ(buffer.bytes(), 2 * 4 * 1000 * 258);
  EXPECT_EQ(buffer.view().k_codes.size() + buffer.view().v_codes.size() +
                2 * (buffer.view().k_norm.size() + buffer.view().v_norm.size()),
            buffer.bytes());
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include "reference/tq4_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "gemma4/tq4_golden.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/tq4_rows.hpp"

/// Caches that an independent implementation compressed.
namespace {

using namespace gemma4;
using namespace gemma4::testkit;
using reference::CacheSide;
using reference::Matrix;
using reference::Rotation;
using reference::Tq4Codec;
using Rows = Tq4Rows;

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

}  // namespace

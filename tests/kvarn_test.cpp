// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gemma4/cache_formats.hpp"
#include "gemma4/rotation.hpp"
#include "reference/cache/flat_layer_cache.hpp"
#include "reference/cache/kvarn_layer_cache.hpp"
#include "tests/support/refuses.hpp"

namespace {

using namespace gemma4;
using reference::KvarnCodec;
using reference::Matrix;
using reference::Qkv;

constexpr std::int64_t kTile = KvarnFormat::kTileTokens, kHeadDim = 64;

Matrix<float> normal(std::uint64_t seed, std::int64_t rows, std::int64_t cols) {
  const std::vector<double> values = haar_gaussians(seed, rows * cols);
  return Eigen::Map<const Matrix<double>>(values.data(), rows, cols).cast<float>();
}

template <class TLine>
double deviation(const TLine& line) {
  const Eigen::ArrayXd values = line.template cast<double>().array();
  return std::sqrt((values - values.mean()).square().mean());
}

/// A tile whose tokens and channels have lengths of their own, far apart.
Matrix<float> uneven_tile(std::uint64_t seed) {
  Matrix<float> tile = normal(seed, kTile, kHeadDim);
  for (Eigen::Index i = 0; i < kTile; ++i) tile.row(i) *= i % 7 == 0 ? 30.0f : 1.0f;
  for (Eigen::Index j = 0; j < kHeadDim; ++j) tile.col(j) *= j % 9 == 0 ? 0.05f : 2.0f;
  return tile;
}

TEST(Kvarn, NamesAndBytes) {
  for (const char* name : {"sim-kvarn-k4v2", "sim-kvarn-k4v4", "sim-kvarn-k2v8"}) {
    EXPECT_EQ(to_string(parse_cache_spec(name)), name);
  }
  for (const char* name : {"sim-kvarn", "sim-kvarn-k4", "sim-kvarn-k1v4", "sim-kvarn-k4v9", "sim-kvarn-k4v4-had"}) {
    EXPECT_TRUE(testkit::refuses([&] { (void)parse_cache_spec(name); }, {name})) << name;
  }
  const KvarnFormat format{.k_bits = 4, .v_bits = 2};
  // 128 tokens of 256 values: 16 KiB of codes, low and step of 256 channels, a scale of 128 tokens.
  EXPECT_EQ(kTile * format.row_bytes(CacheSide::kKey, 256), 16384 + 2 * 2 * 256 + 2 * 128);
  EXPECT_EQ(kTile * format.row_bytes(CacheSide::kValue, 256), 8192 + 2 * 2 * 128 + 2 * 256);
}

TEST(Kvarn, BothAxesHaveDeviationOneAndTheScalesHoldTheRest) {
  const Matrix<float> tile = uneven_tile(3);
  Matrix<float> even = tile;
  const KvarnCodec::Scales scales = KvarnCodec::balance(even);
  for (Eigen::Index i = 0; i < kTile; ++i) EXPECT_NEAR(deviation(even.row(i)), 1.0, 1e-5) << i;
  // Rows are divided last; a column's mean is not a row's, which leaves columns off by up to the variance of a mean
  // of 64.
  for (Eigen::Index j = 0; j < kHeadDim; ++j) EXPECT_NEAR(deviation(even.col(j)), 1.0, 1.0 / 64) << j;
  const Matrix<float> back = scales.token.asDiagonal() * even * scales.channel.asDiagonal();
  EXPECT_LE((back - tile).norm(), 1e-5f * tile.norm());
  EXPECT_GT(deviation(tile.row(0)), 5.0 * deviation(tile.row(1))) << "the control: it was not even before";
  EXPECT_GT(deviation(tile.col(1)), 5.0 * deviation(tile.col(0)));
}

TEST(Kvarn, ATokensScaleSurvivesTwoBits) {
  const auto error = [](const KvarnFormat& format, CacheSide side) {
    const Matrix<float> tile = uneven_tile(5);
    Matrix<float> read = tile;
    KvarnCodec(kHeadDim, format).roundtrip(side, read);
    // Of each token by itself: one of a small token is not hidden behind a large one.
    double sum = 0;
    for (Eigen::Index i = 0; i < kTile; ++i) sum += (read.row(i) - tile.row(i)).norm() / tile.row(i).norm();
    return sum / kTile;
  };
  // Of 128 or 64 normal values the range is 5.2 or 4.7 deviations: a step of b bits makes 5.2 / (2^b - 1) / sqrt(12).
  EXPECT_NEAR(error({.k_bits = 4}, CacheSide::kKey), 5.2 / 15 / std::sqrt(12.0), 0.025);
  EXPECT_NEAR(error({.k_bits = 8}, CacheSide::kKey), 5.2 / 255 / std::sqrt(12.0), 0.003);
  EXPECT_NEAR(error({.v_bits = 2}, CacheSide::kValue), 4.7 / 3 / std::sqrt(12.0), 0.11);
  EXPECT_GT(error({.v_bits = 2}, CacheSide::kValue), 3 * error({.v_bits = 4}, CacheSide::kValue)) << "the control";
  // Zeros, and lines of one value, stay.
  for (const CacheSide side : {CacheSide::kKey, CacheSide::kValue}) {
    Matrix<float> zeros = Matrix<float>::Zero(kTile, kHeadDim);
    KvarnCodec(kHeadDim, {}).roundtrip(side, zeros);
    EXPECT_TRUE((zeros.array() == 0.0f).all());
  }
}

/// Tokens are exact until their tile is full, whatever the chunks; then they are what the codec reads back.
TEST(Kvarn, ATileIsQuantisedWhenItIsFull) {
  AttentionConfig attention;
  attention.head_dim = kHeadDim;
  attention.n_head_kv = 1;
  const std::int64_t n = 2 * kTile + 40;
  const auto rounded = [](Matrix<float> m) { return m.unaryExpr([](float x) { return to_float(to_bf16(x)); }).eval(); };
  const Qkv<float> qkv{normal(1, n, 2 * kHeadDim), rounded(normal(2, n, kHeadDim)), rounded(normal(3, n, kHeadDim))};
  const auto codec = std::make_shared<const KvarnCodec>(kHeadDim, KvarnFormat{.k_bits = 2, .v_bits = 2});
  const auto last_of = [&](std::int64_t count, const std::vector<std::int64_t>& chunks) {
    reference::KvarnLayerCache cache(attention, n, codec);
    Matrix<float> out;
    std::int64_t position = 0;
    for (std::size_t i = 0; position < count; ++i) {
      const std::int64_t some = std::min(chunks[i % chunks.size()], count - position);
      out = cache.attend(Qkv<float>{qkv.q.middleRows(position, some), qkv.k.middleRows(position, some),
                                    qkv.v.middleRows(position, some)},
                         position);
      position += some;
    }
    return Matrix<float>(out.bottomRows(1));
  };
  const auto expected = [&](std::int64_t count, std::int64_t n_quantised) {
    Qkv<float> seen{qkv.q.topRows(count), qkv.k.topRows(count), qkv.v.topRows(count)};
    for (std::int64_t first = 0; first < n_quantised; first += kTile) {
      Matrix<float> k = seen.k.middleRows(first, kTile), v = seen.v.middleRows(first, kTile);
      codec->roundtrip(CacheSide::kKey, k);
      codec->roundtrip(CacheSide::kValue, v);
      seen.k.middleRows(first, kTile) = rounded(k);
      seen.v.middleRows(first, kTile) = rounded(v);
    }
    reference::FlatLayerCache<Bf16> flat(attention, n);
    return Matrix<float>(flat.attend(seen, 0).bottomRows(1));
  };
  const auto near = [](const Matrix<float>& a, const Matrix<float>& b) { return (a - b).norm() <= 3e-5f * b.norm(); };
  for (const auto& chunks : {std::vector<std::int64_t>{1}, {296}, {100, 7, 1}}) {
    EXPECT_TRUE(near(last_of(kTile - 1, chunks), expected(kTile - 1, 0)));
    EXPECT_TRUE(near(last_of(kTile, chunks), expected(kTile, kTile)));
    EXPECT_TRUE(near(last_of(n, chunks), expected(n, 2 * kTile)));
    EXPECT_FALSE(near(last_of(n, chunks), expected(n, kTile))) << "the control: the second tile is quantised";
  }
}

}  // namespace

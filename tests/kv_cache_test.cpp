// SPDX-License-Identifier: Apache-2.0
#include "reference/kv_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/close.hpp"
#include "tests/support/kv_rows.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

/// What a stored vector means, and where an update puts it.
namespace {

using namespace gemma4;
using namespace gemma4::testkit;
using reference::KvCacheBuffer;
using reference::KvCodec;
using reference::KvPlainBuffer;
using reference::KvVectorCodec;
using reference::Matrix;

template <class Scalar>
View<const Scalar, 4> heads(const Matrix<Scalar>& m, std::int64_t batch, std::int64_t n_new, std::int64_t n_head_kv) {
  return make_view(m.data(), batch, n_new, n_head_kv, m.cols());
}

// ---- one vector

/// The bytes, straight from the words of gemma4/kv_format.hpp, and what they read as.
RC_GTEST_PROP(KvCache, CodesAndNormFollowTheFormula, (std::uint64_t seed)) {
  const std::int64_t head_dim = any_head_dim();
  const KvOptions options = any_kv_options();
  const KvCodec<double> codec(head_dim, options);
  for (const bool is_v : {true, false}) {
    const KvVectorCodec<double>& vectors = is_v ? codec.v() : codec.r();
    const int bits = is_v ? options.v_bits : options.r_bits;
    const std::int64_t n = is_v ? head_dim : head_dim / 4;
    const KvCodebook book = solve_kv_codebook(options.codebook, bits, n);
    RC_ASSERT(vectors.codebook() == book);
    RC_ASSERT(vectors.size() == n);
    const Matrix<double> x = normal_rows(seed, 1, n).cast<double>();
    const KvRows rows = compress(vectors, x);
    RC_ASSERT(rows.codes.cols() == bits * n / 8);
    Matrix<double> y = x / x.norm();
    reference::Rotation<double>::signed_hadamard(n, options.seed).forward(y);
    double squares = 0.0;
    for (std::int64_t i = 0; i < n; ++i) {
      int m = 0;
      for (int edge = 0; edge + 1 < book.n_half; ++edge) m += book.edge[edge] < std::abs(y(0, i)) ? 1 : 0;
      const double level = y(0, i) < 0 ? -book.level[m] : book.level[m];
      RC_ASSERT(kv_level(rows.codes.data(), n, i, book) == level);
      squares += level * level;
    }
    const double norm = options.norm == NormKind::kCorrected ? x.norm() / std::sqrt(squares) : x.norm();
    rc_require(close(to_float(rows.norms[0]), norm, kF16Unit * norm), "norm");
    const Matrix<double> expected = decode_kv_vectors(1, n, rows.codes.data(), rows.norms.data(), book, options.seed);
    const Matrix<double> back = decompress(vectors, rows);
    RC_ASSERT((back - expected).norm() <= 1e-12 * expected.norm());
    // Controls: another seed, and a sign more, show.
    RC_ASSERT((back - decode_kv_vectors(1, n, rows.codes.data(), rows.norms.data(), book, options.seed + 1)).norm() >
              1e-3 * expected.norm());
    KvRows flipped = rows;
    flipped.codes(0, (bits - 1) * n / 8) ^= 1;
    RC_ASSERT((decompress(vectors, flipped) - expected).norm() > 1e-3 * expected.norm());
  }
}

/// The error of a vector is the table's distortion, in the mean: TQ4's bound with sums over 200 vectors.
TEST(KvCache, RoundTripErrorIsTheTables) {
  const Matrix<float> x = normal_rows(5, 200, 256);
  double before = 0.4;
  for (const int bits : {3, 4, 5, 6}) {
    const KvCodec<float> codec(256, {.v_bits = bits});
    const double error =
        (decompress(codec.v(), compress(codec.v(), x)) - x).squaredNorm() / static_cast<double>(x.squaredNorm());
    // E[(x - level)^2] of a unit normal: 0.03455, 0.00950, 0.00250, 0.000639; corrected norms add about their half.
    const double distortion[] = {0.03455, 0.00950, 0.00250, 0.000639};
    EXPECT_GT(error, 0.9 * distortion[bits - 3]) << bits;
    EXPECT_LT(error, 1.1 * distortion[bits - 3] / (1 - distortion[bits - 3])) << bits;
    EXPECT_LT(error, before / 3) << "a bit more is worth a factor of 3 at least";
    before = error;
  }
}

RC_GTEST_PROP(KvCache, ACorrectedVectorHasItsLength, (std::uint64_t seed)) {
  KvOptions options = any_kv_options();
  options.norm = NormKind::kCorrected;
  const KvCodec<float> codec(any_head_dim(), options);
  for (const auto* vectors : {&codec.v(), &codec.r()}) {
    const Matrix<float> x = normal_rows(seed, 1, vectors->size());
    const double length = x.norm(), back = decompress(*vectors, compress(*vectors, x)).norm();
    rc_require(close(back, length, (kF16Unit + 1e-6) * length));
  }
}

RC_GTEST_PROP(KvCache, ScaledByAPowerOfTwoOnlyTheNormChanges, (std::uint64_t seed)) {
  const KvCodec<float> codec(any_head_dim(), any_kv_options());
  const int exponent = *rc::gen::inRange(-12, 10);  // where f16 is normal
  const Matrix<float> x = normal_rows(seed, 3, codec.head_dim());
  const KvRows once = compress(codec.v(), x), scaled = compress<float>(codec.v(), x * std::ldexp(1.0f, exponent));
  RC_ASSERT(once.codes == scaled.codes);
  for (std::size_t i = 0; i < once.norms.size(); ++i) {
    RC_ASSERT(to_float(scaled.norms[i]) == std::ldexp(to_float(once.norms[i]), exponent));
  }
  RC_ASSERT(compress<float>(codec.v(), -x).codes != once.codes);  // control: not blind to x
}

TEST(KvCache, ZeroNanAndInfinityStayInTheirRow) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  for (const auto rotation : {RotationKind::kSignedHadamard, RotationKind::kDenseHaar}) {
    const KvCodec<float> codec(64, {.rotation = rotation});
    for (const auto* vectors : {&codec.v(), &codec.r()}) {
      const Matrix<float> clean = normal_rows(1, 6, vectors->size());
      Matrix<float> x = clean;
      x.row(1).setZero();
      x(2, 7) = nan;
      x(3, 9) = -infinity;
      x.row(4).setConstant(3e5f);  // a float, but longer than f16 reaches
      const KvRows rows = compress(*vectors, x), expected = compress(*vectors, clean);
      for (const Eigen::Index r : {0, 5}) {
        EXPECT_EQ(rows.codes.row(r), expected.codes.row(r));
        EXPECT_EQ(rows.norms[static_cast<std::size_t>(r)], expected.norms[static_cast<std::size_t>(r)]);
      }
      EXPECT_EQ(rows.norms[1].bits, 0);
      EXPECT_TRUE((rows.codes.row(1).array() == 0).all()) << "y = 0 is the lowest positive level";
      EXPECT_TRUE(std::isnan(to_float(rows.norms[2])));
      EXPECT_EQ(to_float(rows.norms[3]), infinity);
      EXPECT_EQ(to_float(rows.norms[4]), infinity);
      const Matrix<float> back = decompress(*vectors, rows);
      EXPECT_TRUE(back.row(0).allFinite() && back.row(5).allFinite());
      EXPECT_TRUE((back.row(1).array() == 0.0f).all());
      EXPECT_TRUE(back.row(2).array().isNaN().all());
    }
  }
}

/// A vector whose codes and norm can be had by hand: e_0 turned is +-1 / sqrt(n) everywhere, a magnitude of one
/// deviation. In the tables of 3 to 6 bits that is m = 1, 3, 7 and 14 (levels 0.7560, 0.9423, 1.0488, 1.0257); all
/// signs are that of s[0]; the planes are written out. The format cannot change without this example.
TEST(KvCache, GoldenVector) {
  constexpr int kMagnitude[] = {1, 3, 7, 14};
  constexpr double kLevel[] = {0.7560, 0.9423, 1.0488, 1.0257};
  for (const std::uint64_t seed : {0, 1, 2, 3}) {
    for (const int bits : {3, 4, 5, 6}) {
      const KvCodec<float> codec(64, {.v_bits = bits, .r_bits = bits, .seed = seed});
      for (const auto* vectors : {&codec.v(), &codec.r()}) {
        Matrix<float> x = Matrix<float>::Zero(1, vectors->size());
        x(0, 0) = 8.0f;
        const KvRows rows = compress(*vectors, x);
        const Eigen::Index plane = vectors->size() / 8;
        for (Eigen::Index byte = 0; byte < rows.codes.cols(); ++byte) {
          const auto p = static_cast<int>(byte / plane);
          const bool set = p == bits - 1 ? hadamard_sign(seed, 0) < 0 : (kMagnitude[bits - 3] >> p & 1) != 0;
          EXPECT_EQ(int{rows.codes(0, byte)}, set ? 255 : 0) << bits << " bits, byte " << byte;
        }
        EXPECT_TRUE(close(to_float(rows.norms[0]), 8.0 / kLevel[bits - 3], 8e-3)) << bits;
      }
    }
  }
}

// ---- the update

std::vector<std::int32_t> any_positions(std::int64_t buffer_len) {
  std::vector<std::int32_t> all(static_cast<std::size_t>(buffer_len));
  std::iota(all.begin(), all.end(), 0);
  for (std::size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[*rc::gen::inRange<std::size_t>(0, i)]);
  all.resize(*rc::gen::inRange<std::size_t>(1, all.size() + 1));
  return all;
}

constexpr std::uint8_t kPoisonCode = 0xA5;
constexpr KvNorm kPoisonNorm{0xFFA5};  // a NaN that no rounding makes

KvCacheBuffer poisoned(std::int64_t batch, std::int64_t n_head_kv, std::int64_t buffer_len,
                       const KvCodec<float>& codec) {
  KvCacheBuffer buffer(batch, n_head_kv, buffer_len, codec);
  for (const auto codes : {buffer.v_codes(), buffer.r_codes()}) std::fill(codes.begin(), codes.end(), kPoisonCode);
  for (const auto norms : {buffer.v_norm(), buffer.r_norm()}) std::fill(norms.begin(), norms.end(), kPoisonNorm);
  return buffer;
}

/// R of k [n, head_dim], a row each, by the words of the format.
Matrix<float> r_of(const Matrix<float>& k, const std::vector<float>& w) {
  const Eigen::Index head_dim = k.cols(), n_pair = head_dim / 8;
  Matrix<float> r(k.rows(), head_dim / 4);
  for (Eigen::Index i = 0; i < n_pair; ++i) {
    const float larger =
        std::max(std::abs(w[static_cast<std::size_t>(i)]), std::abs(w[static_cast<std::size_t>(head_dim / 2 + i)]));
    const float scale = std::exp2(std::floor(std::log2(larger)));
    r.col(i) = k.col(i) / scale;
    r.col(n_pair + i) = k.col(head_dim / 2 + i) / scale;
  }
  return r;
}

RC_GTEST_PROP(KvCache, RowsGoToTheirPositionsAndNoOtherByteChanges, (std::uint64_t seed)) {
  const auto batch = *rc::gen::inRange<std::int64_t>(1, 3), n_head_kv = *rc::gen::inRange<std::int64_t>(1, 4);
  const auto buffer_len = *rc::gen::inRange<std::int64_t>(1, 12);
  const KvCodec<float> codec(any_head_dim(), any_kv_options());
  const std::int64_t head_dim = codec.head_dim();
  const std::vector<float> w = spread_weights(seed, head_dim);
  const std::vector<std::int32_t> positions = any_positions(buffer_len);
  const auto n_new = static_cast<std::int64_t>(positions.size());
  const Matrix<float> k = normal_rows(2 * seed, batch * n_new * n_head_kv, head_dim);
  const Matrix<float> v = normal_rows(2 * seed + 1, batch * n_new * n_head_kv, head_dim);
  KvCacheBuffer buffer = poisoned(batch, n_head_kv, buffer_len, codec);
  kv_cache_update<float>(codec, heads(k, batch, n_new, n_head_kv), heads(v, batch, n_new, n_head_kv), w, positions,
                         buffer.view());
  const auto check = [&](const KvVectorCodec<float>& vectors, const Matrix<float>& x, View<std::uint8_t, 4> codes,
                         View<KvNorm, 3> norms) {
    const KvRows rows = compress(vectors, x);
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t h = 0; h < n_head_kv; ++h) {
        for (std::int32_t p = 0; p < buffer_len; ++p) {
          const auto found = std::find(positions.begin(), positions.end(), p);
          const bool is_new = found != positions.end();
          const auto row = is_new ? (b * n_new + (found - positions.begin())) * n_head_kv + h : 0;
          for (std::int64_t j = 0; j < vectors.code_bytes(); ++j) {
            RC_ASSERT(codes(b, h, p, j) == (is_new ? rows.codes(row, j) : kPoisonCode));
          }
          RC_ASSERT(norms(b, h, p) == (is_new ? rows.norms[static_cast<std::size_t>(row)] : kPoisonNorm));
        }
      }
    }
  };
  check(codec.v(), v, buffer.view().v_codes, buffer.view().v_norm);
  check(codec.r(), r_of(k, w), buffer.view().r_codes, buffer.view().r_norm);
}

RC_GTEST_PROP(KvCache, WithoutCodesTheValuesAreStored, (std::uint64_t seed)) {
  const std::int64_t head_dim = any_head_dim();
  const std::vector<float> w = spread_weights(seed, head_dim);
  const Matrix<float> k = normal_rows(2 * seed, 3 * 2, head_dim), v = normal_rows(2 * seed + 1, 3 * 2, head_dim);
  const Matrix<float> r = r_of(k, w);
  const std::vector<std::int32_t> positions = {4, 0, 2};
  KvPlainBuffer<float> exact(1, 2, 5, head_dim);
  KvPlainBuffer<Bf16> rounded(1, 2, 5, head_dim);
  reference::kv_cache_update<float, float>(heads(k, 1, 3, 2), heads(v, 1, 3, 2), w, positions, exact.view());
  reference::kv_cache_update<float, Bf16>(heads(k, 1, 3, 2), heads(v, 1, 3, 2), w, positions, rounded.view());
  for (std::int64_t t = 0; t < 3; ++t) {
    for (std::int64_t h = 0; h < 2; ++h) {
      const std::int32_t p = positions[static_cast<std::size_t>(t)];
      for (std::int64_t i = 0; i < head_dim; ++i) {
        RC_ASSERT(exact.view().v(0, h, p, i) == v(2 * t + h, i));
        RC_ASSERT(rounded.view().v(0, h, p, i) == to_bf16(v(2 * t + h, i)));
      }
      for (std::int64_t j = 0; j < head_dim / 4; ++j) {
        RC_ASSERT(exact.view().r(0, h, p, j) == r(2 * t + h, j));
        RC_ASSERT(rounded.view().r(0, h, p, j) == to_bf16(r(2 * t + h, j)));
      }
    }
  }
  RC_ASSERT(exact.view().v(0, 1, 1, 3) == 0.0f);
}

/// The model that has w times s at a pair, and q's norm over s, is the same; so is its cache, for s a power of two.
RC_GTEST_PROP(KvCache, ASpreadOfTheWeightsChangesNoBit, (std::uint64_t seed)) {
  const KvCodec<float> codec(any_head_dim(), any_kv_options());
  const std::int64_t head_dim = codec.head_dim();
  const std::vector<float> w = spread_weights(seed, head_dim);
  const Matrix<float> k = normal_rows(2 * seed, 4, head_dim), v = normal_rows(2 * seed + 1, 4, head_dim);
  std::vector<float> spread_w = w;
  Matrix<float> spread_k = k;
  for (std::int64_t i = 0; i < head_dim; ++i) {
    const int exponent = static_cast<int>(mix_bits(seed + static_cast<std::uint64_t>(i % (head_dim / 2))) % 13) - 6;
    spread_w[static_cast<std::size_t>(i)] = std::ldexp(w[static_cast<std::size_t>(i)], exponent);
    spread_k.col(i) *= std::ldexp(1.0f, exponent);
  }
  const std::vector<std::int32_t> positions = {0, 1, 2, 3};
  const auto stored = [&](const Matrix<float>& keys, const std::vector<float>& weights) {
    KvCacheBuffer buffer(1, 1, 4, codec);
    kv_cache_update<float>(codec, heads(keys, 1, 4, 1), heads(v, 1, 4, 1), weights, positions, buffer.view());
    return buffer;
  };
  RC_ASSERT(stored(spread_k, spread_w) == stored(k, w));
  RC_ASSERT(!(stored(spread_k, w) == stored(k, w)));  // control: keys alone are other codes
}

TEST(KvCache, MisuseIsRefusedByNameAndWritesNothing) {
  const KvCodec<float> codec(64, {});
  const auto refused = [&](std::vector<std::int32_t> positions, const std::vector<std::string>& words, auto bend) {
    const auto n_new = static_cast<std::int64_t>(positions.size());
    const Matrix<float> x = normal_rows(1, n_new * 2, 64);
    View<const float, 4> k = make_view(x.data(), 1, n_new, 2, 64), v = k;
    std::vector<float> w(64, 1.0f);
    KvCacheBuffer buffer = poisoned(1, 2, 8, codec);
    const KvCacheBuffer before = buffer.clone();
    KvCacheView cache = buffer.view();
    bend(k, v, w, cache);
    EXPECT_TRUE(refuses([&] { kv_cache_update<float>(codec, k, v, w, positions, cache); }, words));
    EXPECT_EQ(buffer, before);
  };
  const auto straight = [](auto&, auto&, auto&, auto&) {};
  refused({0, 8}, {"kv_cache_update", "positions[1] is 8", "buffer_len = 8"}, straight);
  refused({-3, 1}, {"positions[0] is -3"}, straight);
  refused({7, 2, 7}, {"positions[0]", "positions[2]", "both 7"}, straight);
  refused({0, 1}, {"k has extent 3 on axis 1", "= 2"}, [](auto& k, auto&, auto&, auto&) { k.extent[1] = 3; });
  refused({0, 1}, {"v has extent 128 on axis 3", "head_dim = 64"},
          [](auto&, auto& v, auto&, auto&) { v.extent[3] = 128; });
  refused({0, 1}, {"k_weight has 32 values", "head_dim 64"}, [](auto&, auto&, auto& w, auto&) { w.resize(32); });
  refused({0, 1}, {"v_codes has extent 32", "need 40"}, [](auto&, auto&, auto&, auto& c) { c.v_codes.extent[3] = 32; });
  refused({0, 1}, {"r_codes has extent 10", "need 8"}, [](auto&, auto&, auto&, auto& c) { c.r_codes.extent[3] = 10; });
  refused({0, 1}, {"r_norm", "need 2"}, [](auto&, auto&, auto&, auto& c) { c.r_norm.extent[1] = 1; });
  EXPECT_TRUE(refuses([] { KvCodec<float>(96, {}); }, {"head_dim 96"}));
  EXPECT_TRUE(refuses([] { KvCodec<float>(1024, {}); }, {"head_dim 1024"}));
  EXPECT_TRUE(refuses([] { KvCodec<float>(64, {.v_bits = 2}); }, {"bits 2"}));
  EXPECT_TRUE(refuses([] { KvCodec<float>(64, {.r_bits = 7}); }, {"bits 7"}));
  EXPECT_TRUE(refuses([&] { KvCodec<float>(codec.v(), codec.v()); }, {"R of 64 values", "need 16"}));
  Matrix<float> out(3, 64);
  const KvRows rows = compress<float>(codec.v(), Matrix<float>::Zero(2, 64));
  EXPECT_TRUE(refuses([&] { codec.v().decompress(rows.code_view(), rows.norm_view(), out); }, {"codes are [2, 40]"}));
}

TEST(KvCache, ABufferHoldsWhatTheFormatSays) {
  const KvCodec<float> codec(512, {});
  EXPECT_EQ(KvCacheBuffer(1, 4, 1000, codec).bytes(), 4 * 1000 * 388);
  EXPECT_EQ(KvPlainBuffer<Bf16>(1, 4, 1000, 512).bytes(), 4 * 1000 * 1280);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include "reference/layer_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/kv_rows.hpp"

/// The caches of a layer against attention over what they ought to hold, written out: which format a layer gets, what
/// it rounds, which tokens a query sees, chunk after chunk. In double, so that nothing else rounds.
namespace {

using namespace gemma4;
using reference::CacheSide;
using reference::LayerCache;
using reference::Matrix;
using reference::Qkv;

constexpr std::int64_t kContext = 30;
constexpr std::int64_t kChunks[] = {5, 1, 7, 2, 9};

/// Two layers, a sliding one and a full one, with heads of different counts and widths.
ModelConfig config_of_two() {
  ModelConfig config = gemma4_tiny();
  config.n_head = 4;
  config.window = 6;
  config.sliding.head_dim = 64;
  config.sliding.n_head_kv = 2;
  config.full.head_dim = 128;
  config.full.n_head_kv = 1;
  config.is_sliding = {1, 0};
  return config;
}

/// [128] weights of a k norm, from 0.05 to 5.
std::span<const float> k_norm() {
  static const std::vector<float> weights = [] {
    std::vector<float> values;
    for (int i = 0; i < 128; ++i) values.push_back(0.5f * std::pow(10.0f, std::sin(static_cast<float>(i))));
    return values;
  }();
  return weights;
}

/// q, k and v of kContext tokens that no storage holds exactly.
Qkv<double> random_qkv(const ModelConfig& config, const AttentionConfig& attention, std::uint64_t seed) {
  const auto matrix = [&](std::uint64_t stream, std::int64_t n_head) {
    const std::int64_t cols = n_head * attention.head_dim;
    const std::vector<float> values = testkit::draw(2 * seed + 1000 * stream, kContext * cols, 0.4f);
    const std::vector<float> rest = testkit::draw(2 * seed + 1000 * stream + 1, kContext * cols, 1e-3f);
    return Matrix<double>((Eigen::Map<const Matrix<float>>(values.data(), kContext, cols) +
                           Eigen::Map<const Matrix<float>>(rest.data(), kContext, cols))
                              .cast<double>());
  };
  return {matrix(1, config.n_head), matrix(2, attention.n_head_kv), matrix(3, attention.n_head_kv), k_norm()};
}

/// The same for a layer whose K is its V: its values, and the weighted and turned ones.
Qkv<double> one_vector_qkv(const ModelConfig& config, const AttentionConfig& attention, std::uint64_t seed) {
  Qkv<double> qkv = random_qkv(config, attention, seed);
  qkv.k = qkv.v;
  for (Eigen::Index i = 0; i < qkv.k.cols(); ++i) {
    qkv.k.col(i) *= static_cast<double>(qkv.k_norm[static_cast<std::size_t>(i % attention.head_dim)]);
  }
  reference::rope<double>(qkv.k, 0, attention);
  return qkv;
}

Qkv<double> rows_of(const Qkv<double>& qkv, std::int64_t first, std::int64_t count) {
  return {qkv.q.middleRows(first, count), qkv.k.middleRows(first, count), qkv.v.middleRows(first, count), qkv.k_norm};
}

/// What a cache of this format holds of m [n_token, n_head_kv * head_dim].
Matrix<double> stored(const std::string& format, const Matrix<double>& m, std::int64_t head_dim, CacheSide side) {
  if (format == "f32") return m.cast<float>().cast<double>();
  if (format == "bf16") {
    return m.unaryExpr([](double x) { return static_cast<double>(to_float(to_bf16(static_cast<float>(x)))); });
  }
  const reference::Tq4Codec<double> codec(head_dim, std::get<Tq4Format>(parse_cache_spec(format)).options);
  Matrix<double> rows = Eigen::Map<const Matrix<double>>(m.data(), m.size() / head_dim, head_dim);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(rows.size() / 2));
  std::vector<Tq4Norm> norms(static_cast<std::size_t>(rows.rows()));
  codec.compress(side, rows, make_view(codes.data(), rows.rows(), head_dim / 2), make_view(norms.data(), rows.rows()));
  codec.decompress(side, make_view(std::as_const(codes).data(), rows.rows(), head_dim / 2),
                   make_view(std::as_const(norms).data(), rows.rows()), rows);
  return Eigen::Map<const Matrix<double>>(rows.data(), m.rows(), m.cols());
}

/// softmax(q K^T) V of every token over the keys (t - window, t], for every head; no scale.
Matrix<double> attended(const Matrix<double>& q, const Matrix<double>& k, const Matrix<double>& v,
                        std::int64_t head_dim, std::int64_t window) {
  const std::int64_t group = q.cols() / k.cols();
  Matrix<double> out(q.rows(), q.cols());
  for (Eigen::Index t = 0; t < q.rows(); ++t) {
    const Eigen::Index first = std::max<Eigen::Index>(0, t + 1 - window), count = t + 1 - first;
    for (std::int64_t head = 0; head < q.cols() / head_dim; ++head) {
      const Eigen::Index at = head / group * head_dim;
      const Eigen::ArrayXd score =
          (k.block(first, at, count, head_dim) * q.row(t).segment(head * head_dim, head_dim).transpose()).array();
      const Eigen::VectorXd weight = (score - score.maxCoeff()).exp().matrix();
      out.row(t).segment(head * head_dim, head_dim) =
          weight.transpose() * v.block(first, at, count, head_dim) / weight.sum();
    }
  }
  return out;
}

/// All tokens through the cache of a layer, in chunks.
Matrix<double> through(LayerCache<double>& cache, const Qkv<double>& qkv) {
  Matrix<double> out(qkv.q.rows(), qkv.q.cols());
  std::int64_t position = 0;
  for (std::size_t i = 0; position < qkv.q.rows(); ++i) {
    const std::int64_t count = std::min(kChunks[i % std::size(kChunks)], qkv.q.rows() - position);
    const Qkv<double> chunk = rows_of(qkv, position, count);
    out.middleRows(position, count) = std::visit([&](auto& layer) { return layer.attend(chunk, position); }, cache);
    position += count;
  }
  return out;
}

double largest_difference(const Matrix<double>& a, const Matrix<double>& b) {
  return (a - b).cwiseAbs().maxCoeff();
}

struct Format {
  const char* name;
  const char* ring;  ///< of the sliding layers beside it
};

class LayerCacheOf : public testing::TestWithParam<Format> {};

constexpr double kSameFormula = 1e-10;  // double sums in another order, on values below 1

TEST_P(LayerCacheOf, AttendsToWhatItsFormatHolds) {
  const ModelConfig config = config_of_two();
  auto caches = reference::make_layer_caches<double>(config, parse_cache_spec(GetParam().name), kContext);
  ASSERT_EQ(caches.size(), 2u);
  for (const bool sliding : {true, false}) {
    const AttentionConfig& attention = sliding ? config.sliding : config.full;
    const std::int64_t window = sliding ? config.window : kContext;
    const std::string format = sliding ? GetParam().ring : GetParam().name;
    const Qkv<double> qkv = random_qkv(config, attention, sliding ? 5 : 6);
    const Matrix<double> out = through(caches[sliding ? 0 : 1], qkv);
    const auto expected = [&](const std::string& k_format, const std::string& v_format, std::int64_t n_key) {
      return attended(qkv.q, stored(k_format, qkv.k, attention.head_dim, CacheSide::kKey),
                      stored(v_format, qkv.v, attention.head_dim, CacheSide::kValue), attention.head_dim, n_key);
    };
    EXPECT_LE(largest_difference(out, expected(format, format, window)), kSameFormula)
        << format << (sliding ? ", sliding" : ", full");
    // Controls: another format of K or of V, and a window of another length, are far outside.
    for (const char* other : {"f32", "bf16", "tq4", "tq4-raw", "tq4-k3v2"}) {
      if (format == other) continue;
      EXPECT_GT(largest_difference(out, expected(other, format, window)), 100 * kSameFormula) << "K as " << other;
      EXPECT_GT(largest_difference(out, expected(format, other, window)), 100 * kSameFormula) << "V as " << other;
    }
    EXPECT_GT(largest_difference(out, expected(format, format, window - 1)), 100 * kSameFormula);
  }
}

/// A query without keys, as a drafter has: on a full layer it sees the first kv_len of them, on a sliding one the
/// window - 1 newest of those. Later tokens are in the cache already where kv_len is not the last.
TEST_P(LayerCacheOf, QueriesAloneSeeTheKeysBeforeThemAndStoreNone) {
  const ModelConfig config = config_of_two();
  auto caches = reference::make_layer_caches<double>(config, parse_cache_spec(GetParam().name), kContext);
  for (const bool sliding : {true, false}) {
    const AttentionConfig& attention = sliding ? config.sliding : config.full;
    const std::string format = sliding ? GetParam().ring : GetParam().name;
    const Qkv<double> qkv = random_qkv(config, attention, sliding ? 5 : 6);
    static_cast<void>(through(caches[sliding ? 0 : 1], qkv));
    const Matrix<double> k = stored(format, qkv.k, attention.head_dim, CacheSide::kKey);
    const Matrix<double> v = stored(format, qkv.v, attention.head_dim, CacheSide::kValue);
    const Matrix<double> q = random_qkv(config, attention, 11).q;
    const std::int64_t n_key = sliding ? config.window - 1 : kContext;
    for (const std::int64_t kv_len : {kContext, kContext - 3, config.window, config.window - 1, std::int64_t{1}}) {
      const Matrix<double> one = q.row(kv_len - 1);
      const auto ask = [&] {
        return std::visit([&](const auto& layer) { return layer.attend_queries(one, qkv.k_norm, kv_len); },
                          std::as_const(caches[sliding ? 0 : 1]));
      };
      const auto off_by = [&](std::int64_t keys) {
        return largest_difference(ask(), attended(q, k, v, attention.head_dim, keys).row(kv_len - 1));
      };
      EXPECT_LE(off_by(n_key), kSameFormula) << format << (sliding ? ", sliding" : ", full") << ", kv_len " << kv_len;
      EXPECT_EQ(ask(), ask()) << "something was stored";
      if (kv_len < n_key) continue;  // the controls: one key less, and where there is one, one key more
      EXPECT_GT(off_by(n_key - 1), 100 * kSameFormula);
      if (kv_len > n_key) {
        EXPECT_GT(off_by(n_key + 1), 100 * kSameFormula);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, LayerCacheOf,
                         testing::Values(Format{"f32", "f32"}, Format{"bf16", "bf16"}, Format{"tq4", "bf16"},
                                         Format{"tq4-k3v2", "bf16"}, Format{"tq4-k2v4-cut-raw-haar", "bf16"}),
                         [](const auto& info) {
                           std::string name = info.param.name;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

/// V and the rotated quarter of K as codes give them back; K's other places are V's times the weight.
TEST(LayerCache, OneVectorForKAndVIsVAndTheRotatedQuarterOfK) {
  const ModelConfig config = config_of_two();
  const AttentionConfig& attention = config.full;
  const std::int64_t head_dim = attention.head_dim;
  const Qkv<double> qkv = one_vector_qkv(config, attention, 8);
  const auto read = [](const reference::KvVectorCodec<double>& codec, const Matrix<double>& rows) {
    return testkit::decompress(codec, testkit::compress(codec, rows));
  };
  const auto keys = [&](const Matrix<double>& v, const Matrix<double>& r) {
    Matrix<double> k = v * reference::as_row<double>(qkv.k_norm).asDiagonal();
    for (Eigen::Index j = 0; j < head_dim / 4; ++j) {
      k.col(kv_rotated_place(head_dim, j)) = r.col(j) * kv_rotated_scale(qkv.k_norm.data(), head_dim, j);
    }
    return k;
  };
  Matrix<double> r(kContext, head_dim / 4);
  for (Eigen::Index j = 0; j < r.cols(); ++j) {
    r.col(j) = qkv.k.col(kv_rotated_place(head_dim, j)) / kv_rotated_scale(qkv.k_norm.data(), head_dim, j);
  }
  const auto out_of = [&](const char* format) {
    auto caches = reference::make_layer_caches<double>(config, parse_cache_spec(format), kContext);
    return through(caches[1], qkv);
  };
  for (const char* format : {"kv5r4", "kv3r6-cut-raw-haar"}) {
    const reference::KvCodec<double> codec(head_dim, std::get<KvFormat>(parse_cache_spec(format)).options);
    const Matrix<double> v_read = read(codec.v(), qkv.v), r_read = read(codec.r(), r);
    const auto expected = [&](const Matrix<double>& k, const Matrix<double>& v) {
      return attended(qkv.q, k, v, head_dim, kContext);
    };
    const Matrix<double> out = out_of(format);
    EXPECT_LE(largest_difference(out, expected(keys(v_read, r_read), v_read)), kSameFormula) << format;
    EXPECT_GT(largest_difference(out, expected(keys(qkv.v, r_read), v_read)), 100 * kSameFormula) << "K's from V";
    EXPECT_GT(largest_difference(out, expected(keys(v_read, r), v_read)), 100 * kSameFormula) << "R as it was";
    EXPECT_GT(largest_difference(out, expected(keys(v_read, r_read), qkv.v)), 100 * kSameFormula) << "V as it was";
  }
  // bf16 is 2^-9 of a value, and scores of some ten.
  EXPECT_LE(largest_difference(out_of("kv16r16"), attended(qkv.q, qkv.k, qkv.v, head_dim, kContext)), 0.05);
  Qkv<double> own_values = qkv;
  own_values.k_norm = {};
  auto caches = reference::make_layer_caches<double>(config, parse_cache_spec("kv5r4"), kContext);
  EXPECT_THROW((void)through(caches[1], own_values), std::invalid_argument) << "a layer whose K is not its V";
}

/// Of every format: what a token sees that is alone in its chunk, a query alone sees behind it.
TEST(LayerCache, AQueryAloneSeesWhatTheNewestTokenSaw) {
  const ModelConfig config = config_of_two();
  for (const char* format : {"f32", "bf16", "tq4", "tq4-peer", "kv5r4", "kv3r6-cut-raw-haar", "kv16r16", "sim-int8",
                             "sim-k4v4-had", "sim-k4v4-had-tail4", "sim-kvarn-k4v2"}) {
    const Qkv<double> qkv = one_vector_qkv(config, config.full, 8);
    auto caches = reference::make_layer_caches<double>(config, parse_cache_spec(format), kContext);
    const auto rows = [&](std::int64_t first, std::int64_t count) { return rows_of(qkv, first, count); };
    const std::int64_t last = kContext - 1;
    const Matrix<double> saw = std::visit(
        [&](auto& layer) {
          for (std::int64_t t = 0; t < last; ++t) static_cast<void>(layer.attend(rows(t, 1), t));
          return layer.attend(rows(last, 1), last);
        },
        caches[1]);
    const auto ask = [&](const Matrix<double>& q, std::int64_t kv_len) {
      return std::visit([&](const auto& layer) { return layer.attend_queries(q, qkv.k_norm, kv_len); },
                        std::as_const(caches[1]));
    };
    EXPECT_EQ(ask(qkv.q.row(last), kContext), saw) << format;
    EXPECT_NE(ask(qkv.q.row(last), last), saw) << format << ", the control: one key less";
    EXPECT_THROW((void)ask(qkv.q.row(last), kContext + 1), std::invalid_argument) << format;
    EXPECT_THROW((void)ask(qkv.q.row(last), 0), std::invalid_argument) << format;
  }
}

TEST(LayerCache, ARingRefusesQueriesOfTokensThatAreGone) {
  const ModelConfig config = config_of_two();
  auto caches = reference::make_layer_caches<double>(config, parse_cache_spec("bf16"), kContext);
  const Qkv<double> qkv = random_qkv(config, config.sliding, 5);
  auto& ring = std::get<reference::SlidingLayerCache<Bf16>>(caches[0]);
  for (std::int64_t position = 0; position < 5 * kContext; position += kContext) {
    static_cast<void>(ring.attend(qkv, position));
  }
  const Matrix<double> q = qkv.q.row(0);
  const auto ask = [&](std::int64_t kv_len) { return ring.attend_queries(q, {}, kv_len); };
  EXPECT_NO_THROW((void)ask(5 * kContext));
  EXPECT_NO_THROW((void)ask(5 * kContext - kMaxRewind));
  EXPECT_THROW((void)ask(5 * kContext - kMaxRewind - 1), std::invalid_argument);
  EXPECT_THROW((void)ask(5 * kContext + 1), std::invalid_argument);
  EXPECT_THROW((void)ask(0), std::invalid_argument);
  EXPECT_THROW((void)ring.attend_queries(Matrix<double>(qkv.q.topRows(2)), {}, 5), std::invalid_argument);
}

TEST(LayerCache, EveryLayerHasItsOwn) {
  ModelConfig config = config_of_two();
  config.is_sliding = {0, 0, 1, 1};
  for (const char* format : {"f32", "bf16", "tq4", "kv5r4", "kv16r16"}) {
    auto caches = reference::make_layer_caches<double>(config, parse_cache_spec(format), kContext);
    ASSERT_EQ(caches.size(), 4u);
    for (std::size_t layer : {0, 2}) {
      const AttentionConfig& attention = config.attention(static_cast<std::int64_t>(layer));
      const Qkv<double> first = random_qkv(config, attention, 1), second = random_qkv(config, attention, 2);
      const Matrix<double> a = through(caches[layer], first);
      auto fresh = reference::make_layer_caches<double>(config, parse_cache_spec(format), kContext);
      // The neighbour of the same kind has seen nothing of it.
      EXPECT_EQ(through(caches[layer + 1], second), through(fresh[layer + 1], second)) << format << ", layer " << layer;
      EXPECT_EQ(through(fresh[layer], first), a);
    }
  }
}

}  // namespace

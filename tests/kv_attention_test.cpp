// SPDX-License-Identifier: Apache-2.0
#include "reference/kv_attention.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "reference/bf16_attention.hpp"
#include "reference/bf16_cache.hpp"
#include "reference/rms_norm.hpp"
#include "reference/rope.hpp"
#include "tests/support/attention_promises.hpp"
#include "tests/support/kv_rows.hpp"

/// Attention over a cache of one vector for K and V: what every attention promises, over codes; and that it is
/// attention on K and V apart, where nothing is rounded.
namespace gemma4::reference {
namespace {

using namespace gemma4::testkit;

/// Codecs are drawn once: solving a codebook costs more than a small attention.
template <class Scalar>
const KvCodec<Scalar>& codec_of(std::int64_t head_dim, const KvOptions& options = {}) {
  static std::map<std::tuple<std::int64_t, int, int>, std::unique_ptr<KvCodec<Scalar>>> codecs;
  auto& codec = codecs[{head_dim, options.v_bits, options.r_bits}];
  if (!codec) codec = std::make_unique<KvCodec<Scalar>>(head_dim, options);
  return *codec;
}

/// Widths of V and R, apart in most cases: a codebook taken for the other's shows.
KvOptions widths_of(const AttentionCase& c) {
  constexpr std::pair<int, int> kWidths[] = {{5, 4}, {4, 4}, {6, 3}, {3, 6}, {4, 5}};
  const auto& [v_bits, r_bits] = kWidths[c.seed % 5];
  return {.v_bits = v_bits, .r_bits = r_bits};
}

View<const float, 4> tokens_first(const AttentionShape& s, const std::vector<float>& x) {
  View<const float, 4> view = make_view(x.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim);
  std::swap(view.extent[1], view.extent[2]);
  std::swap(view.stride[1], view.stride[2]);
  return view;
}

std::vector<std::int32_t> positions_to(std::int64_t count) {
  std::vector<std::int32_t> positions(static_cast<std::size_t>(count));
  std::iota(positions.begin(), positions.end(), 0);
  return positions;
}

/// K in full from V and R as read, [batch, n_head_kv, buffer_len, head_dim]: w * V, and c * R at the rotated places.
std::vector<double> keys_of(const Matrix<double>& v, const Matrix<double>& r, const std::vector<float>& w) {
  Matrix<double> k(v.rows(), v.cols());
  const Eigen::Index head_dim = v.cols(), n_pair = head_dim / 8;
  for (Eigen::Index i = 0; i < head_dim; ++i) k.col(i) = v.col(i) * static_cast<double>(w[static_cast<std::size_t>(i)]);
  for (Eigen::Index i = 0; i < n_pair; ++i) {
    const auto first = static_cast<std::size_t>(i), second = static_cast<std::size_t>(head_dim / 2 + i);
    const double scale = std::exp2(std::floor(std::log2(std::max(std::abs(w[first]), std::abs(w[second])))));
    k.col(i) = r.col(i) * scale;
    k.col(head_dim / 2 + i) = r.col(n_pair + i) * scale;
  }
  return {k.data(), k.data() + k.size()};
}

/// The reference over codes that it compressed itself. The rows of case.k(), times the weights, stand for K at the
/// rotated places.
template <class Scalar>
class KvSubject {
 public:
  explicit KvSubject(const AttentionCase& c)
      : case_(c),
        q_(c.q()),
        w_(spread_weights(c.seed, c.shape.head_dim)),
        cache_(c.shape.batch, c.shape.n_head_kv, c.shape.buffer_len, codec_of<float>(c.shape.head_dim, widths_of(c))) {
    std::vector<float> k = c.k();
    const std::vector<float> v = c.v();
    // A model's keys have the size of their weights.
    for (std::size_t i = 0; i < k.size(); ++i) k[i] *= std::abs(w_[i % w_.size()]);
    kv_cache_update<float>(codec_of<float>(c.shape.head_dim, widths_of(c)), tokens_first(c.shape, k),
                           tokens_first(c.shape, v), w_, positions_to(c.shape.buffer_len), cache_.view());
  }

  /// Norms a thousand times larger or NaN, and other codes.
  void spoil(std::int64_t first, std::int64_t last, Spoil kind) {
    const KvCacheView view = cache_.view();
    for (std::int64_t b = 0; b < case_.shape.batch; ++b) {
      for (std::int64_t h = 0; h < case_.shape.n_head_kv; ++h) {
        for (std::int64_t j = first; j < last; ++j) {
          for (KvNorm* norm : {&view.v_norm(b, h, j), &view.r_norm(b, h, j)}) {
            *norm = to_f16(kind == Spoil::kNaN ? std::numeric_limits<float>::quiet_NaN() : 1000 * to_float(*norm));
          }
          for (std::int64_t i = 0; i < view.v_codes.extent[3]; ++i) view.v_codes(b, h, j, i) ^= 0x5A;
          for (std::int64_t i = 0; i < view.r_codes.extent[3]; ++i) view.r_codes(b, h, j, i) ^= 0xF0;
        }
      }
    }
  }

  [[nodiscard]] KvSubject sliced(std::int64_t kv_len) const {
    KvSubject slice(case_, q_, w_, kv_len);
    const ConstKvCacheView from = cache_.view();
    const KvCacheView to = slice.cache_.view();
    for (std::int64_t b = 0; b < case_.shape.batch; ++b) {
      for (std::int64_t h = 0; h < case_.shape.n_head_kv; ++h) {
        for (std::int64_t j = 0; j < kv_len; ++j) {
          std::copy_n(&from.v_codes(b, h, j, 0), from.v_codes.extent[3], &to.v_codes(b, h, j, 0));
          std::copy_n(&from.r_codes(b, h, j, 0), from.r_codes.extent[3], &to.r_codes(b, h, j, 0));
          to.v_norm(b, h, j) = from.v_norm(b, h, j);
          to.r_norm(b, h, j) = from.r_norm(b, h, j);
        }
      }
    }
    return slice;
  }

  [[nodiscard]] std::vector<float> attend(const AttentionOptions& options, std::optional<std::int64_t> kv_len) const {
    return attend(options, kv_len, 0, case_.shape.n_query);
  }
  [[nodiscard]] std::vector<float> attend(const AttentionOptions& options, std::optional<std::int64_t> kv_len,
                                          std::int64_t first, std::int64_t n_query) const {
    const AttentionShape& s = case_.shape;
    const std::vector<Scalar> q(q_.begin(), q_.end());
    std::vector<Scalar> out(static_cast<std::size_t>(s.batch * n_query * s.n_head * s.head_dim), Scalar(-7));
    View<const Scalar, 4> queries = make_view(q.data(), s.batch, s.n_query, s.n_head, s.head_dim);
    queries.data += first * queries.stride[1];
    queries.extent[1] = n_query;
    kv_attention<Scalar>(queries, w_, cache_.view(), codec_of<Scalar>(s.head_dim, widths_of(case_)), options, kv_len,
                         make_view(out.data(), s.batch, n_query, s.n_head, s.head_dim));
    return {out.begin(), out.end()};
  }

  /// The naive loop on K and V as they are read, its magnitudes as lengths of vectors.
  [[nodiscard]] NaiveAttention exact(const Sees& sees) const {
    const AttentionShape& s = case_.shape;
    const KvOptions options = widths_of(case_);
    const std::int64_t n_row = s.batch * s.n_head_kv * s.buffer_len, n_rotated = s.head_dim / 4;
    const ConstKvCacheView view = cache_.view();
    const Matrix<double> v = decode_kv_vectors(n_row, s.head_dim, view.v_codes.data, view.v_norm.data,
                                               solve_kv_codebook(CodebookKind::kFull, options.v_bits, s.head_dim), 0);
    const Matrix<double> r = decode_kv_vectors(n_row, n_rotated, view.r_codes.data, view.r_norm.data,
                                               solve_kv_codebook(CodebookKind::kFull, options.r_bits, n_rotated), 0);
    NaiveAttention exact = naive_attention(s, case_.scale, q_, keys_of(v, r, w_),
                                           std::vector<double>(v.data(), v.data() + v.size()), sees);
    const double longest_v = v.rowwise().norm().maxCoeff();
    const double longest_k = (v.rowwise().squaredNorm() + r.rowwise().squaredNorm()).cwiseSqrt().maxCoeff();
    for (std::size_t i = 0; i < exact.out.size(); ++i) {
      const std::size_t head = i / static_cast<std::size_t>(s.head_dim) * static_cast<std::size_t>(s.head_dim);
      double squares =
          0;  // of the folded query: |w| and c are at most twice each other's pair, so |c q| <= |w q| + ...
      for (std::size_t j = 0; j < static_cast<std::size_t>(s.head_dim); ++j) {
        const std::size_t half = static_cast<std::size_t>(s.head_dim) / 2;
        const double weight = std::max(std::abs(w_[j]), std::abs(w_[(j + half) % (2 * half)]));
        squares += std::pow(weight * static_cast<double>(q_[head + j]), 2);
      }
      exact.score_magnitude[i] = case_.scale * std::sqrt(squares) * longest_k;
      exact.value_magnitude[i] = longest_v;
    }
    return exact;
  }

  /// As TQ4's (a butterfly adds log2(head_dim) times and is scaled once, a stored value is one product); folding rounds
  /// once more, and a score is a sum of 5/4 head_dim products.
  [[nodiscard]] AttentionRounding rounding() const {
    const std::int64_t n_block = case_.shape.buffer_len / detail::kKeyBlock + 1;
    const auto head_dim = static_cast<double>(case_.shape.head_dim);
    return {.unit = std::is_same_v<Scalar, double> ? 0x1p-53 : 0x1p-24,
            .output_unit = 0x1p-24,
            .longest_sum = detail::kKeyBlock + n_block,
            .n_rescale = n_block,
            .rotation_roundings = std::log2(head_dim) + 3 + head_dim / 4};
  }

 private:
  KvSubject(const AttentionCase& c, const std::vector<float>& q, const std::vector<float>& w, std::int64_t buffer_len)
      : case_(c),
        q_(q),
        w_(w),
        cache_(c.shape.batch, c.shape.n_head_kv, buffer_len, codec_of<float>(c.shape.head_dim, widths_of(c))) {
    case_.shape.buffer_len = buffer_len;
  }

  AttentionCase case_;
  std::vector<float> q_, w_;
  KvCacheBuffer cache_;
};

using Float = KvSubject<float>;
using Wide = KvSubject<double>;

RC_GTEST_PROP(KvAttention, AgreesWithTheNaiveLoopOnWhatIsRead, (const AttentionCase& c)) {
  agrees_with_exact<Float>(c);
}
RC_GTEST_PROP(KvAttention, DoubleAgreesWithTheNaiveLoopOnWhatIsRead, (const AttentionCase& c)) {
  agrees_with_exact<Wide>(c);
}
RC_GTEST_PROP(KvAttention, GarbageTailIsNeverRead, (const AttentionCase& c)) {
  garbage_tail_is_never_read<Float>(c);
}
RC_GTEST_PROP(KvAttention, ClampEqualsSlice, (const AttentionCase& c)) {
  clamp_equals_slice<Float>(c);
}
RC_GTEST_PROP(KvAttention, CausalSkipChangesNothing, (const AttentionCase& c)) {
  causal_skip_changes_nothing<Float>(c);
}
RC_GTEST_PROP(KvAttention, AnyChunkSizeAgrees, (const AttentionCase& c)) {
  any_chunk_size_agrees<Wide>(c);
}
RC_GTEST_PROP(KvAttention, MaskHidesKeys, (const AttentionCase& c)) {
  mask_hides_keys<Wide>(c);
}
RC_GTEST_PROP(KvAttention, MaskedGarbageHasNoInfluence, (const AttentionCase& c)) {
  masked_garbage_has_no_influence<Float>(c);
}
RC_GTEST_PROP(KvAttention, SameCallGivesSameBits, (const AttentionCase& c)) {
  same_call_gives_same_bits<Float>(c);
}

// ---- one vector is K and V

/// A full layer's heads: projections, and what its norms and RoPE make of them.
struct Layer {
  AttentionConfig attention;
  std::vector<float> w;   ///< of k's norm
  std::int64_t position;  ///< of the first token
  Matrix<float> q, k, v;  ///< [n_token, heads * head_dim]
  std::int64_t head_dim() const { return attention.head_dim; }
  std::int64_t n_token() const { return q.rows(); }

  Layer(std::int64_t head_dim, std::int64_t n_head_kv, std::int64_t group, std::int64_t n_token, std::int64_t from,
        std::uint64_t seed)
      : attention{.head_dim = head_dim, .n_head_kv = n_head_kv, .rope_theta = 1e6, .rope_pairs = head_dim / 8},
        w(spread_weights(seed, head_dim)),
        position(from) {
    const auto normalised = [&](std::uint64_t stream, std::int64_t n_head, std::span<const float> weight) {
      Matrix<float> m = normal_rows(3 * seed + stream, n_token, n_head * head_dim);
      MatrixMap<float> rows = as_heads(m, head_dim);
      rms_norm<float>(rows, weight, 1e-6f, rows);
      return m;
    };
    // q's weights undo the spread of k's, as a model's would; pairs share theirs.
    std::vector<float> q_weight(w.size());
    for (std::size_t i = 0; i < w.size(); ++i) {
      const std::size_t half = w.size() / 2, pair = i % half;
      q_weight[i] = 0.12f / std::max(std::abs(w[pair]), std::abs(w[pair + half]));
    }
    q = normalised(0, group * n_head_kv, q_weight);
    v = normalised(1, n_head_kv, {});
    k = normalised(1, n_head_kv, w);
    rope<float>(q, position, attention);
    rope<float>(k, position, attention);
  }
  [[nodiscard]] static View<const float, 4> heads(const Matrix<float>& m, std::int64_t head_dim) {
    return make_view(m.data(), 1, m.rows(), m.cols() / head_dim, head_dim);
  }

  /// Over K and V apart, float32.
  [[nodiscard]] Matrix<float> apart(const Matrix<float>& keys) const {
    FlatCache<float> cache(1, attention.n_head_kv, n_token(), head_dim());
    bf16_cache_update<float, float>(heads(keys, head_dim()), heads(v, head_dim()), positions_to(n_token()), cache);
    Matrix<float> out(q.rows(), q.cols());
    const auto& stored = cache;
    bf16_attention<float, float>(heads(q, head_dim()), stored.k(), stored.v(), {}, n_token(),
                                 make_view(out.data(), 1, n_token(), q.cols() / head_dim(), head_dim()));
    return out;
  }
  [[nodiscard]] Matrix<float> apart() const { return apart(k); }
  /// Over one vector, float32. `read_weight` is what the query is folded with.
  [[nodiscard]] Matrix<float> joined(const Matrix<float>& keys, const std::vector<float>& read_weight) const {
    KvPlainBuffer<float> cache(1, attention.n_head_kv, n_token(), head_dim());
    kv_cache_update<float, float>(heads(keys, head_dim()), heads(v, head_dim()), w, positions_to(n_token()),
                                  cache.view());
    Matrix<float> out(q.rows(), q.cols());
    kv_attention<float, float>(heads(q, head_dim()), read_weight, std::as_const(cache).view(), {}, n_token(),
                               make_view(out.data(), 1, n_token(), q.cols() / head_dim(), head_dim()));
    return out;
  }
  [[nodiscard]] Matrix<float> joined() const { return joined(k, w); }
};

double relative_difference(const Matrix<float>& a, const Matrix<float>& b) {
  return static_cast<double>((a - b).cwiseAbs().maxCoeff()) / static_cast<double>(b.cwiseAbs().maxCoeff());
}

constexpr double kFloatAgrees = 1e-5;  // scores of about ten, summed in float in another order
constexpr double kShows = 1e-2;

/// Any shape, any depth: the scores are the same numbers, summed in another order.
RC_GTEST_PROP(KvAttention, WithoutRoundingItIsAttentionOnKAndVApart, (std::uint64_t seed)) {
  const auto n_token = *rc::gen::inRange<std::int64_t>(8, 40);
  const Layer layer(any_head_dim(), *rc::gen::inRange<std::int64_t>(1, 3), *rc::gen::element<std::int64_t>(1, 4, 8),
                    n_token, *rc::gen::inRange<std::int64_t>(0, 262144 - n_token), seed);
  const Matrix<float> expected = layer.apart();
  RC_ASSERT(relative_difference(layer.joined(), expected) <= kFloatAgrees);
  const std::int64_t head_dim = layer.head_dim();
  // Controls. k's weight not folded into the query: at the places that RoPE leaves alone.
  std::vector<float> no_weight = layer.w;
  for (std::int64_t i = 0; i < head_dim; ++i) {
    if (!kv_is_rotated(head_dim, i)) no_weight[static_cast<std::size_t>(i)] = 1.0f;
  }
  RC_ASSERT(relative_difference(layer.joined(layer.k, no_weight), expected) > kShows);
  // A rotated place of the query not zeroed: keys would have w * V there besides.
  Matrix<float> not_zeroed = layer.k;
  const std::int64_t place = kv_rotated_place(head_dim, 1);
  for (std::int64_t h = 0; h < layer.attention.n_head_kv; ++h) {
    not_zeroed.col(h * head_dim + place) +=
        layer.v.col(h * head_dim + place) * layer.w[static_cast<std::size_t>(place)];
  }
  RC_ASSERT(relative_difference(layer.joined(), layer.apart(not_zeroed)) > 100 * kFloatAgrees);
  // R at another position.
  Matrix<float> elsewhere = layer.k;
  rope<float>(elsewhere, 1, layer.attention);  // turns row t by 1 + t more
  RC_ASSERT(relative_difference(layer.joined(elsewhere, layer.w), expected) > kShows);
}

/// The whole context of the model, the last query over all of it.
TEST(KvAttention, TheWholeContextIsAttentionOnKAndVApart) {
  constexpr std::int64_t kContext = 262144, kDim = 64;
  const Layer all(kDim, 1, 2, kContext, 0, 11);
  KvPlainBuffer<float> one(1, 1, kContext, kDim);
  FlatCache<float> two(1, 1, kContext, kDim);
  const std::vector<std::int32_t> positions = positions_to(kContext);
  const auto k = Layer::heads(all.k, kDim), v = Layer::heads(all.v, kDim);
  kv_cache_update<float, float>(k, v, all.w, positions, one.view());
  bf16_cache_update<float, float>(k, v, positions, two);
  const Matrix<float> q = all.q.bottomRows(2);
  Matrix<float> joined(2, 2 * kDim), apart(2, 2 * kDim);
  kv_attention<float, float>(Layer::heads(q, kDim), all.w, std::as_const(one).view(), {}, kContext,
                             make_view(joined.data(), 1, 2, 2, kDim));
  bf16_attention<float, float>(Layer::heads(q, kDim), std::as_const(two).k(), std::as_const(two).v(), {}, kContext,
                               make_view(apart.data(), 1, 2, 2, kDim));
  EXPECT_LE(relative_difference(joined, apart), kFloatAgrees);
  const Matrix<float> earlier = all.q.middleRows(kContext - 3, 2);
  kv_attention<float, float>(Layer::heads(earlier, kDim), all.w, std::as_const(one).view(), {}, kContext,
                             make_view(joined.data(), 1, 2, 2, kDim));
  EXPECT_GT(relative_difference(joined, apart), kShows) << "control: queries of one position before";
}

// ---- refusals

TEST(KvAttention, OutMayBeTheQueriesThemselves) {
  std::vector<float> q = draw(5, 3 * 4 * 64);
  const std::vector<float> w(64, 0.5f);
  KvCacheBuffer cache(1, 2, 12, codec_of<float>(64));
  const auto queries = make_view(q.data(), 1, 3, 4, 64);
  kv_attention<float>(queries, w, cache.view(), codec_of<float>(64), {.scale = 0.125f}, 9, queries);
  EXPECT_TRUE(close(q, std::vector<float>(q.size()), 0.0));  // a cache of zero vectors
}

TEST(KvAttention, RefusesMisuse) {
  std::vector<float> q(3 * 4 * 64), out(q.size());
  std::vector<float> w(64, 1.0f);
  KvCacheBuffer good(1, 2, 12, codec_of<float>(64));
  const auto call = [&](const std::function<void(ConstKvCacheView&)>& break_it, AttentionOptions options = {},
                        std::optional<std::int64_t> kv_len = 9) {
    return [&, break_it, options, kv_len] {
      ConstKvCacheView cache = good.view();
      break_it(cache);
      kv_attention<float>(make_view(q.data(), 1, 3, 4, 64), w, cache, codec_of<float>(64), options, kv_len,
                          make_view(out.data(), 1, 3, 4, 64));
    };
  };
  const auto none = [](ConstKvCacheView&) {};
  EXPECT_NO_THROW(call(none)());
  EXPECT_TRUE(refuses(call([](auto& c) { c.v_codes.extent[3] = 31; }), {"kv_attention: v_codes", "31", "need 40"}));
  EXPECT_TRUE(refuses(call([](auto& c) { c.r_codes.extent[2] = 11; }), {"r_codes", "11", "need 12"}));
  EXPECT_TRUE(refuses(call([](auto& c) { c.v_norm.extent[1] = 1; }), {"v_norm", "1", "need 2"}));
  EXPECT_TRUE(refuses(call([](auto& c) { c.r_norm.extent[0] = 2; }), {"r_norm", "2", "need 1"}));
  EXPECT_TRUE(refuses(call([](auto& c) { c.v_codes.stride[3] = 2; }), {"v_codes", "stride 2", "need 1"}));
  EXPECT_TRUE(refuses(call(none, {}, 13), {"kv_attention: kv_len 13", "buffer_len = 12"}));
  EXPECT_TRUE(refuses(call(none, {}, 2), {"kv_len 2", "n_query 3"}));
  const MaskView float_mask{.data = q.data(), .type = ElementType::kF32, .shape = {1, 1, 3, 12}};
  EXPECT_TRUE(refuses(call(none, {.mask = float_mask}), {"kv_attention: mask", "float", "bool"}));
  const MaskView head_mask{.data = q.data(), .type = ElementType::kBool, .shape = {1, 4, 3, 12}};
  EXPECT_TRUE(refuses(call(none, {.mask = head_mask}), {"kv_attention: mask", "4 heads", "need 1"}));
  w.resize(63);
  EXPECT_TRUE(refuses(call(none), {"kv_attention: k_weight has 63 values", "head_dim 64"}));
  w.resize(64);
  const auto with_q = [&](std::int64_t batch, std::int64_t n_head, std::int64_t head_dim) {
    return [&, batch, n_head, head_dim] {
      kv_attention<float>(make_view(q.data(), batch, 3 / batch, n_head, head_dim), w, good.view(), codec_of<float>(64),
                          {}, 9, make_view(out.data(), batch, 3 / batch, n_head, head_dim));
    };
  };
  EXPECT_TRUE(refuses(with_q(1, 3, 64), {"n_head 3", "n_head_kv 2"}));
  EXPECT_TRUE(refuses(with_q(1, 4, 32), {"cache has head_dim 64", "q has 32"}));
  EXPECT_TRUE(refuses(with_q(3, 4, 64), {"cache has batch 1", "q has 3"}));
}

}  // namespace
}  // namespace gemma4::reference

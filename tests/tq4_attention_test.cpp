// SPDX-License-Identifier: Apache-2.0
#include "reference/tq4_attention.hpp"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <tuple>
#include <utility>

#include "gemma4/tq4_golden.hpp"
#include "reference/bf16_attention.hpp"
#include "tests/support/attention_promises.hpp"
#include "tests/support/tq4_oracle.hpp"

namespace gemma4::reference {
namespace {

using namespace gemma4::testkit;

/// Codecs are drawn once: solving a codebook costs more than a small attention.
template <class Scalar>
const Tq4Codec<Scalar>& codec_of(std::int64_t head_dim, const Tq4Options& options = {}) {
  static std::map<std::tuple<std::int64_t, int, int>, std::unique_ptr<Tq4Codec<Scalar>>> codecs;
  auto& codec = codecs[{head_dim, options.k_bits, options.v_bits}];
  if (!codec) codec = std::make_unique<Tq4Codec<Scalar>>(head_dim, options);
  return *codec;
}

/// Widths of K and V, apart in most cases: a codebook taken for the other side's shows.
Tq4Options widths_of(const AttentionCase& c) {
  constexpr std::pair<int, int> kWidths[] = {{4, 2}, {3, 4}, {4, 4}, {2, 3}};
  const auto& [k_bits, v_bits] = kWidths[c.seed % 4];
  return {.k_bits = k_bits, .v_bits = v_bits};
}

/// Every row of one side decoded in double: [batch, n_head_kv, buffer_len, head_dim].
std::vector<double> decoded(const Tq4CacheBuffer& cache, const Rotation<double>& rotation, const Codebook& book,
                            CacheSide side) {
  const ConstTq4CacheView view = cache.view();
  return side == CacheSide::kKey ? decode_side(cache.shape(), view.k_codes.data, view.k_norm.data, book, rotation)
                                 : decode_side(cache.shape(), view.v_codes.data, view.v_norm.data, book, rotation);
}

/// The oracle on decoded rows, its magnitudes as lengths of vectors: what attention_bound asks for in a rotated space.
NaiveAttention naive_on_decoded(const AttentionShape& s, double scale, const std::vector<float>& q,
                                const std::vector<double>& k, const std::vector<double>& v, const Sees& sees) {
  NaiveAttention exact = naive_attention(s, scale, q, k, v, sees);
  const auto longest = [&](const std::vector<double>& x) {
    const Eigen::Map<const Matrix<double>> rows(x.data(), static_cast<Eigen::Index>(x.size()) / s.head_dim, s.head_dim);
    return rows.rowwise().norm().maxCoeff();
  };
  const Eigen::Map<const Matrix<float>> queries(q.data(), static_cast<Eigen::Index>(q.size()) / s.head_dim, s.head_dim);
  const Eigen::VectorXd lengths = queries.cast<double>().rowwise().norm();
  const double longest_k = longest(k), longest_v = longest(v);
  for (std::size_t i = 0; i < exact.out.size(); ++i) {
    exact.score_magnitude[i] = scale * lengths[static_cast<Eigen::Index>(i) / s.head_dim] * longest_k;
    exact.value_magnitude[i] = longest_v;
  }
  return exact;
}

AttentionRounding rounding_of(double unit, std::int64_t n_key, double rotation_roundings) {
  const std::int64_t n_block = n_key / detail::kKeyBlock + 1;
  return {.unit = unit,
          .output_unit = 0x1p-24,
          .longest_sum = detail::kKeyBlock + n_block,
          .n_rescale = n_block,
          .rotation_roundings = rotation_roundings};
}

/// The reference over a TQ4 cache that it compressed itself.
template <class Scalar>
class Tq4Subject {
 public:
  explicit Tq4Subject(const AttentionCase& c)
      : case_(c), q_(c.q()), cache_(c.shape.batch, c.shape.n_head_kv, c.shape.buffer_len, c.shape.head_dim) {
    const AttentionShape& s = c.shape;
    const std::vector<float> k = c.k(), v = c.v();
    std::vector<std::int32_t> positions(static_cast<std::size_t>(s.buffer_len));
    std::iota(positions.begin(), positions.end(), 0);
    const auto tokens_first = [&](const std::vector<float>& x) {
      View<const float, 4> view = make_view(x.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim);
      std::swap(view.extent[1], view.extent[2]);
      std::swap(view.stride[1], view.stride[2]);
      return view;
    };
    tq4_cache_update<float>(codec_of<float>(s.head_dim, widths_of(c)), tokens_first(k), tokens_first(v), positions,
                            cache_.view());
  }

  /// Norms a thousand times larger or NaN, and other codes.
  void spoil(std::int64_t first, std::int64_t last, Spoil kind) {
    const Tq4CacheView view = cache_.view();
    for (std::int64_t b = 0; b < case_.shape.batch; ++b) {
      for (std::int64_t h = 0; h < case_.shape.n_head_kv; ++h) {
        for (std::int64_t j = first; j < last; ++j) {
          for (Tq4Norm* norm : {&view.k_norm(b, h, j), &view.v_norm(b, h, j)}) {
            *norm = to_bf16(kind == Spoil::kNaN ? std::numeric_limits<float>::quiet_NaN() : 1000 * to_float(*norm));
          }
          for (std::int64_t i = 0; i < case_.shape.head_dim / 2; ++i) {
            view.k_codes(b, h, j, i) ^= 0x5A;
            view.v_codes(b, h, j, i) ^= 0xF0;
          }
        }
      }
    }
  }

  [[nodiscard]] Tq4Subject sliced(std::int64_t kv_len) const {
    Tq4Subject slice(case_, q_, kv_len);
    const ConstTq4CacheView from = cache_.view();
    const Tq4CacheView to = slice.cache_.view();
    for (std::int64_t b = 0; b < case_.shape.batch; ++b) {
      for (std::int64_t h = 0; h < case_.shape.n_head_kv; ++h) {
        std::copy_n(&from.k_codes(b, h, 0, 0), kv_len * case_.shape.head_dim / 2, &to.k_codes(b, h, 0, 0));
        std::copy_n(&from.v_codes(b, h, 0, 0), kv_len * case_.shape.head_dim / 2, &to.v_codes(b, h, 0, 0));
        std::copy_n(&from.k_norm(b, h, 0), kv_len, &to.k_norm(b, h, 0));
        std::copy_n(&from.v_norm(b, h, 0), kv_len, &to.v_norm(b, h, 0));
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
    tq4_attention<Scalar>(queries, cache_.view(), codec_of<Scalar>(s.head_dim, widths_of(case_)), options, kv_len,
                          make_view(out.data(), s.batch, n_query, s.n_head, s.head_dim));
    return {out.begin(), out.end()};
  }

  [[nodiscard]] NaiveAttention exact(const Sees& sees) const {
    const std::int64_t head_dim = case_.shape.head_dim;
    const Tq4Options options = widths_of(case_);
    static std::map<std::pair<std::int64_t, int>, Codebook> books;  // solved here, whatever the codec has
    const auto side = [&](CacheSide which, int bits) {
      auto [book, is_new] = books.try_emplace({head_dim, bits});
      if (is_new) book->second = solve_codebook(CodebookKind::kFull, bits, head_dim);
      return decoded(cache_, codec_of<double>(head_dim, options).rotation(), book->second, which);
    };
    return naive_on_decoded(case_.shape, case_.scale, q_, side(CacheSide::kKey, options.k_bits),
                            side(CacheSide::kValue, options.v_bits), sees);
  }

  /// A butterfly adds log2(head_dim) times and is scaled once; a stored value is one product.
  [[nodiscard]] AttentionRounding rounding() const {
    return rounding_of(std::is_same_v<Scalar, double> ? 0x1p-53 : 0x1p-24, case_.shape.buffer_len,
                       std::log2(static_cast<double>(case_.shape.head_dim)) + 2);
  }

 private:
  Tq4Subject(const AttentionCase& c, const std::vector<float>& q, std::int64_t buffer_len)
      : case_(c), q_(q), cache_(c.shape.batch, c.shape.n_head_kv, buffer_len, c.shape.head_dim) {
    case_.shape.buffer_len = buffer_len;
  }

  AttentionCase case_;
  std::vector<float> q_;
  Tq4CacheBuffer cache_;
};

using Float = Tq4Subject<float>;
using Wide = Tq4Subject<double>;

RC_GTEST_PROP(Tq4Attention, AgreesWithTheNaiveLoopOnDecodedRows, (const AttentionCase& c)) {
  agrees_with_exact<Float>(c);
}
RC_GTEST_PROP(Tq4Attention, DoubleAgreesWithTheNaiveLoopOnDecodedRows, (const AttentionCase& c)) {
  agrees_with_exact<Wide>(c);
}
RC_GTEST_PROP(Tq4Attention, GarbageTailIsNeverRead, (const AttentionCase& c)) {
  garbage_tail_is_never_read<Float>(c);
}
RC_GTEST_PROP(Tq4Attention, ClampEqualsSlice, (const AttentionCase& c)) {
  clamp_equals_slice<Float>(c);
}
RC_GTEST_PROP(Tq4Attention, CausalSkipChangesNothing, (const AttentionCase& c)) {
  causal_skip_changes_nothing<Float>(c);
}
RC_GTEST_PROP(Tq4Attention, AnyChunkSizeAgrees, (const AttentionCase& c)) {
  any_chunk_size_agrees<Wide>(c);
}
RC_GTEST_PROP(Tq4Attention, MaskHidesKeys, (const AttentionCase& c)) {
  mask_hides_keys<Wide>(c);
}
RC_GTEST_PROP(Tq4Attention, MaskedGarbageHasNoInfluence, (const AttentionCase& c)) {
  masked_garbage_has_no_influence<Float>(c);
}
RC_GTEST_PROP(Tq4Attention, SameCallGivesSameBits, (const AttentionCase& c)) {
  same_call_gives_same_bits<Float>(c);
}

AttentionCase example() {
  return {.shape = {.batch = 1, .n_query = 3, .n_head = 4, .n_head_kv = 2, .head_dim = 64, .buffer_len = 12},
          .kv_len = 9,
          .causal = true,
          .scale = 0.125f,
          .seed = 5};
}

TEST(Tq4Attention, OutMayBeTheQueriesThemselves) {
  const AttentionCase c = example();
  const Float subject(c);
  std::vector<float> q = c.q();
  Tq4CacheBuffer cache(1, 2, 12, 64);
  const auto queries = make_view(q.data(), 1, 3, 4, 64);
  tq4_attention<float>(queries, cache.view(), codec_of<float>(64), c.options(), 9, queries);
  EXPECT_TRUE(close(q, std::vector<float>(q.size()), 0.0));  // a cache of zero vectors
}

TEST(Tq4Attention, RefusesMisuse) {
  std::vector<float> q(3 * 4 * 64), out(q.size());
  Tq4CacheBuffer good(1, 2, 12, 64);
  const auto call = [&](const std::function<void(ConstTq4CacheView&)>& break_it, AttentionOptions options = {},
                        std::optional<std::int64_t> kv_len = 9) {
    return [&, break_it, options, kv_len] {
      ConstTq4CacheView cache = good.view();
      break_it(cache);
      tq4_attention<float>(make_view(q.data(), 1, 3, 4, 64), cache, codec_of<float>(64), options, kv_len,
                           make_view(out.data(), 1, 3, 4, 64));
    };
  };
  const auto none = [](ConstTq4CacheView&) {};
  EXPECT_NO_THROW(call(none)());
  EXPECT_TRUE(refuses(call([](auto& c) { c.v_codes.extent[3] = 31; }), {"tq4_attention: v_codes", "31", "need 32"}));
  EXPECT_TRUE(refuses(call([](auto& c) { c.v_codes.extent[2] = 11; }), {"v_codes", "11", "need 12"}));
  EXPECT_TRUE(refuses(call([](auto& c) { c.k_norm.extent[1] = 1; }), {"k_norm", "1", "need 2"}));
  EXPECT_TRUE(refuses(call([](auto& c) { c.v_norm.extent[0] = 2; }), {"v_norm", "2", "need 1"}));
  EXPECT_TRUE(refuses(call([](auto& c) { c.k_codes.stride[3] = 2; }), {"k_codes", "stride 2", "need 1"}));
  EXPECT_TRUE(refuses(call([](auto& c) { c.k_codes.extent[1] = 3; }), {"v_codes", "2", "need 3"}));
  EXPECT_TRUE(refuses(call(none, {}, 13), {"tq4_attention: kv_len 13", "buffer_len = 12"}));
  EXPECT_TRUE(refuses(call(none, {}, 2), {"kv_len 2", "n_query 3"}));
  const MaskView float_mask{.data = q.data(), .type = ElementType::kF32, .shape = {1, 1, 3, 12}};
  EXPECT_TRUE(refuses(call(none, {.mask = float_mask}), {"tq4_attention: mask", "float", "bool"}));
  const MaskView head_mask{.data = q.data(), .type = ElementType::kBool, .shape = {1, 4, 3, 12}};
  EXPECT_TRUE(refuses(call(none, {.mask = head_mask}), {"tq4_attention: mask", "4 heads", "need 1"}));
  const auto other_codec = [&] {
    tq4_attention<float>(make_view(q.data(), 1, 3, 4, 64), good.view(), codec_of<float>(128), {}, 9,
                         make_view(out.data(), 1, 3, 4, 64));
  };
  EXPECT_TRUE(refuses(other_codec, {"tq4_attention: codec", "128", "64"}));
}

// ---- Golden cases of another implementation. Its norms are float32 and ours bf16, so the chain has two links: the
// naive loop on rows decoded with its norms is its result; and tq4_attention is the naive loop on rows decoded with
// ours.

class Tq4AttentionGolden : public testing::TestWithParam<const char*> {
 protected:
  Tq4Golden golden = read_tq4_golden(std::string(GEMMA4_TEST_DATA) + "/tq4/" + GetParam() + ".gguf");
  AttentionShape shape = golden.shape;
  Tq4Codec<double> codec{
      Rotation<double>::dense(
          Eigen::Map<const Matrix<float>>(golden.rotation.data(), shape.head_dim, shape.head_dim).cast<double>()),
      golden.codebook, golden.codebook, NormKind::kRaw};

  /// The case's codes with its norms rounded to bf16.
  [[nodiscard]] Tq4CacheBuffer cache() const {
    Tq4CacheBuffer cache(1, shape.n_head_kv, shape.buffer_len, shape.head_dim);
    std::copy(golden.k_codes.begin(), golden.k_codes.end(), cache.k_codes().begin());
    std::copy(golden.v_codes.begin(), golden.v_codes.end(), cache.v_codes().begin());
    std::transform(golden.k_norm.begin(), golden.k_norm.end(), cache.k_norm().begin(), to_bf16);
    std::transform(golden.v_norm.begin(), golden.v_norm.end(), cache.v_norm().begin(), to_bf16);
    return cache;
  }
  [[nodiscard]] Sees sees() const {
    return [this](std::int64_t, std::int64_t t, std::int64_t j) { return j <= golden.kv_len - shape.n_query + t; };
  }
  [[nodiscard]] NaiveAttention naive(const std::vector<double>& k, const std::vector<double>& v) const {
    return naive_on_decoded(shape, golden.options().scale, golden.q, k, v, sees());
  }
  template <class TStorage>
  [[nodiscard]] std::vector<float> uncompressed() const {
    std::vector<TStorage> k, v;
    for (const float value : golden.k) k.push_back(from_float<TStorage>(value));
    for (const float value : golden.v) v.push_back(from_float<TStorage>(value));
    std::vector<float> out(golden.q.size());
    bf16_attention<float, TStorage>(make_view(golden.q.data(), 1, shape.n_query, shape.n_head, shape.head_dim),
                                    make_view(k.data(), 1, shape.n_head_kv, shape.buffer_len, shape.head_dim),
                                    make_view(v.data(), 1, shape.n_head_kv, shape.buffer_len, shape.head_dim),
                                    golden.options(), golden.kv_len,
                                    make_view(out.data(), 1, shape.n_query, shape.n_head, shape.head_dim));
    return out;
  }
};

constexpr double kGoldenRounding = 1e-6;  // out_* were computed in float64 and stored as float32, values below 8

/// The rows of one side decoded with float32 norms.
std::vector<double> with_norms(std::vector<double> unit_rows, const std::vector<float>& norms, std::int64_t head_dim) {
  for (std::size_t i = 0; i < unit_rows.size(); ++i) unit_rows[i] *= norms[i / static_cast<std::size_t>(head_dim)];
  return unit_rows;
}

TEST_P(Tq4AttentionGolden, FormulaOnTheDecodedCacheIsThePeers) {
  Tq4CacheBuffer ones = cache();
  std::fill(ones.k_norm().begin(), ones.k_norm().end(), to_bf16(1.0f));
  std::fill(ones.v_norm().begin(), ones.v_norm().end(), to_bf16(1.0f));
  const auto k =
      with_norms(decoded(ones, codec.rotation(), golden.codebook, CacheSide::kKey), golden.k_norm, shape.head_dim);
  const auto v =
      with_norms(decoded(ones, codec.rotation(), golden.codebook, CacheSide::kValue), golden.v_norm, shape.head_dim);
  EXPECT_TRUE(close(naive(k, v).out, golden.out_tq4, kGoldenRounding));
  EXPECT_FALSE(close(naive(k, v).out, golden.out_exact, kGoldenRounding));  // compression is seen
}

TEST_P(Tq4AttentionGolden, AttentionIsTheFormulaOnTheDecodedCache) {
  const Tq4CacheBuffer stored = cache();
  std::vector<double> q(golden.q.begin(), golden.q.end()), out(q.size());
  tq4_attention<double>(make_view(std::as_const(q).data(), 1, shape.n_query, shape.n_head, shape.head_dim),
                        stored.view(), codec, golden.options(), golden.kv_len,
                        make_view(out.data(), 1, shape.n_query, shape.n_head, shape.head_dim));
  const NaiveAttention exact = naive(decoded(stored, codec.rotation(), golden.codebook, CacheSide::kKey),
                                     decoded(stored, codec.rotation(), golden.codebook, CacheSide::kValue));
  // A product with a dense matrix is off by at most head_dim^1.5 roundings of the vector's length.
  AttentionRounding rounding =
      rounding_of(0x1p-53, golden.kv_len, std::pow(static_cast<double>(shape.head_dim), 1.5) + 1);
  rounding.output_unit = 0;
  EXPECT_TRUE(close(out, exact.out, exact.bounds(rounding, shape.head_dim)));
  EXPECT_FALSE(close(out, golden.out_exact, kGoldenRounding));
}

TEST_P(Tq4AttentionGolden, UncompressedAttentionIsThePeersExactOne) {
  const NaiveAttention exact = naive_attention(shape, golden.options().scale, golden.q, golden.k, golden.v, sees());
  EXPECT_TRUE(close(exact.out, golden.out_exact, kGoldenRounding));
  std::vector<double> bounds = exact.bounds(rounding_of(0x1p-24, golden.kv_len, 0), shape.head_dim);
  for (double& bound : bounds) bound += kGoldenRounding;
  EXPECT_TRUE(close(uncompressed<float>(), golden.out_exact, bounds));
  EXPECT_TRUE(close(uncompressed<Bf16>(), golden.out_exact, bounds));  // the case's K and V are bf16 numbers
  EXPECT_FALSE(close(uncompressed<float>(), golden.out_tq4, bounds));
}

INSTANTIATE_TEST_SUITE_P(Cases, Tq4AttentionGolden,
                         testing::Values("tq4-d64-h4x2-q1-kv40of64", "tq4-d128-h6x1-q7-kv33of48",
                                         "tq4-d256-h16x2-q1-kv96of128", "tq4-d512-h8x1-q5-kv72of96",
                                         "tq4-d512-h32x4-q1-kv100of128"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace gemma4::reference

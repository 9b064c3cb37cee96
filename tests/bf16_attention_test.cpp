// SPDX-License-Identifier: Apache-2.0
#include "reference/bf16_attention.hpp"

#include <gtest/gtest.h>
#include <omp.h>

#include "tests/support/attention_promises.hpp"
#include "tests/support/random_matrix.hpp"

namespace gemma4::reference {
namespace {

using namespace gemma4::testkit;

template <class TStorage>
std::vector<TStorage> stored(const std::vector<float>& values) {
  std::vector<TStorage> out(values.size());
  std::transform(values.begin(), values.end(), out.begin(), from_float<TStorage>);
  return out;
}

/// The reference over an uncompressed cache. `Scalar` results are rounded to float for comparison; that of a double is
/// part of its rounding.
template <class Scalar, class TStorage>
class FlatSubject {
 public:
  explicit FlatSubject(const AttentionCase& c) : case_(c), q_(c.q()), k_(c.k()), v_(c.v()) {}

  void spoil(std::int64_t first, std::int64_t last, Spoil kind) {
    for_rows(first, last, [&](std::size_t i) {
      k_[i] = kind == Spoil::kNaN ? std::numeric_limits<float>::quiet_NaN() : 1000 * k_[i];
      v_[i] = kind == Spoil::kNaN ? std::numeric_limits<float>::quiet_NaN() : 1000 * v_[i];
    });
  }

  [[nodiscard]] FlatSubject sliced(std::int64_t kv_len) const {
    FlatSubject slice(*this);
    slice.k_.clear();
    slice.v_.clear();
    for_rows(0, kv_len, [&](std::size_t i) {
      slice.k_.push_back(k_[i]);
      slice.v_.push_back(v_[i]);
    });
    slice.case_.shape.buffer_len = kv_len;
    return slice;
  }

  [[nodiscard]] std::vector<float> attend(const AttentionOptions& options, std::optional<std::int64_t> kv_len) const {
    return attend(options, kv_len, 0, case_.shape.n_query);
  }

  /// Queries [first, first + n_query) only.
  [[nodiscard]] std::vector<float> attend(const AttentionOptions& options, std::optional<std::int64_t> kv_len,
                                          std::int64_t first, std::int64_t n_query) const {
    const AttentionShape& s = case_.shape;
    const std::vector<Scalar> q(q_.begin(), q_.end());
    const std::vector<TStorage> k = stored<TStorage>(k_), v = stored<TStorage>(v_);
    std::vector<Scalar> out(static_cast<std::size_t>(s.batch * n_query * s.n_head * s.head_dim), Scalar(-7));
    View<const Scalar, 4> queries = make_view(q.data(), s.batch, s.n_query, s.n_head, s.head_dim);
    queries.data += first * queries.stride[1];
    queries.extent[1] = n_query;
    bf16_attention<Scalar, TStorage>(queries, make_view(k.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim),
                                     make_view(v.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim), options,
                                     kv_len, make_view(out.data(), s.batch, n_query, s.n_head, s.head_dim));
    return {out.begin(), out.end()};
  }

  [[nodiscard]] NaiveAttention exact(const Sees& sees) const {
    return naive_attention(case_.shape, case_.scale, q_, k_, v_, sees);
  }

  /// Sums run over one block, then over the blocks.
  [[nodiscard]] AttentionRounding rounding() const {
    const std::int64_t n_block = case_.shape.buffer_len / detail::kKeyBlock + 1;
    return {.unit = std::is_same_v<Scalar, double> ? 0x1p-53 : 0x1p-24,
            .output_unit = 0x1p-24,
            .longest_sum = detail::kKeyBlock + n_block,
            .n_rescale = n_block};
  }

 private:
  template <class TAction>
  void for_rows(std::int64_t first, std::int64_t last, const TAction& action) const {
    const AttentionShape& s = case_.shape;
    for (std::int64_t head = 0; head < s.batch * s.n_head_kv; ++head) {
      for (std::int64_t i = first * s.head_dim; i < last * s.head_dim; ++i) {
        action(static_cast<std::size_t>(head * s.buffer_len * s.head_dim + i));
      }
    }
  }

  AttentionCase case_;
  std::vector<float> q_, k_, v_;
};

using Float = FlatSubject<float, float>;
using Half = FlatSubject<float, Bf16>;
using Wide = FlatSubject<double, float>;

RC_GTEST_PROP(Bf16Attention, AgreesWithTheNaiveLoop, (const AttentionCase& c)) {
  agrees_with_exact<Half>(c);
}
RC_GTEST_PROP(Bf16Attention, Float32CacheAgreesWithTheNaiveLoop, (const AttentionCase& c)) {
  agrees_with_exact<Float>(c);
}
RC_GTEST_PROP(Bf16Attention, DoubleAgreesWithTheNaiveLoop, (const AttentionCase& c)) {
  agrees_with_exact<Wide>(c);
}
RC_GTEST_PROP(Bf16Attention, GarbageTailIsNeverRead, (const AttentionCase& c)) {
  garbage_tail_is_never_read<Half>(c);
}
RC_GTEST_PROP(Bf16Attention, ClampEqualsSlice, (const AttentionCase& c)) {
  clamp_equals_slice<Half>(c);
}
RC_GTEST_PROP(Bf16Attention, CausalSkipChangesNothing, (const AttentionCase& c)) {
  causal_skip_changes_nothing<Half>(c);
}
RC_GTEST_PROP(Bf16Attention, AnyChunkSizeAgrees, (const AttentionCase& c)) {
  any_chunk_size_agrees<Half>(c);
}
RC_GTEST_PROP(Bf16Attention, MaskHidesKeys, (const AttentionCase& c)) {
  mask_hides_keys<Half>(c);
}
RC_GTEST_PROP(Bf16Attention, MaskedGarbageHasNoInfluence, (const AttentionCase& c)) {
  masked_garbage_has_no_influence<Half>(c);
}
RC_GTEST_PROP(Bf16Attention, SameCallGivesSameBits, (const AttentionCase& c)) {
  same_call_gives_same_bits<Half>(c);
}

RC_GTEST_PROP(Bf16Attention, NumberOfThreadsChangesNoBit, (const AttentionCase& c)) {
  const Half subject(c);
  const int before = omp_get_max_threads();
  const std::vector<float> many = subject.attend(c.options(), c.kv_len);
  omp_set_num_threads(1);
  const std::vector<float> one = subject.attend(c.options(), c.kv_len);
  omp_set_num_threads(before);
  rc_require(same_bits(one, many));
}

AttentionCase example() {
  return {.shape = {.batch = 2, .n_query = 3, .n_head = 4, .n_head_kv = 2, .head_dim = 64, .buffer_len = 12},
          .kv_len = 9,
          .causal = true,
          .scale = 0.125f,
          .seed = 5};
}

TEST(Bf16Attention, SumStaysAccurateOver131072Keys) {
  AttentionCase c = example();
  c.shape = {.batch = 1, .n_query = 1, .n_head = 2, .n_head_kv = 1, .head_dim = 64, .buffer_len = 131072};
  c.kv_len = 131072;
  const Half subject(c);
  const std::vector<float> out = subject.attend(c.options(), c.kv_len);
  EXPECT_TRUE(close_to_exact(subject, out, subject.exact(sees_of(c)), 64));
  // The mean of so many values is small: an absolute bound of one thousandth of it must hold too.
  EXPECT_TRUE(close(out, subject.exact(sees_of(c)).out, 1e-6));
}

/// The largest promised chunk, held to the oracle at queries at the ends of tiles and key blocks.
TEST(Bf16Attention, Chunk4096IsExactEverywhereItIsLookedAt) {
  AttentionCase c = example();
  c.shape = {.batch = 1, .n_query = 4096, .n_head = 1, .n_head_kv = 1, .head_dim = 64, .buffer_len = 5001};
  c.kv_len = 5000;
  const Half subject(c);
  const std::vector<float> out = subject.attend(c.options(), c.kv_len), q = c.q();
  const std::vector<std::int64_t> looked_at = {0, 1, 119, 120, 121, 255, 256, 257, 2047, 2048, 4094, 4095};
  AttentionShape few = c.shape;
  few.n_query = static_cast<std::int64_t>(looked_at.size());
  std::vector<float> few_q, few_out;
  for (const std::int64_t t : looked_at) {
    few_q.insert(few_q.end(), q.begin() + t * 64, q.begin() + (t + 1) * 64);
    few_out.insert(few_out.end(), out.begin() + t * 64, out.begin() + (t + 1) * 64);
  }
  const auto sees = [&](std::int64_t, std::int64_t t, std::int64_t j) {
    return j < c.limit(looked_at[static_cast<std::size_t>(t)]);
  };
  EXPECT_TRUE(close_to_exact(subject, few_out, naive_attention(few, c.scale, few_q, c.k(), c.v(), sees), 64));
}

TEST(Bf16Attention, NoKeysGiveZeros) {
  AttentionCase c = example();
  c.causal = false;
  const Half subject(c);
  EXPECT_TRUE(same_bits(subject.attend(c.options(), 0), std::vector<float>(static_cast<std::size_t>(c.q_size()))));
}

TEST(Bf16Attention, CausalCallOnAShortBufferGivesZerosToQueriesBeforeTheFirstKey) {
  AttentionCase c = example();
  c.shape.batch = 1;
  c.shape.n_query = 5;
  c.shape.buffer_len = c.kv_len = 3;  // queries 0 and 1 stand before the first key
  const Half subject(c);
  const std::vector<float> out = subject.attend(c.options(), std::nullopt);
  EXPECT_TRUE(close_to_exact(subject, out, subject.exact(sees_of(c)), 64));
  EXPECT_TRUE(same_bits(std::span(out).first(2 * 4 * 64), std::vector<float>(2 * 4 * 64)));
  EXPECT_NE(out[2 * 4 * 64], 0.0f);
}

TEST(Bf16Attention, NaNThatIsSeenIsReported) {
  const AttentionCase c = example();
  Half subject(c);
  subject.spoil(0, 1, Spoil::kNaN);
  for (const float value : subject.attend(c.options(), c.kv_len)) EXPECT_TRUE(std::isnan(value));
}

TEST(Bf16Attention, ScoresFarApartNeitherOverflowNorVanish) {
  AttentionCase c = example();
  c.scale = 300.0f;  // scores in the thousands: exp() of them is infinite or zero in any type
  const Wide subject(c);
  EXPECT_TRUE(close_to_exact(subject, subject.attend(c.options(), c.kv_len), subject.exact(sees_of(c)), 64));
}

/// Leaving out the last block of a tile, as an off-by-one in the skip would, is seen: the skip test can fail.
TEST(Bf16Attention, SkippingOneBlockTooManyWouldBeSeen) {
  const std::int64_t n_key = 2 * detail::kKeyBlock + 1;
  const Matrix<float> q = random_matrix<float>(1, 2, 64), k = random_matrix<float>(2, n_key, 64);
  const auto load = [&](detail::KeyRange keys, MatrixRef<float> k_block, MatrixRef<float> v_block) {
    k_block = k.middleRows(keys.first, keys.size());
    v_block = k_block;
  };
  const auto visible = [&](std::int64_t) { return detail::VisibleKeys{.range = {0, n_key}}; };
  const auto attend = [&](std::int64_t stop) {
    return detail::attend_tile<float>(q, q.cols(), 2, {0, n_key}, stop, load, visible);
  };
  EXPECT_EQ(attend(n_key), attend(n_key + 100));
  EXPECT_NE(attend(n_key), attend(n_key - 1));
}

/// Calls with one thing wrong; the message names the argument and both values.
TEST(Bf16Attention, RefusesMisuse) {
  const AttentionCase good = example();
  const auto call =
      [&](const std::function<void(AttentionCase&, AttentionOptions&, std::optional<std::int64_t>&)>& break_it) {
        return [&good, break_it] {
          AttentionCase c = good;
          AttentionOptions options = c.options();
          std::optional<std::int64_t> kv_len = c.kv_len;
          break_it(c, options, kv_len);
          (void)Half(c).attend(options, kv_len);
        };
      };
  static const std::uint8_t bytes[2 * 3 * 12] = {};
  const auto with_mask = [&](MaskView mask) {
    return call([mask](auto&, auto& options, auto&) { options.mask = mask; });
  };
  EXPECT_NO_THROW(call([](auto&, auto&, auto&) {})());
  EXPECT_NO_THROW(with_mask({.data = bytes, .type = ElementType::kBool, .shape = {2, 1, 3, 9}})());
  EXPECT_TRUE(refuses(with_mask({.data = bytes, .type = ElementType::kF32, .shape = {2, 1, 3, 9}}),
                      {"bf16_attention", "mask", "float", "bool"}));
  EXPECT_TRUE(refuses(with_mask({.data = bytes, .type = ElementType::kBool, .shape = {2, 4, 3, 9}}),
                      {"mask", "4 heads", "need 1"}));
  EXPECT_TRUE(refuses(with_mask({.data = bytes, .type = ElementType::kBool, .shape = {1, 1, 3, 9}}),
                      {"mask batch 1", "need 2"}));
  EXPECT_TRUE(refuses(with_mask({.data = bytes, .type = ElementType::kBool, .shape = {2, 1, 2, 9}}),
                      {"mask n_query 2", "need 3"}));
  EXPECT_TRUE(refuses(with_mask({.data = bytes, .type = ElementType::kBool, .shape = {2, 1, 3, 8}}),
                      {"mask covers 8", "kv_len 9"}));
  EXPECT_TRUE(
      refuses(with_mask({.data = nullptr, .type = ElementType::kBool, .shape = {2, 1, 3, 9}}), {"mask", "null"}));
  EXPECT_TRUE(refuses(call([](auto& c, auto&, auto&) { c.shape.n_head = 5; }), {"n_head 5", "n_head_kv 2"}));
  EXPECT_TRUE(refuses(call([](auto& c, auto&, auto&) { c.shape.head_dim = 96; }), {"head_dim 96", "power of two"}));
  EXPECT_TRUE(refuses(call([](auto& c, auto&, auto&) { c.shape.head_dim = 32; }), {"head_dim 32", "64 to 512"}));
  EXPECT_TRUE(refuses(call([](auto& c, auto&, auto&) { c.shape.head_dim = 1024; }), {"head_dim 1024", "64 to 512"}));
  EXPECT_TRUE(refuses(call([](auto&, auto&, auto& kv_len) { kv_len = 13; }), {"kv_len 13", "buffer_len = 12"}));
  EXPECT_TRUE(refuses(call([](auto&, auto&, auto& kv_len) { kv_len = -1; }), {"kv_len -1", "[0, "}));
  EXPECT_TRUE(refuses(call([](auto&, auto&, auto& kv_len) { kv_len = 2; }), {"kv_len 2", "n_query 3"}));
  EXPECT_TRUE(refuses(call([](auto& c, auto&, auto&) { c.shape.n_query = 0; }), {"n_query 0", "at least 1"}));
}

TEST(Bf16Attention, RefusesViewsThatDoNotFit) {
  std::vector<float> q(2 * 64), out(2 * 64);
  std::vector<Bf16> cache(4 * 128);
  const auto call = [&](View<const Bf16, 4> k, View<const Bf16, 4> v, View<float, 4> result) {
    return [=, &q] { bf16_attention<float, Bf16>(make_view(q.data(), 1, 1, 2, 64), k, v, {}, 4, result); };
  };
  const View<const Bf16, 4> good = make_view(cache.data(), 1, 1, 4, 64);
  const View<float, 4> target = make_view(out.data(), 1, 1, 2, 64);
  EXPECT_NO_THROW(call(good, good, target)());
  EXPECT_TRUE(
      refuses(call(make_view(cache.data(), 1, 1, 4, 128), good, target), {"bf16_attention: k", "128", "need 64"}));
  EXPECT_TRUE(refuses(call(good, make_view(cache.data(), 1, 1, 3, 64), target), {"bf16_attention: v", "3", "need 4"}));
  EXPECT_TRUE(refuses(call(make_view(cache.data(), 2, 1, 4, 64), good, target), {"bf16_attention: k", "2", "need 1"}));
  EXPECT_TRUE(refuses(call(good, good, make_view(out.data(), 1, 1, 1, 64)), {"bf16_attention: out", "1", "need 2"}));
  View<const Bf16, 4> strided = good;
  strided.stride[3] = 2;
  EXPECT_TRUE(refuses(call(strided, good, target), {"bf16_attention: k", "stride 2", "need 1"}));
}

}  // namespace
}  // namespace gemma4::reference

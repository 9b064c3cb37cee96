// SPDX-License-Identifier: Apache-2.0
#include "gemma4/attention.hpp"

#include <gtest/gtest.h>

#include "gemma4/attention_bound.hpp"
#include "reference/softmax_state.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4 {
namespace {

using reference::Matrix;
using testkit::close;
using testkit::draw;
using testkit::rc_require;
using testkit::refuses;
using testkit::same_bits;
using State = reference::SoftmaxState<float>;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Scores [n_row, n_key], some of them not seen, and values [n_key, head_dim].
struct Keys {
  Matrix<float> scores, values;

  Keys(std::int64_t n_row, std::int64_t n_key, std::int64_t head_dim, float spread, std::uint64_t seed)
      : scores(n_row, n_key), values(n_key, head_dim) {
    const std::vector<float> s = draw(seed, scores.size(), spread), seen = draw(seed + 1, scores.size(), 1.0f);
    const std::vector<float> v = draw(seed + 2, values.size());
    std::copy(s.begin(), s.end(), scores.data());
    std::copy(v.begin(), v.end(), values.data());
    for (Eigen::Index i = 0; i < scores.size(); ++i) {
      if (seen[static_cast<std::size_t>(i)] < -0.5f) scores.data()[i] = State::kNoKey;
    }
  }

  [[nodiscard]] State state(std::int64_t first, std::int64_t n_key) const {
    State state(scores.rows(), values.cols());
    absorb(state, first, n_key);
    return state;
  }
  void absorb(State& state, std::int64_t first, std::int64_t n_key) const {
    Matrix<float> s = scores.middleCols(first, n_key), v = values.middleRows(first, n_key);
    state.absorb(s, v);
  }

  /// softmax(scores) * values in double.
  [[nodiscard]] std::vector<double> exact() const {
    std::vector<double> out;
    for (Eigen::Index row = 0; row < scores.rows(); ++row) {
      double total = 0;
      for (Eigen::Index j = 0; j < scores.cols(); ++j) total += std::exp(static_cast<double>(scores(row, j)));
      for (Eigen::Index i = 0; i < values.cols(); ++i) {
        double sum = 0;
        for (Eigen::Index j = 0; j < scores.cols(); ++j) {
          sum += std::exp(static_cast<double>(scores(row, j))) * static_cast<double>(values(j, i));
        }
        out.push_back(total > 0 ? sum / total : 0.0);
      }
    }
    return out;
  }
  /// attention_bound with exact scores: head_dim counts no products.
  [[nodiscard]] double bound(std::int64_t n_part) const {
    double largest = 0;
    for (const float score : scores.reshaped()) {
      if (score != State::kNoKey) largest = std::max(largest, std::abs(static_cast<double>(score)));
    }
    return attention_bound({.longest_sum = scores.cols() + n_part, .n_rescale = n_part}, 0, largest, 1.7);
  }
};

Keys random_keys() {
  const auto n_row = *rc::gen::inRange<std::int64_t>(1, 5);
  const auto n_key = *rc::gen::inRange<std::int64_t>(1, 60);
  const auto spread = *rc::gen::element(0.1f, 3.0f, 40.0f);
  return Keys(n_row, n_key, 8, spread, *rc::gen::inRange<std::uint64_t>(0, 1 << 20));
}

std::vector<float> flat(const Matrix<float>& m) {
  return {m.data(), m.data() + m.size()};
}

/// Every bit of a state shows in what it gives after one more key.
std::vector<float> fingerprint(State state, const Keys& keys) {
  std::vector<float> bits = flat(state.finish());
  keys.absorb(state, 0, 1);
  const std::vector<float> more = flat(state.finish());
  bits.insert(bits.end(), more.begin(), more.end());
  return bits;
}

RC_GTEST_PROP(SoftmaxState, AnySplitAndAnyOrderOfMergingAgree, ()) {
  const Keys keys = random_keys();
  const std::int64_t n_key = keys.scores.cols();
  std::vector<State> parts;
  for (std::int64_t done = 0; done < n_key;) {
    const auto n_part = *rc::gen::inRange<std::int64_t>(1, n_key - done + 1);
    parts.push_back(keys.state(done, n_part));
    done += n_part;
  }
  const double bound = keys.bound(static_cast<std::int64_t>(parts.size()));
  while (parts.size() > 1) {  // any two, in any order: commutativity and associativity at once
    const auto a = *rc::gen::inRange<std::size_t>(0, parts.size());
    std::swap(parts[a], parts.back());
    const State last = parts.back();
    parts.pop_back();
    parts[*rc::gen::inRange<std::size_t>(0, parts.size())].merge(last);
  }
  rc_require(close(flat(parts[0].finish()), keys.exact(), bound));
  // Control: a key merged twice counts twice.
  const Keys doubled(4, 3, 8, 0.1f, 7);
  State control = doubled.state(0, 3);
  control.merge(doubled.state(0, 1));
  RC_ASSERT(!close(flat(control.finish()), doubled.exact(), doubled.bound(2)));
}

RC_GTEST_PROP(SoftmaxState, MergeCommutesBitForBit, ()) {
  const Keys keys = random_keys();
  const auto cut = *rc::gen::inRange<std::int64_t>(0, keys.scores.cols() + 1);
  const State a = keys.state(0, cut), b = keys.state(cut, keys.scores.cols() - cut);
  State ab = a, ba = b;
  ab.merge(b);
  ba.merge(a);
  rc_require(same_bits(fingerprint(ab, keys), fingerprint(ba, keys)));
}

RC_GTEST_PROP(SoftmaxState, NoKeyIsTheExactIdentity, ()) {
  const Keys keys = random_keys();
  const State state = keys.state(0, keys.scores.cols()), empty(keys.scores.rows(), 8);
  State left = empty, right = state;
  left.merge(state);
  right.merge(empty);
  rc_require(same_bits(fingerprint(left, keys), fingerprint(state, keys)), "empty merged with a state");
  rc_require(same_bits(fingerprint(right, keys), fingerprint(state, keys)), "a state merged with empty");
}

/// A block that no row sees changes no bit, whatever its values hold.
RC_GTEST_PROP(SoftmaxState, UnseenBlockChangesNoBit, ()) {
  const Keys keys = random_keys();
  State state = keys.state(0, keys.scores.cols());
  const std::vector<float> before = fingerprint(state, keys);
  Matrix<float> scores = Matrix<float>::Constant(keys.scores.rows(), 3, State::kNoKey);
  Matrix<float> values = Matrix<float>::Constant(3, 8, kNaN);
  state.absorb(scores, values);
  rc_require(same_bits(fingerprint(state, keys), before));
}

/// One key that is seen by the second row only.
Matrix<float> two_rows_one_bad_key(float score, float value) {
  State state(2, 1);
  Matrix<float> scores(2, 2), values(2, 1);
  scores << 0.0f, State::kNoKey, 0.0f, score;
  values << 3.0f, value;
  state.absorb(scores, values);
  return state.finish();
}

TEST(SoftmaxState, NonFiniteValuesReachOnlyTheRowsThatSeeThem) {
  EXPECT_EQ(two_rows_one_bad_key(0.0f, kNaN)(0, 0), 3.0f);
  EXPECT_TRUE(std::isnan(two_rows_one_bad_key(0.0f, kNaN)(1, 0)));
  EXPECT_EQ(two_rows_one_bad_key(0.0f, kInfinity)(0, 0), 3.0f);
  EXPECT_EQ(two_rows_one_bad_key(0.0f, kInfinity)(1, 0), kInfinity);
}

TEST(SoftmaxState, NaNScoreThatIsSeenMakesItsRowNaN) {
  EXPECT_EQ(two_rows_one_bad_key(kNaN, 1.0f)(0, 0), 3.0f);
  EXPECT_TRUE(std::isnan(two_rows_one_bad_key(kNaN, 1.0f)(1, 0)));
  // It stays, also after further keys and a merge, and where it was the only key.
  State state(1, 1);
  Matrix<float> scores = Matrix<float>::Constant(1, 1, kNaN), values = Matrix<float>::Constant(1, 1, 1.0f);
  state.absorb(scores, values);
  EXPECT_TRUE(std::isnan(state.finish()(0, 0)));
  State clean(1, 1);
  scores(0, 0) = 5.0f;
  values(0, 0) = 1.0f;
  clean.absorb(scores, values);
  State merged = clean;
  merged.merge(state);
  EXPECT_TRUE(std::isnan(merged.finish()(0, 0)));
  scores(0, 0) = 5.0f;
  values(0, 0) = 1.0f;
  state.absorb(scores, values);
  EXPECT_TRUE(std::isnan(state.finish()(0, 0)));
}

TEST(SoftmaxState, ScoresOfAnySizeNeitherOverflowNorVanish) {
  for (const float offset : {-1e30f, -500.0f, 0.0f, 500.0f, 1e30f}) {
    State state(1, 1);
    Matrix<float> scores = Matrix<float>::Constant(1, 2, offset), values(2, 1);
    values << 1.0f, 3.0f;
    state.absorb(scores, values);
    EXPECT_EQ(state.finish()(0, 0), 2.0f) << offset;
  }
}

/// Eigen's vectorised exponential of -inf is not zero for double (5.6e-309), nor for float on most processors
/// (2.9e-39): the state must not rely on it.
template <class Scalar>
Scalar result_beside_unseen_keys() {
  using AnyState = reference::SoftmaxState<Scalar>;
  AnyState state(1, 1);
  Matrix<Scalar> scores = Matrix<Scalar>::Constant(1, 64, AnyState::kNoKey);
  Matrix<Scalar> values = Matrix<Scalar>::Constant(64, 1, std::numeric_limits<Scalar>::max());
  scores(0, 0) = values(0, 0) = Scalar(0);
  state.absorb(scores, values);
  return state.finish()(0, 0);
}

TEST(SoftmaxState, UnseenKeyHasExactlyNoWeight) {
  EXPECT_EQ(result_beside_unseen_keys<float>(), 0.0f);
  EXPECT_EQ(result_beside_unseen_keys<double>(), 0.0);
}

TEST(SoftmaxState, RefusesToMergeOtherShapes) {
  State state(2, 8);
  EXPECT_TRUE(refuses([&] { state.merge(State(3, 8)); }, {"merge", "[2, 8]", "[3, 8]"}));
  EXPECT_TRUE(refuses([&] { state.merge(State(2, 4)); }, {"merge", "[2, 8]", "[2, 4]"}));
}

TEST(AttentionBound, GrowsWithEveryCauseOfError) {
  const AttentionRounding base{.longest_sum = 100, .n_rescale = 2};
  const double reference = attention_bound(base, 64, 3.0, 2.0);
  EXPECT_GT(reference, 0);
  EXPECT_GT(attention_bound(base, 128, 3.0, 2.0), reference);
  EXPECT_GT(attention_bound(base, 64, 6.0, 2.0), reference);
  EXPECT_DOUBLE_EQ(attention_bound(base, 64, 3.0, 4.0), 2 * reference);
  const auto with = [&](auto change) {
    AttentionRounding rounding = base;
    change(rounding);
    return attention_bound(rounding, 64, 3.0, 2.0);
  };
  EXPECT_GT(with([](auto& r) { r.unit = 0x1p-20; }), reference);
  EXPECT_GT(with([](auto& r) { r.weight_unit = 0x1p-8; }), reference);
  EXPECT_GT(with([](auto& r) { r.longest_sum = 200; }), reference);
  EXPECT_GT(with([](auto& r) { r.n_rescale = 20; }), reference);
  EXPECT_DOUBLE_EQ(with([](auto& r) { r.output_unit = 0x1p-8; }), reference + 2 * 0x1p-8);
}

TEST(AttentionContract, NamesTheCallerArgumentAndBothValues) {
  const AttentionShape good{.batch = 1, .n_query = 4, .n_head = 8, .n_head_kv = 2, .head_dim = 64, .buffer_len = 16};
  EXPECT_NO_THROW(require_attention("x", good, {}, 16));
  EXPECT_NO_THROW(require_attention("x", good, {}, std::nullopt));
  EXPECT_NO_THROW(require_attention("x", good, {.causal = false}, 0));
  const auto with = [&](auto change) {
    return [good, change] {
      AttentionShape shape = good;
      change(shape);
      require_attention("some_attention", shape, {}, std::nullopt);
    };
  };
  EXPECT_TRUE(refuses(with([](auto& s) { s.batch = 0; }), {"some_attention: batch 0"}));
  EXPECT_TRUE(refuses(with([](auto& s) { s.n_query = 0; }), {"some_attention: n_query 0"}));
  EXPECT_TRUE(refuses(with([](auto& s) { s.n_head_kv = 0; }), {"some_attention: n_head_kv 0"}));
  EXPECT_TRUE(refuses(with([](auto& s) { s.n_head = 7; }), {"n_head 7", "n_head_kv 2"}));
  EXPECT_TRUE(refuses(with([](auto& s) { s.n_head = 0; }), {"n_head 0"}));
  EXPECT_TRUE(refuses(with([](auto& s) { s.head_dim = 0; }), {"head_dim 0", "power of two"}));
  EXPECT_TRUE(refuses(with([](auto& s) { s.head_dim = 192; }), {"head_dim 192", "power of two"}));
  EXPECT_TRUE(refuses(with([](auto& s) { s.buffer_len = 0; }), {"buffer_len 0"}));
  EXPECT_TRUE(refuses([&] { require_attention("x", good, {}, 17); }, {"x: kv_len 17", "buffer_len = 16"}));
  EXPECT_TRUE(refuses([&] { require_attention("x", good, {}, 3); }, {"x: kv_len 3", "n_query 4"}));
}

}  // namespace
}  // namespace gemma4

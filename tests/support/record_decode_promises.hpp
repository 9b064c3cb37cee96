// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "tests/support/attention_case.hpp"
#include "tests/support/attention_promises.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"

/// What decode attention over the records of a compressed cache promises, as one list of tests that each format
/// instantiates (INSTANTIATE_TYPED_TEST_SUITE_P(FormatGpu, RecordDecode, TDecode)). TDecode offers
///
///   Subject              of attention_promises.hpp, under a Fixed; compare(out, exact), bounds(exact), n_record() too
///   Fixed                what a call is made with: choice.decode.n_split and smem_limit_bytes among it
///   static Fixed draw(const AttentionCase&)  of the properties: the decode path, a format where there are several
///   static Fixed usual() of the examples
///   kMostQueries         that the decode path takes
namespace gemma4::testkit {

template <class TDecode>
class RecordDecode : public testing::Test {
 protected:
  using Subject = typename TDecode::Subject;
  using Fixed = typename TDecode::Fixed;

  /// A case, and the plan that it takes.
  struct Drawn {
    AttentionCase c;
    Fixed fixed;
  };

  /// A decode case: few queries, and a random number of splits, format and, where no tile is drawn, memory limit.
  [[nodiscard]] static Drawn decode_case(const AttentionCase& original) {
    Drawn drawn{original, TDecode::draw(original)};
    AttentionCase& c = drawn.c;
    c.shape.n_query = std::clamp<std::int64_t>(c.shape.n_query, 1, TDecode::kMostQueries);
    c.kv_len = std::max(c.kv_len, c.shape.n_query);
    c.shape.buffer_len = std::max(c.shape.buffer_len, c.kv_len + 1);
    if (*rc::gen::arbitrary<bool>()) drawn.fixed.choice.decode.n_split = *rc::gen::inRange(1, 40);
    if (!drawn.fixed.choice.decode.tile) {
      drawn.fixed.smem_limit_bytes = *rc::gen::element<std::int64_t>(0, 99 * 1024);
    }
    return drawn;
  }

  /// Few keys of even weights, so that each of them matters far above the bounds.
  [[nodiscard]] static AttentionCase control_case(AttentionCase c) {
    c = even_case(c);
    c.shape.n_query = std::min<std::int64_t>(c.shape.n_query, TDecode::kMostQueries);
    c.kv_len = std::min<std::int64_t>(c.kv_len, c.shape.n_query + 7);
    c.shape.buffer_len = c.kv_len + 3;
    return c;
  }

  /// Runs promise(case, fixed) over random decode cases.
  template <class TPromise>
  static void holds(const TPromise& promise) {
    rc::detail::checkGTest([&](const AttentionCase& original) {
      const Drawn drawn = decode_case(original);
      promise(drawn.c, drawn.fixed);
    });
  }
};
TYPED_TEST_SUITE_P(RecordDecode);

/// Control: an oracle whose causal diagonal is one key too short does not agree.
TYPED_TEST_P(RecordDecode, AgreesWithTheNaiveLoop) {
  TestFixture::holds([](const AttentionCase& c, const auto& fixed) {
    const typename TypeParam::Subject subject(c, fixed);
    rc_require(subject.compare(subject.attend(c.options(), c.kv_len), subject.exact(sees_of(c))));
    const AttentionCase few = TestFixture::control_case(c);
    const typename TypeParam::Subject control(few, fixed);
    const std::vector<float> out = control.attend(few.options(), few.kv_len);
    rc_require(control.compare(out, control.exact(sees_of(few))), "few keys");
    const Sees one_short = [&few](std::int64_t, std::int64_t t, std::int64_t j) { return j < few.limit(t) - 1; };
    RC_ASSERT(!control.compare(out, control.exact(one_short)));
  });
}
TYPED_TEST_P(RecordDecode, GarbageTailIsNeverRead) {
  TestFixture::holds([](const AttentionCase& c, const auto& fixed) {
    garbage_tail_is_never_read<typename TypeParam::Subject>(c, fixed);
  });
}
TYPED_TEST_P(RecordDecode, ClampEqualsSlice) {
  TestFixture::holds(
      [](const AttentionCase& c, const auto& fixed) { clamp_equals_slice<typename TypeParam::Subject>(c, fixed); });
}
TYPED_TEST_P(RecordDecode, CausalSkipChangesNothing) {
  TestFixture::holds([](const AttentionCase& c, const auto& fixed) {
    causal_skip_changes_nothing<typename TypeParam::Subject>(c, fixed);
  });
}
/// Queries in pieces, each with the kv_len it then has, are what one call gives. Control: a piece with the kv_len of
/// the whole call is not.
TYPED_TEST_P(RecordDecode, AnyChunkSizeAgrees) {
  TestFixture::holds([](AttentionCase c, const auto& fixed) {
    c.causal = true;
    c.shape.batch = 1;
    c.shape.n_query = *rc::gen::inRange<std::int64_t>(2, TypeParam::kMostQueries + 1);
    c = TestFixture::control_case(c);
    const typename TypeParam::Subject subject(c, fixed);
    const NaiveAttention exact = subject.exact(sees_of(c));
    const auto first = *rc::gen::inRange<std::int64_t>(1, c.shape.n_query);
    const std::int64_t second = c.shape.n_query - first;
    std::vector<float> joined = subject.attend(c.options(), c.kv_len - second, 0, first);
    RC_ASSERT(!subject.compare(subject.attend(c.options(), c.kv_len, 0, first), exact));
    const std::vector<float> tail = subject.attend(c.options(), c.kv_len, first, second);
    joined.insert(joined.end(), tail.begin(), tail.end());
    rc_require(subject.compare(joined, exact));
  });
}
TYPED_TEST_P(RecordDecode, MaskHidesKeys) {
  TestFixture::holds(
      [](const AttentionCase& c, const auto& fixed) { mask_hides_keys<typename TypeParam::Subject>(c, fixed); });
}
TYPED_TEST_P(RecordDecode, MaskedGarbageHasNoInfluence) {
  TestFixture::holds([](const AttentionCase& c, const auto& fixed) {
    masked_garbage_has_no_influence<typename TypeParam::Subject>(c, fixed);
  });
}
TYPED_TEST_P(RecordDecode, SameCallGivesSameBits) {
  TestFixture::holds([](const AttentionCase& c, const auto& fixed) {
    same_call_gives_same_bits<typename TypeParam::Subject>(c, fixed);
  });
}
TYPED_TEST_P(RecordDecode, AnySplitAgreesWithOne) {
  TestFixture::holds([](const AttentionCase& c, auto fixed) {
    fixed.choice.decode.n_split = 1;
    const typename TypeParam::Subject subject(c, fixed);
    const std::vector<float> one = subject.attend(c.options(), c.kv_len);
    fixed.choice.decode.n_split = *rc::gen::inRange(2, 300);
    const std::vector<float> many = typename TypeParam::Subject(c, fixed).attend(c.options(), c.kv_len);
    std::vector<double> bounds = subject.bounds(subject.exact(sees_of(c)));
    for (double& bound : bounds) bound *= 2;  // each is within one bound of the exact result
    rc_require(vectors_close(many, std::vector<double>(one.begin(), one.end()), bounds, c.shape.head_dim));
  });
}

/// The clamp and the skip save work, counted in records, not in time.
TYPED_TEST_P(RecordDecode, ClampAndSkipVisitFewerRecords) {
  AttentionCase c = example_case(256, 8, 2, 1025);  // the last record holds one key, which only the last query sees
  c.shape.buffer_len = 4096;
  const typename TypeParam::Subject subject(c, TypeParam::usual());
  AttentionOptions without = c.options();
  without.causal_skip = false;
  const auto units = 2u * 2u;  // KV heads and groups of eight rows
  (void)subject.attend(c.options(), c.kv_len);
  EXPECT_EQ(subject.n_record(), units * 65u - 2u);
  (void)subject.attend(without, c.kv_len);
  EXPECT_EQ(subject.n_record(), units * 65u);
  (void)subject.attend(without, std::nullopt);
  EXPECT_EQ(subject.n_record(), units * 256u);
}

TYPED_TEST_P(RecordDecode, NoKeysGiveZeros) {
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    AttentionCase c = example_case(head_dim, 4, 4, 100);
    c.causal = false;
    const typename TypeParam::Subject subject(c, TypeParam::usual());
    EXPECT_TRUE(same_bits(subject.attend(c.options(), 0), std::vector<float>(static_cast<std::size_t>(c.q_size()))));
    c.causal = true;  // fewer keys than queries: the first queries stand before the first key
    const std::vector<float> out = typename TypeParam::Subject(c, TypeParam::usual()).attend(c.options(), 3);
    const std::size_t row = static_cast<std::size_t>(c.shape.n_head * head_dim);
    EXPECT_TRUE(same_bits(std::span(out).first(row), std::vector<float>(row)));
    EXPECT_NE(out[row], 0.0f);
  }
}

REGISTER_TYPED_TEST_SUITE_P(RecordDecode, AgreesWithTheNaiveLoop, GarbageTailIsNeverRead, ClampEqualsSlice,
                            CausalSkipChangesNothing, AnyChunkSizeAgrees, MaskHidesKeys, MaskedGarbageHasNoInfluence,
                            SameCallGivesSameBits, AnySplitAgreesWithOne, ClampAndSkipVisitFewerRecords,
                            NoKeysGiveZeros);

}  // namespace gemma4::testkit

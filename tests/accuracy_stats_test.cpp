// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/accuracy_stats.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "tests/support/close.hpp"
#include "tests/support/property.hpp"

namespace {

using namespace gemma4;

std::vector<float> any_logits(std::size_t n) {
  auto logits = *rc::gen::container<std::vector<float>>(
      n, rc::gen::map(rc::gen::inRange(-3000, 3001), [](int value) { return static_cast<float>(value) / 100.0f; }));
  return logits;
}

RC_GTEST_PROP(AccuracyStats, SelfComparisonCostsNothing, ()) {
  const auto n = *rc::gen::inRange<std::size_t>(2, 50);
  std::vector<float> logits = any_logits(n);
  logits[0] += 0.5f;  // not all zero
  const PositionAccuracy self = compare_logits(logits, logits, *rc::gen::inRange<std::int64_t>(0, n));
  testkit::rc_require(testkit::close(self.kl, 0.0, 0.0));
  testkit::rc_require(testkit::close(self.cosine, 1.0, 1e-12));
  RC_ASSERT(self.same_top);
  RC_ASSERT(self.probability_delta == 0.0);
}

RC_GTEST_PROP(AccuracyStats, AConstantAddedToAllLogitsChangesNothingButTheCosine, ()) {
  const auto n = *rc::gen::inRange<std::size_t>(2, 50);
  const std::vector<float> base = any_logits(n), test = any_logits(n);
  std::vector<float> shifted = test;
  for (float& logit : shifted) logit += 8.0f;
  const auto target = *rc::gen::inRange<std::int64_t>(0, n);
  const PositionAccuracy a = compare_logits(test, base, target), b = compare_logits(shifted, base, target);
  testkit::rc_require(testkit::close(a.kl, b.kl, 1e-4));
  testkit::rc_require(testkit::close(a.nll, b.nll, 1e-4));
  RC_ASSERT(a.kl >= -1e-12);  // Gibbs
}

TEST(AccuracyStats, KnownValues) {
  // base (1/2, 1/4, 1/4), test (1/4, 1/4, 1/2), target 0
  const std::vector<float> base = {std::log(2.0f), 0.0f, 0.0f}, test = {0.0f, 0.0f, std::log(2.0f)};
  const PositionAccuracy result = compare_logits(test, base, 0);
  EXPECT_TRUE(testkit::close(result.nll, std::log(4.0), 1e-7));
  EXPECT_TRUE(testkit::close(result.kl, 0.25 * std::log(2.0), 1e-7));
  EXPECT_TRUE(testkit::close(result.probability_delta, -0.25, 1e-7));
  EXPECT_FALSE(result.same_top);
  // KL is not symmetric; KL(test || base) happens to be equal here, so take a case where it is not.
  const std::vector<float> flat = {0.0f, 0.0f, 0.0f};
  EXPECT_FALSE(testkit::close(compare_logits(flat, base, 0).kl, compare_logits(base, flat, 0).kl, 1e-3));
}

TEST(AccuracyStats, SummaryOfARange) {
  std::vector<PositionAccuracy> positions(200);
  for (std::size_t i = 0; i < positions.size(); ++i) {
    positions[i] = {.nll = 1.0,
                    .kl = static_cast<double>(i),
                    .same_top = i % 4 != 0,
                    .probability_delta = i % 2 == 0 ? 0.3 : -0.3,
                    .cosine = 0.5};
  }
  const AccuracySummary summary = summarise(positions);
  EXPECT_EQ(summary.count, 200);
  EXPECT_TRUE(testkit::close(summary.kl_mean, 99.5, 1e-9));
  EXPECT_EQ(summary.kl_p99, 197.0) << "198 of 200 values are at most 197";
  EXPECT_EQ(summary.kl_max, 199.0);
  EXPECT_TRUE(testkit::close(summary.same_top, 0.75, 1e-12));
  EXPECT_TRUE(testkit::close(summary.dp_rms, 0.3, 1e-12)) << "a mean would be 0";
  EXPECT_TRUE(std::isnan(summarise({}).nll));
}

TEST(AccuracyStats, TiesGoToTheLowestToken) {
  EXPECT_EQ(argmax(std::vector<float>{1, 3, 3, 2}), 1);
}

TEST(AccuracyStats, RefusesATargetOutsideTheVocabulary) {
  const std::vector<float> logits(4, 0.0f);
  EXPECT_THROW((void)compare_logits(logits, logits, 4), std::invalid_argument);
  EXPECT_THROW((void)compare_logits(logits, std::vector<float>(3, 0.0f), 0), std::invalid_argument);
}

}  // namespace

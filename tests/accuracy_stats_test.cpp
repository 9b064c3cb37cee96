// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/accuracy_stats.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
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
  EXPECT_TRUE(testkit::close(result.cosine, 0.0, 1e-12));
  EXPECT_TRUE(testkit::close(compare_logits(std::vector<float>{1.0f, 0.0f}, std::vector<float>{3.0f, 3.0f}, 0).cosine,
                             std::sqrt(0.5), 1e-12));
}

TEST(AccuracyStats, KlIsOfTheBaseFromTheTest) {
  // KL(base || test) and KL(test || base) are equal for the pair above. Here they are not: sum b ln(b / t) with
  // b = (1/2, 1/4, 1/4) and t = (1/3, 1/3, 1/3) is ln 3 - 1.5 ln 2, and the other way round 5/3 ln 2 - ln 3.
  const std::vector<float> base = {std::log(2.0f), 0.0f, 0.0f}, flat = {0.0f, 0.0f, 0.0f};
  const double forward = std::log(3.0) - 1.5 * std::log(2.0), backward = 5.0 / 3.0 * std::log(2.0) - std::log(3.0);
  EXPECT_TRUE(testkit::close(compare_logits(flat, base, 0).kl, forward, 1e-7));
  EXPECT_TRUE(testkit::close(compare_logits(base, flat, 0).kl, backward, 1e-7));
  EXPECT_FALSE(testkit::close(forward, backward, 1e-3)) << "the control: the two can be told apart";
  // And the loss and the change of the target's probability are those of the test.
  EXPECT_TRUE(testkit::close(compare_logits(flat, base, 0).nll, std::log(3.0), 1e-7));
  EXPECT_TRUE(testkit::close(compare_logits(flat, base, 0).probability_delta, 1.0 / 3.0 - 0.5, 1e-7));
}

TEST(AccuracyStats, LogitsOfAThousandAreNoOverflow) {
  for (const float shift : {-1000.0f, 0.0f, 1000.0f}) {
    const std::vector<float> base = {shift + 2.0f, shift, shift}, flat = {shift, shift, shift};
    EXPECT_TRUE(testkit::close(log_sum_exp(flat), shift + std::log(3.0), 1e-9)) << shift;
    const PositionAccuracy result = compare_logits(flat, base, 1);
    const double z = std::exp(2.0) + 2.0;
    EXPECT_TRUE(testkit::close(result.nll, std::log(3.0), 1e-9)) << shift;
    EXPECT_TRUE(testkit::close(result.kl, std::log(3.0) - std::log(z) + 2.0 * std::exp(2.0) / z, 1e-9)) << shift;
    EXPECT_TRUE(testkit::close(result.probability_delta, 1.0 / 3.0 - 1.0 / z, 1e-9)) << shift;
  }
  // Far apart in one vector: all of the probability is at the largest.
  const std::vector<float> far = {-1000.0f, 1000.0f, 0.0f};
  EXPECT_TRUE(testkit::close(log_sum_exp(far), 1000.0, 1e-12));
  EXPECT_TRUE(testkit::close(compare_logits(far, far, 0).nll, 2000.0, 1e-12));
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

TEST(AccuracyStats, CosinesAndLossesAreAveragedAndTheWorstIsKept) {
  std::vector<PositionAccuracy> positions(3);
  for (std::size_t worst = 0; worst < positions.size(); ++worst) {
    for (std::size_t i = 0; i < positions.size(); ++i) {
      positions[i] = {.nll = static_cast<double>(i), .kl = i == worst ? 3.0 : 1.0, .cosine = i == worst ? -0.5 : 1.0};
    }
    const AccuracySummary summary = summarise(positions);
    EXPECT_TRUE(testkit::close(summary.nll, 1.0, 1e-12));
    EXPECT_TRUE(testkit::close(summary.kl_mean, 5.0 / 3.0, 1e-12));
    EXPECT_TRUE(testkit::close(summary.cosine, 0.5, 1e-12)) << worst;
    EXPECT_EQ(summary.cosine_min, -0.5) << worst;
    EXPECT_EQ(summary.kl_max, 3.0) << worst;
    EXPECT_EQ(summary.same_top, 0.0);
  }
}

TEST(AccuracyStats, NinetyNineInAHundredDoNotExceedP99) {
  // Values 0 to n - 1 out of order: value v is not exceeded by v + 1 of them, and the smallest with
  // 100 (v + 1) >= 99 n is wanted. 150: 149 of 150 (148 are 98.7 %), so that a rank rounded down or to nearest shows.
  for (std::int64_t n = 1; n <= 1200; ++n) {
    std::vector<PositionAccuracy> positions(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
      positions[static_cast<std::size_t>(i)].kl = static_cast<double>(i % 2 == 0 ? i / 2 : n - 1 - i / 2);
      positions[static_cast<std::size_t>(i)].cosine = 1.0;
    }
    std::int64_t expected = 0;
    while (100 * (expected + 1) < 99 * n) ++expected;
    const AccuracySummary summary = summarise(positions);
    ASSERT_EQ(summary.kl_p99, static_cast<double>(expected)) << n << " positions";
    while (1000 * (expected + 1) < 999 * n) ++expected;
    ASSERT_EQ(summary.kl_p999, static_cast<double>(expected)) << n << " positions";
    ASSERT_EQ(summary.kl_median, static_cast<double>((n + 1) / 2 - 1))
        << n << " positions: of an even number the lower";
  }
}

/// Every figure but the count is NaN.
testing::AssertionResult is_nan_throughout(const AccuracySummary& s) {
  const std::pair<const char*, double> figures[] = {{"nll", s.nll},
                                                    {"kl_mean", s.kl_mean},
                                                    {"kl_p99", s.kl_p99},
                                                    {"kl_max", s.kl_max},
                                                    {"kl_median", s.kl_median},
                                                    {"kl_p999", s.kl_p999},
                                                    {"same_top", s.same_top},
                                                    {"dp_rms", s.dp_rms},
                                                    {"cosine", s.cosine},
                                                    {"cosine_min", s.cosine_min}};
  for (const auto& [name, value] : figures) {
    if (!std::isnan(value)) return testing::AssertionFailure() << name << " is " << value;
  }
  return testing::AssertionSuccess();
}

TEST(AccuracyStats, ANaNIsSeenInEveryFigureWhereverItStands) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  const PositionAccuracy good{.nll = 1, .kl = 0.25, .same_top = true, .probability_delta = 0.125, .cosine = 0.5};
  for (const std::size_t n : {1, 2, 3, 200}) {
    const std::vector<PositionAccuracy> clean(n, good);
    EXPECT_FALSE(is_nan_throughout(summarise(clean)));
    EXPECT_EQ(summarise(clean).cosine_min, 0.5);
    for (std::size_t at = 0; at < n; ++at) {
      for (double PositionAccuracy::*field : {&PositionAccuracy::nll, &PositionAccuracy::kl,
                                              &PositionAccuracy::probability_delta, &PositionAccuracy::cosine}) {
        std::vector<PositionAccuracy> positions = clean;
        positions[at].*field = kNan;
        EXPECT_TRUE(is_nan_throughout(summarise(positions))) << "position " << at << " of " << n;
        EXPECT_EQ(summarise(positions).count, static_cast<std::int64_t>(n));
      }
    }
  }
  EXPECT_TRUE(is_nan_throughout(summarise({})));
}

TEST(AccuracyStats, ALogitThatIsNoNumberMakesItsPositionNaN) {
  const std::vector<float> clean = {1.0f, 2.0f, 3.0f, 4.0f};
  for (std::size_t at = 0; at < clean.size(); ++at) {
    for (const bool in_test : {true, false}) {
      std::vector<float> dirty = clean;
      dirty[at] = std::numeric_limits<float>::quiet_NaN();
      const PositionAccuracy result = in_test ? compare_logits(dirty, clean, 2) : compare_logits(clean, dirty, 2);
      EXPECT_TRUE(std::isnan(result.kl)) << at;
      EXPECT_TRUE(std::isnan(result.cosine)) << at;
      EXPECT_TRUE(is_nan_throughout(summarise(std::vector{result}))) << at;
    }
  }
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

// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/statistics.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

namespace gemma4 {
namespace {

TEST(Statistics, OfKnownSamples) {
  const SampleSummary summary = summarise_samples(std::vector<double>{4, 1, 3, 2, 5});
  EXPECT_EQ(summary.count, 5u);
  EXPECT_DOUBLE_EQ(summary.mean, 3);
  EXPECT_DOUBLE_EQ(summary.deviation, std::sqrt(2.5));
  EXPECT_EQ(summary.min, 1);
  EXPECT_EQ(summary.p10, 1);
  EXPECT_EQ(summary.median, 3);
  EXPECT_EQ(summary.p90, 5);
  EXPECT_EQ(summary.max, 5);
  EXPECT_EQ(summarise_samples(std::vector<double>{7}).deviation, 0);
}

TEST(Statistics, QuantilesAreOfTheNearestRank) {
  // 1 to 20 out of order: the ranks are 0.1 x 19 = 1.9, 9.5 (the upper of the two) and 17.1.
  std::vector<double> samples;
  for (int i = 0; i < 20; ++i) samples.push_back(1 + i * 7 % 20);
  const SampleSummary summary = summarise_samples(samples);
  EXPECT_EQ(summary.p10, 3);
  EXPECT_EQ(summary.median, 11);
  EXPECT_EQ(summary.p90, 18);
  EXPECT_DOUBLE_EQ(summary.mean, 10.5);
  EXPECT_DOUBLE_EQ(summary.deviation, std::sqrt(35.0));
}

// Powers of two scale exactly; a shift rounds, by at most a few units of the largest value.
RC_GTEST_PROP(Statistics, ScaleWithTheSamples, (std::vector<std::int16_t> values)) {
  RC_PRE(!values.empty());
  std::vector<double> samples(values.begin(), values.end()), scaled;
  for (const double sample : samples) scaled.push_back(4 * sample);
  const SampleSummary one = summarise_samples(samples), four = summarise_samples(scaled);
  RC_ASSERT(four.mean == 4 * one.mean);
  RC_ASSERT(four.deviation == 4 * one.deviation);
  RC_ASSERT(four.median == 4 * one.median);
  RC_ASSERT(one.min <= one.p10 && one.p10 <= one.median && one.median <= one.p90 && one.p90 <= one.max);
}

TEST(Statistics, RefuseNothingAndWhatIsNoNumber) {
  EXPECT_THROW((void)summarise_samples({}), std::invalid_argument);
  EXPECT_THROW((void)summarise_samples(std::vector<double>{1, std::numeric_limits<double>::quiet_NaN()}),
               std::invalid_argument);
}

}  // namespace
}  // namespace gemma4

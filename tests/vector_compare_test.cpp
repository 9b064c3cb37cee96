// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/vector_compare.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

namespace gemma4 {
namespace {

TEST(VectorCompare, KnownValues) {
  const VectorComparison same = compare_vectors(std::vector<float>{1, 2}, std::vector<float>{1, 2});
  EXPECT_EQ(same.cosine, 1);
  EXPECT_EQ(same.relative_error, 0);
  const VectorComparison right_angle = compare_vectors(std::vector<float>{0, 3}, std::vector<float>{4, 0});
  EXPECT_EQ(right_angle.cosine, 0);
  EXPECT_DOUBLE_EQ(right_angle.relative_error, 1.25);
  EXPECT_DOUBLE_EQ(compare_vectors(std::vector<float>{2, 4}, std::vector<float>{1, 2}).cosine, 1)
      << "a cosine does not see the length";
  EXPECT_DOUBLE_EQ(compare_vectors(std::vector<float>{2, 4}, std::vector<float>{1, 2}).relative_error, 1);
  EXPECT_EQ(compare_vectors(std::vector<float>{0}, std::vector<float>{0}).cosine, 1);
}

TEST(VectorCompare, WorseKeepsWhatIsNoNumber) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const VectorComparison good{0.9, 0.1}, bad{0.5, 0.7}, broken{nan, nan};
  EXPECT_EQ(worse(good, bad).cosine, 0.5);
  EXPECT_EQ(worse(bad, good).relative_error, 0.7);
  for (const VectorComparison& found : {worse(good, broken), worse(broken, good)}) {
    EXPECT_TRUE(std::isnan(found.cosine));
    EXPECT_TRUE(std::isnan(found.relative_error));
  }
  EXPECT_TRUE(std::isnan(
      compare_vectors(std::vector<float>{std::numeric_limits<float>::quiet_NaN()}, std::vector<float>{1}).cosine));
}

TEST(VectorCompare, RefusesOtherLengths) {
  EXPECT_THROW((void)compare_vectors(std::vector<float>{1}, std::vector<float>{1, 2}), std::invalid_argument);
}

}  // namespace
}  // namespace gemma4

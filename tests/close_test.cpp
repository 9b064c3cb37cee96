// SPDX-License-Identifier: Apache-2.0
// The comparator is code under test: most cases here must be rejected.
#include "tests/support/close.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/support/property.hpp"

namespace {

using gemma4::testkit::close;
using gemma4::testkit::scale_close;
using gemma4::testkit::scale_of;
using gemma4::testkit::share_of_way;
using gemma4::testkit::stays_at;
using Row = std::vector<float>;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(Close, AcceptsWithinTheBoundAndOnIt) {
  EXPECT_TRUE(close(Row{1.0f, -2.0f}, Row{1.0f, -2.0f}, 0.0));
  EXPECT_TRUE(close(Row{1.0f, -2.0f}, Row{1.5f, -2.5f}, 0.5));
  EXPECT_TRUE(close(1.0, 1.25, 0.25));
}

TEST(Close, RejectsJustAboveTheBound) {
  const double above = std::nextafter(0.5, 1.0);
  EXPECT_FALSE(close(std::vector<double>{above}, std::vector<double>{0.0}, 0.5));
}

TEST(Close, RejectsNanOnEitherSideAndOnBoth) {
  EXPECT_FALSE(close(Row{1, kNan}, Row{1, 2}, 1e30));
  EXPECT_FALSE(close(Row{1, 2}, Row{1, kNan}, 1e30));
  EXPECT_FALSE(close(Row{1, kNan}, Row{1, kNan}, 1e30));
  EXPECT_FALSE(close(Row{kInf}, Row{kInf}, 1e30));
}

TEST(Close, RejectsANanOrNegativeBound) {
  EXPECT_FALSE(close(Row{1}, Row{1}, kNan));
  EXPECT_FALSE(close(Row{1}, Row{1}, -1.0));
}

TEST(Close, RejectsWhenBothAreNegative) {
  EXPECT_FALSE(close(Row{-3.0f}, Row{-5.0f}, 1.0));
}

TEST(Close, RejectsOppositeSigns) {
  EXPECT_FALSE(close(Row{-1.0f}, Row{1.0f}, 1.0));
}

TEST(Close, RejectsSwappedRows) {
  const Row expected{0, 1, 2, 3, 4, 5}, swapped{3, 4, 5, 0, 1, 2};  // [2, 3]: the same values, the wrong rows
  EXPECT_FALSE(close(swapped, expected, 0.5));
}

TEST(Close, RejectsOffByOnePosition) {
  Row expected(64), shifted(64);
  for (int i = 0; i < 64; ++i) {
    expected[static_cast<std::size_t>(i)] = static_cast<float>(i);
    shifted[static_cast<std::size_t>(i)] = static_cast<float>(i + 1);
  }
  EXPECT_FALSE(close(shifted, expected, 0.5));
}

TEST(Close, RejectsDifferentLengthsAndEmptiness) {
  EXPECT_FALSE(close(Row{1, 2}, Row{1}, 10.0));
  EXPECT_FALSE(close(Row{}, Row{}, 10.0));
  EXPECT_FALSE(close(Row{1, 2}, Row{1, 2}, Row{1}));
}

TEST(Close, UsesTheBoundOfEachElement) {
  EXPECT_TRUE(close(Row{1, 10}, Row{1.5f, 20}, Row{0.5f, 10}));
  EXPECT_FALSE(close(Row{1, 10}, Row{1.5f, 20}, Row{10, 0.5f}));
}

TEST(Close, NamesTheWorstElementWithBothValues) {
  const auto result = close(Row{0, 0, 7, 0}, Row{0, 2, 3, 0}, 1.0);
  ASSERT_FALSE(result);
  const std::string message = result.message();
  EXPECT_NE(message.find("2 of 4"), std::string::npos) << message;
  EXPECT_NE(message.find("index 2: actual 7, expected 3, error 4"), std::string::npos) << message;
}

TEST(Close, NamesTheNanBeforeAnyFiniteError) {
  const std::string message = close(Row{0, kNan, 1e30f}, Row{0, 0, 0}, 1.0).message();
  EXPECT_NE(message.find("index 1"), std::string::npos) << message;
}

TEST(Close, ComparesSixteenBitFormatsByValue) {
  const std::vector<gemma4::Bf16> actual{gemma4::to_bf16(1.0f)};
  EXPECT_TRUE(close(actual, Row{1.0f}, 0.0));
  EXPECT_FALSE(close(actual, Row{2.0f}, 0.5));
}

RC_GTEST_PROP(Close, OneElementBeyondTheBoundIsFoundWhereverItStands, ()) {
  const auto n = *rc::gen::inRange<std::size_t>(1, 200);
  const auto at = *rc::gen::inRange<std::size_t>(0, n);
  const Row expected(n, 1.0f);
  Row actual = expected;
  RC_ASSERT(static_cast<bool>(close(actual, expected, 0.25)));
  actual[at] = *rc::gen::element(1.5f, 0.5f, -1.0f, kNan, kInf);
  RC_ASSERT(!close(actual, expected, 0.25));
}

// ---- scale_close() and stays_at(), of which most must be rejected too

TEST(ScaleClose, AcceptsEqualsAndTheBound) {
  EXPECT_TRUE(scale_close(Row{1, -2, 3}, Row{1, -2, 3}, 0.0));
  EXPECT_TRUE(scale_close(Row{1.5f, -3}, Row{1, -2}, 0.5));
  EXPECT_EQ(scale_of(Row{3, 6}, Row{1, 2}), 3.0);
  EXPECT_EQ(scale_of(Row{-1, -2}, Row{1, 2}), -1.0);
}

TEST(ScaleClose, RejectsAFactorBeyondTheBound) {
  EXPECT_FALSE(scale_close(Row{1.004f, -2.008f}, Row{1, -2}, 1e-3));
  EXPECT_FALSE(scale_close(Row{0.996f, -1.992f}, Row{1, -2}, 1e-3));
  EXPECT_FALSE(scale_close(Row{-1, 2}, Row{1, -2}, 1e-3)) << "the sign";
  EXPECT_FALSE(scale_close(Row{0, 0}, Row{1, -2}, 1e-3)) << "nothing written";
}

TEST(ScaleClose, RejectsNanInfinityAndNothingToCompare) {
  EXPECT_FALSE(scale_close(Row{1, kNan}, Row{1, 2}, 1e30));
  EXPECT_FALSE(scale_close(Row{1, 2}, Row{1, kNan}, 1e30));
  EXPECT_FALSE(scale_close(Row{kInf, 1}, Row{kInf, 1}, 1e30));
  EXPECT_FALSE(scale_close(Row{1, 2}, Row{1, 2}, kNan));
  EXPECT_FALSE(scale_close(Row{1, 2}, Row{1, 2}, -1.0));
  EXPECT_FALSE(scale_close(Row{1, 2}, Row{0, 0}, 1e30)) << "nothing has no scale";
  EXPECT_FALSE(scale_close(Row{}, Row{}, 1e30));
  EXPECT_FALSE(scale_close(Row{1, 2}, Row{1}, 1e30));
}

/// An error of 1 % without direction on 10000 values moves the scale by 1e-4; a factor of 1.004 beneath it shows.
RC_GTEST_PROP(ScaleClose, SeesASmallFactorUnderALargerNoise, ()) {
  const auto seed = *rc::gen::arbitrary<std::uint32_t>();
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> expected(10000), right, wrong;
  for (double& value : expected) {
    value = normal(random);
    const double noise = 0.01 * normal(random);
    right.push_back(value + noise), wrong.push_back(1.004 * value + noise);
  }
  RC_ASSERT(static_cast<bool>(scale_close(right, expected, 1e-3)));
  RC_ASSERT(!scale_close(wrong, expected, 1e-3));
}

TEST(StaysAt, MeasuresTheWayToAnother) {
  const Row expected{1, 0, 5}, other{3, 0, 5};
  EXPECT_TRUE(stays_at(expected, expected, other, 0.0));
  EXPECT_EQ(share_of_way(other, expected, other), 1.0);
  EXPECT_EQ(share_of_way(Row{1.5f, 7, 9}, expected, other), 0.25) << "what lies across the way does not count";
  EXPECT_FALSE(stays_at(Row{1.5f, 0, 5}, expected, other, 0.2));
  EXPECT_FALSE(stays_at(Row{0.5f, 0, 5}, expected, other, 0.2)) << "the other direction";
}

TEST(StaysAt, RejectsNanAndNoWay) {
  EXPECT_FALSE(stays_at(Row{1, kNan}, Row{1, 2}, Row{2, 2}, 1e30));
  EXPECT_FALSE(stays_at(Row{1, 2}, Row{1, 2}, Row{1, 2}, 1e30)) << "other is expected";
  EXPECT_FALSE(stays_at(Row{1, 2}, Row{1, 2}, Row{1, kNan}, 1e30));
  EXPECT_FALSE(stays_at(Row{1, 2}, Row{1, 2}, Row{2}, 1e30));
  EXPECT_FALSE(stays_at(Row{}, Row{}, Row{}, 1e30));
}

}  // namespace

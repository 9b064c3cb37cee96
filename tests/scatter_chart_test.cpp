// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/scatter_chart.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace gemma4 {
namespace {

std::size_t count(const std::string& text, const std::string& word) {
  std::size_t n = 0;
  for (std::size_t at = text.find(word); at != text.npos; at = text.find(word, at + 1)) ++n;
  return n;
}

TEST(ScatterChart, TicksAreRoundAndHoldTheRange) {
  EXPECT_EQ(log_ticks(3, 40), (std::vector<double>{2, 5, 10, 20, 50}));
  EXPECT_EQ(log_ticks(10, 10), (std::vector<double>{10, 20}));
  EXPECT_THROW((void)log_ticks(0, 1), std::invalid_argument);
  EXPECT_THROW((void)log_ticks(2, 1), std::invalid_argument);
  EXPECT_THROW((void)log_ticks(1, std::numeric_limits<double>::infinity()), std::invalid_argument);
}

RC_GTEST_PROP(ScatterChart, TicksHoldAnyRangeAndBeginAtItsEnd, ()) {
  const double low = *rc::gen::inRange(1, 1000) * std::pow(10.0, *rc::gen::inRange(-8, 8));
  const double high = low * *rc::gen::inRange(1, 100000);
  const std::vector<double> ticks = log_ticks(low, high);
  RC_ASSERT(ticks.size() >= 2u);
  RC_ASSERT(ticks.front() <= low * (1 + 1e-9));
  RC_ASSERT(ticks[1] > low * (1 - 1e-9));
  RC_ASSERT(ticks.back() >= high * (1 - 1e-9));
  RC_ASSERT(ticks.size() == 2u || ticks[ticks.size() - 2] < high * (1 + 1e-9));
}

TEST(ScatterChart, PointsStandAtTheirPlacesWithTheirNames) {
  std::ostringstream svg;
  write_scatter_chart(
      svg, {"KL & bytes", "bytes", "KL"},
      {{"tq4 <ours>", 100, 0.01, false}, {"worse", 1000, 0.1, true}, {"middle", 316.22776601683796, 0.02}});
  const std::string text = svg.str();
  EXPECT_EQ(count(text, "<circle"), 3u);
  EXPECT_EQ(count(text, "#999999"), 1u) << "one is dimmed";
  EXPECT_NE(text.find("tq4 &lt;ours&gt;"), text.npos);
  EXPECT_NE(text.find("cx=\"90\" cy=\"690\""), text.npos) << "the least of both is the corner";
  EXPECT_NE(text.find("cx=\"1080\" cy=\"50\""), text.npos) << "the largest of both the other";
  EXPECT_NE(text.find("cx=\"585\""), text.npos) << "half a decade of a decade is the middle";
  EXPECT_TRUE(text.ends_with("</svg>\n"));
}

/// Forty names fit a chart in which points do not crowd; none covers another or a point. The control: side by side with
/// no search, some do.
RC_GTEST_PROP(ScatterChart, NamesDoNotCoverOneAnother, ()) {
  std::vector<NamedPoint> points;
  std::vector<std::array<double, 2>> at;
  const auto n = *rc::gen::inRange(1, 40);
  for (int i = 0; i < n; ++i) {
    points.push_back({std::string(static_cast<std::size_t>(*rc::gen::inRange(3, 22)), 'x')});
    at.push_back({100.0 + *rc::gen::inRange(0, 900), 60.0 + *rc::gen::inRange(0, 600)});
  }
  const std::vector<LabelBox> boxes = place_labels(points, at, {90, 50, 990, 640});
  RC_ASSERT(boxes.size() == points.size());
  for (std::size_t i = 0; i < boxes.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) RC_ASSERT(!boxes[i].overlaps(boxes[j]));
    for (const auto& point : at) RC_ASSERT(!boxes[i].contains(point[0], point[1]));
  }
}

TEST(ScatterChart, PointsAtOnePlaceGetNamesApart) {
  const std::vector<NamedPoint> points = {{"one"}, {"two"}, {"three"}};
  const std::vector<std::array<double, 2>> at(3, {500.0, 300.0});
  const std::vector<LabelBox> boxes = place_labels(points, at, {90, 50, 990, 640});
  EXPECT_FALSE(boxes[0].overlaps(boxes[1]) || boxes[1].overlaps(boxes[2]) || boxes[0].overlaps(boxes[2]));
  EXPECT_TRUE(boxes[0].overlaps(boxes[0])) << "the control";
}

TEST(ScatterChart, RefusesWhatCannotBeDrawn) {
  std::ostringstream svg;
  EXPECT_THROW(write_scatter_chart(svg, {}, {}), std::invalid_argument);
  EXPECT_THROW(write_scatter_chart(svg, {}, {{"a", 0, 1}}), std::invalid_argument);
  EXPECT_THROW(write_scatter_chart(svg, {}, {{"a", 1, 0}}), std::invalid_argument);
  EXPECT_THROW(write_scatter_chart(svg, {}, {{"a", 1, std::nan("")}}), std::invalid_argument);
}

}  // namespace
}  // namespace gemma4

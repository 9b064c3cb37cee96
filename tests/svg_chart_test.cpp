// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/svg_chart.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
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

TEST(SvgChart, TicksAreRoundAndReachTheLargestValue) {
  EXPECT_EQ(axis_ticks(180), (std::vector<double>{0, 50, 100, 150, 200}));
  EXPECT_EQ(axis_ticks(1), (std::vector<double>{0, 0.2, 0.4, 0.2 * 3, 0.8, 1}));
  EXPECT_THROW((void)axis_ticks(0), std::invalid_argument);
  EXPECT_THROW((void)axis_ticks(std::numeric_limits<double>::infinity()), std::invalid_argument);
}

RC_GTEST_PROP(SvgChart, TicksCoverAnyRangeInFewSteps, ()) {
  const double max = *rc::gen::inRange(1, 1000000) * std::pow(10.0, *rc::gen::inRange(-9, 9));
  const std::vector<double> ticks = axis_ticks(max);
  RC_ASSERT(ticks.front() == 0.0);
  RC_ASSERT(ticks.back() >= max);
  RC_ASSERT(ticks[ticks.size() - 2] < max);
  RC_ASSERT(ticks.size() >= 4u);
  RC_ASSERT(ticks.size() <= 10u);
}

TEST(SvgChart, LinesHaveAMarkerForEachPointAndTheirNames) {
  std::ostringstream svg;
  write_line_chart(svg, {"speed & depth", "depth", "tokens/s"},
                   {{"ours <new>", {{512, 180}, {131072, 150}}, false}, {"a peer", {{512, 45}}, true}});
  const std::string text = svg.str();
  EXPECT_EQ(count(text, "<circle"), 3u);
  EXPECT_EQ(count(text, "<polyline"), 2u);
  EXPECT_EQ(count(text, "stroke-dasharray"), 2u) << "the line and its sample";
  EXPECT_NE(text.find("ours &lt;new&gt;"), text.npos);
  EXPECT_NE(text.find("speed &amp; depth"), text.npos);
  EXPECT_NE(text.find(">128k<"), text.npos);
  EXPECT_NE(text.find("cx=\"95\""), text.npos) << "the smallest x stands at the left";
  EXPECT_NE(text.find("cx=\"585\""), text.npos) << "the largest at the right";
  EXPECT_TRUE(text.ends_with("</svg>\n"));
}

TEST(SvgChart, PartsOfABarStandOnOneAnother) {
  std::ostringstream svg;
  write_bar_chart(svg, {"memory", "", "GiB"}, {{"tq4", {{"weights", 6}, {"cache", 2}}}, {"bf16", {{"weights", 6}}}});
  const std::string text = svg.str();
  // The axis reaches 8 over 360 points: 6 begins at 50 + 90, and 2 on top of it at 50.
  EXPECT_EQ(count(text, "y=\"140\" width=\"182\" height=\"270\""), 2u);
  EXPECT_EQ(count(text, "y=\"50\" width=\"182\" height=\"90\""), 1u);
  EXPECT_EQ(count(text, "<title>weights: 6</title>"), 2u);
}

TEST(SvgChart, RefusesWhatCannotBeDrawn) {
  std::ostringstream svg;
  EXPECT_THROW(write_line_chart(svg, {}, {}), std::invalid_argument);
  EXPECT_THROW(write_line_chart(svg, {}, {{"a", {{0, 1}}, false}}), std::invalid_argument);
  EXPECT_THROW(write_line_chart(svg, {}, {{"a", {{1, std::nan("")}}, false}}), std::invalid_argument);
  EXPECT_THROW(write_bar_chart(svg, {}, {}), std::invalid_argument);
  EXPECT_THROW(write_bar_chart(svg, {}, {{"a", {{"b", -1}}}}), std::invalid_argument);
}

}  // namespace
}  // namespace gemma4

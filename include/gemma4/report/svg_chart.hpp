// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"

/// Two kinds of charts as SVG text: lines over an axis in powers of two, and stacked bars.
namespace gemma4 {

/// Ticks at multiples of 1, 2 or 5 times a power of ten, from 0 to the first that reaches `max`; 4 to 8 steps.
/// @throws std::invalid_argument unless max is positive and finite
[[nodiscard]] inline std::vector<double> axis_ticks(double max) {
  require(std::isfinite(max) && max > 0, "axis_ticks: the largest value is ", max, ", need a positive one");
  const double power = std::pow(10.0, std::floor(std::log10(max)) - 1);
  double step = power;
  for (const double factor : {1.0, 2.0, 5.0, 10.0, 20.0, 50.0}) {
    step = factor * power;
    if (max / step <= 8) break;
  }
  std::vector<double> ticks = {0};
  while (ticks.back() < max) ticks.push_back(static_cast<double>(ticks.size()) * step);
  return ticks;
}

struct ChartPoint {
  double x = 0;
  double y = 0;
};

struct ChartLine {
  std::string name;
  std::vector<ChartPoint> points;
  bool is_dashed = false;  ///< somebody else's figures
};

struct ChartBar {
  std::string name;
  std::vector<std::pair<std::string, double>> parts;  ///< from the bottom up
};

struct ChartLabels {
  std::string title;
  std::string x;
  std::string y;
};

namespace detail {

inline constexpr double kChartWidth = 900, kChartHeight = 480;
inline constexpr double kPlotLeft = 80, kPlotTop = 50, kPlotRight = 600, kPlotBottom = 410;

/// Distinguishable for readers who do not see red and green apart: Okabe and Ito, "Color Universal Design", 2008.
inline constexpr std::array<std::string_view, 8> kChartColors = {"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                                                 "#E69F00", "#56B4E9", "#000000", "#999999"};

[[nodiscard]] inline std::string xml_text(std::string_view text) {
  std::string out;
  for (const char c : text) {
    out += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : c == '"' ? "&quot;" : std::string(1, c);
  }
  return out;
}

[[nodiscard]] inline std::string chart_number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.6g", value);
  return text;
}

/// 512, 2k, 128k: counts of tokens, in units of 1024 where they divide.
[[nodiscard]] inline std::string token_count_text(double value) {
  const auto count = static_cast<long long>(std::llround(value));
  return count >= 1024 && count % 1024 == 0 ? std::to_string(count / 1024) + "k" : std::to_string(count);
}

class ChartWriter {
 public:
  ChartWriter(std::ostream& stream, const ChartLabels& labels, double max_y)
      : stream_(stream), ticks_(axis_ticks(max_y)) {
    stream_ << "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " << kChartWidth << " " << kChartHeight
            << "\" font-family=\"sans-serif\" font-size=\"13\">\n"
            << "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
    text(kPlotLeft, 20, "start", labels.title, "font-size=\"16\"");
    text((kPlotLeft + kPlotRight) / 2, kChartHeight - 20, "middle", labels.x);
    text(kPlotLeft - 60, kPlotTop - 16, "start", labels.y, "fill=\"#555555\"");
    for (const double tick : ticks_) {
      line(kPlotLeft, y(tick), kPlotRight, y(tick), "stroke=\"#dddddd\"");
      text(kPlotLeft - 8, y(tick) + 4, "end", chart_number(tick));
    }
  }
  ~ChartWriter() { stream_ << "</svg>\n"; }
  ChartWriter(const ChartWriter&) = delete;
  ChartWriter& operator=(const ChartWriter&) = delete;

  [[nodiscard]] double y(double value) const { return kPlotBottom - value / ticks_.back() * (kPlotBottom - kPlotTop); }
  void line(double x1, double y1, double x2, double y2, std::string_view style) {
    stream_ << "<line x1=\"" << chart_number(x1) << "\" y1=\"" << chart_number(y1) << "\" x2=\"" << chart_number(x2)
            << "\" y2=\"" << chart_number(y2) << "\" " << style << "/>\n";
  }
  void text(double x, double y, std::string_view anchor, std::string_view words, std::string_view style = "") {
    stream_ << "<text x=\"" << chart_number(x) << "\" y=\"" << chart_number(y) << "\" text-anchor=\"" << anchor << "\" "
            << style << ">" << xml_text(words) << "</text>\n";
  }
  [[nodiscard]] std::ostream& stream() { return stream_; }

 private:
  std::ostream& stream_;
  std::vector<double> ticks_;
};

}  // namespace detail

/// Lines with a marker at each point; x in powers of two, y from 0. Names stand at the right, in the order given.
/// @throws std::invalid_argument when there is no point, or one whose x is not positive or whose y is negative
inline void write_line_chart(std::ostream& stream, const ChartLabels& labels, const std::vector<ChartLine>& lines) {
  using detail::chart_number, detail::ChartWriter, detail::kChartColors, detail::kPlotBottom, detail::kPlotLeft,
      detail::kPlotRight, detail::kPlotTop, detail::token_count_text, detail::xml_text;
  std::vector<double> xs;
  double max_y = 0;
  for (const ChartLine& line : lines) {
    for (const ChartPoint& point : line.points) {
      require(point.x > 0 && std::isfinite(point.x) && point.y >= 0 && std::isfinite(point.y), "chart: '", line.name,
              "' has a point (", point.x, ", ", point.y, "), need positive ones");
      xs.push_back(point.x);
      max_y = std::max(max_y, point.y);
    }
  }
  require(!xs.empty(), "chart '", labels.title, "': there is no point");
  std::ranges::sort(xs);
  const double first = std::log2(xs.front()), last = std::max(std::log2(xs.back()), first + 1);
  const auto x_of = [&](double x) {
    return kPlotLeft + 15 + (std::log2(x) - first) / (last - first) * (kPlotRight - kPlotLeft - 30);
  };
  ChartWriter chart(stream, labels, max_y);
  double last_tick = -1e9;
  for (const double x : xs) {
    if (x_of(x) - last_tick < 40) continue;
    last_tick = x_of(x);
    chart.text(last_tick, kPlotBottom + 20, "middle", token_count_text(x));
  }
  for (std::size_t i = 0; i < lines.size(); ++i) {
    const std::string color(kChartColors[i % kChartColors.size()]);
    const std::string style = "stroke=\"" + color + "\" stroke-width=\"2\" fill=\"none\"" +
                              (lines[i].is_dashed ? " stroke-dasharray=\"6 4\"" : "");
    stream << "<polyline " << style << " points=\"";
    for (const ChartPoint& point : lines[i].points) {
      stream << chart_number(x_of(point.x)) << "," << chart_number(chart.y(point.y)) << " ";
    }
    stream << "\"/>\n";
    for (const ChartPoint& point : lines[i].points) {
      stream << "<circle cx=\"" << chart_number(x_of(point.x)) << "\" cy=\"" << chart_number(chart.y(point.y))
             << "\" r=\"3\" fill=\"" << color << "\"/>\n";
    }
    const double at = kPlotTop + 10 + 22 * static_cast<double>(i);
    chart.line(kPlotRight + 20, at - 4, kPlotRight + 50, at - 4, style);
    chart.text(kPlotRight + 58, at, "start", lines[i].name);
  }
}

/// Bars from stacked parts; parts of one name have one color in all bars. Names stand at the right, the top part first.
/// @throws std::invalid_argument when there is no bar, or a part that is negative or not finite
inline void write_bar_chart(std::ostream& stream, const ChartLabels& labels, const std::vector<ChartBar>& bars) {
  using detail::chart_number, detail::ChartWriter, detail::kChartColors, detail::kPlotBottom, detail::kPlotLeft,
      detail::kPlotRight, detail::kPlotTop, detail::token_count_text, detail::xml_text;
  std::vector<std::string> names;
  double max_y = 0;
  for (const ChartBar& bar : bars) {
    double sum = 0;
    for (const auto& [name, value] : bar.parts) {
      require(value >= 0 && std::isfinite(value), "chart: part '", name, "' of bar '", bar.name, "' is ", value);
      if (std::ranges::find(names, name) == names.end()) names.push_back(name);
      sum += value;
    }
    max_y = std::max(max_y, sum);
  }
  require(max_y > 0, "chart '", labels.title, "': there is no bar");
  const auto color = [&](const std::string& name) {
    const auto index = static_cast<std::size_t>(std::ranges::find(names, name) - names.begin());
    return std::string("fill=\"") + std::string(kChartColors[index % kChartColors.size()]) + "\" fill-opacity=\"" +
           (index < kChartColors.size() ? "1" : "0.5") + "\"";
  };
  ChartWriter chart(stream, labels, max_y * (1 - 1e-9));  // parts of 100 % may add up to a little more
  const double step = (kPlotRight - kPlotLeft) / static_cast<double>(bars.size());
  for (std::size_t b = 0; b < bars.size(); ++b) {
    const double left = kPlotLeft + step * (static_cast<double>(b) + 0.15);
    double sum = 0;
    for (const auto& [name, value] : bars[b].parts) {
      const double top = chart.y(sum + value), bottom = chart.y(sum);
      stream << "<rect x=\"" << chart_number(left) << "\" y=\"" << chart_number(top) << "\" width=\""
             << chart_number(0.7 * step) << "\" height=\"" << chart_number(bottom - top) << "\" " << color(name)
             << " stroke=\"white\" stroke-width=\"0.5\"><title>" << xml_text(name) << ": " << chart_number(value)
             << "</title></rect>\n";
      sum += value;
    }
    chart.text(left + 0.35 * step, kPlotBottom + 20, "middle", bars[b].name);
  }
  for (std::size_t i = 0; i < names.size(); ++i) {
    const double at = kPlotTop + 10 + 20 * static_cast<double>(i);
    const std::string& name = names[names.size() - 1 - i];
    stream << "<rect x=\"" << kPlotRight + 20 << "\" y=\"" << at - 11 << "\" width=\"14\" height=\"14\" " << color(name)
           << "/>\n";
    chart.text(kPlotRight + 42, at, "start", name);
  }
}

}  // namespace gemma4

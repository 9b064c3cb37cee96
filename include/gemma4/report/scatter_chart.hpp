// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <ostream>
#include <string>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/report/svg_chart.hpp"

/// Named points over two logarithmic axes, as SVG text.
namespace gemma4 {

struct NamedPoint {
  std::string name;
  double x = 0;
  double y = 0;
  bool is_dimmed = false;  ///< drawn in grey: another point is better
};

/// Where a name stands, in the units of the drawing; y grows downwards.
struct LabelBox {
  double left = 0, top = 0, width = 0, height = 0;
  [[nodiscard]] bool overlaps(const LabelBox& other) const {
    return left < other.left + other.width && other.left < left + width && top < other.top + other.height &&
           other.top < top + height;
  }
  [[nodiscard]] bool contains(double x, double y) const {
    return x >= left && x <= left + width && y >= top && y <= top + height;
  }
};

/// 1, 2 and 5 times powers of ten from the last that is at most `low` to the first that is at least `high`.
/// @throws std::invalid_argument unless 0 < low <= high, both finite
[[nodiscard]] inline std::vector<double> log_ticks(double low, double high) {
  require(low > 0 && low <= high && std::isfinite(high), "log_ticks: from ", low, " to ", high,
          ", need positive numbers in order");
  std::vector<double> ticks;
  for (double power = std::pow(10.0, std::floor(std::log10(low)) - 1);; power *= 10) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      const double tick = factor * power;
      if (tick <= low * (1 + 1e-12)) ticks.clear();
      ticks.push_back(tick);
      if (tick >= high * (1 - 1e-12) && ticks.size() > 1) return ticks;
    }
  }
}

/// A place for the name of each point, in their order: beside it, or farther off where others stand. No two names
/// overlap and none covers a point, as long as there is room in `area`; where there is none the name stands beside its
/// point all the same.
/// @param at  the points, in the units of the drawing
[[nodiscard]] inline std::vector<LabelBox> place_labels(const std::vector<NamedPoint>& points,
                                                        const std::vector<std::array<double, 2>>& at,
                                                        const LabelBox& area) {
  constexpr double kCharWidth = 6.0, kHeight = 12.0, kGap = 6.0;
  std::vector<LabelBox> placed;
  for (std::size_t i = 0; i < points.size(); ++i) {
    const double width = kCharWidth * static_cast<double>(points[i].name.size());
    const auto is_free = [&](const LabelBox& box) {
      if (box.left < area.left || box.top < area.top || box.left + width > area.left + area.width ||
          box.top + kHeight > area.top + area.height) {
        return false;
      }
      if (std::ranges::any_of(placed, [&](const LabelBox& other) { return box.overlaps(other); })) return false;
      return std::ranges::none_of(at, [&](const auto& point) { return box.contains(point[0], point[1]); });
    };
    LabelBox best{at[i][0] + kGap, at[i][1] - kHeight / 2, width, kHeight};
    bool is_found = is_free(best);
    for (int ring = 0; ring < 24 && !is_found; ++ring) {
      const double radius = kGap + 8.0 * ring;
      for (int turn = 0; turn < 16 && !is_found; ++turn) {
        const double angle = 2 * 3.14159265358979 * turn / 16;
        const double x = at[i][0] + radius * std::cos(angle), y = at[i][1] + radius * std::sin(angle);
        const LabelBox box{std::cos(angle) < -0.1 ? x - width : x, y - kHeight / 2, width, kHeight};
        if (is_free(box)) best = box, is_found = true;
      }
    }
    placed.push_back(best);
  }
  return placed;
}

/// @throws std::invalid_argument when there is no point, or one that is not positive and finite in both
inline void write_scatter_chart(std::ostream& stream, const ChartLabels& labels,
                                const std::vector<NamedPoint>& points) {
  using detail::chart_number, detail::xml_text;
  constexpr double kWidth = 1100, kHeight = 760, kLeft = 90, kTop = 50, kRight = 1080, kBottom = 690;
  require(!points.empty(), "chart '", labels.title, "': there is no point");
  double low[2] = {points[0].x, points[0].y}, high[2] = {points[0].x, points[0].y};
  for (const NamedPoint& point : points) {
    const double value[2] = {point.x, point.y};
    for (int axis = 0; axis < 2; ++axis) {
      require(value[axis] > 0 && std::isfinite(value[axis]), "chart: '", point.name, "' is at (", point.x, ", ",
              point.y, "), need positive numbers on logarithmic axes");
      low[axis] = std::min(low[axis], value[axis]), high[axis] = std::max(high[axis], value[axis]);
    }
  }
  const std::vector<double> xs = log_ticks(low[0], high[0]), ys = log_ticks(low[1], high[1]);
  const auto along = [](const std::vector<double>& ticks, double value) {
    return std::log(value / ticks.front()) / std::log(ticks.back() / ticks.front());
  };
  const auto x_of = [&](double x) { return kLeft + along(xs, x) * (kRight - kLeft); };
  const auto y_of = [&](double y) { return kBottom - along(ys, y) * (kBottom - kTop); };
  const auto line = [&](double x1, double y1, double x2, double y2, const char* color) {
    stream << "<line x1=\"" << chart_number(x1) << "\" y1=\"" << chart_number(y1) << "\" x2=\"" << chart_number(x2)
           << "\" y2=\"" << chart_number(y2) << "\" stroke=\"" << color << "\"/>\n";
  };
  const auto text = [&](double x, double y, const char* anchor, const std::string& words, const char* style) {
    stream << "<text x=\"" << chart_number(x) << "\" y=\"" << chart_number(y) << "\" text-anchor=\"" << anchor << "\" "
           << style << ">" << xml_text(words) << "</text>\n";
  };
  stream << "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " << kWidth << " " << kHeight
         << "\" font-family=\"sans-serif\" font-size=\"11\">\n"
         << "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
  text(kLeft, 20, "start", labels.title, "font-size=\"16\"");
  text((kLeft + kRight) / 2, kHeight - 20, "middle", labels.x, "font-size=\"13\"");
  text(kLeft - 70, kTop - 14, "start", labels.y, "font-size=\"13\" fill=\"#555555\"");
  for (const double x : xs) {
    line(x_of(x), kTop, x_of(x), kBottom, "#eeeeee");
    text(x_of(x), kBottom + 18, "middle", chart_number(x), "");
  }
  for (const double y : ys) {
    line(kLeft, y_of(y), kRight, y_of(y), "#eeeeee");
    text(kLeft - 8, y_of(y) + 4, "end", chart_number(y), "");
  }
  std::vector<std::array<double, 2>> at;
  for (const NamedPoint& point : points) at.push_back({x_of(point.x), y_of(point.y)});
  const std::vector<LabelBox> boxes = place_labels(points, at, {kLeft, kTop, kRight - kLeft, kBottom - kTop});
  for (std::size_t i = 0; i < points.size(); ++i) {
    const char* const color = points[i].is_dimmed ? "#999999" : "#0072B2";
    const double to_x = std::clamp(at[i][0], boxes[i].left, boxes[i].left + boxes[i].width);
    const double to_y = std::clamp(at[i][1], boxes[i].top, boxes[i].top + boxes[i].height);
    if (std::hypot(to_x - at[i][0], to_y - at[i][1]) > 10) line(at[i][0], at[i][1], to_x, to_y, "#cccccc");
    stream << "<circle cx=\"" << chart_number(at[i][0]) << "\" cy=\"" << chart_number(at[i][1])
           << "\" r=\"3.5\" fill=\"" << color << "\"><title>" << xml_text(points[i].name) << ": "
           << chart_number(points[i].x) << ", " << chart_number(points[i].y) << "</title></circle>\n";
    text(boxes[i].left, boxes[i].top + 10, "start", points[i].name,
         points[i].is_dimmed ? "fill=\"#888888\"" : "fill=\"#003355\"");
  }
  stream << "</svg>\n";
}

}  // namespace gemma4

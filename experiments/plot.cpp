// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "experiments/driver.hpp"
#include "gemma4/report/csv_table.hpp"
#include "gemma4/report/svg_chart.hpp"

/// What do the tables look like?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

struct Options {
  std::vector<std::filesystem::path> tables;
  std::filesystem::path out;
  std::string kind = "lines";
  std::string x, y;
  std::vector<std::string> series;
  std::vector<std::string> where;
  double scale = 1;
  ChartLabels labels;
};

/// The cells of some columns that are there and not empty, joined: "NVIDIA H200, tq4, graph".
std::string joined(const CsvTable& table, std::size_t row, const std::vector<std::string>& columns) {
  std::string text;
  for (const std::string& column : columns) {
    const std::string cell = table.cell(row, column);
    if (!cell.empty()) text += (text.empty() ? "" : ", ") + cell;
  }
  return text;
}

/// column=value, or column!=value; a column that a table lacks is empty. Several values: column=a|b.
bool holds(const CsvTable& table, std::size_t row, const std::string& condition) {
  const std::size_t equals = condition.find('=');
  require(equals != condition.npos && equals > 0, "--where '", condition, "': expected column=value or column!=value");
  const bool is_negated = condition[equals - 1] == '!';
  const std::string cell = table.cell(row, condition.substr(0, equals - (is_negated ? 1 : 0)));
  std::string values = condition.substr(equals + 1) + "|";
  bool found = false;
  for (std::size_t at = 0; at < values.size();) {
    const std::size_t end = values.find('|', at);
    found = found || values.substr(at, end - at) == cell;
    at = end + 1;
  }
  return found != is_negated;
}

/// The rows that are drawn, from all tables: their x, their series, their y. A row with a `source` is somebody else's.
struct Value {
  std::string x, series;
  double y = 0;
  bool is_foreign = false;
};

std::vector<Value> read_values(const Options& options) {
  std::vector<Value> values;
  for (const std::filesystem::path& path : options.tables) {
    const CsvTable table = read_csv(path);
    require(table.find_column(options.y).has_value(), path.string(), ": no column '", options.y, "'");
    for (std::size_t row = 0; row < table.rows.size(); ++row) {
      const auto wanted = [&](const std::string& condition) { return holds(table, row, condition); };
      const auto y = csv_number(table.cell(row, options.y));
      if (!y || !std::ranges::all_of(options.where, wanted)) continue;
      values.push_back({.x = table.cell(row, options.x),
                        .series = joined(table, row, options.series),
                        .y = *y * options.scale,
                        .is_foreign = !table.cell(row, "source").empty()});
    }
  }
  require(!values.empty(), "--where: no row of the tables is left to draw");
  return values;
}

void write_chart(const Options& options, std::ostream& stream) {
  const std::vector<Value> values = read_values(options);
  if (options.kind == "lines") {
    std::vector<ChartLine> lines;
    for (const Value& value : values) {
      auto line = std::ranges::find(lines, value.series, &ChartLine::name);
      if (line == lines.end()) {
        line = lines.insert(lines.end(), {.name = value.series, .points = {}, .is_dashed = value.is_foreign});
      }
      const auto x = csv_number(value.x);
      require(x.has_value(), "--x ", options.x, ": a row has no such value");
      line->points.push_back({*x, value.y});
    }
    for (ChartLine& line : lines) std::ranges::sort(line.points, {}, &ChartPoint::x);
    write_line_chart(stream, options.labels, lines);
  } else {
    std::vector<ChartBar> bars;
    for (const Value& value : values) {
      auto bar = std::ranges::find(bars, value.x, &ChartBar::name);
      if (bar == bars.end()) bar = bars.insert(bars.end(), {.name = value.x, .parts = {}});
      bar->parts.emplace_back(value.series, value.y);
    }
    write_bar_chart(stream, options.labels, bars);
  }
}

void run(int argc, char** argv) {
  CLI::App app(
      "Draws rows of result tables as SVG: lines over a logarithmic axis, or stacked bars. Rows with a `source` are "
      "published figures of others and are drawn dashed.");
  Options options;
  app.add_option("tables", options.tables, "CSV files")->required()->check(CLI::ExistingFile);
  app.add_option("--out", options.out, "SVG file to write")->required();
  app.add_option("--kind", options.kind, "Kind of chart")
      ->check(CLI::IsMember({"lines", "bars"}))
      ->capture_default_str();
  app.add_option("--x", options.x, "Column of the points' x, or of the bars")->required();
  app.add_option("--y", options.y, "Column of the values")->required();
  app.add_option("--series", options.series, "Columns that name a line, or a part of a bar")
      ->delimiter(',')
      ->required();
  app.add_option("--where", options.where, "Only rows with column=value, column=a|b or column!=value; may be repeated")
      ->take_all();
  app.add_option("--scale", options.scale, "Factor on the values")->capture_default_str();
  app.add_option("--title", options.labels.title, "Above the chart");
  app.add_option("--x-label", options.labels.x, "Below it");
  app.add_option("--y-label", options.labels.y, "Above the axis");
  parse(app, argc, argv);

  std::ostringstream svg;
  write_chart(options, svg);
  if (options.out.has_parent_path()) std::filesystem::create_directories(options.out.parent_path());
  std::ofstream file(options.out);
  file << svg.str();
  file.close();
  require(file.good(), "cannot write ", options.out.string());
  std::cout << options.out.string() << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}

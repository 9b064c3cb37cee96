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
#include "gemma4/report/markdown_tables.hpp"
#include "gemma4/report/scatter_chart.hpp"
#include "gemma4/report/svg_chart.hpp"
#include "gemma4/report/table_query.hpp"

/// What do the tables look like, and do the pages say what they say?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

struct Options {
  std::vector<std::filesystem::path> pages;
  bool is_check = false;
  std::filesystem::path results = "results";
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

/// The rows that are drawn, from all tables: their x, their series, their y. A row with a `source` is somebody else's,
/// one with something in `dominated_by` is dimmed.
struct Value {
  std::string x, series;
  double y = 0;
  bool is_foreign = false, is_dimmed = false;
};

std::vector<Value> read_values(const Options& options) {
  std::vector<Value> values;
  std::vector<Condition> where;
  for (const std::string& condition : options.where) where.push_back(parse_condition(condition));
  for (const std::filesystem::path& path : options.tables) {
    const CsvTable table = read_csv(path);
    require(table.find_column(options.y).has_value(), path.string(), ": no column '", options.y, "'");
    for (const std::size_t row : rows_where(table, where)) {
      const auto y = csv_number(table.cell(row, options.y));
      if (!y) continue;
      values.push_back({.x = table.cell(row, options.x),
                        .series = joined(table, row, options.series),
                        .y = *y * options.scale,
                        .is_foreign = !table.cell(row, "source").empty(),
                        .is_dimmed = !table.cell(row, "dominated_by").empty()});
    }
  }
  require(!values.empty(), "--where: no row of the tables is left to draw");
  return values;
}

void write_chart(const Options& options, std::ostream& stream) {
  const std::vector<Value> values = read_values(options);
  if (options.kind == "points") {
    std::vector<NamedPoint> points;
    for (const Value& value : values) {
      const auto x = csv_number(value.x);
      require(x.has_value(), "--x ", options.x, ": a row has no such value");
      points.push_back({value.series, *x, value.y, value.is_dimmed});
    }
    write_scatter_chart(stream, options.labels, points);
  } else if (options.kind == "lines") {
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

void write_file(const std::filesystem::path& path, const std::string& text) {
  if (path.has_parent_path()) std::filesystem::create_directories(path.parent_path());
  write_whole_file(path, text);
  std::cout << path.string() << "\n";
}

/// Writes the tables of the pages, or says where they are not what the results have. @return exit code
int update_pages(const Options& options) {
  int code = EXIT_SUCCESS;
  for (const std::filesystem::path& path : options.pages) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream page;
    page << file.rdbuf();
    const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
    const std::string expected = with_markdown_tables(page.str(), path.string(), folder, options.results);
    const auto difference = page_difference(page.str(), expected, path.string());
    if (!difference) continue;
    if (options.is_check) {
      std::cerr << *difference << "\n";
      code = EXIT_FAILURE;
    } else {
      write_file(path, expected);
    }
  }
  return code;
}

void add_options(CLI::App& app, Options& options) {
  CLI::Option* const pages =
      app.add_option("--markdown", options.pages, "Pages whose tables are written, in place of a chart")
          ->check(CLI::ExistingFile);
  app.add_flag("--check", options.is_check, "Write no page: name the line where one differs, and fail")->needs(pages);
  app.add_option("--results", options.results, "Folder that the queries of pages are asked of")
      ->check(CLI::ExistingDirectory)
      ->capture_default_str();
  app.add_option("tables", options.tables, "CSV files")->check(CLI::ExistingFile)->excludes(pages);
  app.add_option("--out", options.out, "SVG file to write")->excludes(pages);
  app.add_option("--kind", options.kind, "Kind of chart")
      ->check(CLI::IsMember({"lines", "bars", "points"}))
      ->capture_default_str();
  app.add_option("--x", options.x, "Column of the points' x, or of the bars");
  app.add_option("--y", options.y, "Column of the values");
  app.add_option("--series", options.series, "Columns that name a line, a part of a bar, or a point")->delimiter(',');
  app.add_option("--where", options.where,
                 "Only rows with column=value, column=a|b, column!=value, column>number or column<number; may be "
                 "repeated")
      ->take_all();
  add_real(app, "--scale", options.scale, "Factor on the values", {-1e300, 1e300});
  app.add_option("--title", options.labels.title, "Above the chart");
  app.add_option("--x-label", options.labels.x, "Below it");
  app.add_option("--y-label", options.labels.y, "Above the axis");
}

int run(int argc, char** argv) {
  CLI::App app(
      "Draws rows of result tables as SVG: lines over a logarithmic axis, stacked bars, or named points over two "
      "logarithmic axes. Rows with a `source` are "
      "published figures of others and are drawn dashed. With --markdown it writes the tables of pages instead, each "
      "behind a comment that says what it shows (gemma4/report/markdown_tables.hpp).");
  Options options;
  add_options(app, options);
  parse(app, argc, argv);
  if (!options.pages.empty()) return update_pages(options);
  require(!options.tables.empty() && !options.out.empty() && !options.x.empty() && !options.y.empty() &&
              !options.series.empty(),
          "a chart needs tables, --out, --x, --y and --series; pages need --markdown");
  std::ostringstream svg;
  write_chart(options, svg);
  write_file(options.out, svg.str());
  return EXIT_SUCCESS;
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}

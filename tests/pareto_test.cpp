// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/pareto.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "gemma4/report/csv_table.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace {

using namespace gemma4;

/// What the marks promise: of rows without a mark none beats another, and a mark names a row that does.
testing::AssertionResult keeps_promise(const std::vector<CostPoint>& points, const std::vector<std::string>& names,
                                       double noise) {
  for (std::size_t i = 0; i < points.size(); ++i) {
    bool is_named = names[i].empty();
    for (const CostPoint& other : points) {
      const bool beats = other.bytes <= points[i].bytes && other.error < points[i].error - noise;
      if (beats && names[i].empty()) {
        return testing::AssertionFailure() << points[i].name << " is not marked, and " << other.name << " beats it";
      }
      is_named = is_named || (beats && other.name == names[i]);
    }
    if (!is_named) return testing::AssertionFailure() << points[i].name << " is marked with " << names[i];
  }
  return testing::AssertionSuccess();
}

TEST(Pareto, KnownTable) {
  const std::vector<CostPoint> points = {
      {"large and exact", 100, 0.0}, {"middle", 50, 0.2}, {"as large, worse", 50, 0.3},
      {"larger and worse", 60, 0.4}, {"small", 10, 0.9},  {"within the noise", 51, 0.205},
      {"no number", 1, std::nan("")}};
  const std::vector<std::string> names = dominated_by(points, 0.01);
  EXPECT_EQ(names, (std::vector<std::string>{"", "", "middle", "middle", "", "", ""}));
  EXPECT_EQ(dominated_by(points, 0.0)[5], "middle");
  EXPECT_EQ(dominated_by(points, 0.15)[2], "") << "less than the noise apart";
  EXPECT_TRUE(dominated_by({}, 0.0).empty());
  EXPECT_TRUE(testkit::refuses([&] { (void)dominated_by(points, -1.0); }, {"noise of -1"}));
}

RC_GTEST_PROP(Pareto, MarksAreTrueAndComplete, ()) {
  const auto pairs = *rc::gen::container<std::vector<std::pair<int, int>>>(
      rc::gen::pair(rc::gen::inRange(0, 12), rc::gen::inRange(0, 12)));
  std::vector<CostPoint> points;
  for (const auto& [bytes, error] : pairs) {
    points.push_back({std::to_string(points.size()), static_cast<double>(bytes), static_cast<double>(error)});
  }
  const double noise = *rc::gen::inRange(0, 4);
  std::vector<std::string> names = dominated_by(points, noise);
  RC_ASSERT(keeps_promise(points, names, noise));
  for (std::string& name : names) {  // the controls: a mark that is missing, and one of somebody who does not beat it
    if (name.empty()) continue;
    const std::string right = name;
    name.clear();
    RC_ASSERT(!keeps_promise(points, names, noise));
    name = "nobody";
    RC_ASSERT(!keeps_promise(points, names, noise));
    name = right;
  }
}

/// Every table of results/ whose rows are marked keeps the promise, by the bytes of both caches and its own noise.
TEST(Pareto, NoRowOfAMeasuredShelfIsBeatenWithoutAMark) {
  const std::filesystem::path results = std::filesystem::path(GEMMA4_TEST_DATA) / "../../results";
  ASSERT_TRUE(std::filesystem::is_directory(results));
  int n_table = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(results)) {
    if (entry.path().extension() != ".csv") continue;
    const CsvTable table = read_csv(entry.path());
    if (!table.find_column("dominated_by") || !table.find_column("bytes_per_token")) continue;
    std::map<std::tuple<std::string, std::string, std::string, std::string>, std::vector<std::size_t>> runs;
    for (std::size_t row = 0; row < table.rows.size(); ++row) {
      if (table.cell(row, "bytes_per_token").empty()) continue;
      runs[{table.cell(row, "utc"), table.cell(row, "text"), table.cell(row, "context"), table.cell(row, "model")}]
          .push_back(row);
    }
    for (const auto& [key, rows] : runs) {
      std::vector<CostPoint> points;
      std::vector<std::string> names;
      for (const std::size_t row : rows) {
        const auto number = [&](const char* column) { return csv_number(table.cell(row, column)).value(); };
        points.push_back({table.cell(row, "cache"),
                          std::round(number("bytes_per_token") * number("context")) + number("ring_bytes"),
                          number("kl_mean")});
        names.push_back(table.cell(row, "dominated_by"));
      }
      EXPECT_TRUE(keeps_promise(points, names, csv_number(table.cell(rows.front(), "kl_noise")).value()))
          << entry.path();
      ++n_table;
    }
  }
  RecordProperty("n_table", n_table);
}

}  // namespace

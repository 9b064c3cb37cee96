// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/table_query.hpp"

#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

#include "tests/support/temp_dir.hpp"

namespace gemma4 {
namespace {

using testkit::TempDir;

CsvTable example() {
  return {.name = "t.csv",
          .columns = {"utc", "cache", "depth", "rate"},
          .rows = {{"1", "tq4", "512", "10"}, {"1", "bf16", "512", "9"}, {"1", "tq4", "2048", ""}}};
}

std::vector<std::size_t> rows(const std::string& conditions) {
  return rows_where(example(), parse_conditions(conditions));
}

TEST(TableQuery, ConditionsChooseRows) {
  using Rows = std::vector<std::size_t>;
  EXPECT_EQ(rows(""), (Rows{0, 1, 2}));
  EXPECT_EQ(rows("cache=tq4"), (Rows{0, 2}));
  EXPECT_EQ(rows("cache!=tq4"), (Rows{1}));
  EXPECT_EQ(rows("cache=tq4|bf16, depth=512"), (Rows{0, 1}));
  EXPECT_EQ(rows("cache!=tq4|bf16"), (Rows{}));
  EXPECT_EQ(rows("rate>9"), (Rows{0})) << "an empty cell is above nothing";
  EXPECT_EQ(rows("rate<10"), (Rows{1}));
  EXPECT_EQ(rows("absent="), (Rows{0, 1, 2})) << "a column that is not there is empty";
}

TEST(TableQuery, RefusesWhatIsNoCondition) {
  for (const char* text : {"cache", "=tq4", "!=tq4", "rate>", "rate>many", "rate<1|2"}) {
    EXPECT_THROW((void)parse_condition(text), FormatError) << text;
  }
}

TEST(TableQuery, LaterConditionsReplaceThoseOnTheSameColumn) {
  const auto conditions = overridden(parse_conditions("cache=tq4, depth=512"), parse_conditions("cache=bf16"));
  EXPECT_EQ(conditions, parse_conditions("depth=512, cache=bf16"));
}

TEST(TableQuery, ARowIsOneOfTheNewestRun) {
  CsvTable table = example();
  EXPECT_EQ(find_row(table, parse_conditions("cache=tq4, depth=512")), 0u);
  EXPECT_EQ(find_row(table, parse_conditions("cache=f32")), std::nullopt);
  EXPECT_THROW((void)find_row(table, parse_conditions("cache=tq4")), FormatError) << "two rows of one run";
  table.rows.push_back({"2", "tq4", "512", "11"});
  EXPECT_EQ(find_row(table, parse_conditions("cache=tq4, depth=512")), 3u);
  table.rows.insert(table.rows.begin(), {"3", "tq4", "512", "12"});
  EXPECT_EQ(find_row(table, parse_conditions("cache=tq4, depth=512")), 0u) << "whatever the order of the rows";
}

TEST(TableQuery, TheNewestTableIsThatOfTheRowsAskedFor) {
  CsvTable older = example(), newer = example();
  newer.rows = {{"2", "bf16", "512", "8"}};
  const std::vector<CsvTable> tables = {newer, older};
  EXPECT_EQ(newest_table(tables, parse_conditions("cache=bf16"), {"rate"}), &tables[0]);
  EXPECT_EQ(newest_table(tables, parse_conditions("cache=tq4"), {"rate"}), &tables[1]);
  EXPECT_EQ(newest_table(tables, parse_conditions("cache=f32"), {"rate"}), nullptr);
  EXPECT_EQ(newest_table(tables, parse_conditions("cache=tq4"), {"no_such"}), nullptr);
  EXPECT_EQ(newest_table(tables, parse_conditions("no_such!=1"), {"rate"}), nullptr);
}

TEST(TableQuery, NumbersInWords) {
  EXPECT_EQ(format_number("%.1f", 172.54), "172.5");
  EXPECT_EQ(format_number("%+.4f", 0.00208), "+0.0021");
  EXPECT_EQ(format_number("%.0f %%", 98.4), "98 %");
  EXPECT_EQ(format_number("about %.2f GiB", 21.816), "about 21.82 GiB");
  for (const char* format : {"", "5", "%d", "%.1", "%.xf", "%.1f %.1f", "%s", "%"}) {
    EXPECT_THROW((void)format_number(format, 1), FormatError) << format;
  }
}

TEST(TableQuery, ADriverIsAFolderAndAFileIsAFile) {
  const TempDir dir;
  std::filesystem::create_directory(dir.file("rates"));
  std::ofstream(dir.file("rates") / "a.csv") << "x\n1\n";
  std::ofstream(dir.file("rates") / "notes.md") << "no table\n";
  EXPECT_EQ(tables_of(dir.file(""), "rates").size(), 1u);
  EXPECT_EQ(tables_of(dir.file(""), "rates/a.csv").size(), 1u);
  EXPECT_THROW((void)tables_of(dir.file(""), "speeds"), FormatError);
}

}  // namespace
}  // namespace gemma4

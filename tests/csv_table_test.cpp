// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/csv_table.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <fstream>
#include <string>
#include <vector>

#include "gemma4/report/result_table.hpp"
#include "tests/support/temp_dir.hpp"

namespace gemma4 {
namespace {

using testkit::TempDir;

TEST(CsvTable, SplitsQuotedCells) {
  EXPECT_EQ(split_csv_line("a,b,"), (std::vector<std::string>{"a", "b", ""}));
  EXPECT_EQ(split_csv_line("\"a,b\",\"say \"\"no\"\"\",c"), (std::vector<std::string>{"a,b", "say \"no\"", "c"}));
  EXPECT_EQ(split_csv_line("\"\",x"), (std::vector<std::string>{"", "x"}));
  EXPECT_THROW((void)split_csv_line("\"open"), FormatError);
  EXPECT_THROW((void)split_csv_line("\"a\"b"), FormatError);
}

RC_GTEST_PROP(CsvTable, ReadsWhatAResultTableWrites, ()) {
  const auto cell = *rc::gen::container<std::string>(rc::gen::elementOf(std::string("ab,\"' .")));
  const auto number = *rc::gen::arbitrary<double>();
  const TempDir dir;
  {
    ResultTable table(dir.file("t.csv"), {}, {"words"}, {"number", "absent"});
    table.row().set("words", cell).set("number", number).commit();
  }
  const CsvTable table = read_csv(dir.file("t.csv"));
  RC_ASSERT(table.rows.size() == 1u);
  RC_ASSERT(table.cell(0, "words") == cell);
  RC_ASSERT(csv_number(table.cell(0, "number")) == number);
  RC_ASSERT(!csv_number(table.cell(0, "absent")).has_value());
  RC_ASSERT(table.cell(0, "no_such_column").empty());
  RC_ASSERT(table.cell(0, "status") == "ok");
}

TEST(CsvTable, RefusesRaggedRowsAndWords) {
  const TempDir dir;
  std::ofstream(dir.file("t.csv")) << "a,b\n1\n";
  EXPECT_THROW((void)read_csv(dir.file("t.csv")), FormatError);
  EXPECT_THROW((void)read_csv(dir.file("absent.csv")), FormatError);
  EXPECT_THROW((void)csv_number("12 tokens"), FormatError);
}

}  // namespace
}  // namespace gemma4

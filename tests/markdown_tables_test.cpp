// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/markdown_tables.hpp"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "tests/support/temp_dir.hpp"

namespace gemma4 {
namespace {

constexpr const char* kHeader = "git_sha,utc,gpu,cache,depth,rate,status\n";

/// results/rates with two tables of one commit and an older one, and what was wanted of them.
class MarkdownTables : public testing::Test {
 protected:
  MarkdownTables() {
    std::filesystem::create_directory(dir.file("rates"));
    write("rates/card-a.csv", std::string(kHeader) + "0123456789,2026-01-02,GPU,tq4,512,172.54,ok\n" +
                                  "0123456789,2026-01-02,GPU,tq4,2048,,failed\n" +
                                  "0123456789,2026-01-02,GPU,bf16,512,200.00,ok\n");
    write("rates/card-b.csv", std::string(kHeader) + "0123456789,2026-01-01,GPU,tq4,512,160.00,ok\n");
    write("rates/older.csv", std::string(kHeader) + "aaaaaaaaaa,2025-01-01,GPU,tq4,512,1.00,ok\n");
    write("peers.csv", "engine,depth,rate\nother,512,68\n");
    write("wanted.csv",
          "section,what,driver,conditions,measure,minus,times,format,relation,wanted,peer_table,peer\n"
          "a,rate at 512,rates,\"cache=tq4, depth=512\",rate,,,%.1f,at least,160,peers.csv,depth=512\n"
          "b,too much,rates,\"cache=tq4, depth=512\",rate,,,%.1f,at most,160,,\n"
          "c,change,rates,\"cache=tq4, depth=512\",rate,cache=bf16,2,%+.1f,at least,-60,,\n");
  }

  void write(const std::string& name, const std::string& text) const { std::ofstream(dir.file(name)) << text; }

  [[nodiscard]] std::string page(const std::string& text) const {
    return with_markdown_tables(text, "page.md", dir.file(""), dir.file(""));
  }
  [[nodiscard]] std::string table(const std::string& query) const {
    return page("<!-- table: rates\n" + query + "\n-->\n<!-- end -->\n");
  }
  /// What is said of a page that cannot be written.
  [[nodiscard]] std::string refusal(const std::string& text) const {
    try {
      (void)page(text);
    } catch (const FormatError& error) {
      return error.what();
    }
    return "nothing was refused";
  }

  testkit::TempDir dir;
};

TEST_F(MarkdownTables, AreWrittenBetweenTheirMarkersAndNowhereElse) {
  const std::string query =
      "<!-- table: rates\nwhere: status!=failed\nrows: cache\ncolumn: at 512 | rate | %.1f | depth=512\n-->\n";
  const std::string written = query +
                              "| cache | at 512 |\n|---|---|\n| tq4 | 172.5 |\n| bf16 | 200.0 |\n\n"
                              "From [rates/card-a.csv](rates/card-a.csv): GPU, commit 01234567.\n<!-- end -->\n";
  EXPECT_EQ(page("before\n" + query + "| stale | 1 |\n<!-- end -->\nafter\n"), "before\n" + written + "after\n");
  EXPECT_EQ(page(written), written);
  EXPECT_EQ(page("no table\n"), "no table\n");
}

TEST_F(MarkdownTables, AColumnComparesWithAnotherRow) {
  const std::string lines = table(
      "where: depth=512\nrows: cache\ncolumn: less | rate | %+.2f | minus cache=bf16\n"
      "column: share | rate | %.1f %% | over cache=bf16 | times 100\ncolumn: plain | rate");
  EXPECT_NE(lines.find("| tq4 | -27.46 | 86.3 % | 172.54 |\n| bf16 | +0.00 | 100.0 % | 200.00 |\n"), lines.npos)
      << lines;
}

TEST_F(MarkdownTables, SeveralRowsNeedAPick) {
  const std::string query = "rows: status\ncolumn: rate | rate | %.0f";
  EXPECT_NE(refusal("<!-- table: rates\nwhere: status=ok\n" + query + "\n-->\n<!-- end -->\n").find("narrow the query"),
            std::string::npos);
  EXPECT_NE(table("where: status=ok\n" + query + " | least").find("| ok | 173 |"), std::string::npos);
  EXPECT_NE(table("where: status=ok\n" + query + " | most").find("| ok | 200 |"), std::string::npos);
}

TEST_F(MarkdownTables, WhatWasNotMeasuredIsADashButNotAWholeColumn) {
  const std::string lines =
      table("where: cache=tq4\nrows: depth\ncolumn: tq4 | rate | %.0f\ncolumn: bf16 | rate | %.0f | cache=bf16");
  EXPECT_NE(lines.find("| 512 | 173 | 200 |\n| 2048 | - | - |\n"), lines.npos) << lines;
  EXPECT_NE(
      refusal("<!-- table: rates\nwhere: depth=2048\nrows: depth\ncolumn: rate | rate | %.0f\n-->\n<!-- end -->\n")
          .find("no value in any row"),
      std::string::npos);
}

TEST_F(MarkdownTables, WhatOnlySomeTablesHaveIsAskedOfThoseAlone) {
  const std::string query =
      "if there: mode=graph\nrows: cache\ncolumn: rate | rate | %.0f | depth=512\n"
      "column: of a copy | of_copy | %.2f | depth=512 | if there";
  EXPECT_NE(table(query).find("| cache | rate |\n|---|---|\n| tq4 | 173 |\n| bf16 | 200 |\n"), std::string::npos)
      << table(query);
  write("rates/newer.csv",
        "git_sha,utc,gpu,cache,depth,mode,rate,of_copy\nbbbbbbbbbb,2026-02-01,GPU,tq4,512,graph,181,0.75\n"
        "bbbbbbbbbb,2026-02-01,GPU,tq4,512,eager,150,0.5\n");
  EXPECT_NE(table(query).find("| cache | rate | of a copy |\n|---|---|---|\n| tq4 | 181 | 0.75 |\n\nFrom [rates/newer"),
            std::string::npos)
      << table(query);
  // Under `where` and without `if there` older tables are passed over, and two modes are two rows.
  EXPECT_NE(table("where: mode=eager\nrows: cache\ncolumn: rate | rate | %.0f").find("| tq4 | 150 |"),
            std::string::npos);
  EXPECT_NE(refusal("<!-- table: rates\nrows: cache\ncolumn: rate | rate | %.0f | depth=512\n-->\n<!-- end -->\n")
                .find("narrow the query"),
            std::string::npos);
}

TEST_F(MarkdownTables, WhatWasWantedIsHeldAgainstTheNewestRow) {
  const std::string lines = page("<!-- wanted: wanted.csv -->\n<!-- end -->\n");
  const std::string link = "[rates/card-a.csv](rates/card-a.csv)";
  EXPECT_NE(lines.find("| rate at 512 | at least 160.0 | 172.5 | yes | 160.0 | 68 (other) | " + link + " |\n"),
            lines.npos)
      << lines;
  EXPECT_NE(lines.find("| too much | at most 160.0 | 172.5 | **no** | 160.0 | | " + link + " |\n"), lines.npos)
      << lines;
  EXPECT_NE(lines.find("| change | at least -60.0 | -54.9 | yes | - | | " + link + " |\n"), lines.npos) << lines;
  EXPECT_EQ(page("<!-- wanted: wanted.csv\nwhere: section=b -->\n<!-- end -->\n").find("rate at 512"),
            std::string::npos);
}

TEST_F(MarkdownTables, FilesAreListedWithWhatMeasuredThem) {
  const std::string lines = page("<!-- files: rates -->\n<!-- end -->\n");
  EXPECT_NE(lines.find("| [rates/card-a.csv](rates/card-a.csv) | 3 | GPU, commit 01234567 | 2026-01-02 |\n"),
            lines.npos)
      << lines;
  EXPECT_NE(lines.find("rates/older.csv"), lines.npos);
  EXPECT_NE(page("<!-- files: not_yet, rates -->\n<!-- end -->\n").find("rates/older.csv"), std::string::npos);
}

TEST_F(MarkdownTables, ARefusalNamesThePageAndTheLine) {
  const auto says = [&](const std::string& query, const std::string& words) {
    const std::string said = refusal("text\n" + query);
    EXPECT_TRUE(said.starts_with("page.md:2: ")) << said;
    EXPECT_NE(said.find(words), said.npos) << said;
  };
  const std::string end = "\n-->\n<!-- end -->\n";
  says("<!-- table: rates\nrows: cache\ncolumn: a | rate -->\n", "no <!-- end -->");
  says("<!-- table: speeds\nrows: cache\ncolumn: a | rate" + end, "no such folder");
  says("<!-- table: rates\nrows: cache\ncolumn: a | speed" + end, "no table has these columns");
  says("<!-- table: rates\nwhere: cache=f32\nrows: cache\ncolumn: a | rate" + end, "no table has these columns");
  says("<!-- table: rates\nrows: cache" + end, "at least one column");
  says("<!-- table: rates\nrows: cache\nround: 2" + end, "expected where:, if there:, rows: or column:");
  says("<!-- table: rates\nrows: cache\ncolumn: rate" + end, "expected header | measure | format");
  says("<!-- table: rates\nrows: cache\ncolumn: a | rate | %.1f | times" + end, "expected column=value");
  says("<!-- wanted: wanted.csv\nwhere: section=z" + end, "no such lines");
}

TEST(PageDifference, NamesTheFirstLine) {
  EXPECT_EQ(page_difference("a\nb\n", "a\nb\n", "p.md"), std::nullopt);
  EXPECT_EQ(page_difference("a\nb\nc\n", "a\nx\ny\n", "p.md"), "p.md:2: found\n  b\nexpected\n  x");
  EXPECT_EQ(page_difference("a\n", "a\nb\n", "p.md"), "p.md:2: found\n  (nothing)\nexpected\n  b");
}

}  // namespace
}  // namespace gemma4

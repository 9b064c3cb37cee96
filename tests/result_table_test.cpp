// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/result_table.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <clocale>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <locale>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "tests/support/result_file.hpp"
#include "tests/support/temp_dir.hpp"
#include "tests/support/text_file.hpp"

// The columns, rows and printing of a result table, and what a run says of itself. Its file:
// result_table_file_test.cpp.
namespace {

using namespace gemma4::testkit;
using gemma4::ResultTable;
using gemma4::RunInfo;

TEST(ResultTable, HeaderIsRunThenParametersThenMeasuresThenStatus) {
  const TempDir folder;
  ResultTable table(folder.file("a/b/t.csv"), example_run(), {"cache", "context"}, {"nll", "kl_mean"});
  EXPECT_FALSE(std::filesystem::exists(folder.file("a/b/t.csv"))) << "a run that fails early must leave no empty table";
  table.row().set("cache", "tq4").set("context", 8192).set("nll", 1.25).commit();
  const auto rows = parse_csv(read_text(folder.file("a/b/t.csv")));
  ASSERT_EQ(rows.size(), 2u);
  const std::vector<std::string> header = {"schema",        "experiment", "git_sha",        "git_dirty", "utc",
                                           "gpu",           "card",       "sm_count",       "sm_mhz",    "memory_mhz",
                                           "power_limit_w", "driver",     "driver_release", "cuda",      "compiler",
                                           "build",         "flags",      "seed",           "argv",      "cache",
                                           "context",       "nll",        "kl_mean",        "status"};
  EXPECT_EQ(rows[0], header);
  ASSERT_EQ(rows[1].size(), header.size());
  EXPECT_EQ(rows[1][1], "accuracy");
  EXPECT_EQ(rows[1][2], "0123456789abcdef");
  EXPECT_TRUE(rows[1][5].starts_with("cpu: ")) << rows[1][5];
  for (const std::size_t column : {6, 8, 9, 10, 11, 12, 13}) {
    EXPECT_EQ(rows[1][column], "") << header[column] << " is of a GPU, and there is none";
  }
  EXPECT_EQ(rows[1][17], "7");
  EXPECT_EQ(rows[1][18], "accuracy --cache bf16,tq4 --prompt 'it'\\''s, \"so\"'") << "the command, as a shell takes it";
  RunInfo gpu = example_run();
  gpu.card = "1a2b3c4d", gpu.power_limit_w = "700", gpu.driver = "13.0", gpu.driver_release = "580.95.05";
  gpu.sm_mhz = "1980", gpu.memory_mhz = "3201", gpu.cuda = "12.8";
  ResultTable(folder.file("gpu.csv"), gpu, {}, {}).row().commit();
  const auto gpu_rows = parse_csv(read_text(folder.file("gpu.csv")));
  const std::vector<std::string> of_card(gpu_rows[1].begin() + 6, gpu_rows[1].begin() + 14);
  EXPECT_EQ(of_card,
            (std::vector<std::string>{"1a2b3c4d", gpu.sm_count, "1980", "3201", "700", "13.0", "580.95.05", "12.8"}));
  const std::vector<std::string> values(rows[1].begin() + gemma4::kRunColumns.size(), rows[1].end());
  EXPECT_EQ(values, (std::vector<std::string>{"tq4", "8192", "1.25", "", "ok"})) << "not measured is an empty cell";
}

TEST(ResultTable, FailedCaseIsARowWithTheReason) {
  const TempDir folder;
  ResultTable table(folder.file("t.csv"), example_run(), {"context"}, {"nll"});
  table.row().set("context", 512).fail("out of memory,\nneed 3 GB");
  const auto rows = parse_csv(read_text(folder.file("t.csv")));
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[1].back(), "failed: out of memory, need 3 GB");
}

TEST(ResultTable, ColumnNamesAreUniqueAndLowerCase) {
  const auto refusal = [](std::vector<std::string> parameters, std::vector<std::string> measures) {
    return message_of([&] { ResultTable("", example_run(), parameters, measures); });
  };
  EXPECT_EQ(refusal({"context"}, {"median_us", "p99"}), "");
  EXPECT_NE(refusal({"context"}, {"context"}).find("'context' is there twice"), std::string::npos);
  EXPECT_NE(refusal({"seed"}, {}).find("'seed' is there twice"), std::string::npos);
  EXPECT_NE(refusal({}, {"status"}).find("'status' is there twice"), std::string::npos);
  for (const char* bad : {"Context", "n head", "", "kl-mean", "größe"}) {
    EXPECT_NE(refusal({bad}, {}).find("lower-case"), std::string::npos) << bad;
  }
}

TEST(ResultTable, UnknownOrRepeatedColumnIsRefusedByName) {
  ResultTable table("", example_run(), {"context"}, {"nll"});
  const std::string unknown = message_of([&] { table.row().set("nlll", 1.0); });
  EXPECT_NE(unknown.find("'nlll'"), unknown.npos) << unknown;
  EXPECT_NE(unknown.find("context,nll"), unknown.npos) << unknown;
  EXPECT_NE(message_of([&] { table.row().set("nll", 1.0).set("nll", 2.0); }).find("'nll' is set twice"), unknown.npos);
  EXPECT_NE(message_of([&] { table.row().set("seed", 1); }).find("'seed'"), unknown.npos) << "the run's own column";
  EXPECT_NE(message_of([&] { table.row().set("status", "ok"); }), "");
  EXPECT_NE(message_of([&] { table.row().set("typo", std::optional<double>()); }), "") << "even with nothing to write";
}

TEST(ResultTable, NumbersUseADotWhateverTheLocale) {
  struct CommaPoint : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new CommaPoint));
  std::ostringstream control;
  control << 1234567.5;
  const TempDir folder;
  ResultTable table(folder.file("t.csv"), example_run(), {"context"}, {"nll"});
  table.row().set("context", 1234567).set("nll", 1234567.5).commit();
  std::ostringstream printed;
  table.print(printed, {"context", "nll"});
  std::locale::global(before);
  EXPECT_NE(control.str().find(','), std::string::npos) << "the locale must be one that would show";
  const auto rows = parse_csv(read_text(folder.file("t.csv")));
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[1][gemma4::kRunColumns.size()], "1234567");
  EXPECT_EQ(rows[1][gemma4::kRunColumns.size() + 1], "1234567.5");
}

RC_GTEST_PROP(ResultTable, AnyTextComesBackAsOneLine, (const std::vector<std::string>& texts)) {
  const TempDir folder;
  ResultTable table(folder.file("t.csv"), example_run(), {"text"}, {"nll"});
  for (const std::string& text : texts) table.row().set("text", text).commit();
  const std::string content = texts.empty() ? "" : read_text(folder.file("t.csv"));
  const auto rows = parse_csv(content);
  RC_ASSERT(rows.size() == (texts.empty() ? 0 : texts.size() + 1));
  for (std::size_t i = 0; i < texts.size(); ++i) {
    std::string expected = texts[i];
    for (char& c : expected) c = (c == '\n' || c == '\r' || c == '\0') ? ' ' : c;
    RC_ASSERT(rows[i + 1].size() == rows[0].size());
    RC_ASSERT(rows[i + 1][gemma4::kRunColumns.size()] == expected);
  }
}

RC_GTEST_PROP(ResultTable, AnyDoubleReadsBackToTheSameValue, (std::uint64_t bits)) {
  const auto value = gemma4::bit_cast<double>(bits);
  const std::string text = gemma4::detail::result_cell(value).full;
  const double back = std::strtod(text.c_str(), nullptr);
  RC_ASSERT((std::isnan(value) ? std::isnan(back) : back == value));
  const std::string six_digits = gemma4::concat(0.1234567890123);  // control: a stream's default does not
  RC_ASSERT(std::strtod(six_digits.c_str(), nullptr) != 0.1234567890123);
}

TEST(ResultTable, ARowOfWhatIsNoNumberIsNeverOk) {
  for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    const TempDir folder;
    ResultTable table(folder.file("t.csv"), example_run(), {"context"}, {"nll"});
    table.row().set("context", 1).set("nll", bad).commit();
    const auto rows = parse_csv(read_text(folder.file("t.csv")));
    ASSERT_EQ(rows.size(), 2u);
    EXPECT_EQ(rows[1].back().rfind("failed: nll is ", 0), 0u) << rows[1].back();
    EXPECT_NE(message_of([&] { table.finish(); }).find("1 rows hold a number that is not finite"), std::string::npos);
    std::ostringstream printed;
    table.print_with_failures(printed, {"context"});
    EXPECT_NE(printed.str().find("failed: nll"), std::string::npos);
  }
  ResultTable table("", example_run(), {}, {"nll"});
  table.row().set("nll", 1.0).commit();
  EXPECT_NO_THROW(table.finish());
  std::ostringstream printed;
  table.print_with_failures(printed, {"nll"});
  EXPECT_EQ(printed.str().find("status"), std::string::npos) << "the control: all rows are ok";
}

TEST(ResultTable, PrintsChosenColumnsAligned) {
  ResultTable table("", example_run(), {"cache", "context"}, {"nll"});
  table.row().set("cache", "bf16").set("context", 512).set("nll", 1.23456789).commit();
  table.row().set("cache", "tq4-haar").set("context", 131072).commit();
  std::ostringstream stream;
  table.print(stream, {"cache", "context", "nll", "status"});
  EXPECT_EQ(stream.str(),
            "cache     context     nll  status\n"
            "bf16          512  1.2346  ok\n"
            "tq4-haar   131072       -  ok\n");
  EXPECT_NE(message_of([&] { table.print(stream, {"typo"}); }), "");
}

TEST(RunInfo, UtcIsIso8601) {
  EXPECT_EQ(gemma4::utc_text(std::chrono::system_clock::from_time_t(0)), "1970-01-01T00:00:00Z");
  EXPECT_EQ(gemma4::utc_text(std::chrono::system_clock::from_time_t(951782399)), "2000-02-28T23:59:59Z");
}

TEST(RunInfo, ACardIsNamedByAHashOfItsUuid) {
  EXPECT_EQ(gemma4::card_name(""), "cbf29ce4") << "FNV-1a of nothing is its offset";
  EXPECT_EQ(gemma4::card_name("a"), "af63dc4c") << "published value af63dc4c8601ec8c";
  EXPECT_EQ(gemma4::card_name("foobar"), "85944171") << "published value 85944171f73967e8";
  const std::string with_zeros("\x00\x80\xff\x00", 4);
  EXPECT_NE(gemma4::card_name(with_zeros), gemma4::card_name(with_zeros.substr(0, 3))) << "a zero byte counts";
}

TEST(RunInfo, TheDriversReleaseIsReadFromWhatTheKernelSays) {
  EXPECT_EQ(gemma4::driver_release_in("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Mon Jan  5 22:42:20 "
                                      "UTC 2026\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"),
            "580.159.04");
  EXPECT_EQ(gemma4::driver_release_in("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release"),
            "570.86.15");
  EXPECT_EQ(gemma4::driver_release_in(""), "");
  EXPECT_EQ(gemma4::driver_release_in("no release. x86_64 12 .5"), "");
}

TEST(RunInfo, DefaultPathNamesExperimentDeviceAndCommit) {
  RunInfo run = example_run();
  run.gpu = "NVIDIA H200 (SXM)";
  EXPECT_EQ(gemma4::default_result_path(run).string(), "results/accuracy/nvidia-h200-sxm-01234567.csv");
}

}  // namespace

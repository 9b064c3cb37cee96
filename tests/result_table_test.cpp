// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/result_table.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <clocale>
#include <cmath>
#include <csignal>
#include <exception>
#include <filesystem>
#include <fstream>
#include <limits>
#include <locale>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

using gemma4::ResultTable;
using gemma4::RunInfo;

/// A folder of its own for each test, removed afterwards.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "result_table_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = name;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  [[nodiscard]] std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

/// RFC 4180, written independently of the writer: one record a line.
std::vector<std::vector<std::string>> parse_csv(const std::string& text) {
  std::vector<std::vector<std::string>> rows;
  std::vector<std::string> row(1);
  bool is_quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (is_quoted) {
      if (c == '"' && i + 1 < text.size() && text[i + 1] == '"') {
        row.back() += text[++i];
      } else if (c == '"') {
        is_quoted = false;
      } else {
        row.back() += c;
      }
    } else if (c == '"') {
      is_quoted = true;
    } else if (c == ',') {
      row.emplace_back();
    } else if (c == '\n') {
      rows.push_back(row);
      row.assign(1, "");
    } else {
      row.back() += c;
    }
  }
  return rows;
}

RunInfo example_run() {
  const char* const argv[] = {"/somewhere/bin/accuracy", "--cache", "bf16,tq4", "--prompt", "it's, \"so\""};
  return gemma4::run_info("accuracy", 5, argv, 7, {"0123456789abcdef", "0", "Release", "-O3 -march=native"});
}

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

TEST(ResultTable, HeaderIsRunThenParametersThenMeasuresThenStatus) {
  const TemporaryFolder folder;
  ResultTable table(folder / "a/b/t.csv", example_run(), {"cache", "context"}, {"nll", "kl_mean"});
  EXPECT_FALSE(std::filesystem::exists(folder / "a/b/t.csv")) << "a run that fails early must leave no empty table";
  table.row().set("cache", "tq4").set("context", 8192).set("nll", 1.25).commit();
  const auto rows = parse_csv(read_text(folder / "a/b/t.csv"));
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
  ResultTable(folder / "gpu.csv", gpu, {}, {}).row().commit();
  const auto gpu_rows = parse_csv(read_text(folder / "gpu.csv"));
  const std::vector<std::string> of_card(gpu_rows[1].begin() + 6, gpu_rows[1].begin() + 14);
  EXPECT_EQ(of_card,
            (std::vector<std::string>{"1a2b3c4d", gpu.sm_count, "1980", "3201", "700", "13.0", "580.95.05", "12.8"}));
  const std::vector<std::string> values(rows[1].begin() + gemma4::kRunColumns.size(), rows[1].end());
  EXPECT_EQ(values, (std::vector<std::string>{"tq4", "8192", "1.25", "", "ok"})) << "not measured is an empty cell";
}

TEST(ResultTable, EachRowIsOnDiskBeforeTheNext) {
  const TemporaryFolder folder;
  ResultTable table(folder / "t.csv", example_run(), {"context"}, {"nll"});
  for (int n = 1; n <= 3; ++n) {
    table.row().set("context", n).commit();
    EXPECT_EQ(parse_csv(read_text(folder / "t.csv")).size(), static_cast<std::size_t>(n + 1));
  }
  { auto abandoned = table.row().set("context", 99); }
  EXPECT_EQ(parse_csv(read_text(folder / "t.csv")).size(), 4u) << "a row that is not committed is not written";
}

TEST(ResultTable, FailedCaseIsARowWithTheReason) {
  const TemporaryFolder folder;
  ResultTable table(folder / "t.csv", example_run(), {"context"}, {"nll"});
  table.row().set("context", 512).fail("out of memory,\nneed 3 GB");
  const auto rows = parse_csv(read_text(folder / "t.csv"));
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[1].back(), "failed: out of memory, need 3 GB");
}

TEST(ResultTable, AppendsToItsOwnHeaderAndRefusesAnother) {
  const TemporaryFolder folder;
  const auto path = folder / "t.csv";
  for (int run = 0; run < 2; ++run) {
    ResultTable(path, example_run(), {"context"}, {"nll"}).row().set("context", run).commit();
  }
  const std::string before = read_text(path);
  EXPECT_EQ(parse_csv(before).size(), 3u);
  const std::string message = message_of([&] { ResultTable(path, example_run(), {"context"}, {"kl_mean"}); });
  EXPECT_NE(message.find("context,nll,status"), message.npos) << message;
  EXPECT_NE(message.find("context,kl_mean,status"), message.npos) << message;
  EXPECT_EQ(read_text(path), before);
}

TEST(ResultTable, IncompleteLastLineIsRefusedAndKept) {
  const TemporaryFolder folder;
  const auto path = folder / "t.csv";
  ResultTable(path, example_run(), {"context"}, {"nll"}).row().set("context", 1).commit();
  const std::string whole = read_text(path);
  std::filesystem::resize_file(path, whole.size() - 5);
  const std::string cut = read_text(path);
  const std::string message = message_of([&] { ResultTable(path, example_run(), {"context"}, {"nll"}); });
  EXPECT_NE(message.find("incomplete"), message.npos) << message;
  EXPECT_EQ(read_text(path), cut);
  const auto tail = cut.size() - cut.rfind('\n') - 1;
  EXPECT_NE(message.find("truncate --size=-" + std::to_string(tail) + " "), message.npos) << message;
  std::filesystem::resize_file(path, cut.size() - tail);  // what the message says
  ResultTable(path, example_run(), {"context"}, {"nll"}).row().set("context", 2).commit();
  EXPECT_EQ(parse_csv(read_text(path)).size(), 2u);
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

TEST(ResultTable, PlaceThatCannotBeWrittenIsRefusedBeforeTheRun) {
  const TemporaryFolder folder;
  std::ofstream(folder / "file") << "x";
  EXPECT_NE(message_of([&] { ResultTable(folder / "file/t.csv", example_run(), {}, {"nll"}); }), "");
  std::filesystem::create_directory(folder / "directory.csv");
  EXPECT_NE(message_of([&] { ResultTable(folder / "directory.csv", example_run(), {}, {"nll"}); }), "");
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
  const TemporaryFolder folder;
  ResultTable table(folder / "t.csv", example_run(), {"context"}, {"nll"});
  table.row().set("context", 1234567).set("nll", 1234567.5).commit();
  std::ostringstream printed;
  table.print(printed, {"context", "nll"});
  std::locale::global(before);
  EXPECT_NE(control.str().find(','), std::string::npos) << "the locale must be one that would show";
  const auto rows = parse_csv(read_text(folder / "t.csv"));
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[1][gemma4::kRunColumns.size()], "1234567");
  EXPECT_EQ(rows[1][gemma4::kRunColumns.size() + 1], "1234567.5");
}

RC_GTEST_PROP(ResultTable, AnyTextComesBackAsOneLine, (const std::vector<std::string>& texts)) {
  const TemporaryFolder folder;
  ResultTable table(folder / "t.csv", example_run(), {"text"}, {"nll"});
  for (const std::string& text : texts) table.row().set("text", text).commit();
  const std::string content = texts.empty() ? "" : read_text(folder / "t.csv");
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

TEST(ResultTable, ConcurrentRunsInterleaveWholeRows) {
  const TemporaryFolder folder;
  const auto write = [&](int run) {
    ResultTable table(folder / "t.csv", example_run(), {"run", "context"}, {"nll"});
    for (int n = 0; n < 50; ++n) table.row().set("run", run).set("context", n).commit();
  };
  std::vector<std::thread> runs;
  for (int run = 0; run < 4; ++run) runs.emplace_back(write, run);
  for (std::thread& run : runs) run.join();
  const auto rows = parse_csv(read_text(folder / "t.csv"));
  ASSERT_EQ(rows.size(), 201u) << "one header and every row";
  for (const auto& row : rows) EXPECT_EQ(row.size(), rows[0].size());
}

TEST(ResultTable, WritersThatBeginTogetherMakeOneHeader) {
  // Every round begins with no file, so that all of them would write the header.
  constexpr int kWriters = 8, kRounds = 40;
  for (int round = 0; round < kRounds; ++round) {
    const TemporaryFolder folder;
    std::barrier start(kWriters);
    std::vector<std::thread> writers;
    for (int writer = 0; writer < kWriters; ++writer) {
      writers.emplace_back([&, writer] {
        ResultTable table(folder / "t.csv", example_run(), {"writer"}, {"nll"});
        auto row = table.row().set("writer", writer);
        start.arrive_and_wait();
        row.commit();
      });
    }
    for (std::thread& writer : writers) writer.join();
    const auto rows = parse_csv(read_text(folder / "t.csv"));
    ASSERT_EQ(rows.size(), static_cast<std::size_t>(kWriters + 1)) << "round " << round;
    EXPECT_EQ(rows[0][0], "schema");
    for (std::size_t i = 1; i < rows.size(); ++i) ASSERT_NE(rows[i][0], "schema") << "a second header";
  }
}

/// Another program that has the table locked, as a reader would: an exclusive lock has to wait for it.
class OtherProgram {
 public:
  explicit OtherProgram(const std::filesystem::path& path)
      : file_(open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644)) {
    if (file_ < 0 || flock(file_, LOCK_SH) != 0) throw std::runtime_error("cannot lock the file");
  }
  ~OtherProgram() { close(file_); }
  OtherProgram(const OtherProgram&) = delete;
  OtherProgram& operator=(const OtherProgram&) = delete;
  void append(const std::string& text) const {
    if (write(file_, text.data(), text.size()) != static_cast<ssize_t>(text.size())) throw std::runtime_error("write");
  }
  void unlock() const { flock(file_, LOCK_UN); }

 private:
  int file_;
};

/// What commit() says ("" when it wrote), with `meanwhile` in the file before the lock is let go.
std::string commit_behind_a_lock(const std::filesystem::path& path, const std::string& meanwhile) {
  ResultTable table(path, example_run(), {"context"}, {"nll"});
  OtherProgram other(path);
  std::atomic<bool> is_done = false;
  std::string said;
  std::thread writer([&] {
    said = message_of([&] { table.row().set("context", 1).commit(); });
    is_done = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_FALSE(is_done) << "the row was written although the file is locked";
  other.append(meanwhile);
  other.unlock();
  writer.join();
  return said;
}

std::string header_of(const std::string& measure) {
  const TemporaryFolder folder;
  ResultTable(folder / "t.csv", example_run(), {"context"}, {measure}).row().set("context", 7).commit();
  return read_text(folder / "t.csv");
}

TEST(ResultTable, ARowWaitsForTheLockAndThenLooksAgain) {
  const TemporaryFolder folder;
  EXPECT_EQ(commit_behind_a_lock(folder / "empty.csv", ""), "");
  EXPECT_EQ(parse_csv(read_text(folder / "empty.csv")).size(), 2u);
  // Who had the lock wrote the header and a row.
  EXPECT_EQ(commit_behind_a_lock(folder / "same.csv", header_of("nll")), "");
  const auto rows = parse_csv(read_text(folder / "same.csv"));
  ASSERT_EQ(rows.size(), 3u) << "one header and two rows";
  EXPECT_EQ(rows[2][gemma4::kRunColumns.size()], "1");
  // Who had the lock wrote another table, or stopped within a line.
  const std::string another = header_of("kl_mean");
  EXPECT_NE(commit_behind_a_lock(folder / "another.csv", another).find("another header"), std::string::npos);
  EXPECT_EQ(read_text(folder / "another.csv"), another);
  const std::string whole = header_of("nll"), part = whole.substr(0, whole.size() - 3);
  EXPECT_NE(commit_behind_a_lock(folder / "part.csv", part).find("incomplete"), std::string::npos);
  EXPECT_EQ(read_text(folder / "part.csv"), part);
}

TEST(ResultTable, TheHeaderIsLookedAtBeforeEveryRow) {
  const TemporaryFolder folder;
  const auto path = folder / "t.csv";
  ResultTable table(path, example_run(), {"context"}, {"nll"});
  table.row().set("context", 1).commit();
  const std::string another = header_of("kl_mean");
  std::ofstream(path, std::ios::trunc) << another;
  EXPECT_NE(message_of([&] { table.row().set("context", 2).commit(); }).find("another header"), std::string::npos);
  EXPECT_EQ(read_text(path), another);
  std::filesystem::remove(path);
  table.row().set("context", 3).commit();
  EXPECT_EQ(parse_csv(read_text(path)).size(), 2u) << "a file that is gone begins anew";
}

TEST(ResultTable, ARowThatTheDiskTookInPartIsTakenBack) {
  const TemporaryFolder folder;
  const auto path = folder / "t.csv";
  ResultTable table(path, example_run(), {"context"}, {"nll"});
  table.row().set("context", 1).commit();
  const std::string before = read_text(path);
  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = limit;
  small.rlim_cur = before.size() + 10;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string said = message_of([&] { table.row().set("context", 2).commit(); });
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_NE(said.find("took only a part"), std::string::npos) << said;
  EXPECT_EQ(said.find("incomplete"), std::string::npos) << said;
  EXPECT_EQ(read_text(path), before);
  table.row().set("context", 3).commit();
  EXPECT_EQ(parse_csv(read_text(path)).size(), 3u);
}

/// call() in a process that may write files of `bytes` at most. @return what it throws
template <class TCall>
std::string at_a_limit(std::uint64_t bytes, TCall&& call) {
  rlimit limit{};
  EXPECT_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = limit;
  small.rlim_cur = bytes;
  EXPECT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string said = message_of(call);
  EXPECT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  std::signal(SIGXFSZ, handler);
  return said;
}

TEST(ResultTable, RowsThatAreLostAreKeptPrintedAndTriedAgain) {
  const TemporaryFolder folder;
  const auto path = folder / "t.csv";
  ResultTable table(path, example_run(), {"context"}, {"nll"});
  table.keep_rows();
  table.row().set("context", 1).commit();
  const auto size = std::filesystem::file_size(path);
  const std::string lost = at_a_limit(size + 10, [&] {
    for (const int context : {2, 3}) table.row().set("context", context).commit();
    table.finish();
  });
  EXPECT_NE(lost.find("2 of 3 rows are not in " + path.string() + ": "), std::string::npos) << lost;
  EXPECT_NE(lost.find("cannot append"), std::string::npos) << lost;
  EXPECT_EQ(std::filesystem::file_size(path), size);
  std::ostringstream printed;
  table.print(printed, {"context"});
  EXPECT_EQ(printed.str(), "context\n      1\n      2\n      3\n");
  table.row().set("context", 4).commit();
  EXPECT_NO_THROW(table.finish()) << "the disk has room again";
  const auto rows = parse_csv(read_text(path));
  ASSERT_EQ(rows.size(), 5u);
  for (std::size_t i = 1; i < 5; ++i) EXPECT_EQ(rows[i][gemma4::kRunColumns.size()], std::to_string(i));
}

TEST(ResultTable, WithoutRoomForALineItIsRefusedBeforeTheRun) {
  const TemporaryFolder folder;
  const auto path = folder / "new/deep/t.csv";
  const auto open = [&] { ResultTable(path, example_run(), {}, {"nll"}); };
  EXPECT_NE(at_a_limit(20, open).find("cannot write in"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder / "new")) << "folders for nothing";
  EXPECT_EQ(at_a_limit(1 << 20, open), "");
  EXPECT_FALSE(std::filesystem::exists(folder / "new")) << "no row came";
  ResultTable table(path, example_run(), {}, {"nll"});
  EXPECT_NE(at_a_limit(20, [&] { table.row().set("nll", 1).commit(); }), "");
  EXPECT_FALSE(std::filesystem::exists(path)) << "a first row that failed leaves no file";
  table.row().set("nll", 1).commit();
  EXPECT_EQ(parse_csv(read_text(path)).size(), 2u);
}

TEST(ResultTable, ARowOfWhatIsNoNumberIsNeverOk) {
  for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    const TemporaryFolder folder;
    ResultTable table(folder / "t.csv", example_run(), {"context"}, {"nll"});
    table.row().set("context", 1).set("nll", bad).commit();
    const auto rows = parse_csv(read_text(folder / "t.csv"));
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

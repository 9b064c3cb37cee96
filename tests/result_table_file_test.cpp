// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "gemma4/report/result_table.hpp"
#include "tests/support/result_file.hpp"
#include "tests/support/temp_dir.hpp"
#include "tests/support/text_file.hpp"

// The file of a result table: what it is opened for, who else writes it, and rows that do not reach it.
namespace {

using namespace gemma4::testkit;
using gemma4::ResultTable;

TEST(ResultTable, EachRowIsOnDiskBeforeTheNext) {
  const TempDir folder;
  ResultTable table(folder.file("t.csv"), example_run(), {"context"}, {"nll"});
  for (int n = 1; n <= 3; ++n) {
    table.row().set("context", n).commit();
    EXPECT_EQ(parse_csv(read_text(folder.file("t.csv"))).size(), static_cast<std::size_t>(n + 1));
  }
  { auto abandoned = table.row().set("context", 99); }
  EXPECT_EQ(parse_csv(read_text(folder.file("t.csv"))).size(), 4u) << "a row that is not committed is not written";
}

TEST(ResultTable, AppendsToItsOwnHeaderAndRefusesAnother) {
  const TempDir folder;
  const auto path = folder.file("t.csv");
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
  const TempDir folder;
  const auto path = folder.file("t.csv");
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

TEST(ResultTable, PlaceThatCannotBeWrittenIsRefusedBeforeTheRun) {
  const TempDir folder;
  std::ofstream(folder.file("file")) << "x";
  EXPECT_NE(message_of([&] { ResultTable(folder.file("file/t.csv"), example_run(), {}, {"nll"}); }), "");
  std::filesystem::create_directory(folder.file("directory.csv"));
  EXPECT_NE(message_of([&] { ResultTable(folder.file("directory.csv"), example_run(), {}, {"nll"}); }), "");
}

TEST(ResultTable, ConcurrentRunsInterleaveWholeRows) {
  const TempDir folder;
  const auto write = [&](int run) {
    ResultTable table(folder.file("t.csv"), example_run(), {"run", "context"}, {"nll"});
    for (int n = 0; n < 50; ++n) table.row().set("run", run).set("context", n).commit();
  };
  std::vector<std::thread> runs;
  for (int run = 0; run < 4; ++run) runs.emplace_back(write, run);
  for (std::thread& run : runs) run.join();
  const auto rows = parse_csv(read_text(folder.file("t.csv")));
  ASSERT_EQ(rows.size(), 201u) << "one header and every row";
  for (const auto& row : rows) EXPECT_EQ(row.size(), rows[0].size());
}

TEST(ResultTable, WritersThatBeginTogetherMakeOneHeader) {
  // Every round begins with no file, so that all of them would write the header.
  constexpr int kWriters = 8, kRounds = 40;
  for (int round = 0; round < kRounds; ++round) {
    const TempDir folder;
    std::barrier start(kWriters);
    std::vector<std::thread> writers;
    for (int writer = 0; writer < kWriters; ++writer) {
      writers.emplace_back([&, writer] {
        ResultTable table(folder.file("t.csv"), example_run(), {"writer"}, {"nll"});
        auto row = table.row().set("writer", writer);
        start.arrive_and_wait();
        row.commit();
      });
    }
    for (std::thread& writer : writers) writer.join();
    const auto rows = parse_csv(read_text(folder.file("t.csv")));
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
  const TempDir folder;
  ResultTable(folder.file("t.csv"), example_run(), {"context"}, {measure}).row().set("context", 7).commit();
  return read_text(folder.file("t.csv"));
}

TEST(ResultTable, ARowWaitsForTheLockAndThenLooksAgain) {
  const TempDir folder;
  EXPECT_EQ(commit_behind_a_lock(folder.file("empty.csv"), ""), "");
  EXPECT_EQ(parse_csv(read_text(folder.file("empty.csv"))).size(), 2u);
  // Who had the lock wrote the header and a row.
  EXPECT_EQ(commit_behind_a_lock(folder.file("same.csv"), header_of("nll")), "");
  const auto rows = parse_csv(read_text(folder.file("same.csv")));
  ASSERT_EQ(rows.size(), 3u) << "one header and two rows";
  EXPECT_EQ(rows[2][gemma4::kRunColumns.size()], "1");
  // Who had the lock wrote another table, or stopped within a line.
  const std::string another = header_of("kl_mean");
  EXPECT_NE(commit_behind_a_lock(folder.file("another.csv"), another).find("another header"), std::string::npos);
  EXPECT_EQ(read_text(folder.file("another.csv")), another);
  const std::string whole = header_of("nll"), part = whole.substr(0, whole.size() - 3);
  EXPECT_NE(commit_behind_a_lock(folder.file("part.csv"), part).find("incomplete"), std::string::npos);
  EXPECT_EQ(read_text(folder.file("part.csv")), part);
}

TEST(ResultTable, TheHeaderIsLookedAtBeforeEveryRow) {
  const TempDir folder;
  const auto path = folder.file("t.csv");
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
  const TempDir folder;
  const auto path = folder.file("t.csv");
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
  const TempDir folder;
  const auto path = folder.file("t.csv");
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
  const TempDir folder;
  const auto path = folder.file("new/deep/t.csv");
  const auto open = [&] { ResultTable(path, example_run(), {}, {"nll"}); };
  EXPECT_NE(at_a_limit(20, open).find("cannot write in"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder.file("new"))) << "folders for nothing";
  EXPECT_EQ(at_a_limit(1 << 20, open), "");
  EXPECT_FALSE(std::filesystem::exists(folder.file("new"))) << "no row came";
  ResultTable table(path, example_run(), {}, {"nll"});
  EXPECT_NE(at_a_limit(20, [&] { table.row().set("nll", 1).commit(); }), "");
  EXPECT_FALSE(std::filesystem::exists(path)) << "a first row that failed leaves no file";
  table.row().set("nll", 1).commit();
  EXPECT_EQ(parse_csv(read_text(path)).size(), 2u);
}

}  // namespace

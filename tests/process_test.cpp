// SPDX-License-Identifier: Apache-2.0
#include "experiments/support/process.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "experiments/support/process.cpp"  // the drivers' own, in a program of the tests
#include "tests/support/temp_dir.hpp"

/// How a driver ends: lost output, what it throws, memory that is refused; each in a process of its own.
namespace {

using namespace gemma4;
using namespace gemma4::experiment;
using testkit::TempDir;

std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

struct End {
  int status = 0;  ///< as wait() gives it
  std::string out, err;
  [[nodiscard]] int code() const { return WIFEXITED(status) ? WEXITSTATUS(status) : -1; }
};

/// run_process(body) with stdout a file, after `prepare`.
End end_of(
    const std::function<int()>& body, const std::function<void()>& prepare = [] {}) {
  const TempDir folder;
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::dup2(::open(folder.file("out").c_str(), O_WRONLY | O_CREAT, 0600), STDOUT_FILENO);
    ::dup2(::open(folder.file("err").c_str(), O_WRONLY | O_CREAT, 0600), STDERR_FILENO);
    prepare();
    ::_exit(run_process(body));
  }
  End end;
  ::waitpid(pid, &end.status, 0);
  end.out = read_text(folder.file("out"));
  end.err = read_text(folder.file("err"));
  return end;
}

int say_hello() {
  std::cout << "hello\n";
  return 0;
}
void to_full_disk() {
  ::dup2(::open("/dev/full", O_WRONLY), STDOUT_FILENO);
}
void to_closed_pipe() {
  int ends[2];
  if (::pipe(ends) != 0) ::_exit(99);
  ::close(ends[0]);
  ::dup2(ends[1], STDOUT_FILENO);
}

TEST(Process, EndsWithWhatItsBodyReturnsOrThrows) {
  const End good = end_of(say_hello);
  EXPECT_EQ(good.code(), 0);
  EXPECT_EQ(good.out, "hello\n");
  EXPECT_EQ(good.err, "");
  EXPECT_EQ(end_of([] { return 7; }).code(), 7);
  EXPECT_EQ(end_of([]() -> int { throw Exit{3}; }).code(), 3);
  const End thrown = end_of([]() -> int { throw std::runtime_error("the reason"); });
  EXPECT_EQ(thrown.code(), 1);
  EXPECT_EQ(thrown.err, "error: the reason\n");
  EXPECT_EQ(end_of([]() -> int { throw 5; }).code(), 1);
}

TEST(Process, LostOutputIsAnErrorThatIsSaidOnce) {
  const std::pair<void (*)(), const char*> places[] = {
      {to_full_disk, "No space left on device"},
      {to_closed_pipe, "Broken pipe"},
      {[] { ::close(STDOUT_FILENO); }, "Bad file descriptor"},
  };
  for (const auto& [place, reason] : places) {
    const std::string expected = concat("error: standard output cannot be written: ", reason, "\n");
    const End at_end = end_of(say_hello, place);
    EXPECT_EQ(at_end.code(), 1) << reason;
    EXPECT_EQ(at_end.err, expected);
    const End at_once = end_of(
        [&] {
          std::cout << "hello" << std::flush;
          std::cerr << "went on";
          return 0;
        },
        place);
    EXPECT_EQ(at_once.err, expected) << "work whose output is lost ends";
    const End silent = end_of([] { return 0; }, place);
    EXPECT_EQ(silent.code(), 0) << "nothing was written, nothing is lost: " << silent.err;
  }
}

TEST(Process, MuchOutputComesOutWhole) {
  const End end = end_of([] {
    for (int i = 0; i < 100000; ++i) std::cout << i << '\n';
    return 0;
  });
  std::string expected;
  for (int i = 0; i < 100000; ++i) expected += std::to_string(i) + "\n";
  EXPECT_EQ(end.out, expected);
}

TEST(Process, AFileDoesNotTakeThePlaceOfAClosedStdout) {
  const TempDir folder;
  const auto path = folder.file("table.csv");
  const End end = end_of(
      [&] {
        std::ofstream file(path);
        file << "row\n" << std::flush;
        std::cout << "hello\n";
        return 0;
      },
      [] { ::close(STDOUT_FILENO); });
  EXPECT_EQ(read_text(path), "row\n");
  EXPECT_EQ(end.code(), 1);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST(Process, MemoryThatIsRefusedIsNamed) {
  volatile std::size_t count = std::size_t{1} << 55;
  const End end = end_of([&] { return static_cast<int>(std::vector<std::uint8_t>(count).size()); });
  EXPECT_EQ(end.code(), 1);
  EXPECT_NE(end.err.find("error: out of memory: 36028797018963968 B asked for at once; available are "),
            std::string::npos)
      << end.err;
  volatile std::size_t too_many = std::size_t{1} << 62;
  EXPECT_NE(
      end_of([&] { return static_cast<int>(std::vector<double>(too_many).size()); }).err.find("than can be addressed"),
      std::string::npos);
}
#endif

TEST(Process, ASignalEndsItAsTheParentExpects) {
  const End end = end_of([] {
    std::signal(SIGUSR1, SIG_IGN);
    ::raise(SIGTERM);
    return 0;
  });
  EXPECT_TRUE(WIFSIGNALED(end.status) && WTERMSIG(end.status) == SIGTERM);
}

}  // namespace

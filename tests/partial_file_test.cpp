// SPDX-License-Identifier: Apache-2.0
#include "gemma4/partial_file.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "tests/support/refuses.hpp"
#include "tests/support/temp_dir.hpp"

/// A file is there whole or not at all: after an error, an interrupt at any moment, a process that was killed.
namespace {

using namespace gemma4;
using testkit::TempDir;

std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Runs body() in a process of its own. @return its wait status
template <class TBody>
int in_child(TBody&& body) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    body();
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  return status;
}

/// The number of a process that is no more.
pid_t dead_pid() {
  const pid_t pid = ::fork();
  if (pid == 0) ::_exit(0);
  ::waitpid(pid, nullptr, 0);
  return pid;
}

TEST(PartialFile, IsThereWithCommitAndNotBefore) {
  const TempDir folder;
  const auto path = folder.file("a.txt");
  std::ofstream(path) << "old";
  {
    PartialFile file(path);
    file.write("ne");
    EXPECT_EQ(read_text(path), "old");
    EXPECT_EQ(folder.names().size(), 2u);
    file.write("w");
    file.commit();
    EXPECT_EQ(read_text(path), "new");
  }
  { PartialFile(path).write("never"); }
  EXPECT_EQ(folder.names(), std::vector<std::string>{"a.txt"});
  EXPECT_EQ(read_text(path), "new");
  EXPECT_TRUE(testkit::refuses([] { PartialFile("/dev/null"); }, {"/dev/null", "regular file"}));
}

TEST(PartialFile, KeepsTheModeAndTheLink) {
  const TempDir folder;
  const auto path = folder.file("a.txt"), link = folder.file("link.txt");
  std::ofstream(path) << "old";
  std::filesystem::create_symlink("a.txt", link);
  ::chmod(path.c_str(), 0640);
  PartialFile file(link);
  file.write("new");
  file.commit();
  EXPECT_TRUE(std::filesystem::is_symlink(link));
  EXPECT_EQ(read_text(path), "new");
  struct stat status {};
  ASSERT_EQ(::stat(path.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777u, 0640u);
}

TEST(PartialFile, ALimitIsAnErrorWithItsReason) {
  const TempDir folder;
  const int status = in_child([&] {
    catch_interrupts();
    rlimit limit{10, 10};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    try {
      PartialFile file(folder.file("a.txt"));
      file.write("more than ten bytes");
    } catch (const std::system_error& error) {
      ::_exit(error.code() == std::errc::file_too_large ? 42 : 43);
    }
  });
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 42) << status;
  EXPECT_TRUE(folder.names().empty());
}

/// A length that is asked for is room on the disk, where the file system promises any: a full one is full then.
TEST(PartialFile, ALengthIsRoomToo) {
  const TempDir folder;
  PartialFile file(folder.file("a"));
  constexpr std::int64_t kBytes = 3 << 20;
  const bool can_promise = ::fallocate(file.descriptor(), 0, 0, 4096) == 0;
  file.resize(kBytes);
  struct stat status {};
  ASSERT_EQ(::fstat(file.descriptor(), &status), 0);
  EXPECT_EQ(status.st_size, kBytes);
  if (can_promise) {
    EXPECT_GE(512 * static_cast<std::int64_t>(status.st_blocks), kBytes);
  }
  file.resize(10);
  ASSERT_EQ(::fstat(file.descriptor(), &status), 0);
  EXPECT_EQ(status.st_size, 10);
}

TEST(PartialFile, AnInterruptLeavesNothingAndIsSeenByTheParent) {
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    for (const bool catches : {true, false}) {
      const TempDir folder;
      const int status = in_child([&] {
        ::signal(number, SIG_DFL);
        if (catches) catch_interrupts();
        PartialFile file(folder.file("a.txt"));
        file.write("half");
        ::raise(number);
      });
      EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == number);
      EXPECT_EQ(folder.names().empty(), catches) << "the control, which catches nothing, leaves its file";
    }
  }
}

TEST(PartialFile, AnInterruptThatTheParentIgnoredStaysSo) {
  const int status = in_child([] {
    ::signal(SIGHUP, SIG_IGN);
    catch_interrupts();
    ::raise(SIGHUP);
  });
  EXPECT_TRUE(WIFEXITED(status));
}

TEST(InterruptShield, ASignalWaitsForItsEnd) {
  const TempDir folder;
  const auto path = folder.file("a.txt");
  const int status = in_child([&] {
    ::signal(SIGTERM, SIG_DFL);
    catch_interrupts();
    const InterruptShield outer;
    {
      const InterruptShield shield;
      std::ofstream(path) << "first ";
      ::raise(SIGTERM);
    }
    std::ofstream(path, std::ios::app) << "second";
  });
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM);
  EXPECT_EQ(read_text(path), "first second");
}

TEST(DoomedPath, AFolderGoesUnlessSomethingCameIntoIt) {
  const TempDir folder;
  for (const char* name : {"empty", "full"}) std::filesystem::create_directory(folder.file(name));
  std::ofstream(folder.file("full") / "a.txt") << "x";
  (void)in_child([&] {
    catch_interrupts();
    const DoomedPath empty(folder.file("empty"), DoomedPath::Kind::kFolder);
    const DoomedPath full(folder.file("full"), DoomedPath::Kind::kFolder);
    DoomedPath released(folder.file("full") / "a.txt");
    released.release();
    ::raise(SIGTERM);
  });
  EXPECT_EQ(folder.names(), std::vector<std::string>{"full"});
  EXPECT_TRUE(std::filesystem::exists(folder.file("full") / "a.txt"));
}

/// What the next writer of a.txt says, with `name` in its folder; whether the file is still there.
struct Removal {
  std::string said;
  bool is_there = false;
};
Removal beside(const std::string& name) {
  const TempDir folder;
  std::ofstream(folder.file(name)) << "half";
  std::ostringstream said;
  PartialFile(folder.file("a.txt"), said).commit();
  return {said.str(), std::filesystem::exists(folder.file(name))};
}

TEST(PartialFile, WhatADeadProcessLeftIsNamedAndRemoved) {
  const std::string dead = std::to_string(dead_pid()), host = detail::host_name();
  for (const std::string& name : {"a.txt.partial-" + dead, "a.txt.partial-" + dead + "-" + host}) {
    const Removal removal = beside(name);
    EXPECT_FALSE(removal.is_there) << name;
    EXPECT_NE(removal.said.find(name), std::string::npos) << removal.said;
    EXPECT_NE(removal.said.find("process " + dead), std::string::npos) << removal.said;
  }
}

TEST(PartialFile, WhatMayBeWrittenStays) {
  const std::string dead = std::to_string(dead_pid()), parent = std::to_string(::getppid());
  for (const std::string& name : std::vector<std::string>{
           "a.txt.partial-" + parent, "a.txt.partial-", "a.txt.partial-x", "a.txt.partial-" + dead + "x",
           "a.txt.partial--5", "a.txt.partial-0", "b.txt.partial-" + dead, "a.txt.partial-99999999999999999999"}) {
    const Removal removal = beside(name);
    EXPECT_TRUE(removal.is_there) << name;
    EXPECT_EQ(removal.said, "") << name;
  }
  const Removal elsewhere = beside("a.txt.partial-" + dead + "-elsewhere");
  EXPECT_TRUE(elsewhere.is_there);
  EXPECT_NE(elsewhere.said.find("of elsewhere, not removed"), std::string::npos) << elsewhere.said;
}

TEST(PartialFile, ALockOutlivesWhatTheNumberSays) {  // as in another container, whose processes are not seen here
  const TempDir folder;
  const auto partial = folder.file("a.txt.partial-" + std::to_string(dead_pid()));
  std::ofstream(partial) << "half";
  const int descriptor = ::open(partial.c_str(), O_RDONLY | O_CLOEXEC);
  ASSERT_EQ(::flock(descriptor, LOCK_EX), 0);
  remove_stale_partials(folder.file("a.txt"));
  EXPECT_TRUE(std::filesystem::exists(partial));
  ::close(descriptor);
  remove_stale_partials(folder.file("a.txt"));
  EXPECT_FALSE(std::filesystem::exists(partial));
}

TEST(PartialFile, ANumberThatAnotherProcessHasSinceIsNoOwner) {
  const TempDir folder;
  const auto partial = folder.file("a.txt.partial-" + std::to_string(::getppid()));
  std::ofstream(partial) << "half";
  remove_stale_partials(folder.file("a.txt"));
  EXPECT_TRUE(std::filesystem::exists(partial)) << "written since that process began";
  std::filesystem::last_write_time(partial,
                                   std::filesystem::file_time_type::clock::now() - std::chrono::hours(24 * 365));
  remove_stale_partials(folder.file("a.txt"));
  EXPECT_FALSE(std::filesystem::exists(partial)) << "a year old: before that process began";
}

TEST(PartialFile, TwoWritersOfOnePathInOneProcessDoNotMix) {
  const TempDir folder;
  PartialFile first(folder.file("a.txt"));
  first.write("first");
  EXPECT_THROW(PartialFile(folder.file("a.txt")), std::system_error);
  first.commit();
  EXPECT_EQ(read_text(folder.file("a.txt")), "first");
}

}  // namespace

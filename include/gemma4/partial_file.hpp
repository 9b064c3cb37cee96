// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "gemma4/error.hpp"
#include "gemma4/interrupt.hpp"

/// Files that are there whole or not at all.
namespace gemma4 {

/// Bytes for `path` that go to "<path>.partial-<pid>-<host>" beside it, and become `path` in one step with commit():
/// readers see the old file or the whole new one. Without commit(), after an error or an interrupt, nothing stays; what
/// a process left that was killed is named and removed by the next one that writes the same path. The writer holds a
/// lock on its partial file as long as it lives.
///
/// Errors: std::invalid_argument for a path that is something else than a regular file, std::system_error naming the
/// path when the system refuses; after that the file can only be abandoned.
class PartialFile {
 public:
  explicit PartialFile(const std::filesystem::path& path, std::ostream& said = std::cerr);
  PartialFile(const PartialFile&) = delete;
  PartialFile& operator=(const PartialFile&) = delete;
  ~PartialFile() { abandon(); }

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] int descriptor() const { return descriptor_; }

  /// Appends.
  void write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
      const int reason = errno;
      if (written < 0 && reason == EINTR) continue;
      if (written < 0) fail("write", reason);
      bytes = bytes.subspan(static_cast<std::size_t>(written));
    }
  }
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }

  /// Writes at a place; any thread may.
  void write_at(std::uint64_t at, std::span<const std::byte> bytes) const {
    while (!bytes.empty()) {
      const ssize_t written = ::pwrite(descriptor_, bytes.data(), bytes.size(), static_cast<off_t>(at));
      const int reason = errno;
      if (written < 0 && reason == EINTR) continue;
      if (written < 0) fail("write", reason);
      at += static_cast<std::uint64_t>(written);
      bytes = bytes.subspan(static_cast<std::size_t>(written));
    }
  }

  /// Its full length, and the room for it, so that a disk is full now and not halfway; where the file system cannot
  /// promise room, the length alone. Pages that have their place are written twice as fast (ext4: 10 GB/s, 5 without).
  void resize(std::uint64_t bytes) const {
    const auto length = static_cast<off_t>(bytes);
    int status = 0, reason = 0;
    do {
      status = length > 0 ? ::fallocate(descriptor_, 0, 0, length) : 0;
      reason = errno;
    } while (status != 0 && reason == EINTR);
    if (status != 0 && (reason == ENOSPC || reason == EFBIG || reason == EDQUOT)) fail("extend", reason);
    status = ::ftruncate(descriptor_, length);
    reason = errno;
    if (status != 0) fail("extend", reason);
  }

  /// The file under its own name, complete.
  void commit() {
    const int closed = ::close(std::exchange(descriptor_, -1));
    const int close_reason = errno;
    if (closed != 0) fail("close", close_reason);
    const int renamed = ::rename(partial_path_.c_str(), path_.c_str());
    const int rename_reason = errno;
    if (renamed != 0) fail("rename", rename_reason);
    is_committed_ = true;
    doom_.release();
  }

 private:
  [[noreturn]] void fail(const char* action, int reason) const {
    throw std::system_error(reason, std::generic_category(),
                            concat("cannot ", action, " '", partial_path_.string(), "'"));
  }

  void abandon() noexcept {
    if (descriptor_ >= 0) ::close(descriptor_);
    if (!is_committed_ && !partial_path_.empty()) ::unlink(partial_path_.c_str());
  }

  std::filesystem::path path_;
  std::filesystem::path partial_path_;
  DoomedPath doom_;
  int descriptor_ = -1;
  bool is_committed_ = false;
};

namespace detail {

/// Of this machine, in letters that a file name may have.
[[nodiscard]] inline std::string host_name() {
  std::array<char, 256> name{};
  if (::gethostname(name.data(), name.size() - 1) != 0) return "host";
  std::string text(name.data());
  for (char& c : text) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '.' && c != '-') c = '_';
  }
  return text.empty() ? "host" : text;
}

/// Seconds since the epoch at which a process began; nothing where that cannot be known.
[[nodiscard]] inline std::optional<double> process_start(std::int64_t pid) {
  std::ifstream file(concat("/proc/", pid, "/stat"));
  std::string text;
  if (!std::getline(file, text)) return std::nullopt;
  const std::size_t name_end = text.rfind(')');  // the name before may hold anything
  if (name_end == text.npos) return std::nullopt;
  std::istringstream fields(text.substr(name_end + 1));
  std::string field;
  for (int i = 0; i < 20; ++i) fields >> field;  // the 22nd of all: clock ticks from boot to start
  std::int64_t ticks = 0;
  const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), ticks);
  const auto ticks_a_second = static_cast<double>(::sysconf(_SC_CLK_TCK));
  struct timespec now {
  }, since_boot{};
  const bool is_known = ::clock_gettime(CLOCK_REALTIME, &now) == 0 && ::clock_gettime(CLOCK_BOOTTIME, &since_boot) == 0;
  if (error != std::errc() || end != field.data() + field.size() || !is_known) return std::nullopt;
  const auto seconds = [](const struct timespec& t) {
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  return seconds(now) - seconds(since_boot) + static_cast<double>(ticks) / ticks_a_second;
}

/// What "<pid>-<host>" behind ".partial-" says; without a host, as an older version wrote it, `host` is empty.
struct PartialOwner {
  std::int64_t pid = 0;
  std::string host;
};
[[nodiscard]] inline std::optional<PartialOwner> partial_owner(std::string_view text) {
  PartialOwner owner;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), owner.pid);
  const std::string_view rest(end, static_cast<std::size_t>(text.data() + text.size() - end));
  if (error != std::errc() || owner.pid < 1 || owner.pid > INT32_MAX) return std::nullopt;
  if (!rest.empty() && (rest.front() != '-' || rest.size() == 1)) return std::nullopt;
  if (!rest.empty()) owner.host = rest.substr(1);
  return owner;
}

/// Whether nobody writes the file any more: no lock on it, and its process is gone, or another one has its number
/// since.
[[nodiscard]] inline bool is_abandoned(const std::filesystem::path& path, const PartialOwner& owner) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (descriptor < 0) return false;
  struct stat status {};
  const bool is_free =
      ::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) && ::flock(descriptor, LOCK_EX | LOCK_NB) == 0;
  ::close(descriptor);
  if (!is_free) return false;
  if (owner.pid == ::getpid()) return true;  // a writer of this process would hold the lock
  const int alive = ::kill(static_cast<pid_t>(owner.pid), 0);
  const int reason = errno;
  if (alive != 0 && reason == ESRCH) return true;
  constexpr double kClockSlack = 2;  // seconds that a clock may have been set by
  const std::optional<double> start = process_start(owner.pid);
  return start && static_cast<double>(status.st_mtim.tv_sec) + kClockSlack < *start;
}

}  // namespace detail

/// Removes what dead processes left of `path`, and names it. What a live one writes stays, and is not spoken of; what
/// another host left is named and stays, since nobody here knows whether its process lives.
inline void remove_stale_partials(const std::filesystem::path& path, std::ostream& said = std::cerr) {
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  const std::string prefix = path.filename().string() + ".partial-";
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(prefix)) continue;
    const auto owner = detail::partial_owner(std::string_view(name).substr(prefix.size()));
    if (!owner) continue;
    if (!owner->host.empty() && owner->host != detail::host_name()) {
      said << entry.path().string() << ": left by process " << owner->pid << " of " << owner->host
           << ", not removed; if that one is over, remove it\n";
    } else if (detail::is_abandoned(entry.path(), *owner) && ::unlink(entry.path().c_str()) == 0) {
      said << "removed " << entry.path().string() << ": left by process " << owner->pid << ", which is no more\n";
    }
  }
}

inline PartialFile::PartialFile(const std::filesystem::path& path, std::ostream& said)
    : path_(std::filesystem::is_symlink(path) && std::filesystem::exists(path) ? std::filesystem::canonical(path)
                                                                               : path) {
  struct stat status {};
  const bool exists = ::stat(path_.c_str(), &status) == 0;
  require(!exists || S_ISREG(status.st_mode), path_.string(),
          ": expected a regular file or none, found something else there");
  remove_stale_partials(path_, said);
  std::filesystem::path partial = path_;
  partial += concat(".partial-", ::getpid(), "-", detail::host_name());
  doom_ = DoomedPath(partial);
  descriptor_ = ::open(partial.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  const int reason = errno;
  if (descriptor_ < 0) {
    doom_.release();
    throw std::system_error(reason, std::generic_category(), concat("cannot create '", partial.string(), "'"));
  }
  partial_path_ = std::move(partial);
  (void)::flock(descriptor_, LOCK_EX | LOCK_NB);  // where there are no locks, the process' number must do
  if (exists) (void)::fchmod(descriptor_, status.st_mode & 07777u);
}

}  // namespace gemma4

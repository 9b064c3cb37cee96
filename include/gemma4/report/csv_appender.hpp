// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/interrupt.hpp"

namespace gemma4::detail {

/// Folders made for a file. Those that are still empty when nothing came of it go again, also after an interrupt.
class MadeFolders {
 public:
  /// @throws std::invalid_argument when they cannot be made
  void make(const std::filesystem::path& folder) {
    std::vector<std::filesystem::path> missing;
    std::error_code ignored;
    for (std::filesystem::path at = folder; !at.empty() && !std::filesystem::exists(at, ignored);
         at = at.parent_path()) {
      missing.push_back(at);
      if (at == at.parent_path()) break;
    }
    for (auto at = missing.rbegin(); at != missing.rend(); ++at) {
      if (!at->has_filename()) continue;  // the end of a path that ends with a slash
      DoomedPath doom(*at, DoomedPath::Kind::kFolder);
      const int made = ::mkdir(at->c_str(), 0777);
      const int reason = errno;
      require(made == 0 || reason == EEXIST, "result table: cannot create the folder ", at->string(), ": ",
              std::strerror(reason));
      if (made == 0) made_.emplace_back(*at, std::move(doom));
    }
    require(std::filesystem::is_directory(folder, ignored), "result table: cannot create the folder ", folder.string(),
            ": something else is there");
  }
  ~MadeFolders() {
    for (auto at = made_.rbegin(); at != made_.rend(); ++at) ::rmdir(at->first.c_str());  // of what holds something: no
  }

 private:
  std::vector<std::pair<std::filesystem::path, DoomedPath>> made_;
};

/// Appends whole lines to a file with a fixed first line.
class CsvAppender {
 public:
  /// Finds out, before there is anything to write, what a row would find: that the place can be written and locked, has
  /// room for a line, and the header. Makes no file: that is for the first row.
  CsvAppender(std::filesystem::path path, std::string header) : path_(std::move(path)), header_(std::move(header)) {
    folders_.make(folder());
    std::error_code ignored;
    if (!std::filesystem::exists(path_, ignored)) {
      try_new();
      return;
    }
    require(std::filesystem::is_regular_file(path_, ignored), "result table: ", path_.string(),
            " is not a regular file");
    const Descriptor file = open_locked(0);
    check_existing();
    try_longer(file);
  }

  /// Appends `lines` and, to an empty file, the header before them: all of them or nothing.
  void append(const std::vector<std::string>& lines) {
    folders_.make(folder());
    const InterruptShield shield;
    const Descriptor file = open_locked(O_CREAT);
    const off_t size_before = size_of(file);
    if (size_before > 0) check_existing();  // another run may have written since the constructor
    std::string bytes = size_before == 0 ? header_ + "\n" : std::string();
    for (const std::string& line : lines) bytes += line + "\n";
    ssize_t written = -1;
    int reason = 0;
    do {
      written = ::write(file.number, bytes.data(), bytes.size());
      reason = errno;
    } while (written < 0 && reason == EINTR);
    if (written == static_cast<ssize_t>(bytes.size())) return;
    const bool is_restored = ::ftruncate(file.number, size_before) == 0;
    if (size_before == 0) ::unlink(path_.c_str());  // under the lock; who waits for it looks again
    require(false, "result table: cannot append a row to ", path_.string(), ": ",
            written < 0 ? std::strerror(reason) : "the disk took only a part",
            is_restored ? "" : "; its last line may be incomplete");
  }

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  struct Descriptor {
    explicit Descriptor(int value) : number(value) {}
    Descriptor(Descriptor&& other) noexcept : number(std::exchange(other.number, -1)) {}
    Descriptor& operator=(Descriptor&& other) noexcept {
      std::swap(number, other.number);
      return *this;
    }
    ~Descriptor() {
      if (number >= 0) ::close(number);
    }
    int number;
  };

  [[nodiscard]] std::filesystem::path folder() const {
    return path_.has_parent_path() ? path_.parent_path() : std::filesystem::path(".");
  }

  void lock(const Descriptor& file) const {
    int status = -1, reason = 0;
    do {
      status = ::flock(file.number, LOCK_EX);
      reason = errno;
    } while (status != 0 && reason == EINTR);
    require(status == 0, "result table: cannot lock ", path_.string(), ": ", std::strerror(reason));
  }

  /// The file that has the name when it is locked: the one that was opened may have been taken away meanwhile.
  [[nodiscard]] Descriptor open_locked(int flags) const {
    for (;;) {
      Descriptor file(::open(path_.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC | flags, 0644));
      const int reason = errno;
      require(file.number >= 0, "result table: cannot open ", path_.string(), ": ", std::strerror(reason));
      lock(file);
      struct stat opened {
      }, named{};
      const bool is_known = ::fstat(file.number, &opened) == 0;
      if (is_known && ::stat(path_.c_str(), &named) == 0 && opened.st_ino == named.st_ino &&
          opened.st_dev == named.st_dev) {
        return file;
      }
    }
  }

  [[nodiscard]] off_t size_of(const Descriptor& file) const {
    struct stat status {};
    const int answer = ::fstat(file.number, &status);
    const int reason = errno;
    require(answer == 0, "result table: cannot stat ", path_.string(), ": ", std::strerror(reason));
    return status.st_size;
  }

  /// A file in the folder takes the header and goes again: one without a name where the file system knows such files.
  void try_new() const {
    Descriptor file(::open(folder().c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, 0600));
    int reason = errno;
    if (file.number < 0 && (reason == EOPNOTSUPP || reason == EISDIR || reason == EINVAL)) {
      std::string name = path_.string() + ".partial-XXXXXX";
      const InterruptShield shield;
      file = Descriptor(::mkostemp(name.data(), O_CLOEXEC));
      reason = errno;
      if (file.number >= 0) ::unlink(name.c_str());
    }
    require(file.number >= 0, "result table: cannot write in ", folder().string(), ": ", std::strerror(reason));
    lock(file);
    const ssize_t written = ::write(file.number, header_.data(), header_.size());
    reason = errno;
    require(written == static_cast<ssize_t>(header_.size()), "result table: cannot write in ", folder().string(), ": ",
            written < 0 ? std::strerror(reason) : "the disk took only a part");
  }

  /// Asks for room behind the end and gives it back; the file stays as long as it is.
  void try_longer(const Descriptor& file) const {
    const off_t size = size_of(file);
    const int answer = ::fallocate(file.number, FALLOC_FL_KEEP_SIZE, size, static_cast<off_t>(header_.size()));
    const int reason = errno;
    if (answer == 0) {
      [[maybe_unused]] const int kept = ::ftruncate(file.number, size);  // room that stays asked for hurts nobody
      return;
    }
    require(reason != ENOSPC && reason != EDQUOT && reason != EFBIG, "result table: cannot append a row to ",
            path_.string(), ": ", std::strerror(reason));
  }

  void check_existing() const {
    std::ifstream file(path_, std::ios::binary);
    require(file.good(), "result table: cannot read ", path_.string());
    if (file.peek() == std::ifstream::traits_type::eof()) return;
    std::string found;
    std::getline(file, found);
    require(found == header_, "result table: ", path_.string(),
            " has another header; write to another file\n  found:    ", found, "\n  expected: ", header_);
    // Only the last byte is looked at: a long table is not read again for each row.
    file.clear();
    file.seekg(-1, std::ios::end);
    if (file.get() == '\n') return;
    file.clear();
    file.seekg(0);
    std::string line;
    while (std::getline(file, line)) {
    }
    require(false, "result table: the last line of ", path_.string(), " is incomplete (", line.size(),
            " bytes without a line end); cut it: truncate --size=-", line.size(), " ", path_.string());
  }

  std::filesystem::path path_;
  std::string header_;
  MadeFolders folders_;
};

}  // namespace gemma4::detail

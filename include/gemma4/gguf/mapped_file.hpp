// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <span>
#include <system_error>
#include <utility>

#include "gemma4/error.hpp"

namespace gemma4 {

/// A whole file mapped read-only; move-only, unmapped on destruction. The base address is page aligned and survives a
/// move. The file must not shrink while it is mapped: the kernel then answers a read of bytes() with SIGBUS, which no
/// check here can prevent.
class MappedFile {
 public:
  MappedFile() = default;

  /// @throws std::system_error naming the path when it cannot be opened or mapped
  /// @throws FormatError when it is not a regular file
  explicit MappedFile(const std::filesystem::path& path) : path_(path) {
    file_ = Descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (file_.number < 0) fail("open");
    struct stat status {};
    if (::fstat(file_.number, &status) != 0) fail("inspect");
    require_format(S_ISREG(status.st_mode), path.string(), ": expected a regular file, found ",
                   S_ISDIR(status.st_mode) ? "a directory" : "a device, pipe or socket");
    size_ = static_cast<std::size_t>(status.st_size);
    if (size_ == 0) return;  // mmap refuses an empty range
    void* const address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file_.number, 0);
    if (address == MAP_FAILED) fail("map");
    data_ = static_cast<const std::byte*>(address);
  }

  MappedFile(MappedFile&& other) noexcept { swap(other); }
  MappedFile& operator=(MappedFile&& other) noexcept {
    MappedFile taken(std::move(other));
    swap(taken);
    return *this;
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  ~MappedFile() {
    if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  }

  [[nodiscard]] std::span<const std::byte> bytes() const { return {data_, size_}; }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

  /// Copies bytes [offset, offset + room.size()) without a page of the mapping: threads that do so do not wait for each
  /// other, and those of a file that has shrunk are refused.
  /// @throws std::system_error when the system refuses, FormatError when the file ends before
  void read_at(std::size_t offset, std::span<std::byte> room) const {
    while (!room.empty()) {
      const ssize_t n = ::pread(file_.number, room.data(), room.size(), static_cast<off_t>(offset));
      const int reason = errno;
      if (n < 0 && reason == EINTR) continue;
      if (n < 0) fail("read", reason);
      require_format(n > 0, path_.string(), ": ends at byte ", offset, ", had ", size_, " when it was opened");
      offset += static_cast<std::size_t>(n);
      room = room.subspan(static_cast<std::size_t>(n));
    }
  }

 private:
  /// Closed on every way out of the constructor.
  struct Descriptor {
    Descriptor() = default;
    explicit Descriptor(int number) : number(number) {}
    Descriptor(Descriptor&& other) noexcept : number(std::exchange(other.number, -1)) {}
    Descriptor& operator=(Descriptor&& other) noexcept {
      std::swap(number, other.number);
      return *this;
    }
    ~Descriptor() {
      if (number >= 0) ::close(number);
    }
    int number = -1;
  };

  [[noreturn]] void fail(const char* action) const {
    const int reason = errno;  // before anything else can change it
    fail(action, reason);
  }
  [[noreturn]] void fail(const char* action, int reason) const {
    throw std::system_error(reason, std::generic_category(), concat("cannot ", action, " '", path_.string(), "'"));
  }

  void swap(MappedFile& other) noexcept {
    path_.swap(other.path_);
    std::swap(file_, other.file_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  std::filesystem::path path_;
  Descriptor file_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace gemma4

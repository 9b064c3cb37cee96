// SPDX-License-Identifier: Apache-2.0
#include "experiments/support/process.hpp"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <exception>
#include <iostream>
#include <streambuf>
#include <string>
#include <utility>

#include "gemma4/error.hpp"
#include "gemma4/host_memory.hpp"
#include "gemma4/interrupt.hpp"

namespace gemma4::experiment {
namespace {

/// A descriptor that the parent closed would be the next file that is opened: what is printed would go into it.
void keep_standard_descriptors() {
  for (const int number : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (::fcntl(number, F_GETFD) >= 0) continue;
    // Stdout open for reading alone, and stdin for writing: each use fails, and says so. Messages have nowhere to go.
    const int opened = ::open("/dev/null", number == STDOUT_FILENO ? O_RDONLY : O_WRONLY);
    if (opened >= 0 && opened != number) {
      ::dup2(opened, number);
      ::close(opened);
    }
  }
}

/// The buffer of std::cout while a driver runs: a write that fails throws, with the system's reason.
class StandardOutput final : public std::streambuf {
 public:
  StandardOutput()
      : before_(std::cout.rdbuf()), mask_(std::cout.exceptions()), is_terminal_(::isatty(STDOUT_FILENO) != 0) {
    std::cout.flush();
    setp(buffer_.data(), buffer_.data() + buffer_.size());
    std::cout.rdbuf(this);
    std::cout.clear();
    std::cout.exceptions(std::ios::badbit);
  }
  StandardOutput(const StandardOutput&) = delete;
  StandardOutput& operator=(const StandardOutput&) = delete;
  ~StandardOutput() override {
    std::cout.exceptions(std::ios::goodbit);
    std::cout.rdbuf(before_);
    std::cout.exceptions(mask_);
  }

  /// Everything is out, as far as the system says, which for some file systems is when a file is closed.
  void finish() {
    if (!reason_.empty()) throw OutputError(reason_);
    drain();
    const int copy = ::dup(STDOUT_FILENO);
    if (copy < 0) return;  // closed, and nothing was written: drain() would have noticed
    const int closed = ::close(copy);
    const int reason = errno;
    if (closed != 0) fail(reason);
  }

 private:
  int_type overflow(int_type c) override {
    drain();
    if (!traits_type::eq_int_type(c, traits_type::eof())) {
      *pptr() = traits_type::to_char_type(c);
      pbump(1);
      if (is_terminal_ && c == '\n') drain();
    }
    return traits_type::not_eof(c);
  }
  std::streamsize xsputn(const char* text, std::streamsize count) override {
    bool ends_line = false;
    for (std::streamsize i = 0; i < count; ++i) {
      if (pptr() == epptr()) drain();
      *pptr() = text[i];
      pbump(1);
      ends_line = ends_line || text[i] == '\n';
    }
    if (is_terminal_ && ends_line) drain();
    return count;
  }
  int sync() override {
    drain();
    return 0;
  }

  void drain() {
    if (!reason_.empty()) throw OutputError(reason_);
    const char* at = pbase();
    const char* const end = pptr();
    setp(buffer_.data(), buffer_.data() + buffer_.size());
    while (at < end) {
      const ssize_t written = ::write(STDOUT_FILENO, at, static_cast<std::size_t>(end - at));
      const int reason = errno;
      if (written >= 0) {
        at += written;
      } else if (reason == EAGAIN) {
        struct pollfd waits {
          .fd = STDOUT_FILENO, .events = POLLOUT, .revents = 0
        };
        (void)::poll(&waits, 1, -1);
      } else if (reason != EINTR) {
        fail(reason);
      }
    }
  }
  [[noreturn]] void fail(int reason) {
    reason_ = concat("standard output cannot be written: ", std::strerror(reason));
    throw OutputError(reason_);
  }

  std::streambuf* before_;
  std::ios::iostate mask_;
  bool is_terminal_;
  std::string reason_;  ///< of the first failure
  std::array<char, 1 << 16> buffer_;
};

void say(const std::string& text) {
  std::cout.exceptions(std::ios::goodbit);  // std::cerr is tied to it
  std::cerr << "error: " << text << std::endl;
}

/// @return what the exception in flight says
std::string message() {
  const auto memory = [](const std::string& asked) {
    return concat("out of memory: ", asked, "; available are ", host_bytes_available(), " B");
  };
  try {
    throw;
  } catch (const AllocationError& error) {
    return memory(concat(error.bytes(), " B asked for at once"));
  } catch (const std::bad_alloc&) {
    return memory("an allocation was refused");
  } catch (const std::length_error& error) {
    return memory(concat("more asked for than can be addressed (", error.what(), ")"));
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "an exception of an unknown type";
  }
}

}  // namespace

int run_process(const std::function<int()>& body) {
  keep_standard_descriptors();
  catch_interrupts();
  StandardOutput output;
  int code = EXIT_FAILURE;
  bool is_said = false;  // that output is lost
  try {
    code = body();
  } catch (const Exit& exit) {
    code = exit.code;
  } catch (const OutputError&) {
    say(message());
    is_said = true;
  } catch (...) {
    say(message());
  }
  try {
    output.finish();
  } catch (const OutputError&) {
    if (!is_said) say(message());
    if (code == EXIT_SUCCESS) code = EXIT_FAILURE;
  }
  return code;
}

}  // namespace gemma4::experiment

// The sanitizers have operators of their own, which end the program where memory is refused.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
void* operator new(std::size_t bytes) {
  if (void* const memory = std::malloc(bytes == 0 ? 1 : bytes)) return memory;
  throw gemma4::experiment::AllocationError(bytes);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t /*bytes*/) noexcept {
  std::free(memory);
}
#endif

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

/// Ctrl-C as a wish of whoever sits there, not as the end of the program.
namespace gemma4::experiment {

namespace detail {
inline std::atomic<bool> is_interrupted = false;
}  // namespace detail

/// What a shell gives for a program that SIGINT ended.
inline constexpr int kInterruptedExit = 128 + SIGINT;

/// While one lives, SIGINT is noted, and nothing else; one that the parent has had ignored stays so. One at a time.
class Interruptions {
 public:
  Interruptions() {
    detail::is_interrupted = false;
    struct sigaction action = {};
    action.sa_handler = [](int) { detail::is_interrupted = true; };  // no SA_RESTART: reading a line returns
    sigemptyset(&action.sa_mask);
    ::sigaction(SIGINT, nullptr, &before_);
    if (before_.sa_handler != SIG_IGN) ::sigaction(SIGINT, &action, nullptr);
  }
  Interruptions(const Interruptions&) = delete;
  Interruptions& operator=(const Interruptions&) = delete;
  ~Interruptions() { ::sigaction(SIGINT, &before_, nullptr); }

  /// Whether there was one since the last time that it was asked.
  [[nodiscard]] static bool take() { return detail::is_interrupted.exchange(false); }
  [[nodiscard]] static bool pending() { return detail::is_interrupted; }

 private:
  struct sigaction before_ = {};
};

/// Thrown where an interruption ends work from inside.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

/// Lines of a file descriptor.
class LineReader {
 public:
  enum class Kind { kLine, kEnd, kInterrupted };
  struct Line {
    Kind kind = Kind::kEnd;
    std::string text = {};  ///< without its line end
  };

  explicit LineReader(int descriptor) : descriptor_(descriptor) {}

  /// Waits for a line, for the end, or for Ctrl-C, which drops what had come of a line.
  /// @throws std::runtime_error when the descriptor cannot be read
  [[nodiscard]] Line next() {
    for (;;) {
      if (const std::size_t end = pending_.find('\n'); end != std::string::npos) {
        std::string line = pending_.substr(0, end);
        pending_.erase(0, end + 1);
        if (line.ends_with('\r')) line.pop_back();
        return {Kind::kLine, std::move(line)};
      }
      if (is_ended_) {
        if (pending_.empty()) return {};
        return {Kind::kLine, std::exchange(pending_, {})};
      }
      if (Interruptions::take()) {
        pending_.clear();
        return {.kind = Kind::kInterrupted};
      }
      wait();
    }
  }

 private:
  /// For bytes, or for a fifth of a second: a signal that another thread took does not end a wait.
  void wait() {
    pollfd wanted = {.fd = descriptor_, .events = POLLIN, .revents = 0};
    if (::poll(&wanted, 1, 200) <= 0) return;
    std::array<char, 4096> bytes;
    const ssize_t count = ::read(descriptor_, bytes.data(), bytes.size());
    const int reason = errno;
    if (count > 0) pending_.append(bytes.data(), static_cast<std::size_t>(count));
    if (count == 0) is_ended_ = true;
    if (count < 0 && reason != EINTR && reason != EAGAIN) {
      throw std::runtime_error(std::string("standard input: cannot be read: ") + std::strerror(reason));
    }
  }

  int descriptor_;
  std::string pending_;
  bool is_ended_ = false;
};

}  // namespace gemma4::experiment

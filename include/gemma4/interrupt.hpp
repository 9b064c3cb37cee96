// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <string>

#include "gemma4/error.hpp"

/// What an interrupt leaves behind: nothing that is half done.
///
/// A file that is not complete, or a folder made for it, is a DoomedPath while that lasts: a signal that ends the
/// program removes it first. What must not be cut in two, such as a row and its line end, stands under an
/// InterruptShield: a signal then waits for its end. Programs that never call catch_interrupts() keep the system's
/// ways; the guards then cost a few instructions.
namespace gemma4 {

namespace detail {

/// Of one path. A handler may look at it at any moment, from any thread.
struct Doom {
  enum State : int { kFree, kTaken, kFile, kFolder };
  std::atomic<int> state = kFree;
  std::array<char, 4096> path = {};
};

/// All that a handler may touch: no lock, no memory to allocate.
struct InterruptState {
  std::array<Doom, 64> dooms;
  std::atomic<int> n_shield = 0;
  std::atomic<int> is_ending = 0;  ///< a handler is about to end the program
  std::atomic<int> waiting = 0;    ///< signal that came under a shield
};
inline InterruptState interrupt_state;

/// Removes what is doomed, last come first. Only what may be called in a handler.
inline void remove_doomed() {
  auto& dooms = interrupt_state.dooms;
  for (std::size_t i = dooms.size(); i-- > 0;) {
    const int state = dooms[i].state.load();
    if (state == Doom::kFile) ::unlink(dooms[i].path.data());
    if (state == Doom::kFolder) ::rmdir(dooms[i].path.data());  // one that something came into stays
  }
}

/// Ends the program as the signal would have, so that its parent sees by what.
inline void end_by_signal(int number) {
  remove_doomed();
  struct sigaction plain {};
  plain.sa_handler = SIG_DFL;
  ::sigaction(number, &plain, nullptr);
  sigset_t only;
  sigemptyset(&only);
  sigaddset(&only, number);
  ::pthread_sigmask(SIG_UNBLOCK, &only, nullptr);
  ::raise(number);
}

extern "C" inline void gemma4_interrupt_handler(int number) {
  InterruptState& state = interrupt_state;
  state.is_ending = 1;
  if (state.n_shield > 0) {  // a shield that comes later sees is_ending, and waits
    state.waiting = number;
    state.is_ending = 0;
    return;
  }
  end_by_signal(number);
}

}  // namespace detail

/// SIGINT, SIGTERM and SIGHUP remove what is doomed before they end the program; one that the parent has had ignored,
/// as nohup does, stays so. A limit of the size of files, or a pipe that nobody reads, becomes an error of the write.
inline void catch_interrupts() {
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    struct sigaction action {};
    if (::sigaction(number, nullptr, &action) == 0 && action.sa_handler == SIG_IGN) continue;
    action = {};
    action.sa_handler = detail::gemma4_interrupt_handler;
    action.sa_flags = SA_RESTART;
    sigemptyset(&action.sa_mask);
    for (const int other : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&action.sa_mask, other);
    ::sigaction(number, &action, nullptr);
  }
  ::signal(SIGPIPE, SIG_IGN);
  ::signal(SIGXFSZ, SIG_IGN);
}

/// A path that must not outlive an interrupt. Register it before it is made: removing what is not there does no harm.
class DoomedPath {
 public:
  enum class Kind { kFile, kFolder };

  DoomedPath() = default;
  /// @throws std::invalid_argument for a path that is too long, or when more than 64 are doomed at a time
  explicit DoomedPath(const std::filesystem::path& path, Kind kind = Kind::kFile) {
    const std::string absolute = std::filesystem::absolute(path).string();
    require(absolute.size() < detail::Doom{}.path.size(), "path of ", absolute.size(), " bytes, at most ",
            detail::Doom{}.path.size() - 1, ": ", absolute);
    for (detail::Doom& doom : detail::interrupt_state.dooms) {
      int expected = detail::Doom::kFree;
      if (!doom.state.compare_exchange_strong(expected, detail::Doom::kTaken)) continue;
      std::memcpy(doom.path.data(), absolute.c_str(), absolute.size() + 1);
      doom.state = kind == Kind::kFile ? detail::Doom::kFile : detail::Doom::kFolder;
      doom_ = &doom;
      return;
    }
    require(false, "more than ", detail::interrupt_state.dooms.size(), " unfinished files at a time: ", absolute);
  }
  DoomedPath(DoomedPath&& other) noexcept : doom_(other.doom_) { other.doom_ = nullptr; }
  DoomedPath& operator=(DoomedPath&& other) noexcept {
    std::swap(doom_, other.doom_);
    return *this;
  }
  ~DoomedPath() { release(); }

  /// It may stay.
  void release() {
    if (doom_ != nullptr) doom_->state = detail::Doom::kFree;
    doom_ = nullptr;
  }

 private:
  detail::Doom* doom_ = nullptr;
};

/// A signal that comes while one of these lives ends the program when the last of them goes.
class InterruptShield {
 public:
  InterruptShield() {
    ++detail::interrupt_state.n_shield;
    while (detail::interrupt_state.is_ending > 0) ::sched_yield();
  }
  InterruptShield(const InterruptShield&) = delete;
  InterruptShield& operator=(const InterruptShield&) = delete;
  ~InterruptShield() {
    if (--detail::interrupt_state.n_shield > 0) return;
    if (const int number = detail::interrupt_state.waiting.exchange(0); number != 0) detail::end_by_signal(number);
  }
};

}  // namespace gemma4

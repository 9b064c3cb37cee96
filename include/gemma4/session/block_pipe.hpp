// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "gemma4/session/session_info.hpp"

/// Blocks of a session between a caller and a file. The caller's part, copies of a device above all, is done block
/// after block on its own thread; checksums and the system's copies into and out of the page cache need no order, and
/// take as long.
namespace gemma4 {

/// Who has a block first: who writes a file fills it and threads do the rest, who reads one gets it from them.
enum class PipeFirst { kCaller, kThreads };

/// The two sides of a block: turn() on the caller's thread, block after block, and work() on any. `room` holds
/// kSessionBlock bytes and goes from one to the other.
///
/// A class with a name and no lambdas: closures of an inline function are laid out otherwise by nvcc's front end than
/// by the host compiler, and where both compile it a program has one copy of what takes them (seen as a crash).
struct BlockSides {
  BlockSides() = default;
  BlockSides(const BlockSides&) = delete;
  BlockSides& operator=(const BlockSides&) = delete;
  virtual ~BlockSides() = default;
  virtual void turn(std::size_t index, std::span<std::byte> room) = 0;
  virtual void work(std::size_t index, std::span<std::byte> room) = 0;
};

/// Threads that are worth their start for so many bytes; 0: the caller does all. Out of the page cache one thread
/// brings 3 to 8 GB/s; what is written into one file waits for its lock, whatever the number.
[[nodiscard]] inline int n_pipe_thread(std::size_t bytes) {
  constexpr std::size_t kFew = 8 * kSessionBlock;  // 2 ms of one thread
  if (bytes < kFew) return 0;
  return static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, 4u));
}

namespace detail {

/// A few slots through which blocks go in turn: block i through slot i modulo their number, each half of its way by
/// another side.
class BlockPipe {
 public:
  BlockPipe(std::size_t n_block, PipeFirst first, int n_thread, BlockSides& sides)
      : sides_(sides),
        n_block_(n_block),
        caller_first_(first == PipeFirst::kCaller),
        n_thread_(n_thread),
        slots_(std::min(n_block, 2 * static_cast<std::size_t>(n_thread) + 1)) {
    for (Slot& slot : slots_) slot.bytes.resize(kSessionBlock);
  }

  void run() {
    Crew crew(*this);
    for (int i = 0; i < n_thread_; ++i) crew.threads.emplace_back(&BlockPipe::work_all, this);
    for (std::size_t index = 0; index < n_block_; ++index) {
      Slot& slot = await(index, caller_first_ ? 0 : 1);
      sides_.turn(index, std::span<std::byte>(slot.bytes));
      pass_on(slot);
    }
    for (std::size_t index = n_block_ - slots_.size(); index < n_block_; ++index) (void)await(index, 2);
  }

 private:
  struct Slot {
    std::vector<std::byte> bytes;
    std::size_t n_half = 0;  ///< done so far, two a block
    std::exception_ptr failure = {};
  };

  /// The threads; however run() is left, they are told to stop and waited for.
  struct Crew {
    explicit Crew(BlockPipe& pipe) : pipe(pipe) {}
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;
    ~Crew() {
      {
        const std::lock_guard lock(pipe.mutex_);
        pipe.stop_ = true;
      }
      pipe.changed_.notify_all();
      for (std::thread& thread : threads) thread.join();
    }
    BlockPipe& pipe;
    std::vector<std::thread> threads;
  };

  [[nodiscard]] Slot& slot_of(std::size_t index) { return slots_[index % slots_.size()]; }
  /// Halves that its slot has behind it when a block is to be taken up, and `n_half` of its own are done.
  [[nodiscard]] std::size_t due(std::size_t index, std::size_t n_half) const {
    return 2 * (index / slots_.size()) + n_half;
  }

  /// The caller's wait. What a thread failed at is thrown here, that of the earliest block first.
  [[nodiscard]] Slot& await(std::size_t index, std::size_t n_half) {
    Slot& slot = slot_of(index);
    std::unique_lock lock(mutex_);
    while (!slot.failure && slot.n_half != due(index, n_half)) changed_.wait(lock);
    if (slot.failure) std::rethrow_exception(slot.failure);
    return slot;
  }

  void pass_on(Slot& slot) {
    {
      const std::lock_guard lock(mutex_);
      ++slot.n_half;
    }
    changed_.notify_all();
  }

  /// What each thread does. One that fails ends; those before its block go on, and the caller comes to it.
  void work_all() {
    for (;;) {
      std::unique_lock lock(mutex_);
      if (next_ == n_block_) return;
      const std::size_t index = next_++;
      Slot& slot = slot_of(index);
      while (!stop_ && slot.n_half != due(index, caller_first_ ? 1 : 0)) changed_.wait(lock);
      if (stop_) return;
      lock.unlock();
      try {
        sides_.work(index, std::span<std::byte>(slot.bytes));
      } catch (...) {
        lock.lock();
        slot.failure = std::current_exception();
        lock.unlock();
        changed_.notify_all();
        return;
      }
      pass_on(slot);
    }
  }

  BlockSides& sides_;
  std::size_t n_block_;
  bool caller_first_;
  int n_thread_;
  std::vector<Slot> slots_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t next_ = 0;  ///< that no thread has taken yet
  bool stop_ = false;
};

}  // namespace detail

/// Calls sides.turn(i, room) for each i below n_block, in order and on this thread, and sides.work(i, room) on one of
/// `n_thread` threads, before or after. There is room for two blocks a thread and one more.
/// @throws what turn or work does; of several blocks the earliest one's. No call is under way then
inline void pipe_blocks(std::size_t n_block, PipeFirst first, int n_thread, BlockSides& sides) {
  if (n_block == 0) return;
  if (n_thread > 0) return detail::BlockPipe(n_block, first, n_thread, sides).run();
  std::vector<std::byte> room(kSessionBlock);
  for (std::size_t index = 0; index < n_block; ++index) {
    if (first == PipeFirst::kCaller) sides.turn(index, std::span(room));
    sides.work(index, std::span(room));
    if (first == PipeFirst::kThreads) sides.turn(index, std::span(room));
  }
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>

/// The threads of the running block: fibers of one host thread, each with a stack, which run until they wait.
namespace gemma4::emulator {

inline constexpr int kMaxThreads = 1024;  ///< of a block
inline constexpr int kLanes = 32;

struct Warp;

/// Who runs.
struct Running {
  int thread = 0;
  int lane = 0;
  Warp* warp = nullptr;
};
extern Running running;

/// Runs `body` as each of n_thread threads, until all have ended.
void run_threads(int n_thread, const std::function<void()>& body);

/// The running thread goes no further before make_ready().
void suspend();
void make_ready(int thread);

/// Threads of the block that have not ended.
[[nodiscard]] int n_live_thread();

/// Whether threads run in a random order, and a number below n of the same generator.
[[nodiscard]] bool in_random_order();
[[nodiscard]] std::size_t random_below(std::size_t n);

}  // namespace gemma4::emulator

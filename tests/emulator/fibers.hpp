// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>

/// The threads of the running cluster of blocks: fibers of one host thread, each with a stack, which run until they
/// wait. A block runs until all of its threads wait, then another one of the cluster.
namespace gemma4::emulator {

inline constexpr int kMaxThreads = 1024;  ///< of a block
inline constexpr int kMaxBlocks = 8;      ///< of a cluster
inline constexpr int kLanes = 32;

struct Warp;

/// Who runs.
struct Running {
  int block = 0;   ///< of the cluster
  int thread = 0;  ///< of the block
  int lane = 0;
  Warp* warp = nullptr;
};
extern Running running;

/// Runs `body` as each of n_thread threads of n_block blocks, until all have ended.
void run_threads(int n_block, int n_thread, const std::function<void()>& body);

/// The running thread goes no further before make_ready().
void suspend();
void make_ready(int thread);  ///< of the running block
void make_ready(int block, int thread);

/// Threads that have not ended: of the running block, of the cluster.
[[nodiscard]] int n_live_thread();
[[nodiscard]] int n_live_in_cluster();

/// Whether threads run in a random order, and a number below n of the same generator.
[[nodiscard]] bool in_random_order();
[[nodiscard]] std::size_t random_below(std::size_t n);

}  // namespace gemma4::emulator

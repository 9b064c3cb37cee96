// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>
#include <string>

#include "tests/emulator/failure.hpp"
#include "tests/emulator/fibers.hpp"

/// Where threads meet: the lanes of a warp in its operations, the threads of a block at its sixteen barriers.
namespace gemma4::emulator {

inline constexpr int kLaneBytes = 64;  ///< what a lane may bring to an operation, or take from it

/// An operation that some lanes of a warp have come to.
struct Warp {
  alignas(64) unsigned char in[kLanes * kLaneBytes];
  alignas(64) unsigned char out[kLanes * kLaneBytes];
  const void* operation = nullptr;
  const char* name = "";
  int n_arrived = 0, n_lane = kLanes;
  int waiting[kLanes];
};

/// Every lane brings `in`; for the last one compute(const TIn*, TOut*) makes of all 32 what each of them takes.
template <class TOut, class TIn, class TCompute>
TOut warp_operation(const char* name, const TIn& in, const TCompute& compute) {
  static_assert(sizeof(TIn) <= kLaneBytes && sizeof(TOut) <= kLaneBytes);
  static const char kOperation = 0;  // an address for each operation on each type
  Warp& warp = *running.warp;
  const int lane = running.lane;
  if (warp.n_arrived == 0) {
    warp.operation = &kOperation, warp.name = name;
  } else if (warp.operation != &kOperation) {
    fail("thread ", running.thread, ": a warp diverges, ", name, " meets ", warp.name);
  }
  std::memcpy(warp.in + lane * sizeof(TIn), &in, sizeof(TIn));
  if (++warp.n_arrived == warp.n_lane) {
    warp.n_arrived = 0;
    compute(reinterpret_cast<const TIn*>(warp.in), reinterpret_cast<TOut*>(warp.out));
    for (int i = 0; i < warp.n_lane - 1; ++i) make_ready(warp.waiting[i]);
  } else {
    warp.waiting[warp.n_arrived - 1] = running.thread;
    suspend();
  }
  TOut result;
  std::memcpy(&result, warp.out + lane * sizeof(TOut), sizeof(TOut));
  return result;
}

/// Meets n_thread threads, 0: all that live, and tells whether `value` holds in any of them.
bool meet_any(int barrier, int n_thread, bool value);
inline void meet(int barrier, int n_thread) {
  (void)meet_any(barrier, n_thread, false);
}

/// The barrier of all threads of the cluster, whose two halves a thread passes in turn.
void arrive_at_cluster();
void wait_for_cluster();

/// For fibers.cpp and launch.cpp.
[[nodiscard]] Warp& warp_of(int thread);  ///< of the running block
void begin_rendezvous(int n_block, int n_thread);
void end_rendezvous();                  ///< fails where a lane still waits
void thread_ends();                     ///< those that wait for all threads that live may go on
[[nodiscard]] std::string who_waits();  ///< for the report of a deadlock

}  // namespace gemma4::emulator

// SPDX-License-Identifier: Apache-2.0
#include "tests/emulator/rendezvous.hpp"

#include <algorithm>
#include <vector>

#include "tests/emulator/copies.hpp"

namespace gemma4::emulator {
namespace {

constexpr int kBarriers = 16, kAllThatLive = 0;

struct Barrier {
  int n_arrived = 0, n_thread = kAllThatLive;
  bool any = false;
  std::vector<int> waiting;
};
Barrier barriers[kBarriers];
bool any_of[kMaxThreads];  // what a thread learns at its barrier
Warp warps[kMaxThreads / kLanes];
int n_warp = 0;

void release(Barrier& barrier) {
  for (const int thread : barrier.waiting) {
    any_of[thread] = barrier.any;
    make_ready(thread);
  }
  barrier = {};
}

}  // namespace

bool meet_any(int number, int n_thread, bool value) {
  if (number < 0 || number >= kBarriers) fail("there is no barrier ", number);
  Barrier& barrier = barriers[number];
  if (barrier.n_arrived == 0) barrier.n_thread = n_thread;
  if (barrier.n_thread != n_thread) {
    fail("barrier ", number, ": one thread waits for ", barrier.n_thread, " threads, another for ", n_thread);
  }
  barrier.any |= value;
  barrier.waiting.push_back(running.thread);
  if (++barrier.n_arrived == (n_thread == kAllThatLive ? n_live_thread() : n_thread)) {
    if (!in_random_order()) barrier.waiting.pop_back();  // the last one goes on at once
    any_of[running.thread] = barrier.any;
    release(barrier);
    if (!in_random_order()) return any_of[running.thread];
  }
  suspend();
  return any_of[running.thread];
}

Warp& warp_of(int thread) {
  return warps[thread / kLanes];
}

void begin_rendezvous(int n_thread) {
  std::fill_n(barriers, kBarriers, Barrier{});
  n_warp = (n_thread + kLanes - 1) / kLanes;
  for (int w = 0; w < n_warp; ++w) {
    warps[w].n_arrived = 0;
    warps[w].n_lane = std::min(kLanes, n_thread - kLanes * w);
  }
}

void end_rendezvous() {
  for (int w = 0; w < n_warp; ++w) {
    if (warps[w].n_arrived > 0) fail("warp ", w, " ends within ", warps[w].name);
  }
}

void thread_ends() {
  Barrier& all = barriers[0];
  if (all.n_thread == kAllThatLive && all.n_arrived > 0 && all.n_arrived == n_live_thread()) release(all);
}

std::string who_waits() {
  std::ostringstream report;
  for (int b = 0; b < kBarriers; ++b) {
    const Barrier& barrier = barriers[b];
    if (barrier.n_arrived == 0) continue;
    report << "\n  barrier " << b << ": " << barrier.n_arrived << " of "
           << (barrier.n_thread == kAllThatLive ? n_live_thread() : barrier.n_thread)
           << " threads, the first is thread " << barrier.waiting[0];
  }
  for (int w = 0; w < n_warp; ++w) {
    if (warps[w].n_arrived > 0)
      report << "\n  warp " << w << ": " << warps[w].n_arrived << " lanes in " << warps[w].name;
  }
  report << who_waits_for_copies();
  return report.str();
}

}  // namespace gemma4::emulator

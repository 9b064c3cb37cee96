// SPDX-License-Identifier: Apache-2.0
#include "tests/emulator/rendezvous.hpp"

#include <algorithm>
#include <utility>
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
/// Of a block.
struct Meetings {
  Barrier barriers[kBarriers];
  bool any_of[kMaxThreads];  ///< what a thread learns at its barrier
  Warp warps[kMaxThreads / kLanes];
};
Meetings meetings[kMaxBlocks];
int n_warp = 0, n_block_here = 1;

[[nodiscard]] Meetings& here() {
  return meetings[running.block];
}

/// The barrier of the cluster: phases that are complete, arrivals at the next one, and who waits.
struct ClusterBarrier {
  int n_complete = 0, n_arrived = 0;
  int n_passed[kMaxBlocks][kMaxThreads] = {};  ///< arrivals of a thread
  int n_awaited[kMaxBlocks][kMaxThreads] = {};
  std::vector<std::pair<int, int>> waiting;  ///< block, thread
};
ClusterBarrier cluster;

void complete_cluster_phase() {
  cluster.n_arrived = 0;
  ++cluster.n_complete;
  for (const auto& [block, thread] : cluster.waiting) make_ready(block, thread);
  cluster.waiting.clear();
}

void release(Barrier& barrier) {
  for (const int thread : barrier.waiting) {
    here().any_of[thread] = barrier.any;
    make_ready(thread);
  }
  barrier = {};
}

}  // namespace

bool meet_any(int number, int n_thread, bool value) {
  if (number < 0 || number >= kBarriers) fail("there is no barrier ", number);
  Barrier& barrier = here().barriers[number];
  if (barrier.n_arrived == 0) barrier.n_thread = n_thread;
  if (barrier.n_thread != n_thread) {
    fail("barrier ", number, ": one thread waits for ", barrier.n_thread, " threads, another for ", n_thread);
  }
  barrier.any |= value;
  barrier.waiting.push_back(running.thread);
  if (++barrier.n_arrived == (n_thread == kAllThatLive ? n_live_thread() : n_thread)) {
    if (!in_random_order()) barrier.waiting.pop_back();  // the last one goes on at once
    here().any_of[running.thread] = barrier.any;
    release(barrier);
    if (!in_random_order()) return here().any_of[running.thread];
  }
  suspend();
  return here().any_of[running.thread];
}

void arrive_at_cluster() {
  int& n_passed = cluster.n_passed[running.block][running.thread];
  if (n_passed != cluster.n_awaited[running.block][running.thread]) {
    fail("thread ", running.thread, " of block ", running.block, " arrives at its cluster twice without waiting");
  }
  ++n_passed;
  if (++cluster.n_arrived == n_live_in_cluster()) complete_cluster_phase();
}

void wait_for_cluster() {
  int& n_awaited = cluster.n_awaited[running.block][running.thread];
  if (n_awaited == cluster.n_passed[running.block][running.thread]) {
    fail("thread ", running.thread, " of block ", running.block, " waits for its cluster without arriving");
  }
  ++n_awaited;
  while (cluster.n_complete < n_awaited) {
    cluster.waiting.emplace_back(running.block, running.thread);
    suspend();
  }
}

Warp& warp_of(int thread) {
  return here().warps[thread / kLanes];
}

void begin_rendezvous(int n_block, int n_thread) {
  n_warp = (n_thread + kLanes - 1) / kLanes;
  n_block_here = n_block;
  if (n_block > 1 || cluster.n_complete > 0) cluster = {};
  for (int b = 0; b < n_block; ++b) {
    std::fill_n(meetings[b].barriers, kBarriers, Barrier{});
    for (int w = 0; w < n_warp; ++w) {
      Warp& warp = meetings[b].warps[w];
      warp.n_arrived = 0;
      warp.n_lane = std::min(kLanes, n_thread - kLanes * w);
    }
  }
}

void end_rendezvous() {
  for (int b = 0; b < n_block_here; ++b) {
    for (int w = 0; w < n_warp; ++w) {
      const Warp& warp = meetings[b].warps[w];
      if (warp.n_arrived > 0) fail("warp ", w, " ends within ", warp.name);
    }
  }
}

void thread_ends() {
  Barrier& all = here().barriers[0];
  if (all.n_thread == kAllThatLive && all.n_arrived > 0 && all.n_arrived == n_live_thread()) release(all);
}

std::string who_waits() {
  std::ostringstream report;
  const auto& [barriers, any_of, warps] = here();
  if (n_block_here > 1) report << " in block " << running.block << " of a cluster";
  if (!cluster.waiting.empty()) {
    report << "\n  cluster: " << cluster.n_arrived << " of " << n_live_in_cluster() << " threads have arrived, "
           << cluster.waiting.size() << " wait";
  }
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

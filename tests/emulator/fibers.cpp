// SPDX-License-Identifier: Apache-2.0
#include "tests/emulator/fibers.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <numeric>
#include <random>

#include "tests/emulator/copies.hpp"
#include "tests/emulator/failure.hpp"
#include "tests/emulator/launch.hpp"
#include "tests/emulator/rendezvous.hpp"
#include "tests/emulator/settings.hpp"
#include "tests/emulator/shared_memory.hpp"

/// Keeps the registers that a call preserves on the stack, the stack pointer in *from, and goes on with another stack.
extern "C" void gemma4_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl gemma4_emulator_switch
gemma4_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace gemma4::emulator {

Running running;

namespace {

constexpr std::size_t kStackBytes = 256 * 1024, kGuardBytes = 4096;
constexpr int kPreserved = 6;  // registers that gemma4_emulator_switch() keeps
constexpr int kNobody = -1;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
};
Fiber fibers[kMaxBlocks][kMaxThreads];
std::deque<int> ready[kMaxBlocks];
int n_live[kMaxBlocks] = {};
int n_block_now = 1;
void* host_stack_pointer = nullptr;
const std::function<void()>* body_now = nullptr;

const int kSeed = whole_setting("GEMMA4_EMULATOR_SEED", 0);
std::mt19937 engine(static_cast<unsigned>(kSeed));

/// The block whose shared memory is in place is running.block.
void enter(int thread) {
  running = {.block = running.block, .thread = thread, .lane = thread % kLanes, .warp = &warp_of(thread)};
  place_thread(thread);
}

int take_ready_of_block() {
  std::deque<int>& threads = ready[running.block];
  land_copy(false);
  while (threads.empty() && land_copy(true)) {
  }
  if (threads.empty()) return kNobody;
  if (in_random_order()) std::swap(threads.front(), threads[random_below(threads.size())]);
  const int thread = threads.front();
  threads.pop_front();
  return thread;
}

/// Of the running block, or of the next one that has one, which then runs.
int take_ready() {
  for (int i = 0; i < n_block_now; ++i) {
    const int thread = take_ready_of_block();
    if (thread != kNobody) return thread;
    if (n_block_now == 1) break;
    const int next = (running.block + 1) % n_block_now;
    exchange_shared_memory(running.block, next);
    running.block = next;
    place_block(next);
  }
  return kNobody;
}

void run_fiber() {
  (*body_now)();
  --n_live[running.block];
  thread_ends();
  suspend();
  std::abort();  // nobody makes a thread ready that has ended
}

/// A stack on which gemma4_emulator_switch() finds registers and run_fiber() to return to.
void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* room = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED || mprotect(room, kGuardBytes, PROT_NONE) != 0) fail("no memory for the stack of a thread");
    fiber.stack = static_cast<char*>(room) + kGuardBytes;
  }
  auto* top = reinterpret_cast<std::uintptr_t*>(fiber.stack + kStackBytes - 64);
  *--top = 0;  // so that a function begins 8 bytes before a multiple of 16, as after a call
  *--top = reinterpret_cast<std::uintptr_t>(&run_fiber);
  for (int i = 0; i < kPreserved; ++i) *--top = 0;
  fiber.stack_pointer = top;
}

}  // namespace

void run_threads(int n_block, int n_thread, const std::function<void()>& body) {
  if (n_thread < 1 || n_thread > kMaxThreads) fail("a block of ", n_thread, " threads");
  body_now = &body;
  n_block_now = n_block;
  running.block = 0;
  place_block(0);
  for (int block = 0; block < n_block; ++block) {
    n_live[block] = n_thread;
    for (int thread = 0; thread < n_thread; ++thread) {
      prepare(fibers[block][thread]);
      make_ready(block, thread);
    }
  }
  const int first = take_ready();
  enter(first);
  gemma4_emulator_switch(&host_stack_pointer, fibers[running.block][first].stack_pointer);
  if (running.block != 0) exchange_shared_memory(running.block, 0);
  running.block = 0;
}

void suspend() {
  Fiber& from = fibers[running.block][running.thread];
  const int next = take_ready();
  if (next == kNobody) {
    if (n_live_in_cluster() > 0) fail("deadlock", who_waits());
    gemma4_emulator_switch(&from.stack_pointer, host_stack_pointer);
    return;
  }
  enter(next);
  Fiber& to = fibers[running.block][next];
  if (&to != &from) gemma4_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

void make_ready(int thread) {
  make_ready(running.block, thread);
}
void make_ready(int block, int thread) {
  ready[block].push_back(thread);
}

int n_live_thread() {
  return n_live[running.block];
}
int n_live_in_cluster() {
  return std::accumulate(n_live, n_live + n_block_now, 0);
}

bool in_random_order() {
  return kSeed != 0;
}

std::size_t random_below(std::size_t n) {
  return engine() % n;
}

}  // namespace gemma4::emulator

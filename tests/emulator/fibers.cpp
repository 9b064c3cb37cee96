// SPDX-License-Identifier: Apache-2.0
#include "tests/emulator/fibers.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <random>

#include "tests/emulator/copies.hpp"
#include "tests/emulator/failure.hpp"
#include "tests/emulator/launch.hpp"
#include "tests/emulator/rendezvous.hpp"
#include "tests/emulator/settings.hpp"

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
Fiber fibers[kMaxThreads];
std::deque<int> ready;
int n_live = 0;
void* host_stack_pointer = nullptr;
const std::function<void()>* body_now = nullptr;

const int kSeed = whole_setting("GEMMA4_EMULATOR_SEED", 0);
std::mt19937 engine(static_cast<unsigned>(kSeed));

void enter(int thread) {
  running = {.thread = thread, .lane = thread % kLanes, .warp = &warp_of(thread)};
  place_thread(thread);
}

int take_ready() {
  land_copy(false);
  while (ready.empty() && land_copy(true)) {
  }
  if (ready.empty()) return kNobody;
  if (in_random_order()) std::swap(ready.front(), ready[random_below(ready.size())]);
  const int thread = ready.front();
  ready.pop_front();
  return thread;
}

void run_fiber() {
  (*body_now)();
  --n_live;
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

void run_threads(int n_thread, const std::function<void()>& body) {
  if (n_thread < 1 || n_thread > kMaxThreads) fail("a block of ", n_thread, " threads");
  body_now = &body;
  n_live = n_thread;
  for (int thread = 0; thread < n_thread; ++thread) {
    prepare(fibers[thread]);
    make_ready(thread);
  }
  const int first = take_ready();
  enter(first);
  gemma4_emulator_switch(&host_stack_pointer, fibers[first].stack_pointer);
}

void suspend() {
  const int from = running.thread;
  const int next = take_ready();
  if (next == kNobody) {
    if (n_live > 0) fail("deadlock", who_waits());
    gemma4_emulator_switch(&fibers[from].stack_pointer, host_stack_pointer);
    return;
  }
  enter(next);
  if (next != from) gemma4_emulator_switch(&fibers[from].stack_pointer, fibers[next].stack_pointer);
}

void make_ready(int thread) {
  ready.push_back(thread);
}

int n_live_thread() {
  return n_live;
}

bool in_random_order() {
  return kSeed != 0;
}

std::size_t random_below(std::size_t n) {
  return engine() % n;
}

}  // namespace gemma4::emulator

// SPDX-License-Identifier: Apache-2.0
#include "tests/emulator/copies.hpp"

#include <cstring>
#include <deque>
#include <vector>

#include "tests/emulator/failure.hpp"
#include "tests/emulator/fibers.hpp"
#include "tests/emulator/settings.hpp"
#include "tests/emulator/shared_memory.hpp"

namespace gemma4::emulator {
namespace {

constexpr int kNotLanded = 0xFF;

struct BulkCopy {
  void* target;
  const void* source;
  std::uint32_t n_byte, barrier;
};
struct Copy16 {
  void* target;
  const void* source;
  bool valid;
};
using Group = std::vector<Copy16>;
struct ThreadCopies {
  Group open;
  std::deque<Group> committed;
};

/// Of a block.
struct Copies {
  std::vector<BulkCopy> bulk;
  ThreadCopies of[kMaxThreads];
  std::vector<int> waiting;  ///< threads, for any change of any mbarrier
};
Copies copies_of_block[kMaxBlocks];
int n_block_here = 1;

[[nodiscard]] Copies& here() {
  return copies_of_block[running.block];
}
const std::string kWhen = setting("GEMMA4_EMULATOR_COPIES", "late");

/// The 8 bytes of an mbarrier.
struct Mbarrier {
  std::int16_t n_missing, n_arrival;  ///< arrivals that this phase lacks, and that a phase takes
  std::int32_t bytes_and_phase;       ///< 2 * bytes announced and not landed + parity of the phase
};
static_assert(sizeof(Mbarrier) == 8);

Mbarrier& mbarrier_at(std::uint32_t address) {
  if (address % 8 != 0) fail("an mbarrier at ", address, ", which is no multiple of 8");
  return *reinterpret_cast<Mbarrier*>(from_shared(address));
}
void settle(Mbarrier& barrier) {
  if (barrier.n_missing < 0) fail("an mbarrier has more arrivals than it counts");
  if (barrier.n_missing == 0 && barrier.bytes_and_phase >> 1 == 0) {
    barrier.n_missing = barrier.n_arrival;
    barrier.bytes_and_phase ^= 1;
  }
  for (const int thread : here().waiting) make_ready(thread);
  here().waiting.clear();
}

void land(const BulkCopy& copy) {
  std::memcpy(copy.target, copy.source, copy.n_byte);
  Mbarrier& barrier = mbarrier_at(copy.barrier);
  barrier.bytes_and_phase -= 2 * static_cast<std::int32_t>(copy.n_byte);
  settle(barrier);
}
void land(Group& group) {
  for (const Copy16& copy : group) {
    if (copy.valid) {
      std::memcpy(copy.target, copy.source, 16);
    } else {
      std::memset(copy.target, 0, 16);
    }
  }
  group.clear();
}

bool aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

}  // namespace

void start_bulk_copy(void* target, const void* source, std::uint32_t n_byte, std::uint32_t barrier) {
  if (n_byte % 16 != 0 || !aligned(target) || !aligned(source))
    fail("a bulk copy of ", n_byte, " bytes is not aligned");
  const BulkCopy copy{target, source, n_byte, barrier};
  if (kWhen == "early") return land(copy);
  std::memset(target, kNotLanded, n_byte);
  here().bulk.push_back(copy);
}

bool land_copy(bool must) {
  const bool at_random = kWhen == "random";
  std::vector<BulkCopy>& bulk_copies = here().bulk;
  if (bulk_copies.empty() || (!must && (!at_random || random_below(8) != 0))) return false;
  const auto chosen =
      bulk_copies.begin() + static_cast<std::ptrdiff_t>(at_random ? random_below(bulk_copies.size()) : 0);
  const BulkCopy copy = *chosen;
  bulk_copies.erase(chosen);
  land(copy);
  return true;
}

void start_copy_16(void* target, const void* source, bool valid) {
  if (!aligned(target) || (valid && !aligned(source))) fail("a copy of 16 bytes is not aligned");
  std::memset(target, kNotLanded, 16);
  here().of[running.thread].open.push_back({target, source, valid});
}

void commit_copies() {
  ThreadCopies& copies = here().of[running.thread];
  copies.committed.push_back(std::move(copies.open));
  copies.open.clear();
}

void wait_for_copies(int n_pending) {
  std::deque<Group>& committed = here().of[running.thread].committed;
  while (static_cast<int>(committed.size()) > n_pending) {
    land(committed.front());
    committed.pop_front();
  }
}

void arrive_after_copies(std::uint32_t barrier) {
  wait_for_copies(0);
  land(here().of[running.thread].open);
  arrive_mbarrier(barrier, 0);
}

void init_mbarrier(std::uint32_t barrier, int n_arrival) {
  const auto n = static_cast<std::int16_t>(n_arrival);
  mbarrier_at(barrier) = {.n_missing = n, .n_arrival = n, .bytes_and_phase = 0};
}

void arrive_mbarrier(std::uint32_t address, std::uint32_t n_byte_expected) {
  Mbarrier& barrier = mbarrier_at(address);
  barrier.bytes_and_phase += 2 * static_cast<std::int32_t>(n_byte_expected);
  --barrier.n_missing;
  settle(barrier);
}

void wait_mbarrier(std::uint32_t barrier, std::uint32_t parity) {
  while ((static_cast<std::uint32_t>(mbarrier_at(barrier).bytes_and_phase) & 1u) == (parity & 1u)) {
    here().waiting.push_back(running.thread);
    suspend();
  }
}

void begin_copies(int n_block, int n_thread) {
  n_block_here = n_block;
  for (int block = 0; block < n_block; ++block) {
    copies_of_block[block].waiting.clear();
    for (int thread = 0; thread < n_thread; ++thread) copies_of_block[block].of[thread] = {};
  }
}

void end_copies() {
  for (int block = 0; block < n_block_here; ++block) {
    const std::size_t n_left = copies_of_block[block].bulk.size();
    if (n_left > 0) fail(n_left, " bulk copies have not landed at the end of a block");
  }
}

std::string who_waits_for_copies() {
  const std::vector<int>& waiting = here().waiting;
  if (waiting.empty()) return {};
  std::ostringstream report;
  report << "\n  " << waiting.size() << " threads wait for an mbarrier, the first is thread " << waiting[0];
  return report.str();
}

}  // namespace gemma4::emulator

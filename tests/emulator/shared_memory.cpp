// SPDX-License-Identifier: Apache-2.0
#include "tests/emulator/shared_memory.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "tests/emulator/fibers.hpp"

/// Dynamic shared memory by every name that a kernel of this namespace has for it (`extern __shared__`): a new name
/// belongs here.
namespace gemma4::cuda::detail {
constexpr std::size_t kRoomBytes = 240 * 1024;
alignas(1024) thread_local unsigned char smem[kRoomBytes];
alignas(1024) thread_local unsigned char sliding_smem_bytes[kRoomBytes];
alignas(1024) thread_local unsigned char linear_smem_bytes[kRoomBytes];
alignas(1024) thread_local unsigned char smem_bytes[kRoomBytes];
}  // namespace gemma4::cuda::detail

namespace gemma4::emulator {
namespace {

constexpr std::size_t kCanaryBytes = 4096;
constexpr unsigned char kCanary = 0xA5, kUnwritten = 0xFF;

template <class TVisit>
void for_each_room(const TVisit& visit) {
  visit(cuda::detail::smem);
  visit(cuda::detail::sliding_smem_bytes);
  visit(cuda::detail::linear_smem_bytes);
  visit(cuda::detail::smem_bytes);
}

using Aside = std::vector<unsigned char>;  // the rooms of a block behind each other
Aside aside[kMaxBlocks];
std::size_t n_byte_here = 0;
int n_block_here = 1;

[[nodiscard]] std::size_t room_bytes() {
  return n_byte_here + kCanaryBytes;
}

void look_at_canaries() {
  for_each_room([&](const unsigned char* room) {
    for (std::size_t i = n_byte_here; i < room_bytes(); ++i) {
      if (room[i] != kCanary) fail("byte ", i, " of ", n_byte_here, " bytes of shared memory was written");
    }
  });
}

}  // namespace

unsigned char* shared_base() {
  return cuda::detail::smem;
}

void exchange_shared_memory(int from, int to) {
  Aside& out = aside[from];
  out.clear();
  for_each_room([&](const unsigned char* room) { out.insert(out.end(), room, room + room_bytes()); });
  const unsigned char* in = aside[to].data();
  for_each_room([&](unsigned char* room) {
    std::copy_n(in, room_bytes(), room);
    in += room_bytes();
  });
}

void write_to_block(void* local, int block, const void* from, std::size_t n_byte) {
  if (block < 0 || block >= n_block_here) fail("there is no block ", block, " in a cluster of ", n_block_here);
  if (block == running.block) {
    std::memcpy(local, from, n_byte);
    return;
  }
  std::size_t before = 0;
  bool found = false;
  for_each_room([&](const unsigned char* room) {
    const std::ptrdiff_t distance = static_cast<const unsigned char*>(local) - room;
    if (distance >= 0 && distance + static_cast<std::ptrdiff_t>(n_byte) <= static_cast<std::ptrdiff_t>(n_byte_here)) {
      std::memcpy(aside[block].data() + before + distance, from, n_byte);
      found = true;
    }
    before += room_bytes();
  });
  if (!found) fail("a store to another block at an address that is not in dynamic shared memory");
}

void begin_shared_memory(int n_block, std::size_t n_byte) {
  if (n_byte + kCanaryBytes > cuda::detail::kRoomBytes) fail("no room for ", n_byte, " bytes of shared memory");
  n_byte_here = n_byte;
  n_block_here = n_block;
  int n_room = 0;
  for_each_room([&](unsigned char* room) {
    std::memset(room, kUnwritten, n_byte);
    std::memset(room + n_byte, kCanary, kCanaryBytes);
    ++n_room;
  });
  for (int block = 1; block < n_block; ++block) {
    aside[block].assign(n_room * room_bytes(), kUnwritten);
    for (int i = 0; i < n_room; ++i)
      std::memset(aside[block].data() + i * room_bytes() + n_byte, kCanary, kCanaryBytes);
  }
}

void end_shared_memory() {
  look_at_canaries();
  for (int block = 1; block < n_block_here; ++block) {
    exchange_shared_memory(block - 1, block);
    look_at_canaries();
  }
}

}  // namespace gemma4::emulator

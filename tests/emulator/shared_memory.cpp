// SPDX-License-Identifier: Apache-2.0
#include "tests/emulator/shared_memory.hpp"

#include <cstring>

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

}  // namespace

unsigned char* shared_base() {
  return cuda::detail::smem;
}

void begin_shared_memory(std::size_t n_byte) {
  if (n_byte + kCanaryBytes > cuda::detail::kRoomBytes) fail("no room for ", n_byte, " bytes of shared memory");
  for_each_room([&](unsigned char* room) {
    std::memset(room, kUnwritten, n_byte);
    std::memset(room + n_byte, kCanary, kCanaryBytes);
  });
}

void end_shared_memory(std::size_t n_byte) {
  for_each_room([&](const unsigned char* room) {
    for (std::size_t i = n_byte; i < n_byte + kCanaryBytes; ++i) {
      if (room[i] != kCanary) fail("byte ", i, " of ", n_byte, " bytes of shared memory was written");
    }
  });
}

}  // namespace gemma4::emulator

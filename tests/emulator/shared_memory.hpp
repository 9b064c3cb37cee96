// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "tests/emulator/failure.hpp"

/// Shared memory of the running block; that of the other blocks of its cluster lies aside. Its 32-bit addresses are
/// distances from the first array of dynamic shared memory, and signed: static shared memory may lie before it.
namespace gemma4::emulator {

[[nodiscard]] unsigned char* shared_base();

[[nodiscard]] inline std::uint32_t to_shared(const void* pointer) {
  constexpr std::ptrdiff_t kFar = std::ptrdiff_t{1} << 30;
  const std::ptrdiff_t distance = static_cast<const unsigned char*>(pointer) - shared_base();
  if (distance < -kFar || distance > kFar) fail("an address that is not in shared memory");
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(distance));
}
[[nodiscard]] inline unsigned char* from_shared(std::uint32_t address) {
  return shared_base() + static_cast<std::int32_t>(address);
}

/// Writes where `local` is in the shared memory of a block of the cluster.
void write_to_block(void* local, int block, const void* from, std::size_t n_byte);

/// For fibers.cpp: what lies in place, of block `from`, goes aside for that of block `to`.
void exchange_shared_memory(int from, int to);

/// For launch.cpp: n_byte of dynamic shared memory, 0xFF, and canaries behind them, for each block. Block 0 runs first.
void begin_shared_memory(int n_block, std::size_t n_byte);
void end_shared_memory();  ///< fails where a canary has died; block 0 is in place

}  // namespace gemma4::emulator

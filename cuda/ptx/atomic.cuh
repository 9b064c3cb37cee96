// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Atomics with an order that CUDA's functions do not have. Source: the PTX ISA, "atom".
namespace gemma4::cuda {

/// Counts up to `last` and then begins at 0 again; returns the count before. Acquires what others have released on it,
/// and releases what this thread has seen.
[[nodiscard]] __device__ __forceinline__ std::uint32_t count_around(std::uint32_t* counter, std::uint32_t last) {
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
  return before;
}

}  // namespace gemma4::cuda

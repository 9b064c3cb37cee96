// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// What the L2 cache is told. Source: the PTX ISA, "createpolicy", "prefetch".
namespace gemma4::cuda {

/// For data that is not read again before everything else has been: it leaves the L2 first. From sm_80 on.
[[nodiscard]] __device__ __forceinline__ std::uint64_t evict_first_policy() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

/// Brings the line of an address in global memory into the L2.
__device__ __forceinline__ void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace gemma4::cuda

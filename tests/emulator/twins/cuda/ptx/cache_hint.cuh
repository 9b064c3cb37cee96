// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Twin of cuda/ptx/cache_hint.cuh: there is no cache.
namespace gemma4::cuda {

[[nodiscard]] __device__ __forceinline__ std::uint64_t evict_first_policy() {
  return 0;
}

__device__ __forceinline__ void prefetch_line(const void*) {}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Twin of cuda/ptx/atomic.cuh.
namespace gemma4::cuda {

[[nodiscard]] __device__ __forceinline__ std::uint32_t count_around(std::uint32_t* counter, std::uint32_t last) {
  return atomicInc(counter, last);
}

}  // namespace gemma4::cuda

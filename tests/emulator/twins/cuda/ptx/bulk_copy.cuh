// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Twin of cuda/ptx/bulk_copy.cuh.
namespace gemma4::cuda {

__device__ __forceinline__ void bulk_load(std::uint32_t target, const void* source, std::uint32_t n_byte,
                                          std::uint32_t barrier) {
  emulator::start_bulk_copy(emulator::from_shared(target), source, n_byte, barrier);
}

__device__ __forceinline__ void bulk_load(std::uint32_t target, const void* source, std::uint32_t n_byte,
                                          std::uint32_t barrier, std::uint64_t) {
  bulk_load(target, source, n_byte, barrier);
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Twin of cuda/ptx/mbarrier.cuh.
namespace gemma4::cuda {

__device__ __forceinline__ void mbarrier_init(std::uint32_t barrier, int n_arrival) {
  emulator::init_mbarrier(barrier, n_arrival);
}

__device__ __forceinline__ void mbarrier_init_fence() {}

__device__ __forceinline__ void mbarrier_expect(std::uint32_t barrier, std::uint32_t n_byte) {
  emulator::arrive_mbarrier(barrier, n_byte);
}

__device__ __forceinline__ void mbarrier_arrive(std::uint32_t barrier) {
  emulator::arrive_mbarrier(barrier, 0);
}

__device__ __forceinline__ void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  emulator::wait_mbarrier(barrier, parity);
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Twin of cuda/ptx/wgmma.cuh: warpgroup products are not emulated.
namespace gemma4::cuda {

[[nodiscard]] __device__ __forceinline__ std::uint64_t wgmma_operand(std::uint32_t, std::uint32_t, std::uint32_t) {
  return 0;
}

[[nodiscard]] __device__ __forceinline__ std::uint64_t wgmma_advance(std::uint64_t operand, std::uint32_t) {
  return operand;
}

__device__ __forceinline__ void wgmma_fence() {}

__device__ __forceinline__ void wgmma_commit() {}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {}

template <int kCount>
__device__ __forceinline__ void wgmma_pin(float (&)[kCount]) {}

template <int kCount>
__device__ __forceinline__ void release_registers() {}
template <int kCount>
__device__ __forceinline__ void take_registers() {}

__device__ __forceinline__ void wgmma_m64n64k16(float (&)[32], std::uint64_t, std::uint64_t, bool) {
  emulator::fail("wgmma is not emulated: GEMMA4_EMULATOR_ARCH=800 does without");
}

__device__ __forceinline__ void wgmma_m64n256k16(float (&)[128], std::uint64_t, std::uint64_t, bool) {
  emulator::fail("wgmma is not emulated: GEMMA4_EMULATOR_ARCH=800 does without");
}

__device__ __forceinline__ void wgmma_m64n256k16(float (&)[128], const std::uint32_t (&)[4], std::uint64_t) {
  emulator::fail("wgmma is not emulated: GEMMA4_EMULATOR_ARCH=800 does without");
}

}  // namespace gemma4::cuda

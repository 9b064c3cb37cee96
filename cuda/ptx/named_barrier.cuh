// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The sixteen barriers of a block. Number 0 is __syncthreads(); the others belong to the kernel, which gives its teams
/// of warps numbers of their own in one place and asserts that they stay below kNamedBarriers:
///   cuda/flash/wgmma_256.cuh, wgmma_512.cuh   kSums, kGroup of the traits
///   cuda/tq4_attention/                       Tq4DecodeTraits::kTeamBarrier, one a pair of warps
///   cuda/sliding_decode/                      SlidingDecodeTraits::kTeamBarrier, the warps that compute
///   cuda/quantized_linear/                    the warps that multiply
/// Source: the PTX ISA, "bar".
namespace gemma4::cuda {

inline constexpr int kNamedBarriers = 16;

/// Meets the other threads of a barrier; n_thread is how many, whole warps.
__device__ __forceinline__ void named_barrier_sync(int barrier, int n_thread) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(n_thread) : "memory");
}

/// The same for numbers that the instruction itself holds.
template <int kThreads>
__device__ __forceinline__ void named_barrier_sync(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
/// Meets them, and tells whether `value` holds in any of them.
template <int kThreads>
[[nodiscard]] __device__ __forceinline__ bool named_barrier_any(int barrier, bool value) {
  int any;
  asm volatile(
      "{ .reg .pred mine, any; setp.ne.s32 mine, %1, 0; bar.red.or.pred any, %2, %3, mine; selp.s32 %0, 1, 0, any; }"
      : "=r"(any)
      : "r"(static_cast<int>(value)), "r"(barrier), "n"(kThreads)
      : "memory");
  return any != 0;
}

template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_barrier_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Twin of cuda/ptx/named_barrier.cuh.
namespace gemma4::cuda {

inline constexpr int kNamedBarriers = 16;

__device__ __forceinline__ void named_barrier_sync(int barrier, int n_thread) {
  if (n_thread % 32 != 0) emulator::fail("barrier ", barrier, " of ", n_thread, " threads, which are not whole warps");
  emulator::meet(barrier, n_thread);
}

template <int kThreads>
__device__ __forceinline__ void named_barrier_sync(int barrier) {
  named_barrier_sync(barrier, kThreads);
}
template <int kThreads>
[[nodiscard]] __device__ __forceinline__ bool named_barrier_any(int barrier, bool value) {
  return emulator::meet_any(barrier, kThreads, value);
}

template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_barrier_sync() {
  named_barrier_sync(kBarrier, kThreads);
}

}  // namespace gemma4::cuda

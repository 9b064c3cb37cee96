// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/ptx/shared_memory.cuh"

/// Twin of cuda/ptx/cluster.cuh: what is written is visible at once, with a promise or without.
namespace gemma4::cuda {

__device__ __forceinline__ void cluster_arrive_relaxed() {
  emulator::arrive_at_cluster();
}

__device__ __forceinline__ void cluster_arrive_release() {
  emulator::arrive_at_cluster();
}

__device__ __forceinline__ void cluster_wait() {
  emulator::wait_for_cluster();
}

__device__ __forceinline__ void cluster_wait_acquire() {
  emulator::wait_for_cluster();
}

__device__ __forceinline__ void store_to_block(void* local, int rank, float2 value) {
  emulator::write_to_block(local, rank, &value, sizeof(value));
}

}  // namespace gemma4::cuda

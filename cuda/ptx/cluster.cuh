// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/shared_memory.cuh"

/// Clusters of blocks, from sm_90 on: the barrier of all their threads, and stores to each other's shared memory.
/// Every thread of the cluster passes arrive and wait in turn. Source: the PTX ISA, "barrier.cluster", "mapa".
namespace gemma4::cuda {

/// Arrives without a promise about memory.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

/// Arrives; what this thread has written is visible to those that cluster_wait_acquire().
__device__ __forceinline__ void cluster_arrive_release() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait_acquire() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Stores two floats where `local` is in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void store_to_block(void* local, int rank, float2 value) {
  std::uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(local)), "r"(rank));
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(remote), "f"(value.x), "f"(value.y) : "memory");
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/ptx/shared_memory.cuh"

/// Twin of cuda/ptx/cluster.cuh: clusters are not emulated.
namespace gemma4::cuda {

__device__ __forceinline__ void cluster_arrive_relaxed() {
  emulator::fail("clusters are not emulated");
}

__device__ __forceinline__ void cluster_arrive_release() {
  emulator::fail("clusters are not emulated");
}

__device__ __forceinline__ void cluster_wait() {
  emulator::fail("clusters are not emulated");
}

__device__ __forceinline__ void cluster_wait_acquire() {
  emulator::fail("clusters are not emulated");
}

__device__ __forceinline__ void store_to_block(void*, int, float2) {
  emulator::fail("clusters are not emulated");
}

}  // namespace gemma4::cuda

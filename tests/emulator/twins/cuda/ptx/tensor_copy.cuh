// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"
#include "gemma4/float16.hpp"

/// Twin of cuda/ptx/tensor_copy.cuh: tensor copies are not emulated.
namespace gemma4::cuda {

struct TensorMapShape {
  std::uint64_t extent[5];
  std::uint64_t stride_bytes[4];
  std::uint32_t box[5];
};

[[nodiscard]] inline CUtensorMap make_tensor_map(const char* what, const Bf16*, const TensorMapShape&) {
  emulator::fail(what, ": tensor copies are not emulated; GEMMA4_EMULATOR_ARCH=800 does without");
}

__device__ __forceinline__ void tensor_load(std::uint32_t, const CUtensorMap*, std::uint32_t, int, int, int, int, int) {
  emulator::fail("tensor copies are not emulated");
}

__device__ __forceinline__ void tensor_store(const CUtensorMap*, std::uint32_t, int, int, int, int, int) {
  emulator::fail("tensor copies are not emulated");
}

__device__ __forceinline__ void tensor_store_finish() {}

__device__ __forceinline__ void fence_async_shared() {}

}  // namespace gemma4::cuda

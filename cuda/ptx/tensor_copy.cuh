// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"

/// The tensor copy engine of sm_90: maps of strided tensors, and bulk copies between them and shared memory, which
/// complete on mbarriers (mbarrier.cuh). Source: the PTX ISA, "cp.async.bulk.tensor".
namespace gemma4::cuda {

/// Extents and strides of a bf16 tensor, innermost first; the innermost axis is contiguous.
struct TensorMapShape {
  std::uint64_t extent[5];
  std::uint64_t stride_bytes[4];  ///< of axes 1 to 4; multiples of 16
  std::uint32_t box[5];           ///< what one copy moves; the innermost is 64 values, one 128-byte row
};

/// A map of `data` in the 128-byte swizzle; what lies outside the extents reads as zero and is not written.
/// @throws std::invalid_argument when the driver has no tensor maps or refuses this one
[[nodiscard]] inline CUtensorMap make_tensor_map(const char* what, const Bf16* data, const TensorMapShape& shape) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  require(status == cudaSuccess && found == cudaDriverEntryPointSuccess && function != nullptr, what,
          ": the driver has no cuTensorMapEncodeTiled (", cudaGetErrorString(status), "); it is too old for sm_90");
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  CUtensorMap map{};
  const cuuint32_t element_stride[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, const_cast<Bf16*>(data), shape.extent, shape.stride_bytes,
             shape.box, element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, what, ": the driver refuses the tensor map (CUresult ", static_cast<int>(result),
          "); data and strides must be multiples of 16 bytes");
  return map;
}

/// Box at coordinate c (innermost first) into shared memory; its bytes complete on `barrier`.
__device__ __forceinline__ void tensor_load(std::uint32_t target, const CUtensorMap* map, std::uint32_t barrier, int c0,
                                            int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

/// Box from shared memory to the tensor; finished after tensor_store_finish() by the same thread.
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, std::uint32_t source, int c0, int c1, int c2,
                                             int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

__device__ __forceinline__ void tensor_store_finish() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/// Orders this thread's ordinary writes to shared memory before later reads by wgmma and the copy engine.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace gemma4::cuda

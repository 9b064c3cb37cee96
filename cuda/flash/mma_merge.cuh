// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/flash/mma_load.cuh"
#include "cuda/flash/params.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/softmax_state.cuh"
#include "gemma4/float16.hpp"

/// What a thread of the mma.sync flash kernel has summed, how the warps of a block that shared the keys are merged, and
/// where the result goes (cuda/flash/mma_sync.cuh).
namespace gemma4::cuda::detail {

/// Running softmax and output of the two rows that a thread shares with its quad.
template <class TTraits>
struct FlashState {
  SoftmaxState row[2];  ///< the sum is this thread's part of it
  float o[TTraits::kWarpDims / 8][4];

  __device__ __forceinline__ void init() {
    row[0] = row[1] = {};
#pragma unroll
    for (auto& tile : o) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
  }
};

/// Index of a row among the partials of this block's split.
[[nodiscard]] __device__ __forceinline__ std::int64_t partial_row(const FlashParams& params, int row) {
  const std::int64_t n_head = params.batch * params.n_head_kv;
  return (blockIdx.z * n_head + blockIdx.y) * flash_rows(params) + row;
}

/// Where a row of the call is in `out`.
[[nodiscard]] __device__ __forceinline__ Bf16* out_row(const FlashParams& params, int batch, int head_kv, int row) {
  return params.out + batch * params.out_stride[0] + (row / params.group) * params.out_stride[1] +
         (head_kv * params.group + row % params.group) * params.out_stride[2];
}

/// Writes the rows of warps that saw all keys of the block: normalised into out, or as they are into the partials.
template <class TTraits>
__device__ __forceinline__ void store_rows(const FlashState<TTraits>& state, const FlashParams& params,
                                           const FlashBlock<TTraits>& block) {
  const int t = threadIdx.x & 3, dim0 = block.dim0;
  const int row = block.row0 + (block.warp_m * 16 + (threadIdx.x & 31) / 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= flash_rows(params)) continue;
    if (params.n_split > 1) {
      const std::int64_t index = partial_row(params, row + 8 * half);
      float* const target = params.partial_o + index * TTraits::kHeadDim + dim0 + 2 * t;
#pragma unroll
      for (int tile = 0; tile < TTraits::kWarpDims / 8; ++tile) {
        *reinterpret_cast<float2*>(target + 8 * tile) =
            make_float2(state.o[tile][2 * half], state.o[tile][2 * half + 1]);
      }
      if (t == 0 && dim0 == 0) {
        *reinterpret_cast<float2*>(params.partial_ml + 2 * index) =
            make_float2(state.row[half].maximum, state.row[half].sum);
      }
    } else {
      const float inverse = state.row[half].inverse();
      Bf16* const target = out_row(params, block.batch, block.head_kv, row + 8 * half) + dim0 + 2 * t;
#pragma unroll
      for (int tile = 0; tile < TTraits::kWarpDims / 8; ++tile) {
        *reinterpret_cast<std::uint32_t*>(target + 8 * tile) =
            pack_bf16(state.o[tile][2 * half] * inverse, state.o[tile][2 * half + 1] * inverse);
      }
    }
  }
}

/// Merges the warps that shared the keys: each leaves its rows, scaled to the common maximum, in shared memory; then
/// all threads add them in warp order and write. Rows beyond the call's last are skipped: a decode block has few.
template <class TTraits>
__device__ __forceinline__ void merge_warps(FlashState<TTraits>& state, const FlashParams& params,
                                            const FlashBlock<TTraits>& block, float* smem) {
  constexpr int kRows = TTraits::kRows, kHeadDim = TTraits::kHeadDim;
  constexpr int kStride = TTraits::kMergeStride, kWarpsK = TTraits::kWarpsK;
  const int t = threadIdx.x & 3, n_row = min(kRows, flash_rows(params) - block.row0);
  const int warp_row = block.warp_m * 16 + (threadIdx.x & 31) / 4, warp_k = block.warp_k, dim0 = block.dim0;
  float* const sums = smem;                            // [kWarpsK, kRows, kStride]
  float* const ml = smem + kWarpsK * kRows * kStride;  // [kWarpsK, kRows, 2]
  __syncthreads();                                     // the tiles are no longer needed
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (t != 0 || dim0 != 0) continue;
    ml[(warp_k * kRows + warp_row + 8 * half) * 2] = state.row[half].maximum;
    ml[(warp_k * kRows + warp_row + 8 * half) * 2 + 1] = state.row[half].sum;
  }
  __syncthreads();
  const auto row_maximum = [&](int row) {
    float maximum = -INFINITY;
#pragma unroll
    for (int k = 0; k < kWarpsK; ++k) maximum = fmaxf(maximum, ml[(k * kRows + row) * 2]);
    return maximum;
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (warp_row + 8 * half >= n_row) continue;
    const float factor = exp2_approx(state.row[half].maximum - softmax_reference(row_maximum(warp_row + 8 * half)));
    float* const mine = sums + (warp_k * kRows + warp_row + 8 * half) * kStride + dim0 + 2 * t;
#pragma unroll
    for (int tile = 0; tile < TTraits::kWarpDims / 8; ++tile) {
      *reinterpret_cast<float2*>(mine + 8 * tile) =
          make_float2(state.o[tile][2 * half] * factor, state.o[tile][2 * half + 1] * factor);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int item = threadIdx.x; item < n_row * (kHeadDim / 4); item += TTraits::kThreads) {
    const int row = item / (kHeadDim / 4), dim = item % (kHeadDim / 4) * 4;
    const float maximum = row_maximum(row);
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kWarpsK; ++k) {
      const float4 part = *reinterpret_cast<const float4*>(sums + (k * kRows + row) * kStride + dim);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      total = fmaf(ml[(k * kRows + row) * 2 + 1], exp2_approx(ml[(k * kRows + row) * 2] - softmax_reference(maximum)),
                   total);
    }
    if (params.n_split > 1) {
      const std::int64_t index = partial_row(params, block.row0 + row);
      *reinterpret_cast<float4*>(params.partial_o + index * kHeadDim + dim) = sum;
      if (dim == 0) *reinterpret_cast<float2*>(params.partial_ml + 2 * index) = make_float2(maximum, total);
    } else {
      const float inverse = softmax_inverse(total);
      *reinterpret_cast<uint2*>(out_row(params, block.batch, block.head_kv, block.row0 + row) + dim) =
          make_uint2(pack_bf16(sum.x * inverse, sum.y * inverse), pack_bf16(sum.z * inverse, sum.w * inverse));
    }
  }
}

/// The result of the block.
template <class TTraits>
__device__ __forceinline__ void merge_and_store(FlashState<TTraits>& state, const FlashParams& params,
                                                const FlashBlock<TTraits>& block, float* smem) {
#pragma unroll
  for (int half = 0; half < 2; ++half) warp_sum_in_place<1, 2>(state.row[half].sum);
  if constexpr (TTraits::kWarpsK == 1) {
    store_rows(state, params, block);
  } else {
    merge_warps(state, params, block, smem);
  }
}

}  // namespace gemma4::cuda::detail

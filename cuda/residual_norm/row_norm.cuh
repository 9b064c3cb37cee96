// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/ptx/warp_reduce.cuh"
#include "gemma4/float16.hpp"

/// What "finish the residual, then normalise it" is for one row, in operations that are spelled out one by one: every
/// instance of the kernel has the same bits.
///
///   n  = pending / sqrt(mean(pending^2) + epsilon) * post_norm
///   x' = (x + n) * scale                                        nothing pending: x' = x
///   h  = x' / sqrt(mean(x'^2) + epsilon) * norm                 rounded to bf16
///
/// A row belongs to kRowThreads threads in pieces of 8 neighbouring values: thread i has pieces i, i + kRowThreads, ...
/// in this order. Sums: each thread adds its squares in order, a warp by a tree, the warps in order.
/// Mirror: reference/decoder_layer.hpp, finish_and_normalise
namespace gemma4::cuda::detail {

inline constexpr int kRowThreads = 256;
inline constexpr int kRowWarps = kRowThreads / 32;
inline constexpr int kRowPiece = 8;  ///< values

/// sum + the squares of a piece.
[[nodiscard]] __device__ __forceinline__ float add_squares(float sum, const float (&piece)[kRowPiece]) {
#pragma unroll
  for (const float value : piece) sum = __fmaf_rn(value, value, sum);
  return sum;
}

/// The sum over the threads of a row, which are the whole block, in every one of them. `thread` counts them. `parts` is
/// shared memory of this sum alone until the next barrier after the call: two sums in a row take two in turn.
[[nodiscard]] __device__ __forceinline__ float sum_of_row(float sum, float (&parts)[kRowWarps], int thread) {
  block_sum_in_place(sum, parts, thread, [] { __syncthreads(); });
  return sum;
}

/// 1 / sqrt(mean + epsilon)
[[nodiscard]] __device__ __forceinline__ float norm_scale(float sum_of_squares, int width, float epsilon) {
  const float mean = __fdiv_rn(sum_of_squares, static_cast<float>(width));
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, epsilon)));
}

[[nodiscard]] __device__ __forceinline__ float normalised(float value, float norm_scale, float weight) {
  return __fmul_rn(__fmul_rn(value, norm_scale), weight);
}

/// x' of the formula above.
[[nodiscard]] __device__ __forceinline__ float finished(float x, float pending, float norm_scale, float post_norm,
                                                        float scale) {
  return __fmul_rn(__fadd_rn(x, normalised(pending, norm_scale, post_norm)), scale);
}

}  // namespace gemma4::cuda::detail

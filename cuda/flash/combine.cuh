// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/flash/mma_merge.cuh"
#include "cuda/flash/params.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/softmax_state.cuh"

namespace gemma4::cuda::detail {

inline constexpr int kCombineGroups = 8;  ///< threads that share the splits of a value: their loads fly together

/// Merges the splits of one row in a fixed order. (Without this kernel, 16 blocks of a cluster merging through each
/// other's shared memory: a decode over a ring of 1024 then took 12.5 us on an H200 instead of 10.7.)
///   out = sum_s 2^(m_s - m) O_s / sum_s 2^(m_s - m) l_s.
/// grid: x = row, y = batch * n_head_kv; kCombineGroups threads share four dimensions.
template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim / 4 * kCombineGroups)
    flash_combine_kernel(const __grid_constant__ FlashParams params) {
  constexpr int kColumns = kHeadDim / 4;
  __shared__ __align__(16) float4 sums[kCombineGroups][kColumns];
  __shared__ float totals[kCombineGroups];
  const int row = blockIdx.x, n_row = flash_rows(params), n_head = params.batch * params.n_head_kv;
  const int column = threadIdx.x % kColumns, group = threadIdx.x / kColumns, lane = threadIdx.x & 31;
  const auto index = [&](int split) { return (static_cast<std::int64_t>(split) * n_head + blockIdx.y) * n_row + row; };
  wait_for_previous_kernel();
  allow_next_kernel();
  float maximum = -INFINITY;
  for (int split = lane; split < params.n_split; split += 32) {
    maximum = fmaxf(maximum, params.partial_ml[2 * index(split)]);
  }
  maximum = warp_max(maximum);
  const float reference = softmax_reference(maximum);
  float total = 0.0f;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int split = group; split < params.n_split; split += kCombineGroups) {
    const float2 ml = *reinterpret_cast<const float2*>(params.partial_ml + 2 * index(split));
    const float4 o = *reinterpret_cast<const float4*>(params.partial_o + index(split) * kHeadDim + 4 * column);
    const float factor = exp2_approx(ml.x - reference);
    total = fmaf(ml.y, factor, total);
    sum.x = fmaf(o.x, factor, sum.x), sum.y = fmaf(o.y, factor, sum.y);
    sum.z = fmaf(o.z, factor, sum.z), sum.w = fmaf(o.w, factor, sum.w);
  }
  sums[group][column] = sum;
  if (column == 0) totals[group] = total;
  __syncthreads();
  if (group != 0) return;
  for (int other = 1; other < kCombineGroups; ++other) {
    const float4 more = sums[other][column];
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    total += totals[other];
  }
  const float inverse = softmax_inverse(total);
  const int batch = blockIdx.y / params.n_head_kv, head_kv = blockIdx.y % params.n_head_kv;
  *reinterpret_cast<uint2*>(out_row(params, batch, head_kv, row) + 4 * column) =
      make_uint2(pack_bf16(sum.x * inverse, sum.y * inverse), pack_bf16(sum.z * inverse, sum.w * inverse));
}

}  // namespace gemma4::cuda::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/opaque.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/rotation.cuh"
#include "cuda/softmax_state.cuh"
#include "cuda/tq4_attention/decode_query.cuh"

/// The second kernel of TQ4 decode: adds what the blocks of the first one left of each query row and rotates the result
/// back.
///   out = R^T sum_i 2^(m_i - m) O_i / sum_i 2^(m_i - m) l_i,   m = max_i m_i,   blocks i in order
/// A block a row. Reads n_active * (head_dim + 2) floats a row, mostly from the L2.
namespace gemma4::cuda::detail {

inline constexpr int kTq4CombineThreads = 512;

/// The result of a row from the sums of its groups [kGroups][head_dim], all threads taking part: a thread a dim. The
/// Hadamard transform crosses the lanes of a warp by shuffles and the warps through shared memory, as one signed sum.
template <int kHeadDim, int kGroups>
__device__ __forceinline__ void finish_row(const RotationParams& rotation, std::uint32_t negative,
                                           float (&sums)[kGroups][kHeadDim], float total, Bf16* target) {
  constexpr int kWarps = kHeadDim / 32, kValues = kHeadDim / 32;
  const int dim = static_cast<int>(threadIdx.x), lane = dim & 31, warp = dim / 32;
  const bool takes_part = dim < kHeadDim;  // whole warps
  const float inverse = 1.0f / total;
  float value = 0.0f;
  if (takes_part) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) value += sums[g][dim];
    value *= inverse;
    if (rotation.kind == RotationKind::kSignedHadamard) {
#pragma unroll
      for (int bit = 1; bit < 32; bit *= 2) {
        value = fmaf((lane & bit) != 0 ? -1.0f : 1.0f, value, __shfl_xor_sync(~0u, value, bit));
      }
    }
    sums[0][dim] = value;  // of this thread's dim alone until the barrier
  }
  __syncthreads();
  if (rotation.kind == RotationKind::kDenseHaar) {
    if (warp != 0) return;
    float x[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[i] = sums[0][lane * kValues + i];
    rotate_back_warp<kHeadDim>(rotation, x);
    if (total == 0.0f) {
#pragma unroll
      for (float& zero : x) zero = 0.0f;
    }
    store_values(target + lane * kValues, x);
    return;
  }
  if (!takes_part) return;
  // Bit w of the row: the sign of warp w in the sum, the parity of w & warp.
  const std::uint32_t row = ((warp & 1) != 0 ? 0xAAAAu : 0u) ^ ((warp & 2) != 0 ? 0xCCCCu : 0u) ^
                            ((warp & 4) != 0 ? 0xF0F0u : 0u) ^ ((warp & 8) != 0 ? 0xFF00u : 0u);
  float part[4] = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const std::uint32_t other = __float_as_uint(sums[0][w * 32 + lane]);
    part[w & 3] += __uint_as_float(other ^ ((row << (31 - w)) & 0x80000000u));
  }
  value = ((part[0] + part[1]) + (part[2] + part[3])) * rotation.scale;
  if (((negative >> lane) & 1u) != 0) value = -value;
  target[dim] = to_bf16(total == 0.0f ? 0.0f : value);  // a row that saw no key gives zeros, and no negative ones
}

/// The weight of each partial of row blockIdx.x of the unit, by one warp. @return the sum of all weights of the row
__device__ __forceinline__ float weigh_partials(const Tq4DecodeParams& params, const Tq4DecodeUnit& unit, int n_active,
                                                float (&weights)[kMaxRecordSplit]) {
  const int lane = static_cast<int>(threadIdx.x) & 31, slot = static_cast<int>(blockIdx.x);
  const auto ml_of = [&](int split) { return params.partial_ml[(unit.first + split) * kRowTile + slot]; };
  float maximum = kFarBelow, total = 0.0f;
  for (int split = lane; split < n_active; split += 32) {
    maximum = fmaxf(maximum, ml_of(split).x);
  }
  maximum = warp_max(maximum);
  for (int split = lane; split < n_active; split += 32) {
    const float2 ml = ml_of(split);
    const float weight = exp2_approx(ml.x - maximum);
    weights[split] = weight;
    total += weight * ml.y;
  }
  total = warp_sum(total);
  return total;
}

/// Adds the partials of one row in block order, divides, rotates back and stores it. grid: x = row of the unit, y and z
/// as in Tq4DecodeUnit. Groups of threads take every kGroups-th partial and are added in order.
/// @tparam kOfRows sequences stand for rows of one, each of which sees one key more than the row before
template <int kHeadDim, bool kOfRows = false>
__global__ void __launch_bounds__(kTq4CombineThreads)
    tq4_combine_kernel(const __grid_constant__ Tq4DecodeParams params) {
  constexpr int kColumns = kHeadDim / 4, kGroups = kTq4CombineThreads / kColumns;
  constexpr int kAhead = kHeadDim == 512 ? 9 : 4;  // partials of a group that are on their way at a time
  __shared__ __align__(16) float sums[kGroups][kHeadDim];
  __shared__ float weights[kMaxRecordSplit];
  __shared__ float row_total;
  const Tq4DecodeUnit unit = Tq4DecodeUnit::here(params);
  const auto slot = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int row = unit.row0 + slot, lane = thread & 31, group = thread / kColumns, dim = thread % kColumns * 4;
  // kv_len was written before the kernel whose end is awaited here.
  const Tq4DecodeKeys keys = decode_keys(params, kOfRows ? unit.batch : 0);
  const int dim_word = min(thread, kHeadDim - 1) / 32;
  std::uint32_t negative = params.rotation.negative[dim_word];  // read ahead, like the parameters of the first kernel
  float scale = params.rotation.scale;
  have_now(negative, scale);
  const auto partial = [&](int split) {
    return *reinterpret_cast<const float4*>(params.partial_o + ((unit.first + split) * kRowTile + slot) * kHeadDim +
                                            dim);
  };
  wait_for_previous_kernel();
  allow_next_kernel();
  if (row >= unit.n_row) return;

  float4 part[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (group + i * kGroups < keys.n_active) part[i] = partial(group + i * kGroups);
  }
  if (thread < 32) {
    const float total = weigh_partials(params, unit, keys.n_active, weights);
    if (lane == 0) row_total = total;
  }
  __syncthreads();
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const auto add = [&](const float4& value, int split) {
    const float weight = weights[split];
    sum.x = fmaf(value.x, weight, sum.x), sum.y = fmaf(value.y, weight, sum.y);
    sum.z = fmaf(value.z, weight, sum.z), sum.w = fmaf(value.w, weight, sum.w);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (group + i * kGroups < keys.n_active) add(part[i], group + i * kGroups);
  }
  for (int split = group + kAhead * kGroups; split < keys.n_active; split += kGroups) add(partial(split), split);
  *reinterpret_cast<float4*>(&sums[group][dim]) = sum;
  __syncthreads();
  const int token = token_of(params, row);
  finish_row<kHeadDim, kGroups>(params.rotation, negative, sums, row_total,
                                params.out + unit.batch * params.out_stride[0] + token * params.out_stride[1] +
                                    (unit.head_kv * params.group + row - token * params.group) * params.out_stride[2]);
}

}  // namespace gemma4::cuda::detail

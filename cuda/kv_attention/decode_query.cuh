// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/kv_attention/decode_params.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/rotation.cuh"
#include "cuda/tq4_attention.cuh"

/// How queries of kv_decode_kernel come into shared memory: a row becomes H (w * q with zeros at the rotated places)
/// and H' (c * q at the rotated places), c being their scales, each scaled by a power of two to fp16, as B fragments:
/// 16-byte piece 32 U + 4 slot + t holds dims 32 U + 2t + {0, 1, 8, 9, 16, 17, 24, 25}, R's columns behind those of V.
namespace gemma4::cuda::detail {

/// Rows that a block stages, and twice: one task a warp, the parts of V first.
inline constexpr int kKvStageTasks = 2 * kRowTile;

/// A lane's part of a row, of V or of R as its task says; the other is not touched.
template <class TTraits>
struct KvQueryPart {
  float v[TTraits::kValues];
  float r[kKvValues<TTraits::kRotated>];

  /// Reads row `slot` of the unit, zeros beyond the last.
  __device__ __forceinline__ void load(const Tq4DecodeParams& params, const Tq4DecodeUnit& unit, int slot, bool is_v) {
    if (is_v) return load_query<TTraits>(params, unit, slot, v);
    constexpr int kN = TTraits::kRotated, kCount = kKvValues<kN>, kPairs = kN / 2;
    const int row = unit.row0 + slot, lane = static_cast<int>(threadIdx.x) & 31, first = lane * kCount;
#pragma unroll
    for (float& value : r) value = 0.0f;
    if (row >= unit.n_row || first >= kN) return;
    const int token = token_of(params, row);
    const int place = first < kPairs ? first : TTraits::kHeadDim / 2 + first - kPairs;
    load_values(params.q + unit.batch * params.q_stride[0] + token * params.q_stride[1] +
                    (unit.head_kv * params.group + row - token * params.group) * params.q_stride[2] + place,
                r);
  }
};

/// Scales a rotated row by a power of two and stores it as fragments from `pieces` on. @return what it was divided by
template <int kN>
[[nodiscard]] __device__ __forceinline__ float kv_store_fragments(const float (&x)[kKvValues<kN>], int slot,
                                                                  unsigned char* pieces) {
  constexpr int kCount = kKvValues<kN>;
  const int lane = static_cast<int>(threadIdx.x) & 31, dim0 = lane * kCount;
  float largest = 0.0f;
#pragma unroll
  for (const float value : x) largest = fmaxf(largest, fabsf(value));
  largest = warp_max(largest);
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);  // biased; 0: zero, 255: not finite
  const bool scaled = exponent > 0 && exponent < 254;
  const float down = scaled ? __uint_as_float(static_cast<std::uint32_t>(254 - exponent) << 23) : 1.0f;
  const float up = scaled ? __uint_as_float(static_cast<std::uint32_t>(exponent) << 23) : 1.0f;
  const auto target = [&](int dim) {
    return pieces + ((dim >> 5) * 32 + 4 * slot + ((dim >> 1) & 3)) * 16 + ((dim >> 3) & 3) * 4 + (dim & 1) * 2;
  };
  if constexpr (kCount >= 2) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      *reinterpret_cast<std::uint32_t*>(target(dim0 + i)) = pack_f16(x[i] * down, x[i + 1] * down);
    }
  } else {
    const std::uint32_t pair = pack_f16(x[0] * down, 0.0f);  // of 16 dims the upper lanes hold the zeros behind them
    *reinterpret_cast<std::uint16_t*>(target(dim0)) = static_cast<std::uint16_t>(pair);
  }
  return up;
}

/// Folds, rotates and stores one part of row `slot`. @param weight the lane's values of w; for V's part
template <class TTraits>
__device__ __forceinline__ void stage_part(const KvDecodeParams& params, KvQueryPart<TTraits>& part,
                                           const float (&weight)[TTraits::kValues], int slot, bool is_v,
                                           unsigned char* q_smem, float* row_scale) {
  constexpr int kHeadDim = TTraits::kHeadDim, kRotated = TTraits::kRotated;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  float up, unit;
  if (is_v) {
    const bool is_rotated = (lane & 15) < 4;  // all of the lane's places, or none
#pragma unroll
    for (int i = 0; i < TTraits::kValues; ++i) part.v[i] = is_rotated ? 0.0f : part.v[i] * weight[i];
    kv_rotate_warp<kHeadDim, true>(params.base.rotation, part.v);
    up = kv_store_fragments<kHeadDim>(part.v, slot, q_smem);
    unit = params.levels.v_unit;
  } else {
    float scale[kKvValues<kRotated>];
    kv_load_scales<kHeadDim>(params.k_weight, scale);
#pragma unroll
    for (int i = 0; i < kKvValues<kRotated>; ++i) part.r[i] *= scale[i];
    kv_rotate_warp<kRotated, true>(params.r_rotation, part.r);
    up = kv_store_fragments<kRotated>(part.r, slot, q_smem + 16 * kHeadDim);
    unit = params.levels.r_unit;
  }
  if (lane == 0) row_scale[4 * (slot >> 1) + (is_v ? 0 : 2) + (slot & 1)] = params.base.scale_log2 * unit * up;
}

}  // namespace gemma4::cuda::detail

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

/// Of a block of a call of rows: which of its group's tiles is its first, and whether its rows are those that begin a
/// record more than the call's first (cuda/kv_attention/rows.cuh). grid: z = 2 * groups of tiles.
template <class TTraits>
struct KvRowsBlock {
  int first_tile;
  bool is_later;

  [[nodiscard]] static __device__ __forceinline__ KvRowsBlock here() {
    const int z = static_cast<int>(blockIdx.z), n_group = static_cast<int>(gridDim.z) / 2;
    return {(z < n_group ? z : z - n_group) * TTraits::kRowTiles, z >= n_group};
  }
};

/// What a block works on: kRowTiles tiles of eight rows of a KV head. grid: y = KV head, z = batch * groups of tiles,
/// or as in KvRowsBlock, where tokens stand for the batch.
/// @param tile of the group; it may lie behind the last one
template <class TTraits>
[[nodiscard]] __device__ __forceinline__ Tq4DecodeUnit kv_unit(const Tq4DecodeParams& params, int tile) {
  const auto head = static_cast<int>(blockIdx.y), z = static_cast<int>(blockIdx.z);
  if constexpr (TTraits::kOfRows) {
    const int index = KvRowsBlock<TTraits>::here().first_tile + tile, token = index / params.n_row_tile;
    return {token, head, kRowTile * (index - token * params.n_row_tile), token < params.n_token ? params.group : 0,
            (std::int64_t{index} * params.n_head_kv + head) * params.n_split};
  }
  if constexpr (TTraits::kRowTiles == 1) return Tq4DecodeUnit::here(params);
  const int n_group = (params.n_row_tile + TTraits::kRowTiles - 1) / TTraits::kRowTiles, batch = z / n_group;
  const int index = (z - batch * n_group) * TTraits::kRowTiles + tile;
  return {batch, head, kRowTile * index, params.n_query * params.group,
          ((std::int64_t{batch} * params.n_row_tile + index) * params.n_head_kv + head) * params.n_split};
}

/// The keys of a block. Of a call of rows those of its rows that have equally many records, the call's first or its
/// last having them; n_active is 0 where it has no such row.
template <class TTraits>
[[nodiscard]] __device__ __forceinline__ Tq4DecodeKeys kv_keys(const Tq4DecodeParams& params) {
  if constexpr (!TTraits::kOfRows) return decode_keys(params);
  const auto block = KvRowsBlock<TTraits>::here();
  const int given = given_kv_len(params), last = params.n_token - 1;
  const Tq4DecodeKeys first_keys = keys_of(params, given), last_keys = keys_of(params, given + last);
  const int begin = block.first_tile / params.n_row_tile;
  const int end = min(last, (block.first_tile + TTraits::kRowTiles - 1) / params.n_row_tile);
  Tq4DecodeKeys keys = block.is_later ? last_keys : first_keys;
  const bool has_rows = keys_of(params, given + (block.is_later ? end : begin)).n_record == keys.n_record;
  if (!has_rows || (block.is_later && first_keys.n_record == last_keys.n_record)) keys.n_active = 0;
  keys.kv_len = keys_of(params, given + begin).kv_len;  // that all of its rows see
  return keys;
}

/// Whether a tile's rows are the block's.
template <class TTraits>
[[nodiscard]] __device__ __forceinline__ bool kv_has_tile(const Tq4DecodeParams& params, const Tq4DecodeUnit& rows,
                                                          const Tq4DecodeKeys& keys) {
  if constexpr (!TTraits::kOfRows) return rows.row0 < rows.n_row;
  return rows.row0 < rows.n_row && decode_keys(params, rows.batch).n_record == keys.n_record;
}

/// A row that a block stages, its part of V or of R: one task a warp, the parts of V first.
template <class TTraits>
struct KvStageTask {
  static constexpr int kRows = kRowTile * TTraits::kRowTiles, kCount = 2 * kRows;
  int tile, slot;
  bool is_v;

  [[nodiscard]] static __device__ __forceinline__ KvStageTask of(int task) {
    return {task % kRows / kRowTile, task % kRowTile, task < kRows};
  }
};

/// A lane's part of a row, of V or of R as its task says; the other is not touched.
template <class TTraits>
struct KvQueryPart {
  float v[TTraits::kValues];
  float r[kKvValues<TTraits::kRotated>];

  /// Reads row `slot` of the unit, zeros beyond the last.
  __device__ __forceinline__ void load(const Tq4DecodeParams& params, const KvStageTask<TTraits>& task) {
    const Tq4DecodeUnit unit = kv_unit<TTraits>(params, task.tile);
    const int slot = task.slot;
    if (task.is_v) return load_query<TTraits>(params, unit, slot, v);
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

/// What a lane's values are folded with: w for V's part, the scales of R for R's (the first few).
template <class TTraits>
__device__ __forceinline__ void load_factors(const float* k_weight, bool is_v, float (&factor)[TTraits::kValues]) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if (is_v) return load_values(k_weight + lane * TTraits::kValues, factor);
  float scale[kKvValues<TTraits::kRotated>];
  kv_load_scales<TTraits::kHeadDim>(k_weight, scale);
#pragma unroll
  for (int i = 0; i < kKvValues<TTraits::kRotated>; ++i) factor[i] = scale[i];
}

/// Folds, rotates and stores one part of a row.
template <class TTraits>
__device__ __forceinline__ void stage_part(const KvDecodeParams& params, KvQueryPart<TTraits>& part,
                                           const float (&factor)[TTraits::kValues], const KvStageTask<TTraits>& task,
                                           unsigned char* smem) {
  constexpr int kHeadDim = TTraits::kHeadDim, kRotated = TTraits::kRotated;
  const int lane = static_cast<int>(threadIdx.x) & 31, slot = task.slot;
  unsigned char* const q_smem = smem + TTraits::kQOffset + task.tile * TTraits::kQTileBytes;
  auto* const row_scale = reinterpret_cast<float*>(smem + TTraits::kScaleOffset + 64 * task.tile);
  float up, unit;
  if (task.is_v) {
    const bool is_rotated = (lane & 15) < 4;  // all of the lane's places, or none
#pragma unroll
    for (int i = 0; i < TTraits::kValues; ++i) part.v[i] = is_rotated ? 0.0f : part.v[i] * factor[i];
    kv_rotate_warp<kHeadDim, true>(params.base.rotation, part.v);
    up = kv_store_fragments<kHeadDim>(part.v, slot, q_smem);
    unit = params.levels.v_unit;
  } else {
#pragma unroll
    for (int i = 0; i < kKvValues<kRotated>; ++i) part.r[i] *= factor[i];
    kv_rotate_warp<kRotated, true>(params.r_rotation, part.r);
    up = kv_store_fragments<kRotated>(part.r, slot, q_smem + 16 * kHeadDim);
    unit = params.levels.r_unit;
  }
  if (lane == 0) row_scale[4 * (slot >> 1) + (task.is_v ? 0 : 2) + (slot & 1)] = params.base.scale_log2 * unit * up;
}

/// The tasks of a warp, every so many warps one. What the first needs is read as soon as it may be, and of a kernel
/// with fewer warps than tasks the second one's, too, where that is a part of R behind one of V.
template <class TTraits>
struct KvStaging {
  using Task = KvStageTask<TTraits>;
  static constexpr int kWarps = TTraits::kTeamWarps * TTraits::kPairs;
  static constexpr bool kAhead = TTraits::kBatch > 1 && kWarps < Task::kCount&& kWarps >= Task::kRows;
  static_assert(!kAhead || 2 * kWarps >= Task::kCount, "a warp has two tasks at most");
  Task task;
  KvQueryPart<TTraits> part;
  float factor[TTraits::kValues], factor_ahead[kAhead ? TTraits::kValues : 1];

  __device__ __forceinline__ void load_weights(const float* k_weight, int warp) {
    task = Task::of(warp);
    load_factors<TTraits>(k_weight, task.is_v, factor);  // which no kernel writes
    if constexpr (kAhead) load_factors<TTraits>(k_weight, false, factor_ahead);
  }
  __device__ __forceinline__ void load_queries(const Tq4DecodeParams& params, int warp) {
    if (warp < Task::kCount) part.load(params, task);
    if constexpr (kAhead) {
      if (warp + kWarps < Task::kCount) part.load(params, Task::of(warp + kWarps));
    }
  }
  __device__ __forceinline__ void stage(const KvDecodeParams& params, int warp, unsigned char* smem) {
    if constexpr (kAhead) {
      stage_part<TTraits>(params, part, factor, task, smem);
      if (warp + kWarps < Task::kCount) {
        stage_part<TTraits>(params, part, factor_ahead, Task::of(warp + kWarps), smem);
      }
    } else {
      for (int index = warp; index < Task::kCount; index += kWarps) {
        if (index != warp) {
          task = Task::of(index);
          part.load(params.base, task);
          load_factors<TTraits>(params.k_weight, task.is_v, factor);
        }
        stage_part<TTraits>(params, part, factor, task, smem);
      }
    }
  }
};

}  // namespace gemma4::cuda::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/rotation.cuh"
#include "cuda/tq4_attention/decode_params.cuh"
#include "cuda/tq4_cache.cuh"

/// Which rows and keys a block of tq4_decode_kernel works on, and how its queries come into shared memory: rotated,
/// scaled and as fp16 fragments (cuda/tq4_attention/decode.cuh).
namespace gemma4::cuda::detail {

/// Position of a thread: its pair, its half of the dims, and within the warp the lane 4 g + t.
struct Tq4DecodeThread {
  int pair, half, lane, g, t;

  [[nodiscard]] static __device__ __forceinline__ Tq4DecodeThread here() {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) & 31;
    return {warp >> 1, warp & 1, lane, lane >> 2, lane & 3};
  }
};

/// floor(n * i / of) for i <= of, in 32 bits.
[[nodiscard]] __device__ __forceinline__ int share(int n, int i, int of) {
  return n / of * i + n % of * i / of;
}

/// What a block works on: kRowTile rows of a KV head from row0 on. grid: y = KV head, z = batch * n_row_tile + tile.
struct Tq4DecodeUnit {
  int batch, head_kv, row0;
  int n_row;           ///< rows of the KV head in all
  std::int64_t first;  ///< partial of the first split

  [[nodiscard]] static __device__ __forceinline__ Tq4DecodeUnit here(const Tq4DecodeParams& params) {
    return of(params, static_cast<int>(blockIdx.z));
  }
  /// @param z as in the grid
  [[nodiscard]] static __device__ __forceinline__ Tq4DecodeUnit of(const Tq4DecodeParams& params, int z) {
    const auto head = static_cast<int>(blockIdx.y);
    const int batch = params.n_row_tile == 1 ? z : z / params.n_row_tile;  // divisions cost before the first load
    return {batch, head, kRowTile * (z - batch * params.n_row_tile), params.n_query * params.group,
            (std::int64_t{z} * params.n_head_kv + head) * params.n_split};
  }
};

/// Where a block of tq4_decode_kernel is. In a call of rows each is a token of one sequence, and the blocks that read
/// the same records stand behind each other, x = split * n_token + token, so that all but one find them in the L2.
template <class TTraits>
struct Tq4DecodePlace {
  Tq4DecodeUnit unit;
  int split, sequence, token;

  [[nodiscard]] static __device__ __forceinline__ Tq4DecodePlace here(const Tq4DecodeParams& params) {
    const auto x = static_cast<int>(blockIdx.x), z = static_cast<int>(blockIdx.z);
    if constexpr (!TTraits::kOfRows) {
      const Tq4DecodeUnit unit = Tq4DecodeUnit::of(params, z);
      return {unit, x, unit.batch, 0};
    }
    const int split = x / params.n_token, token = x - split * params.n_token;
    return {Tq4DecodeUnit::of(params, token * params.n_row_tile + z), split, 0, token};
  }
};

/// Token of a row of a KV head.
[[nodiscard]] __device__ __forceinline__ int token_of(const Tq4DecodeParams& params, int row) {
  return params.n_query == 1 ? 0 : row / params.group;
}

/// The keys of a call.
struct Tq4DecodeKeys {
  int kv_len, n_record;
  int n_active;  ///< blocks that have records
};

[[nodiscard]] __device__ __forceinline__ int given_kv_len(const Tq4DecodeParams& params) {
  return params.kv_len != nullptr ? *params.kv_len : params.kv_len_host;
}

[[nodiscard]] __device__ __forceinline__ Tq4DecodeKeys keys_of(const Tq4DecodeParams& params, int given) {
  const int kv_len = max(0, min(given, static_cast<int>(params.cache.buffer_len)));
  const int n_record = (kv_len + kTq4RecordTokens - 1) / kTq4RecordTokens;
  return {kv_len, n_record, min(params.n_split, n_record)};
}

/// @param token of a call of rows, each of which sees one key more than the row before
[[nodiscard]] __device__ __forceinline__ Tq4DecodeKeys decode_keys(const Tq4DecodeParams& params, int token = 0) {
  return keys_of(params, given_kv_len(params) + token);
}

/// One more than the last key that row `row` may see before any mask; 0 for a row beyond the last.
[[nodiscard]] __device__ __forceinline__ int key_limit(const Tq4DecodeParams& params, int kv_len, int row) {
  if (row >= params.n_query * params.group) return 0;
  return params.causal ? max(0, min(kv_len, kv_len - params.n_query + token_of(params, row) + 1)) : kv_len;
}

/// Reads row `slot` of the unit, zeros beyond the last.
template <class TTraits>
__device__ __forceinline__ void load_query(const Tq4DecodeParams& params, const Tq4DecodeUnit& unit, int slot,
                                           float (&x)[TTraits::kValues]) {
  const int row = unit.row0 + slot;
  if (row < unit.n_row) {
    const int token = token_of(params, row);
    load_values(params.q + unit.batch * params.q_stride[0] + token * params.q_stride[1] +
                    (unit.head_kv * params.group + row - token * params.group) * params.q_stride[2] +
                    static_cast<int>(threadIdx.x & 31) * TTraits::kValues,
                x);
  } else {
#pragma unroll
    for (float& value : x) value = 0.0f;
  }
}

/// Rotates row `slot`, scales it by a power of two and stores it as B fragments: 16-byte piece u * 32 + 4 * slot + t
/// holds the eight dims that word u of lane t of the K codes holds.
template <class TTraits>
__device__ __forceinline__ void stage_query(const Tq4DecodeParams& params, float (&x)[TTraits::kValues],
                                            std::uint32_t negative, int slot, unsigned char* q_smem, float* row_scale) {
  constexpr int kValues = TTraits::kValues, kHeadDim = TTraits::kHeadDim;
  const int lane = threadIdx.x & 31, dim0 = lane * kValues;
  rotate_warp<kHeadDim>(params.rotation, negative, x);
  float largest = 0.0f;
#pragma unroll
  for (const float value : x) largest = fmaxf(largest, fabsf(value));
  largest = warp_max(largest);
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);  // biased; 0: zero, 255: not finite
  const bool scaled = exponent > 0 && exponent < 254;
  const float down = scaled ? __uint_as_float(static_cast<std::uint32_t>(254 - exponent) << 23) : 1.0f;
  const float up = scaled ? __uint_as_float(static_cast<std::uint32_t>(exponent) << 23) : 1.0f;
  if (lane == 0) row_scale[slot] = params.scale_log2 * params.levels.k_scale * up;
#pragma unroll
  for (int i = 0; i < kValues; i += 2) {
    const int dim = dim0 + i;
    const int t = kHeadDim == 64 ? dim >> 4 : (dim >> 5) & 3;
    const int u = kHeadDim == 64 ? (dim >> 3) & 1 : ((dim >> 7) << 2) + ((dim >> 3) & 3);
    *reinterpret_cast<std::uint32_t*>(q_smem + (u * 32 + 4 * slot + t) * 16 + (dim & 7) * 2) =
        pack_f16(x[i] * down, x[i + 1] * down);
  }
}

}  // namespace gemma4::cuda::detail

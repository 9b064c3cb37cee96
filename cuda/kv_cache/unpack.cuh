// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/kv_cache/layout.cuh"
#include "cuda/kv_cache/store.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "gemma4/float16.hpp"

/// K and V rebuilt from the records of a cache of one vector for both: not rotated any more, w * V with c * R in its
/// places and V, as rows that any attention can read.
namespace gemma4::cuda::detail {

template <class TOut>
struct KvUnpackParams {
  ConstKvRecords cache;
  KvCodecParams codec;
  const float* k_weight = nullptr;  ///< [head_dim]
  TOut* k = nullptr;                ///< [n_head, rows, head_dim]
  TOut* v = nullptr;
  std::int64_t rows = 0;
  int batch = 0, head0 = 0;
  const std::int32_t* kv_len = nullptr;  ///< null: kv_len_host
  int kv_len_host = 0;
};

inline constexpr int kKvUnpackWarps = 8;

/// V and R of a token, as stored vectors.
template <int kHeadDim, class TOut>
__device__ __forceinline__ void kv_unpack_token(const KvUnpackParams<TOut>& params, const std::byte* record, int token,
                                                const float (&level)[2][KvCodebook::kMaxHalf],
                                                float (&v)[kHeadDim / 32], float (&r)[kKvValues<kHeadDim / 4>]) {
  constexpr int kRotated = kHeadDim / 4, kRValues = kKvValues<kRotated>;
  const ConstKvRecords& cache = params.cache;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if (!cache.has_codes()) {
    const auto* const v_row = reinterpret_cast<const Bf16*>(record) + token * kHeadDim;
    const auto* const r_row = reinterpret_cast<const Bf16*>(record + cache.r_offset()) + token * kRotated;
    load_values(v_row + lane * (kHeadDim / 32), v);
    if (kRotated >= 32 || lane < kRotated) load_values(r_row + lane * kRValues, r);
    return;
  }
  const auto* const norms = reinterpret_cast<const KvNorm*>(record + cache.norms_offset());
  const float v_norm = to_float(norms[kv_norm_place(true, token)]);
  const float r_norm = to_float(norms[kv_norm_place(false, token)]);
  kv_read_vector<kHeadDim>(record, cache.v_bits, level[0], v_norm, token, v);
  kv_read_vector<kRotated>(record + cache.r_offset(), cache.r_bits, level[1], r_norm, token, r);
  kv_rotate_warp<kHeadDim, false>(params.codec.v_rotation, v);
  kv_rotate_warp<kRotated, false>(params.codec.r_rotation, r);
}

/// One warp a token. grid: x over records, y = head.
template <int kHeadDim, class TOut>
__global__ void __launch_bounds__(32 * kKvUnpackWarps, 3)
    kv_unpack_kernel(const __grid_constant__ KvUnpackParams<TOut> params) {
  constexpr int kValues = kHeadDim / 32, kRotated = kHeadDim / 4, kRValues = kKvValues<kRotated>;
  __shared__ float level[2][KvCodebook::kMaxHalf];
  __shared__ float rotated[kKvUnpackWarps][kRotated];
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) / 32;
  if (warp < 2) level[warp][lane] = (warp == 0 ? params.codec.v : params.codec.r).level[lane];
  const std::int64_t kv_len = params.kv_len != nullptr ? *params.kv_len : params.kv_len_host;
  const std::int64_t n_row = min(max(kv_len, std::int64_t{0}), params.rows), n_record = (n_row + 15) / 16;
  float weight[kValues];
  load_values(params.k_weight + lane * kValues, weight);
  float scale[kRValues];
  kv_load_scales<kHeadDim>(params.k_weight, scale);
  __syncthreads();
  for (std::int64_t item = blockIdx.x * std::int64_t{kKvUnpackWarps} + warp; item < n_record * kKvRecordTokens;
       item += std::int64_t{gridDim.x} * kKvUnpackWarps) {
    const std::int64_t r_index = item / kKvRecordTokens;
    const std::byte* const record = params.cache.record(params.batch, params.head0 + blockIdx.y, r_index);
    float v[kValues], r[kRValues] = {};
    kv_unpack_token<kHeadDim>(params, record, static_cast<int>(item % kKvRecordTokens), level, v, r);
    const std::int64_t row = (blockIdx.y * params.rows + item) * kHeadDim + lane * kValues;
    store_values(params.v + row, v);
    if (kRotated >= 32 || lane < kRotated) {
#pragma unroll
      for (int i = 0; i < kRValues; ++i) rotated[warp][lane * kRValues + i] = r[i] * scale[i];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] *= weight[i];
    if ((lane & 15) < 4) {  // as kv_gather_rotated() took them
      const float* const source = rotated[warp] + (lane < 16 ? lane : lane - 12) * kValues;
#pragma unroll
      for (int i = 0; i < kValues; ++i) v[i] = source[i];
    }
    store_values(params.k + row, v);
    __syncwarp();
  }
}

}  // namespace gemma4::cuda::detail

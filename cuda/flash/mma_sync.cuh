// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/flash/mma_load.cuh"
#include "cuda/flash/mma_merge.cuh"
#include "cuda/flash/params.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared_memory.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/softmax_state.cuh"

/// Flash attention with mma.sync: every head_dim, group, mask and source of keys, on every device from sm_80.
/// It is the path of decode (few rows, keys split over blocks) and the prefill of devices without wgmma.
///
/// A block holds 16 * warps_m rows of one KV head and walks over tiles of keys; warps_k warps share the keys of a tile
/// and are merged at the end in a fixed order; warps_d warps share the output dimensions (each computes all scores).
/// With n_split > 1 a block takes one slice of the tiles and leaves (max, sum, unnormalised output) for combine_kernel.
/// Slices are cut from the number of keys alone, so the result depends on n_split and kv_len, never on the buffer.
namespace gemma4::cuda::detail {

/// Scores of 16 rows against 16 keys, summed over all of head_dim in two chains.
template <class TTraits>
__device__ __forceinline__ void score_keys(float (&s)[2][4], std::uint32_t q_smem, std::uint32_t k_smem, int row0,
                                           int key0) {
  const int lane = threadIdx.x & 31;
  const int a_row = row0 + (lane & 15), b_row = key0 + (lane & 7) + ((lane >> 4) << 3);
  float chain[2][2][4] = {};
#pragma unroll 8
  for (int step = 0; step < TTraits::kHeadDim / 16; ++step) {
    std::uint32_t a[4], b[4];
    load_matrix_x4(a, q_smem + swizzled<TTraits>(a_row, 2 * step + (lane >> 4)));
    load_matrix_x4(b, k_smem + swizzled<TTraits>(b_row, 2 * step + ((lane >> 3) & 1)));
    mma_bf16(chain[step & 1][0], a, b[0], b[1]);
    mma_bf16(chain[step & 1][1], a, b[2], b[3]);
  }
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[tile][i] = chain[0][tile][i] + chain[1][tile][i];
  }
}

/// Scales the scores and hides the keys that a row does not see.
__device__ __forceinline__ void hide_keys(float (&s)[2][4], const FlashParams& params, int batch, int first,
                                          const int (&token)[2], const KeyRange (&keys)[2]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int half = (i >> 1) & 1;
    const int position = first + (i >> 2) * 8 + (threadIdx.x & 3) * 2 + (i & 1);
    bool visible = position >= keys[half].lo && position < keys[half].hi;
    if (params.mask != nullptr && visible) {
      visible = params.mask[(static_cast<std::int64_t>(batch) * params.n_query + token[half]) * params.mask_extent +
                            position] != 0;
    }
    float& score = s[i >> 2][i & 3];
    score = visible ? score * params.scale_log2 : -INFINITY;
  }
}

/// Absorbs 16 scored keys into the state: new maximum, probabilities, and o = o * alpha + p V.
template <class TTraits>
__device__ __forceinline__ void absorb(FlashState<TTraits>& state, float (&s)[2][4], std::uint32_t v_smem, int key0,
                                       int dim0) {
  float alpha[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float maximum = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
    alpha[half] = state.row[half].raise(quad_max(maximum));
    const float reference = state.row[half].reference();
    float sum = 0.0f;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& p = s[tile][2 * half + i];
        p = exp2_approx(p - reference);
        sum += p;
      }
    }
    state.row[half].sum = state.row[half].sum * alpha[half] + sum;
  }
  if (__any_sync(~0u, alpha[0] != 1.0f || alpha[1] != 1.0f)) {
#pragma unroll
    for (auto& tile : state.o) {
      tile[0] *= alpha[0], tile[1] *= alpha[0];
      tile[2] *= alpha[1], tile[3] *= alpha[1];
    }
  }
  const std::uint32_t p[4] = {pack_bf16(s[0][0], s[0][1]), pack_bf16(s[0][2], s[0][3]), pack_bf16(s[1][0], s[1][1]),
                              pack_bf16(s[1][2], s[1][3])};
  const int lane = threadIdx.x & 31;
  const int v_row = key0 + (lane & 15);
#pragma unroll
  for (int pair = 0; pair < TTraits::kWarpDims / 16; ++pair) {
    std::uint32_t b[4];
    load_matrix_x4_transposed(b, v_smem + swizzled<TTraits>(v_row, dim0 / 8 + 2 * pair + (lane >> 4)));
    mma_bf16(state.o[2 * pair], p, b[0], b[1]);
    mma_bf16(state.o[2 * pair + 1], p, b[2], b[3]);
  }
}

/// The keys of split blockIdx.z among those of the whole call, cut down by whole tiles to what the block's rows can
/// see. `lo` is where the split's first tile begins.
template <class TTraits>
[[nodiscard]] __device__ __forceinline__ KeyRange block_keys(const FlashParams& params, const KeyExtent& extent,
                                                             KeyRange call, int first_token, int last_token) {
  const int n_key = max(0, call.hi - call.lo), split = static_cast<int>(blockIdx.z);
  const int each = n_key / params.n_split, rest = n_key % params.n_split;
  KeyRange keys{call.lo + split * each + min(split, rest), 0};
  keys.hi = keys.lo + each + (split < rest ? 1 : 0);
  if (params.causal_skip || params.ring_len > 0) {
    const int unseen = visible_keys(params, extent, first_token).lo - keys.lo;
    if (unseen > 0) keys.lo += unseen / TTraits::kTileKv * TTraits::kTileKv;
    keys.hi = min(keys.hi, visible_keys(params, extent, last_token).hi);
  }
  return keys;
}

/// Tokens of the two rows of this thread, and which of the block's keys they see.
template <class TTraits>
__device__ __forceinline__ void rows_of_thread(const FlashParams& params, const FlashBlock<TTraits>& block,
                                               const KeyExtent& extent, KeyRange of_block, int (&token)[2],
                                               KeyRange (&keys)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    token[half] =
        min(params.n_query - 1, (block.row0 + block.warp_m * 16 + (threadIdx.x & 31) / 4 + 8 * half) / params.group);
    keys[half] = visible_keys(params, extent, token[half]);
    keys[half] = {max(keys[half].lo, of_block.lo), min(keys[half].hi, of_block.hi)};
  }
}

/// grid: x = row tile (longest first), y = batch * n_head_kv, z = split.
template <class TTraits>
__global__ void __launch_bounds__(TTraits::kThreads, 1) flash_mma_kernel(const __grid_constant__ FlashParams params) {
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  const std::uint32_t q_smem = shared_address(smem_bytes), kv_smem = q_smem + TTraits::kQBytes;
  const auto block = FlashBlock<TTraits>::here(params);

  if (!params.old_at_rest) {
    wait_for_previous_kernel();
    allow_next_kernel();
  }
  const KeyExtent extent = key_extent(params, block.batch);
  const KeyRange call{visible_keys(params, extent, 0).lo, extent.kv_end};
  const int last_token = min(params.n_query - 1, (block.row0 + TTraits::kRows - 1) / params.group);
  const KeyRange mine = block_keys<TTraits>(params, extent, call, block.row0 / params.group, last_token);
  const int n_tile = max(0, (mine.hi - mine.lo + TTraits::kTileKv - 1) / TTraits::kTileKv);
  int token[2];
  KeyRange keys[2];
  rows_of_thread(params, block, extent, mine, token, keys);
  const auto fetch = [&](int tile, int from, int to) {
    if (tile >= n_tile || from >= to) return;
    load_keys(params, block, extent, mine, kv_smem + tile % TTraits::kStages * 2 * TTraits::kTileBytes,
              mine.lo + tile * TTraits::kTileKv, {from, to});
  };
  int n_early = 0;  // rows of the first tile that are fetched under the end of the kernel before
  if (params.old_at_rest) {
    n_early = max(0, min(TTraits::kTileKv, extent.fresh_begin - mine.lo));
    fetch(0, 0, n_early);
    wait_for_previous_kernel();
    allow_next_kernel();
  }
  FlashState<TTraits> state;
  state.init();
#pragma unroll 1
  for (int stage = 0; stage < TTraits::kStages; ++stage) {
    fetch(stage, stage == 0 ? n_early : 0, TTraits::kTileKv);
    if (stage == 0) load_queries(params, block, q_smem);
    copy_async_commit();
  }
#pragma unroll 1
  for (int tile = 0; tile < n_tile; ++tile) {
    copy_async_wait<TTraits::kStages - 1>();
    __syncthreads();
    const std::uint32_t k_smem = kv_smem + tile % TTraits::kStages * 2 * TTraits::kTileBytes;
#pragma unroll 1
    for (int key0 = block.warp_k * 16; key0 < TTraits::kTileKv; key0 += 16 * TTraits::kWarpsK) {
      float s[2][4];
      score_keys<TTraits>(s, q_smem, k_smem, block.warp_m * 16, key0);
      hide_keys(s, params, block.batch, mine.lo + tile * TTraits::kTileKv + key0, token, keys);
      absorb(state, s, k_smem + TTraits::kTileBytes, key0, block.dim0);
    }
    __syncthreads();
    fetch(tile + TTraits::kStages, 0, TTraits::kTileKv);
    copy_async_commit();
  }
  copy_async_wait<0>();
  if (params.tile_count != nullptr && threadIdx.x == 0) {
    atomicAdd(params.tile_count, static_cast<unsigned long long>(n_tile));
  }
  merge_and_store(state, params, block, reinterpret_cast<float*>(smem_bytes));
}

}  // namespace gemma4::cuda::detail

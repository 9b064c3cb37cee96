// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/flash/wgmma.cuh"

/// Flash attention at head_dim 256 on sm_90a, over a flat cache or over a ring and a fresh chunk: 128 rows a block.
///
/// Two consumer warpgroups hold 64 rows each, with all 256 output dimensions in registers, and share the keys; the
/// third warpgroup feeds them through the tensor copy engine. In each, the scores of tile j + 1 run under the softmax
/// of tile j, and the two warpgroups cover each other's softmax. Q 64 KiB, K and V two stages of 32 KiB each.
///
/// A tile is 64 neighbouring positions of one source. Ring tiles start at multiples of 64, so they never wrap (ring_len
/// is a multiple of 64); fresh tiles start at the chunk's first position. The ring tile in which the chunk begins is
/// cut there.
namespace gemma4::cuda::detail {

struct Flash256 {
  static constexpr int kHeadDim = 256;
  static constexpr int kRows = 128;
  static constexpr int kThreads = 384;
  static constexpr int kStages = 2;
  static constexpr int kTileBytes = kWgmmaKeys * kHeadDim * 2;
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kRows * kHeadDim * 2;
  static constexpr int kV = kK + kStages * kTileBytes;
  static constexpr int kBarriers = kV + kStages * kTileBytes;
  static constexpr int kSmemBytes = kBarriers + 8 * (1 + 4 * kStages) + 1024;  ///< 1024 to align the base
  static constexpr int kQFull = 0, kKFull = 1, kKEmpty = kKFull + kStages, kVFull = kKEmpty + kStages,
                       kVEmpty = kVFull + kStages;
  static constexpr int kGroup = 1;  ///< named barrier of one consumer warpgroup, + its number
  static_assert(kSmemBytes <= 232448, "more than a block of sm_90 may have");
};

/// What every warp of a block knows about its work.
struct Flash256Block {
  std::uint32_t smem;  ///< aligned base
  int batch, head_kv, token0;
  KeyExtent extent;
  KeyRange call;            ///< positions that any query of the call sees
  int old_first, n_old;     ///< position of the first ring tile; how many
  int fresh_first, n_tile;  ///< position of the first fresh tile; tiles of both sources
  [[nodiscard]] __device__ std::uint32_t barrier(int number) const {
    return smem + Flash256::kBarriers + 8 * static_cast<std::uint32_t>(number);
  }
  [[nodiscard]] __device__ bool is_old(int tile) const { return tile < n_old; }
  [[nodiscard]] __device__ int first_position(int tile) const {
    return is_old(tile) ? old_first + tile * kWgmmaKeys : fresh_first + (tile - n_old) * kWgmmaKeys;
  }
  /// Positions of a tile that hold keys of this call.
  [[nodiscard]] __device__ KeyRange valid(int tile) const {
    return is_old(tile) ? KeyRange{call.lo, extent.fresh_begin} : KeyRange{extent.fresh_begin, extent.kv_end};
  }
};

__device__ __forceinline__ void plan_tiles(Flash256Block& block, const FlashParams& params) {
  const int last_token = min(params.n_query, block.token0 + Flash256::kRows / params.group) - 1;
  const KeyRange first = visible_keys(params, block.extent, min(params.n_query - 1, block.token0));
  const bool skip = params.causal_skip || params.ring_len > 0;
  const int begin = skip ? first.lo : 0;
  const int stop = skip ? visible_keys(params, block.extent, last_token).hi : block.extent.kv_end;
  const int fresh_begin = block.extent.fresh_begin;
  block.call = {visible_keys(params, block.extent, 0).lo, block.extent.kv_end};
  block.old_first = begin / kWgmmaKeys * kWgmmaKeys;
  block.n_old = begin < fresh_begin ? (fresh_begin - block.old_first + kWgmmaKeys - 1) / kWgmmaKeys : 0;
  block.fresh_first = fresh_begin + max(0, begin - fresh_begin) / kWgmmaKeys * kWgmmaKeys;
  block.n_tile = block.n_old + max(0, stop - block.fresh_first + kWgmmaKeys - 1) / kWgmmaKeys;
}

/// The producer: one thread issues every copy of the block.
__device__ __forceinline__ void produce_256(const Flash256Block& block, const FlashParams& params,
                                            const FlashMaps& maps) {
  using T = Flash256;
  mbarrier_expect(block.barrier(T::kQFull), T::kRows * T::kHeadDim * 2);
  tensor_load(block.smem + T::kQ, &maps.q, block.barrier(T::kQFull), 0, block.head_kv * params.group, block.token0, 0,
              block.batch);
  const auto load = [&](int tile, bool keys) {
    const int stage = tile % T::kStages, phase = (tile / T::kStages) & 1;
    const std::uint32_t full = block.barrier((keys ? T::kKFull : T::kVFull) + stage);
    mbarrier_wait(block.barrier((keys ? T::kKEmpty : T::kVEmpty) + stage), phase ^ 1);
    mbarrier_expect(full, T::kTileBytes);
    const bool old = block.is_old(tile);
    const int position = block.first_position(tile);
    const int row = old ? ring_slot(position, params.ring_len) : position - block.extent.fresh_begin;
    const CUtensorMap* map = old ? (keys ? &maps.old_k : &maps.old_v) : (keys ? &maps.k : &maps.v);
    tensor_load(block.smem + (keys ? T::kK : T::kV) + stage * T::kTileBytes, map, full, 0, row, 0, block.head_kv,
                block.batch);
  };
  load(0, true);
  for (int tile = 0; tile < block.n_tile; ++tile) {
    if (tile + 1 < block.n_tile) load(tile + 1, true);
    load(tile, false);
  }
}

/// Issues the scores of `tile` for the 64 rows of warpgroup `part`, as one committed group.
__device__ __forceinline__ void issue_scores(const Flash256Block& block, float (&s)[32], int tile, int part) {
  using T = Flash256;
  const int stage = tile % T::kStages;
  const std::uint64_t q = opaque(wgmma_operand(block.smem + T::kQ + part * 8192, 0, 1024));
  const std::uint64_t k = opaque(wgmma_operand(block.smem + T::kK + stage * T::kTileBytes, 0, 1024));
  mbarrier_wait(block.barrier(T::kKFull + stage), (tile / T::kStages) & 1);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < T::kHeadDim / 16; ++step) {
    const std::uint32_t inside = step % 4 * 32;
    wgmma_m64n64k16(s, wgmma_advance(q, step / 4 * T::kRows * 128 + inside),
                    wgmma_advance(k, step / 4 * kWgmmaKeys * 128 + inside), step > 0);
  }
  wgmma_commit();
}

/// Waits for V of `tile`; clears its values that are not keys of this call.
__device__ __forceinline__ void wait_values(const Flash256Block& block, int tile, int part) {
  using T = Flash256;
  const int stage = tile % T::kStages, first = block.first_position(tile);
  mbarrier_wait(block.barrier(T::kVFull + stage), (tile / T::kStages) & 1);
  const KeyRange valid = block.valid(tile);
  if (first >= valid.lo && first + kWgmmaKeys <= valid.hi) return;
  // Both warpgroups write the same zeros, so neither waits for the other.
  clear_rows(block.smem + T::kV + stage * T::kTileBytes, kWgmmaKeys, kWgmmaKeys, valid.lo - first, valid.hi - first);
  fence_async_shared();
  named_barrier_sync(T::kGroup + part, 128);
}

/// Issues o += p V as one committed group.
__device__ __forceinline__ void issue_values(const Flash256Block& block, float (&o)[128],
                                             const std::uint32_t (&p)[4][4], int tile) {
  using T = Flash256;
  const std::uint64_t v =
      opaque(wgmma_operand(block.smem + T::kV + tile % T::kStages * T::kTileBytes, kWgmmaKeys * 128, 1024));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) wgmma_m64n256k16(o, p[step], wgmma_advance(v, step * 2048));
  wgmma_commit();
}

__device__ __forceinline__ void release_stage(const Flash256Block& block, int empty, int tile) {
  if ((threadIdx.x & 127) == 0) mbarrier_arrive(block.barrier(empty + tile % Flash256::kStages));
}

/// Hides what the rows of this thread do not see, where the tile has any such key.
__device__ __forceinline__ void hide_tile(const Flash256Block& block, float (&s)[32], int tile, KeyRange all_see,
                                          const KeyRange (&keys)[2]) {
  const int first = block.first_position(tile);
  const KeyRange valid = block.valid(tile);
  if (first >= max(all_see.lo, valid.lo) && first + kWgmmaKeys <= min(all_see.hi, valid.hi)) return;
  const KeyRange cut[2] = {{max(keys[0].lo, valid.lo), min(keys[0].hi, valid.hi)},
                           {max(keys[1].lo, valid.lo), min(keys[1].hi, valid.hi)}};
  hide_tile(s, first, cut);
}

/// A consumer warpgroup: scores, softmax and output of its 64 rows.
__device__ __forceinline__ void consume_256(const Flash256Block& block, const FlashParams& params,
                                            const FlashMaps& maps, int part) {
  using T = Flash256;
  const int tokens = 64 / params.group, token0 = block.token0 + part * tokens;
  const auto range = [&](int token) { return visible_keys(params, block.extent, min(params.n_query - 1, token)); };
  const int row = (threadIdx.x & 127) / 32 * 16 + (threadIdx.x & 31) / 4;
  const KeyRange keys[2] = {range(token0 + row / params.group), range(token0 + (row + 8) / params.group)};
  const KeyRange all_see{range(token0 + tokens - 1).lo, range(token0).hi};
  float o[128], s[32], alpha[2];
  std::uint32_t p[4][4];
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] = 0.0f;
  WgmmaSoftmax state;

  if (block.n_tile > 0) {
    mbarrier_wait(block.barrier(T::kQFull), 0);
    issue_scores(block, s, 0, part);
    wgmma_wait<0>();
    wgmma_pin(s);
    release_stage(block, T::kKEmpty, 0);
    hide_tile(block, s, 0, all_see, keys);
    softmax_tile(state, s, alpha, params.scale_log2);
    for (int tile = 0; tile + 1 < block.n_tile; ++tile) {
      pack_probabilities(p, s);
      issue_scores(block, s, tile + 1, part);
      rescale(o, alpha);
      wait_values(block, tile, part);
      issue_values(block, o, p, tile);
      wgmma_wait<1>();
      wgmma_pin(s);
      release_stage(block, T::kKEmpty, tile + 1);
      hide_tile(block, s, tile + 1, all_see, keys);
      softmax_tile(state, s, alpha, params.scale_log2);
      wgmma_wait<0>();
      wgmma_pin(o);
      release_stage(block, T::kVEmpty, tile);
    }
    pack_probabilities(p, s);
    rescale(o, alpha);
    wait_values(block, block.n_tile - 1, part);
    issue_values(block, o, p, block.n_tile - 1);
    wgmma_wait<0>();
    wgmma_pin(o);
  }
  float inverse[2];
  inverse_sum(state, inverse);
  // The rows go out through the place of this warpgroup's queries, which its finished scores were the last to read.
  store_rows(o, inverse, block.smem + T::kQ, T::kRows, part * 64);
  fence_async_shared();
  named_barrier_sync(T::kGroup + part, 128);
  if ((threadIdx.x & 127) == 0) {
    for (int step = 0; step < 4; ++step) {  // the blocks of 64 rows are not neighbours in shared memory
      tensor_store(&maps.out, block.smem + T::kQ + step * T::kRows * 128 + part * 8192, 0, block.head_kv * params.group,
                   token0, step, block.batch);
    }
    tensor_store_finish();
  }
}

/// grid: x = row tile (longest first), y = batch * n_head_kv. Any power-of-two group to 64.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    flash_wgmma_256_kernel(const __grid_constant__ FlashParams params, const __grid_constant__ FlashMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  Flash256Block block;
  block.smem = (shared_address(smem_bytes) + 1023) & ~1023u;
  block.batch = blockIdx.y / params.n_head_kv;
  block.head_kv = blockIdx.y % params.n_head_kv;
  block.token0 = static_cast<int>(gridDim.x - 1 - blockIdx.x) * (T::kRows / params.group);
  block.extent = key_extent(params);
  plan_tiles(block, params);

  if (threadIdx.x == 0) {
    mbarrier_init(block.barrier(T::kQFull), 1);
    for (int stage = 0; stage < T::kStages; ++stage) {
      mbarrier_init(block.barrier(T::kKFull + stage), 1);
      mbarrier_init(block.barrier(T::kVFull + stage), 1);
      mbarrier_init(block.barrier(T::kKEmpty + stage), 2);
      mbarrier_init(block.barrier(T::kVEmpty + stage), 2);
    }
    mbarrier_init_fence();
    if (params.tile_count != nullptr) atomicAdd(params.tile_count, static_cast<unsigned long long>(block.n_tile));
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    release_registers<40>();
    if (threadIdx.x == 256 && block.n_tile > 0) produce_256(block, params, maps);
  } else {
    take_registers<232>();
    consume_256(block, params, maps, warpgroup);
  }
#else
  __trap();  // built for another architecture
#endif
}

}  // namespace gemma4::cuda::detail

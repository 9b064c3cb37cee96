// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>

#include "cuda/flash/params.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/float16.hpp"

/// The tiles of the mma.sync flash kernel, what a block knows of its work, and how queries, keys and values come into
/// shared memory (cuda/flash/mma_sync.cuh).
namespace gemma4::cuda {

/// One compiled shape of the mma.sync kernel.
struct FlashTile {
  int head_dim;
  int warps_m;  ///< 16 rows each
  int warps_k;  ///< share the keys of a tile
  int warps_d;  ///< share the output dimensions: 256 of them are 128 registers
  int tile_kv;  ///< keys in shared memory at a time
  int n_stage;  ///< tiles in flight
  bool operator==(const FlashTile&) const = default;

  [[nodiscard]] constexpr int n_thread() const { return 32 * warps_m * warps_k * warps_d; }
  [[nodiscard]] constexpr int rows() const { return 16 * warps_m; }
  [[nodiscard]] constexpr int smem_bytes() const { return (rows() + 2 * tile_kv * n_stage) * head_dim * 2; }
};

/// Prefill tiles have warps_m = 4, decode tiles warps_m = 1. For each head_dim the first that fits is taken; the last
/// of each kind needs at most 99 KB, what every device from sm_80 has.
inline constexpr std::array kFlashTiles{
    FlashTile{.head_dim = 64, .warps_m = 4, .warps_k = 1, .warps_d = 1, .tile_kv = 64, .n_stage = 2},
    FlashTile{.head_dim = 128, .warps_m = 4, .warps_k = 1, .warps_d = 1, .tile_kv = 64, .n_stage = 2},
    FlashTile{.head_dim = 256, .warps_m = 4, .warps_k = 1, .warps_d = 1, .tile_kv = 64, .n_stage = 2},
    FlashTile{.head_dim = 256, .warps_m = 4, .warps_k = 1, .warps_d = 1, .tile_kv = 32, .n_stage = 2},
    FlashTile{.head_dim = 512, .warps_m = 4, .warps_k = 1, .warps_d = 2, .tile_kv = 32, .n_stage = 2},
    FlashTile{.head_dim = 512, .warps_m = 4, .warps_k = 1, .warps_d = 2, .tile_kv = 16, .n_stage = 1},
    FlashTile{.head_dim = 64, .warps_m = 1, .warps_k = 4, .warps_d = 1, .tile_kv = 64, .n_stage = 3},
    FlashTile{.head_dim = 128, .warps_m = 1, .warps_k = 4, .warps_d = 1, .tile_kv = 64, .n_stage = 2},
    FlashTile{.head_dim = 256, .warps_m = 1, .warps_k = 4, .warps_d = 1, .tile_kv = 64, .n_stage = 1},
    FlashTile{.head_dim = 512, .warps_m = 1, .warps_k = 2, .warps_d = 2, .tile_kv = 32, .n_stage = 1},
};

namespace detail {

template <FlashTile kTile>
struct FlashMmaTraits {
  static constexpr int kHeadDim = kTile.head_dim;
  static constexpr int kWarpsM = kTile.warps_m, kWarpsK = kTile.warps_k, kWarpsD = kTile.warps_d;
  static constexpr int kTileKv = kTile.tile_kv, kStages = kTile.n_stage;
  static constexpr int kThreads = kTile.n_thread();
  static constexpr int kRows = kTile.rows();
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kChunks = kHeadDim / 8;  ///< of 16 bytes in a row
  static constexpr int kWarpDims = kHeadDim / kWarpsD;
  static constexpr int kQBytes = kRows * kRowBytes;
  static constexpr int kTileBytes = kTileKv * kRowBytes;  ///< of K or of V
  static constexpr int kSmemBytes = kTile.smem_bytes();
  static_assert(kTileKv % (16 * kWarpsK) == 0, "each warp takes whole groups of 16 keys");
  static_assert(kWarpDims <= 256, "more than 128 accumulator registers a thread spill");
  static constexpr int kMergeStride = kHeadDim + 8;  ///< floats; eight rows begin in eight groups of banks
  static_assert(kWarpsK == 1 || kWarpsK * kRows * (kMergeStride + 2) * 4 <= kSmemBytes,
                "the merge of the warps must fit where the tiles were");
};

/// Byte offset of 16-byte chunk `chunk` of row `row`: the chunk index is XORed with the row, so that eight rows of one
/// column, which ldmatrix reads together, lie in eight different groups of banks.
template <class TTraits>
[[nodiscard]] __device__ __forceinline__ std::uint32_t swizzled(int row, int chunk) {
  return static_cast<std::uint32_t>(row * TTraits::kRowBytes + ((chunk ^ (row & 7)) << 4));
}

/// What every warp of a block knows about its work, and the part of a warp in it.
template <class TTraits>
struct FlashBlock {
  int batch, head_kv;
  int row0;    ///< first row of the call
  int warp_m;  ///< rows 16 warp_m and on of the block
  int warp_k;  ///< keys of a tile: groups of 16, warp_k modulo kWarpsK
  int dim0;    ///< output dimensions from here on

  [[nodiscard]] static __device__ __forceinline__ FlashBlock here(const FlashParams& params) {
    const int warp = threadIdx.x / 32;
    return {.batch = static_cast<int>(blockIdx.y / params.n_head_kv),
            .head_kv = static_cast<int>(blockIdx.y % params.n_head_kv),
            .row0 = static_cast<int>(gridDim.x - 1 - blockIdx.x) * TTraits::kRows,
            .warp_m = warp % TTraits::kWarpsM,
            .warp_k = warp / TTraits::kWarpsM % TTraits::kWarpsK,
            .dim0 = warp / (TTraits::kWarpsM * TTraits::kWarpsK) * TTraits::kWarpDims};
  }
};

/// Rows row0, row0 + 1, ... of the call into shared memory; rows beyond the last are zero.
template <class TTraits>
__device__ __forceinline__ void load_queries(const FlashParams& params, const FlashBlock<TTraits>& block,
                                             std::uint32_t smem) {
  constexpr int kRowsAtOnce = TTraits::kThreads / TTraits::kChunks;
  const int n_row = flash_rows(params), chunk = threadIdx.x % TTraits::kChunks;
#pragma unroll 1
  for (int row = threadIdx.x / TTraits::kChunks; row < TTraits::kRows; row += kRowsAtOnce) {
    const bool valid = block.row0 + row < n_row;
    const int token = valid ? (block.row0 + row) / params.group : 0;
    const int head = block.head_kv * params.group + (valid ? (block.row0 + row) % params.group : 0);
    const Bf16* source = params.q + block.batch * params.q_stride[0] + token * params.q_stride[1] +
                         head * params.q_stride[2] + chunk * 8;
    copy_async_16(smem + swizzled<TTraits>(row, chunk), source, valid);
  }
}

/// K and V of positions [first, first + kTileKv) that all lie in one piece of memory.
template <class TTraits>
__device__ __forceinline__ void load_whole_tile(const Bf16* k, const Bf16* v, std::int64_t k_step, std::int64_t v_step,
                                                std::uint32_t smem, int row0, int chunk) {
  constexpr int kRowsAtOnce = TTraits::kThreads / TTraits::kChunks;
#pragma unroll 4
  for (int row = row0; row < TTraits::kTileKv; row += kRowsAtOnce) {
    const std::uint32_t target = smem + swizzled<TTraits>(row, chunk);
    copy_async_16(target, k, true);
    copy_async_16(target + TTraits::kTileBytes, v, true);
    k += k_step, v += v_step;
  }
}

/// K and V of positions [first, first + kTileKv); rows outside [keys.lo, keys.hi) are zero, so that a masked
/// probability of 0 never meets a NaN. Only rows [rows.lo, rows.hi) of the tile. Each thread keeps its column. (Loops
/// stay rolled: a decode block runs once through its code, and instructions that miss the cache cost more than a loop.)
template <class TTraits>
__device__ __forceinline__ void load_keys(const FlashParams& params, const FlashBlock<TTraits>& block,
                                          const KeyExtent& extent, KeyRange keys, std::uint32_t smem, int first,
                                          KeyRange rows) {
  constexpr int kTileKv = TTraits::kTileKv, kRowsAtOnce = TTraits::kThreads / TTraits::kChunks;
  static_assert(TTraits::kThreads % TTraits::kChunks == 0 && kTileKv % kRowsAtOnce == 0);
  const int chunk = threadIdx.x % TTraits::kChunks, row0 = threadIdx.x / TTraits::kChunks;
  const bool fresh = first >= extent.fresh_begin;  // of the first row
  const int slot = fresh ? first - extent.fresh_begin : ring_slot(first, params.ring_len);
  const bool one_source = fresh || (first + kTileKv <= extent.fresh_begin && slot + kTileKv <= params.ring_len);
  const auto base = [&](const Bf16* data, const std::int64_t(&stride)[3]) {
    return data + block.batch * stride[0] + block.head_kv * stride[1] + chunk * 8;
  };
  if (one_source && first >= keys.lo && first + kTileKv <= keys.hi && rows.hi - rows.lo == kTileKv) {
    const KeySource& source = fresh ? params.fresh : params.old;
    load_whole_tile<TTraits>(base(source.k, source.k_stride) + (slot + row0) * source.k_stride[2],
                             base(source.v, source.v_stride) + (slot + row0) * source.v_stride[2],
                             kRowsAtOnce * source.k_stride[2], kRowsAtOnce * source.v_stride[2], smem, row0, chunk);
    return;
  }
  const Bf16* const fresh_k = base(params.fresh.k, params.fresh.k_stride);
  const Bf16* const fresh_v = base(params.fresh.v, params.fresh.v_stride);
  const Bf16* const old_k = base(params.old.k, params.old.k_stride);
  const Bf16* const old_v = base(params.old.v, params.old.v_stride);
#pragma unroll 2
  for (int row = row0; row < rows.hi; row += kRowsAtOnce) {
    if (row < rows.lo) continue;
    const int position = first + row, fresh_row = position - extent.fresh_begin;
    const bool valid = position >= keys.lo && position < keys.hi;
    int old_row = slot + row;
    if (fresh_row < 0 && old_row >= params.ring_len) old_row = ring_slot(old_row, params.ring_len);
    const Bf16* const k =
        fresh_row >= 0 ? fresh_k + fresh_row * params.fresh.k_stride[2] : old_k + old_row * params.old.k_stride[2];
    const Bf16* const v =
        fresh_row >= 0 ? fresh_v + fresh_row * params.fresh.v_stride[2] : old_v + old_row * params.old.v_stride[2];
    const std::uint32_t target = smem + swizzled<TTraits>(row, chunk);
    copy_async_16(target, valid ? k : params.q, valid);  // nothing is read where the row is not valid
    copy_async_16(target + TTraits::kTileBytes, valid ? v : params.q, valid);
  }
}

}  // namespace detail
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>

#include "cuda/flash/params.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared_memory.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "gemma4/attention.hpp"

/// Flash attention with mma.sync: every head_dim, group, mask and source of keys, on every device from sm_80.
/// It is the path of decode (few rows, keys split over blocks) and the prefill of devices without wgmma.
///
/// A block holds 16 * warps_m rows of one KV head and walks over tiles of keys; warps_k warps share the keys of a tile
/// and are merged at the end in a fixed order; warps_d warps share the output dimensions (each computes all scores).
/// With n_split > 1 a block takes one slice of the tiles and leaves (max, sum, unnormalised output) for combine_kernel.
/// Slices are cut from the number of keys alone, so the result depends on n_split and kv_len, never on the buffer.
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

/// Rows row0, row0 + 1, ... of the call into shared memory; rows beyond the last are zero.
template <class TTraits>
__device__ __forceinline__ void load_queries(const FlashParams& params, std::uint32_t smem, int batch, int head_kv,
                                             int row0) {
  constexpr int kRowsAtOnce = TTraits::kThreads / TTraits::kChunks;
  const int n_row = flash_rows(params), chunk = threadIdx.x % TTraits::kChunks;
#pragma unroll 1
  for (int row = threadIdx.x / TTraits::kChunks; row < TTraits::kRows; row += kRowsAtOnce) {
    const bool valid = row0 + row < n_row;
    const int token = valid ? (row0 + row) / params.group : 0;
    const int head = head_kv * params.group + (valid ? (row0 + row) % params.group : 0);
    const Bf16* source =
        params.q + batch * params.q_stride[0] + token * params.q_stride[1] + head * params.q_stride[2] + chunk * 8;
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
/// probability of 0 never meets a NaN. Only rows [from, to) of the tile. Each thread keeps its column. (Loops stay
/// rolled: a decode block runs once through its code, and instructions that miss the cache cost more than a loop.)
template <class TTraits>
__device__ __forceinline__ void load_keys(const FlashParams& params, const KeyExtent& extent, KeyRange keys,
                                          std::uint32_t smem, int batch, int head_kv, int first, int from, int to) {
  constexpr int kTileKv = TTraits::kTileKv, kRowsAtOnce = TTraits::kThreads / TTraits::kChunks;
  static_assert(TTraits::kThreads % TTraits::kChunks == 0 && kTileKv % kRowsAtOnce == 0);
  const int chunk = threadIdx.x % TTraits::kChunks, row0 = threadIdx.x / TTraits::kChunks;
  const bool fresh = first >= extent.fresh_begin;  // of the first row
  const int slot = fresh ? first - extent.fresh_begin : ring_slot(first, params.ring_len);
  const bool one_source = fresh || (first + kTileKv <= extent.fresh_begin && slot + kTileKv <= params.ring_len);
  const auto base = [&](const Bf16* data, const std::int64_t(&stride)[3]) {
    return data + batch * stride[0] + head_kv * stride[1] + chunk * 8;
  };
  if (one_source && first >= keys.lo && first + kTileKv <= keys.hi && to - from == kTileKv) {
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
  for (int row = row0; row < to; row += kRowsAtOnce) {
    if (row < from) continue;
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

/// Running softmax and output of the two rows that a thread shares with its quad.
template <class TTraits>
struct FlashState {
  float m[2], l[2];  ///< maximum in base 2; this thread's part of the sum
  float o[TTraits::kWarpDims / 8][4];

  __device__ __forceinline__ void init() {
    m[0] = m[1] = -INFINITY;
    l[0] = l[1] = 0.0f;
#pragma unroll
    for (auto& tile : o) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
  }
};

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
    float maximum = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
    maximum = fmaxf(state.m[half], quad_max(maximum));
    const float reference = maximum == -INFINITY ? 0.0f : maximum;  // (-inf) - (-inf) is not a number
    alpha[half] = exp2_approx(state.m[half] - reference);
    state.m[half] = maximum;
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
    state.l[half] = state.l[half] * alpha[half] + sum;
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

/// Index of a row among the partials of this block's split.
[[nodiscard]] __device__ __forceinline__ std::int64_t partial_row(const FlashParams& params, int row) {
  const std::int64_t n_head = params.batch * params.n_head_kv;
  return (blockIdx.z * n_head + blockIdx.y) * flash_rows(params) + row;
}

/// Where a row of the call is in `out`.
[[nodiscard]] __device__ __forceinline__ Bf16* out_row(const FlashParams& params, int batch, int head_kv, int row) {
  return params.out + batch * params.out_stride[0] + (row / params.group) * params.out_stride[1] +
         (head_kv * params.group + row % params.group) * params.out_stride[2];
}

/// Writes the rows of warps that saw all keys of the block: normalised into out, or as they are into the partials.
template <class TTraits>
__device__ __forceinline__ void store_rows(const FlashState<TTraits>& state, const FlashParams& params, int batch,
                                           int head_kv, int row, int dim0) {
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= flash_rows(params)) continue;
    if (params.n_split > 1) {
      const std::int64_t index = partial_row(params, row + 8 * half);
      float* const target = params.partial_o + index * TTraits::kHeadDim + dim0 + 2 * t;
#pragma unroll
      for (int tile = 0; tile < TTraits::kWarpDims / 8; ++tile) {
        *reinterpret_cast<float2*>(target + 8 * tile) =
            make_float2(state.o[tile][2 * half], state.o[tile][2 * half + 1]);
      }
      if (t == 0 && dim0 == 0) {
        *reinterpret_cast<float2*>(params.partial_ml + 2 * index) = make_float2(state.m[half], state.l[half]);
      }
    } else {
      const float inverse = state.l[half] > 0.0f ? 1.0f / state.l[half] : 0.0f;  // a row that saw no key gives zeros
      Bf16* const target = out_row(params, batch, head_kv, row + 8 * half) + dim0 + 2 * t;
#pragma unroll
      for (int tile = 0; tile < TTraits::kWarpDims / 8; ++tile) {
        *reinterpret_cast<std::uint32_t*>(target + 8 * tile) =
            pack_bf16(state.o[tile][2 * half] * inverse, state.o[tile][2 * half + 1] * inverse);
      }
    }
  }
}

/// Merges the warps that shared the keys: each leaves its rows, scaled to the common maximum, in shared memory; then
/// all threads add them in warp order and write. Rows beyond the call's last are skipped: a decode block has few.
template <class TTraits>
__device__ __forceinline__ void merge_warps(FlashState<TTraits>& state, const FlashParams& params, float* smem,
                                            int batch, int head_kv, int row0, int warp_row, int warp_k, int dim0) {
  constexpr int kRows = TTraits::kRows, kHeadDim = TTraits::kHeadDim;
  constexpr int kStride = TTraits::kMergeStride, kWarpsK = TTraits::kWarpsK;
  const int t = threadIdx.x & 3, n_row = min(kRows, flash_rows(params) - row0);
  float* const sums = smem;                            // [kWarpsK, kRows, kStride]
  float* const ml = smem + kWarpsK * kRows * kStride;  // [kWarpsK, kRows, 2]
  __syncthreads();                                     // the tiles are no longer needed
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (t != 0 || dim0 != 0) continue;
    ml[(warp_k * kRows + warp_row + 8 * half) * 2] = state.m[half];
    ml[(warp_k * kRows + warp_row + 8 * half) * 2 + 1] = state.l[half];
  }
  __syncthreads();
  const auto row_maximum = [&](int row) {
    float maximum = -INFINITY;
#pragma unroll
    for (int k = 0; k < kWarpsK; ++k) maximum = fmaxf(maximum, ml[(k * kRows + row) * 2]);
    return maximum;
  };
  const auto finite = [](float maximum) { return maximum == -INFINITY ? 0.0f : maximum; };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (warp_row + 8 * half >= n_row) continue;
    const float factor = exp2_approx(state.m[half] - finite(row_maximum(warp_row + 8 * half)));
    float* const mine = sums + (warp_k * kRows + warp_row + 8 * half) * kStride + dim0 + 2 * t;
#pragma unroll
    for (int tile = 0; tile < TTraits::kWarpDims / 8; ++tile) {
      *reinterpret_cast<float2*>(mine + 8 * tile) =
          make_float2(state.o[tile][2 * half] * factor, state.o[tile][2 * half + 1] * factor);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int item = threadIdx.x; item < n_row * (kHeadDim / 4); item += TTraits::kThreads) {
    const int row = item / (kHeadDim / 4), dim = item % (kHeadDim / 4) * 4;
    const float maximum = row_maximum(row);
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kWarpsK; ++k) {
      const float4 part = *reinterpret_cast<const float4*>(sums + (k * kRows + row) * kStride + dim);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      total = fmaf(ml[(k * kRows + row) * 2 + 1], exp2_approx(ml[(k * kRows + row) * 2] - finite(maximum)), total);
    }
    if (params.n_split > 1) {
      const std::int64_t index = partial_row(params, row0 + row);
      *reinterpret_cast<float4*>(params.partial_o + index * kHeadDim + dim) = sum;
      if (dim == 0) *reinterpret_cast<float2*>(params.partial_ml + 2 * index) = make_float2(maximum, total);
    } else {
      const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
      *reinterpret_cast<uint2*>(out_row(params, batch, head_kv, row0 + row) + dim) =
          make_uint2(pack_bf16(sum.x * inverse, sum.y * inverse), pack_bf16(sum.z * inverse, sum.w * inverse));
    }
  }
}

/// The result of the block.
template <class TTraits>
__device__ __forceinline__ void merge_and_store(FlashState<TTraits>& state, const FlashParams& params, float* smem,
                                                int batch, int head_kv, int row0, int warp_m, int warp_k, int dim0) {
  const int warp_row = warp_m * 16 + (threadIdx.x & 31) / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) warp_sum_in_place<1, 2>(state.l[half]);
  if constexpr (TTraits::kWarpsK == 1) {
    store_rows(state, params, batch, head_kv, row0 + warp_row, dim0);
  } else {
    merge_warps(state, params, smem, batch, head_kv, row0, warp_row, warp_k, dim0);
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

/// grid: x = row tile (longest first), y = batch * n_head_kv, z = split.
template <class TTraits>
__global__ void __launch_bounds__(TTraits::kThreads, 1) flash_mma_kernel(const __grid_constant__ FlashParams params) {
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  const std::uint32_t q_smem = shared_address(smem_bytes), kv_smem = q_smem + TTraits::kQBytes;
  const int batch = blockIdx.y / params.n_head_kv, head_kv = blockIdx.y % params.n_head_kv;
  const int row0 = static_cast<int>(gridDim.x - 1 - blockIdx.x) * TTraits::kRows;
  const int warp = threadIdx.x / 32, warp_m = warp % TTraits::kWarpsM;
  const int warp_k = warp / TTraits::kWarpsM % TTraits::kWarpsK;
  const int dim0 = warp / (TTraits::kWarpsM * TTraits::kWarpsK) * TTraits::kWarpDims;

  if (!params.old_at_rest) {
    wait_for_previous_kernel();
    allow_next_kernel();
  }
  const KeyExtent extent = key_extent(params);
  const KeyRange call{visible_keys(params, extent, 0).lo, extent.kv_end};
  const int last_token = min(params.n_query - 1, (row0 + TTraits::kRows - 1) / params.group);
  const KeyRange block = block_keys<TTraits>(params, extent, call, row0 / params.group, last_token);
  const int n_tile = max(0, (block.hi - block.lo + TTraits::kTileKv - 1) / TTraits::kTileKv);
  int token[2];
  KeyRange keys[2];
  for (int half = 0; half < 2; ++half) {
    token[half] = min(params.n_query - 1, (row0 + warp_m * 16 + (threadIdx.x & 31) / 4 + 8 * half) / params.group);
    keys[half] = visible_keys(params, extent, token[half]);
    keys[half] = {max(keys[half].lo, block.lo), min(keys[half].hi, block.hi)};
  }

  const auto fetch = [&](int tile, int from, int to) {
    if (tile >= n_tile || from >= to) return;
    load_keys<TTraits>(params, extent, block, kv_smem + tile % TTraits::kStages * 2 * TTraits::kTileBytes, batch,
                       head_kv, block.lo + tile * TTraits::kTileKv, from, to);
  };
  int n_early = 0;  // rows of the first tile that are fetched under the end of the kernel before
  if (params.old_at_rest) {
    n_early = max(0, min(TTraits::kTileKv, extent.fresh_begin - block.lo));
    fetch(0, 0, n_early);
    wait_for_previous_kernel();
    allow_next_kernel();
  }
  FlashState<TTraits> state;
  state.init();
#pragma unroll 1
  for (int stage = 0; stage < TTraits::kStages; ++stage) {
    fetch(stage, stage == 0 ? n_early : 0, TTraits::kTileKv);
    if (stage == 0) load_queries<TTraits>(params, q_smem, batch, head_kv, row0);
    copy_async_commit();
  }
#pragma unroll 1
  for (int tile = 0; tile < n_tile; ++tile) {
    copy_async_wait<TTraits::kStages - 1>();
    __syncthreads();
    const std::uint32_t k_smem = kv_smem + tile % TTraits::kStages * 2 * TTraits::kTileBytes;
#pragma unroll 1
    for (int key0 = warp_k * 16; key0 < TTraits::kTileKv; key0 += 16 * TTraits::kWarpsK) {
      float s[2][4];
      score_keys<TTraits>(s, q_smem, k_smem, warp_m * 16, key0);
      hide_keys(s, params, batch, block.lo + tile * TTraits::kTileKv + key0, token, keys);
      absorb<TTraits>(state, s, k_smem + TTraits::kTileBytes, key0, dim0);
    }
    __syncthreads();
    fetch(tile + TTraits::kStages, 0, TTraits::kTileKv);
    copy_async_commit();
  }
  copy_async_wait<0>();
  if (params.tile_count != nullptr && threadIdx.x == 0) {
    atomicAdd(params.tile_count, static_cast<unsigned long long>(n_tile));
  }
  merge_and_store<TTraits>(state, params, reinterpret_cast<float*>(smem_bytes), batch, head_kv, row0, warp_m, warp_k,
                           dim0);
}

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
  const float reference = maximum == -INFINITY ? 0.0f : maximum;
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
  const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
  const int batch = blockIdx.y / params.n_head_kv, head_kv = blockIdx.y % params.n_head_kv;
  *reinterpret_cast<uint2*>(out_row(params, batch, head_kv, row) + 4 * column) =
      make_uint2(pack_bf16(sum.x * inverse, sum.y * inverse), pack_bf16(sum.z * inverse, sum.w * inverse));
}

}  // namespace detail
}  // namespace gemma4::cuda

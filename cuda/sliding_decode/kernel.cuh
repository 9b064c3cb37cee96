// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/shared_memory.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/rms_norm.cuh"
#include "cuda/rope.cuh"
#include "cuda/sliding_decode/share.cuh"
#include "cuda/softmax_state.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/float16.hpp"

/// The kernel of sliding_decode.cuh: a decode step of a sliding layer by clusters of blocks.
///
/// The n_split blocks of a cluster share the keys that two query heads of a KV head see, at most 128 a block. Old keys
/// and values are at rest while the kernel in front still runs, so a copying warp asks for the first of them before the
/// projections are there, 32 at a time, and for the rest as soon as they are, as many as there is room for. Meanwhile
/// eight warps prepare q, each block for itself. Then each takes 16 of the keys: scores by mma.sync, softmax over its
/// own keys, and weighted sums of values in float, a lane holding head_dim / 32 dimensions. Warps are merged in shared
/// memory; each block sends the others of its cluster the part of its sums that they finish.
///
/// What it is not, since each was slower on an H200 between the products of a layer of the 31B:
/// - all asked for early: the end of the kernel in front waits behind that queue; or nothing early, slower still;
/// - all keys in shared memory at once, one block a multiprocessor: only 15 clusters of 8 find room at a time, and no
///   block of the product behind begins early;
/// - scores in float, a key after another over the lanes;
/// - sums left in memory for the last block to merge, by 8 blocks a KV head or by 16;
/// - the next product's weights fetched into the L2 cache once the own keys have come: the more, the slower.
/// A body whose copying warp passes the block's barriers at places of its own is a little faster; synccheck refuses it.
namespace gemma4::cuda {

namespace detail {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// The other warps before the projections are there: the angles, and the weights of the norms.
template <class T>
__device__ __forceinline__ void prepare_early(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                              SlidingDecodeSmem<T>& smem) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < T::kHeadDim) {
    smem.norms[0][i] = params.norms.q[i];
    smem.norms[1][i] = params.norms.k[i];
  }
  if (i < params.rope.n_pair) {
    smem.cos_sin[i % T::kValues * 16 + i / T::kValues] = rope_cos_sin(share.position, params.rope.frequency[i]);
  }
}

/// Normalises and turns the two query heads, and in the last split also the newest key and value, a warp each.
template <class T>
__device__ __forceinline__ void prepare_heads(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                              SlidingDecodeSmem<T>& smem) {
  constexpr int kValues = T::kValues;
  const int vector = static_cast<int>(threadIdx.x) / 32, first = (static_cast<int>(threadIdx.x) & 31) * kValues;
  if (vector >= T::kHeads + (share.has_newest ? 2 : 0)) return;
  const bool is_q = vector < T::kHeads, is_k = vector == T::kHeads;
  float x[kValues];
  load_values(is_q   ? &params.q(0, share.head(params, vector), first)
              : is_k ? &params.k(0, share.head_kv, first)
                     : &params.v(0, share.head_kv, first),
              x);
  rms_norm_warp<T::kHeadDim>(x, is_q ? smem.norms[0] : is_k ? smem.norms[1] : nullptr, params.norms.epsilon);
  if (is_q || is_k) {
    rope_warp<T::kHeadDim>(smem.cos_sin, params.rope.n_pair, x);
  }
  if (is_q) return store_values(smem.q[vector] + first, x);
  store_values(smem.fresh[is_k ? 0 : 1] + first, x);
  if (share.pair != 0 || share.position < 0) return;
  const auto slot = ring_slot(static_cast<std::uint32_t>(share.position), static_cast<std::uint32_t>(params.ring_len));
  store_values(&(is_k ? params.ring_k : params.ring_v)(share.head_kv, slot, first), x);
}

/// Key or value `row` of a chunk; behind the last one, the last one again.
template <class T>
[[nodiscard]] __device__ __forceinline__ const unsigned char* row_of_chunk(const SlidingDecodeShare& share,
                                                                           const SlidingDecodeSmem<T>& smem, int chunk,
                                                                           int row) {
  const int in_kind = chunk % T::kChunks, key = min(in_kind * T::kChunkKeys + row, share.n_key - 1);
  return key < share.n_old ? smem.slot[chunk % T::kSlots] + (key - in_kind * T::kChunkKeys) * (2 * T::kHeadDim)
                           : reinterpret_cast<const unsigned char*>(smem.fresh[chunk < T::kChunks ? 0 : 1]);
}

/// Scores of the warp's 16 keys by mma.sync, the keys as rows and the heads as columns: row r is key 4 * warp + r % 4
/// of chunk r / 4. A lane takes 16 bytes of a row at a time, so that the order of dimensions is its own, the same for
/// both operands. Rows begin in the same banks: odd ones are read 64 bytes ahead and back, and multiplied by what
/// belongs there; the products that belong to the other half of the rows are thrown away. On return lane 4 g holds
/// score[i][h] of key g + 8 i and head h, in base 2; -inf where there is no such key.
///
/// What the lanes of two rows read at step s, eight lanes at a time (one pass over the 32 banks):
///
///              banks 0 .. 15         banks 16 .. 31
///            +----------------------+----------------------+
///   even row | t=0  t=1  t=2  t=3   |                      |   bytes 64 s     .. 64 s + 63
///   odd row  |                      | t=0  t=1  t=2  t=3   |   bytes 64 (s^1) .. 64 (s^1) + 63     (s even)
///            +----------------------+----------------------+
///
/// So one mma with q[s] is right for the even rows, and a second with q[s ^ 1] for the odd ones.
template <class T>
__device__ __forceinline__ void score_keys_of_warp(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                                   const SlidingDecodeSmem<T>& smem, float (&score)[2][2]) {
  constexpr int kSteps = T::kHeadDim / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) & 31;
  const int g = lane / 4, t = lane % 4;
  const std::uint32_t full = shared_address(smem.full), empty = shared_address(smem.empty);
  score[0][0] = score[0][1] = score[1][0] = score[1][1] = -INFINITY;
  if (share.n_key == 0) return;
  uint4 q[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    q[step] = make_uint4(0, 0, 0, 0);
    if (g < T::kHeads) {
      q[step] = *reinterpret_cast<const uint4*>(smem.q[g] + step * 32 + t * 8);
    }
  }
  const int n_chunk = (share.n_key + T::kChunkKeys - 1) / T::kChunkKeys;
#pragma unroll 1
  for (int chunk = 0; chunk < n_chunk; ++chunk) mbarrier_wait(full + 8 * chunk, 0);
  const unsigned char* row[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = g + 8 * i;
    row[i] = row_of_chunk<T>(share, smem, min(r / T::kWarpKeys, n_chunk - 1), warp * T::kWarpKeys + r % T::kWarpKeys);
  }
  float even[2][4] = {}, odd[2][4] = {};  // two chains each
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int offset = (step ^ (g & 1)) * 64 + t * 16;
    const uint4 low = *reinterpret_cast<const uint4*>(row[0] + offset);
    const uint4 high = *reinterpret_cast<const uint4*>(row[1] + offset);
    const std::uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
    mma_bf16(even[0], first, q[step].x, q[step].y);
    mma_bf16(even[1], second, q[step].z, q[step].w);
    mma_bf16(odd[0], first, q[step ^ 1].x, q[step ^ 1].y);
    mma_bf16(odd[1], second, q[step ^ 1].z, q[step ^ 1].w);
  }
#pragma unroll 1
  for (int chunk = 0; chunk < n_chunk; ++chunk) mbarrier_arrive(empty + 8 * chunk);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = g + 8 * i, key = r / T::kWarpKeys * T::kChunkKeys + warp * T::kWarpKeys + r % T::kWarpKeys;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = 2 * i + h;
      const float sum = g % 2 == 0 ? even[0][c] + even[1][c] : odd[0][c] + odd[1][c];
      if (key < share.n_key) score[i][h] = sum * params.scale_log2;
    }
  }
}

/// Softmax over a warp's own 16 keys, whose scores are in lanes four apart: leaves (maximum, sum) of each head and the
/// exponentials in shared memory, where the lane `stores`. Four rows at a time may lie in neighbouring lanes.
/// @param states of the warp's heads @param to [16] both heads' exponentials
__device__ __forceinline__ void weigh_keys(const float (&score)[2][2], SoftmaxState* states, float2* to, bool stores) {
  const int g = (static_cast<int>(threadIdx.x) & 31) / 4;
  float weight[2][2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float maximum = fmaxf(score[0][h], score[1][h]);
    maximum = warp_max<16, 4>(maximum);
    const float reference = softmax_reference(maximum);
    weight[0][h] = exp2_approx(score[0][h] - reference);
    weight[1][h] = exp2_approx(score[1][h] - reference);
    float total = weight[0][h] + weight[1][h];
    total = warp_sum<16, 4>(total);
    if (stores && g == 0) {
      states[h] = {maximum, total};
    }
  }
  if (stores) {
    to[g] = make_float2(weight[0][0], weight[0][1]);
    to[g + 8] = make_float2(weight[1][0], weight[1][1]);
  }
  __syncwarp();
}

/// The warp's weighted sums of values, left in shared memory where the last keys were.
template <class T>
__device__ __forceinline__ void add_values(const SlidingDecodeShare& share, SlidingDecodeSmem<T>& smem) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) & 31;
  const std::uint32_t full = shared_address(smem.full), empty = shared_address(smem.empty);
  float sum[T::kHeads][T::kValues] = {};
#pragma unroll 1
  for (int chunk = 0; chunk * T::kChunkKeys < share.n_key; ++chunk) {
    float weight[T::kWarpKeys * T::kHeads];
    load_values(smem.weights[warp][chunk][0], weight);
    mbarrier_wait(full + 8 * (T::kChunks + chunk), 0);
#pragma unroll
    for (int i = 0; i < T::kWarpKeys; ++i) {
      RawValues<T::kValues, Bf16> raw;
      raw.load(
          reinterpret_cast<const Bf16*>(row_of_chunk<T>(share, smem, T::kChunks + chunk, warp * T::kWarpKeys + i)) +
          lane * T::kValues);
      float v[T::kValues];
      raw.widen(v);
#pragma unroll
      for (int h = 0; h < T::kHeads; ++h) {
#pragma unroll
        for (int d = 0; d < T::kValues; ++d) sum[h][d] = fmaf(weight[i * T::kHeads + h], v[d], sum[h][d]);
      }
    }
  }
#pragma unroll 1
  for (int chunk = T::kSumsSlot; chunk * T::kChunkKeys < share.n_key && chunk < T::kChunks; ++chunk) {
    mbarrier_wait(empty + 8 * chunk, 0);  // no warp still reads the keys
  }
#pragma unroll
  for (int h = 0; h < T::kHeads; ++h) {
    store_values(smem.sums(warp, h) + lane * T::kValues, sum[h]);
  }
}

/// Two neighbouring values of a head, unnormalised, and the head's (maximum, sum of exponentials), of kCount parts in
/// their order: those of warps or of blocks.
struct MergedPair {
  float2 sum = make_float2(0.0f, 0.0f);
  SoftmaxState state;
};
template <class TState, class TPart>
[[nodiscard]] __device__ __forceinline__ MergedPair merge_parts(int count, const TState& state_of,
                                                                const TPart& part_of) {
  MergedPair merged;
#pragma unroll 8
  for (int i = 0; i < count; ++i) merged.state.maximum = fmaxf(merged.state.maximum, state_of(i).maximum);
  const float reference = merged.state.reference();
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const SoftmaxState state = state_of(i);
    const float2 part = part_of(i);
    const float factor = exp2_approx(state.maximum - reference);
    merged.sum.x = fmaf(part.x, factor, merged.sum.x);
    merged.sum.y = fmaf(part.y, factor, merged.sum.y);
    merged.state.sum = fmaf(state.sum, factor, merged.state.sum);
  }
  return merged;
}

/// Merges the warps of this block and sends each block of the cluster what it finishes: 2 * head_dim / n_split values.
template <class T>
__device__ __forceinline__ void send_parts(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                           SlidingDecodeSmem<T>& smem) {
  const int value = 2 * static_cast<int>(threadIdx.x), each = T::kHeads * T::kHeadDim / params.n_split;
  if (value >= T::kHeads * T::kHeadDim) return;
  const int h = value / T::kHeadDim, dim = value % T::kHeadDim;
  const MergedPair merged = merge_parts(
      T::kWarps, [&](int warp) { return smem.states[warp][h]; },
      [&](int warp) { return *reinterpret_cast<const float2*>(smem.sums(warp, h) + dim); });
  store_to_block(smem.parts + share.split * each + value % each, value / each, merged.sum);
  if (dim / 2 < params.n_split) {
    store_to_block(&smem.part_states[share.split][h], dim / 2, make_float2(merged.state.maximum, merged.state.sum));
  }
}

/// Merges what the blocks of the cluster have sent, and stores it.
template <class T>
__device__ __forceinline__ void finish_parts(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                             const SlidingDecodeSmem<T>& smem) {
  const int each = T::kHeads * T::kHeadDim / params.n_split, in_share = 2 * static_cast<int>(threadIdx.x);
  if (in_share >= each) return;
  const int value = share.split * each + in_share, h = value / T::kHeadDim, dim = value % T::kHeadDim;
  if (2 * share.pair + h >= params.group) return;
  const MergedPair merged = merge_parts(
      params.n_split, [&](int split) { return smem.part_states[split][h]; },
      [&](int split) { return *reinterpret_cast<const float2*>(smem.parts + split * each + in_share); });
  const float inverse = 1.0f / merged.state.sum;  // the newest key is always seen
  *reinterpret_cast<std::uint32_t*>(&params.out(0, share.head(params, h), dim)) =
      pack_bf16(merged.sum.x * inverse, merged.sum.y * inverse);
}

#endif

/// grid: clusters of n_split blocks, one a pair of query heads. Nothing before sm_90.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 2)
    sliding_decode_kernel(const __grid_constant__ SlidingDecodeParams params) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char sliding_smem_bytes[];
  auto& smem = *reinterpret_cast<SlidingDecodeSmem<T>*>(sliding_smem_bytes);
  const bool copies = threadIdx.x / 32 == T::kWarps;
  cluster_arrive_relaxed();  // "I have begun": may be written to
  const SlidingDecodeShare share(params);
  if (copies) {
    fetch_early<T>(params, share, smem);
  } else {
    prepare_early<T>(params, share, smem);
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();
  if (copies) {
    fetch_rest<T>(params, share, smem);
  } else {
    prepare_heads<T>(params, share, smem);
    named_barrier_sync<T::kTeamBarrier, 32 * T::kWarps>();
    float score[2][2];
    score_keys_of_warp<T>(params, share, smem, score);
    weigh_keys(score, smem.states[threadIdx.x / 32], reinterpret_cast<float2*>(smem.weights[threadIdx.x / 32]),
               threadIdx.x % 4 == 0);
    add_values<T>(share, smem);
    named_barrier_sync<T::kTeamBarrier, 32 * T::kWarps>();
  }
  cluster_wait();  // the others have begun
  if (!copies) send_parts<T>(params, share, smem);
  cluster_arrive_release();
  cluster_wait_acquire();
  if (!copies) finish_parts<T>(params, share, smem);
#endif
}

}  // namespace detail
}  // namespace gemma4::cuda

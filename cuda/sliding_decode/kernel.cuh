// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cache_hint.cuh"
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
#include "gemma4/attention.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/platform.hpp"
#include "gemma4/view.hpp"

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

template <int kDim>
struct SlidingDecodeTraits {
  static constexpr int kHeadDim = kDim, kValues = kDim / 32;
  static constexpr int kWarps = 8;                    ///< that compute
  static constexpr int kThreads = 32 * (kWarps + 1);  ///< one more copies
  static constexpr int kHeads = 2;                    ///< query heads of a cluster
  static constexpr int kChunkKeys = 32, kChunks = 4;  ///< of keys; as many of values
  static constexpr int kSlots = 6;  ///< chunks in shared memory at a time: two blocks of head_dim 256, or one
                                    ///< and one of a product, share a multiprocessor
  static constexpr int kEarly = 4;  ///< chunks that are asked for under the end of the kernel in front
  static constexpr int kWarpKeys = kChunkKeys / kWarps;  ///< of a warp and a chunk
  static constexpr int kSlotBytes = kChunkKeys * kDim * 2;
  static constexpr int kSumsBytes = kWarps * kHeads * kDim * 4;
  static constexpr int kSumsSlot = kChunks - kSumsBytes / kSlotBytes;  ///< the warps' sums take the last keys' places
  static_assert(kWarpKeys * kChunks == 16, "the keys of a warp are the rows of a product of matrices");
  static_assert(kHeads * kDim <= 2 * 32 * kWarps, "a thread merges two values");
  static_assert(kEarly <= kSlots && kSlots >= kChunks && kSlots <= 2 * kChunks && 2 * kChunks - kSlots <= kSumsSlot,
                "values that take the place of keys stay clear of the sums");
};

inline constexpr int kSlidingDecodeKeys = 128;  ///< of a block
inline constexpr int kSlidingDecodeSplits = 8;  ///< the largest cluster that every device with clusters takes

/// Where things lie in shared memory, in bytes, behind the slots.
template <class TTraits>
struct SlidingDecodeSmem {
  static constexpr int kFresh = TTraits::kSlots * TTraits::kSlotBytes;  ///< [2, head_dim] bf16: the newest k and v
  static constexpr int kQ = kFresh + 2 * 2 * TTraits::kHeadDim;         ///< [2, head_dim] bf16
  static constexpr int kNorms = kQ + 2 * TTraits::kHeads * TTraits::kHeadDim;  ///< [2, head_dim] float: of q and of k
  static constexpr int kWeights = kNorms + 2 * 4 * TTraits::kHeadDim;  ///< [warp, chunk, key, head] float: exponentials
  static constexpr int kStates = kWeights + 4 * 32 * TTraits::kWarps;  ///< [warp, head] (maximum, sum of exponentials)
  static constexpr int kParts = kStates + 8 * TTraits::kHeads * TTraits::kWarps;  ///< [2 * head_dim] float, from others
  static constexpr int kPartStates = kParts + 4 * TTraits::kHeads * TTraits::kHeadDim;  ///< [split, head] as kStates
  static constexpr int kCosSin = kPartStates + 8 * TTraits::kHeads * kSlidingDecodeSplits;  ///< [head_dim / 2] float2
  static constexpr int kFull = kCosSin + 4 * TTraits::kHeadDim;    ///< a barrier for each chunk that arrives
  static constexpr int kEmpty = kFull + 8 * 2 * TTraits::kChunks;  ///< and for each chunk of keys that is done with
  static constexpr int kBytes = kEmpty + 8 * TTraits::kChunks;
  static constexpr int kSums = TTraits::kSumsSlot * TTraits::kSlotBytes;  ///< [warp, head, head_dim] float
};

struct SlidingDecodeParams {
  View<const float, 3> q, k, v;
  View<Bf16, 3> ring_k, ring_v, out;
  QkNorms norms;
  RopeParams rope;
  const std::int32_t* position;
  std::int32_t position_host;
  std::int32_t ring_len, window, group, n_pair, n_split;
  float scale_log2;  ///< scale * log2(e): softmax runs in base 2
};
static_assert(std::is_trivially_copyable_v<SlidingDecodeParams>);

/// The share of a block: which heads, and which keys of those that they see. The newest key of all is the last one of
/// the last split.
struct SlidingDecodeShare {
  int head_kv, pair, split;
  int position;
  int first;  ///< position of its first key
  int n_key, n_old;
  bool has_newest;

  __device__ __forceinline__ explicit SlidingDecodeShare(const SlidingDecodeParams& params) {
    const int block = static_cast<int>(blockIdx.x);
    split = block % params.n_split;
    pair = block / params.n_split % params.n_pair;
    head_kv = block / params.n_split / params.n_pair;
    position = params.position != nullptr ? *params.position : params.position_host;
    const int newest = max(position, 0), n_seen = min(newest, params.window - 1) + 1;
    const int begin = n_seen * split / params.n_split;
    first = newest + 1 - n_seen + begin;
    n_key = n_seen * (split + 1) / params.n_split - begin;
    has_newest = split == params.n_split - 1;
    n_old = n_key - (has_newest ? 1 : 0);
  }
  /// A query head of the pair; an odd group's last pair has its only head twice.
  [[nodiscard]] __device__ __forceinline__ int head(const SlidingDecodeParams& params, int h) const {
    return head_kv * params.group + min(2 * pair + h, params.group - 1);
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// Asks for a chunk of old keys (chunk < kChunks) or values, which lies in slot chunk % kSlots; one thread.
template <class T>
__device__ __forceinline__ void fetch_chunk(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                            unsigned char* smem, int chunk) {
  const int in_kind = chunk % T::kChunks, n_row = min(share.n_old - in_kind * T::kChunkKeys, T::kChunkKeys);
  if (in_kind * T::kChunkKeys >= share.n_key) return;
  const std::uint32_t barrier = shared_address(smem + SlidingDecodeSmem<T>::kFull) + 8 * chunk;
  if (n_row <= 0) return mbarrier_arrive(barrier);    // nothing but the newest
  const std::uint64_t policy = evict_first_policy();  // a ring is not read again before all weights have been
  const auto slot = static_cast<int>(ring_slot(static_cast<std::uint32_t>(share.first + in_kind * T::kChunkKeys),
                                               static_cast<std::uint32_t>(params.ring_len)));
  const int n_before_end = min(n_row, params.ring_len - slot);
  const View<Bf16, 3>& ring = chunk < T::kChunks ? params.ring_k : params.ring_v;
  const auto copy = [&](int to_row, int from_row, int count) {
    bulk_load(shared_address(smem + chunk % T::kSlots * T::kSlotBytes) + to_row * T::kHeadDim * 2,
              &ring(share.head_kv, from_row, 0), count * T::kHeadDim * 2, barrier, policy);
  };
  mbarrier_expect(barrier, n_row * T::kHeadDim * 2);
  copy(0, slot, n_before_end);
  if (n_before_end < n_row) copy(n_before_end, 0, n_row - n_before_end);
}

/// The copying warp before the projections are there.
template <class T>
__device__ __forceinline__ void fetch_early(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                            unsigned char* smem) {
  using Smem = SlidingDecodeSmem<T>;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if (lane == 0) {
#pragma unroll 1
    for (int chunk = 0; chunk < 2 * T::kChunks; ++chunk) {
      mbarrier_init(shared_address(smem + Smem::kFull) + 8 * chunk, 1);
      if (chunk < T::kChunks) mbarrier_init(shared_address(smem + Smem::kEmpty) + 8 * chunk, 32 * T::kWarps);
    }
    mbarrier_init_fence();
  }
  __syncwarp();
  if (lane < T::kEarly) fetch_chunk<T>(params, share, smem, lane);
  __syncwarp();
}

/// And after: what there is room for, then values in the places of keys.
template <class T>
__device__ __forceinline__ void fetch_rest(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                           unsigned char* smem) {
  const int lane = static_cast<int>(threadIdx.x) & 31, n_chunk = (share.n_key + T::kChunkKeys - 1) / T::kChunkKeys;
  if (lane >= T::kEarly && lane < T::kSlots) fetch_chunk<T>(params, share, smem, lane);
  if (lane == 0) {
#pragma unroll 1
    for (int chunk = T::kSlots; chunk < T::kChunks + n_chunk; ++chunk) {
      mbarrier_wait(shared_address(smem + SlidingDecodeSmem<T>::kEmpty) + 8 * (chunk - T::kSlots), 0);
      fetch_chunk<T>(params, share, smem, chunk);
    }
  }
  __syncwarp();
}

/// The other warps before the projections are there: the angles, and the weights of the norms.
template <class T>
__device__ __forceinline__ void prepare_early(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                              unsigned char* smem) {
  using Smem = SlidingDecodeSmem<T>;
  float2* const cos_sin = reinterpret_cast<float2*>(smem + Smem::kCosSin);
  float* const norms = reinterpret_cast<float*>(smem + Smem::kNorms);
  const int i = static_cast<int>(threadIdx.x);
  if (i < T::kHeadDim) {
    norms[i] = params.norms.q[i];
    norms[T::kHeadDim + i] = params.norms.k[i];
  }
  if (i < params.rope.n_pair) {
    cos_sin[i % T::kValues * 16 + i / T::kValues] = rope_cos_sin(share.position, params.rope.frequency[i]);
  }
}

/// Normalises and turns the two query heads, and in the last split also the newest key and value, a warp each.
template <class T>
__device__ __forceinline__ void prepare_heads(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                              unsigned char* smem) {
  using Smem = SlidingDecodeSmem<T>;
  constexpr int kValues = T::kValues;
  const int vector = static_cast<int>(threadIdx.x) / 32, first = (static_cast<int>(threadIdx.x) & 31) * kValues;
  if (vector >= T::kHeads + (share.has_newest ? 2 : 0)) return;
  const bool is_q = vector < T::kHeads, is_k = vector == T::kHeads;
  float x[kValues];
  load_values(is_q   ? &params.q(0, share.head(params, vector), first)
              : is_k ? &params.k(0, share.head_kv, first)
                     : &params.v(0, share.head_kv, first),
              x);
  const float* const norms = reinterpret_cast<const float*>(smem + Smem::kNorms);
  rms_norm_warp<T::kHeadDim>(x, is_q ? norms : is_k ? norms + T::kHeadDim : nullptr, params.norms.epsilon);
  if (is_q || is_k) {
    rope_warp<T::kHeadDim>(reinterpret_cast<const float2*>(smem + Smem::kCosSin), params.rope.n_pair, x);
  }
  if (is_q) return store_values(reinterpret_cast<Bf16*>(smem + Smem::kQ) + vector * T::kHeadDim + first, x);
  store_values(reinterpret_cast<Bf16*>(smem + Smem::kFresh) + (is_k ? 0 : T::kHeadDim) + first, x);
  if (share.pair != 0 || share.position < 0) return;
  const auto slot = ring_slot(static_cast<std::uint32_t>(share.position), static_cast<std::uint32_t>(params.ring_len));
  store_values(&(is_k ? params.ring_k : params.ring_v)(share.head_kv, slot, first), x);
}

/// Key or value `row` of a chunk; behind the last one, the last one again.
template <class T>
[[nodiscard]] __device__ __forceinline__ const unsigned char* row_of_chunk(const SlidingDecodeShare& share,
                                                                           const unsigned char* smem, int chunk,
                                                                           int row) {
  const int in_kind = chunk % T::kChunks, key = min(in_kind * T::kChunkKeys + row, share.n_key - 1);
  return key < share.n_old
             ? smem + chunk % T::kSlots * T::kSlotBytes + (key - in_kind * T::kChunkKeys) * (2 * T::kHeadDim)
             : smem + SlidingDecodeSmem<T>::kFresh + (chunk < T::kChunks ? 0 : 2 * T::kHeadDim);
}

/// Scores of the warp's 16 keys by mma.sync, the keys as rows and the heads as columns: row r is key 4 * warp + r % 4
/// of chunk r / 4. A lane takes 16 bytes of a row at a time, so that the order of dimensions is its own, the same for
/// both operands. Rows begin in the same banks: odd ones are read 64 bytes ahead and back, and multiplied by what
/// belongs there; the products that belong to the other half of the rows are thrown away. On return lane 4 g holds
/// score[i][h] of key g + 8 i and head h, in base 2; -inf where there is no such key.
template <class T>
__device__ __forceinline__ void score_keys_of_warp(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                                   const unsigned char* smem, float (&score)[2][2]) {
  using Smem = SlidingDecodeSmem<T>;
  constexpr int kSteps = T::kHeadDim / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) & 31;
  const int g = lane / 4, t = lane % 4;
  const std::uint32_t full = shared_address(smem + Smem::kFull), empty = shared_address(smem + Smem::kEmpty);
  score[0][0] = score[0][1] = score[1][0] = score[1][1] = -INFINITY;
  if (share.n_key == 0) return;
  uint4 q[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    q[step] = make_uint4(0, 0, 0, 0);
    if (g < T::kHeads) {
      q[step] = *reinterpret_cast<const uint4*>(smem + Smem::kQ + 2 * (g * T::kHeadDim + step * 32 + t * 8));
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

/// Softmax over the warp's own keys: leaves (maximum, sum) of each head and the exponentials in shared memory.
template <class T>
__device__ __forceinline__ void weigh_keys(const float (&score)[2][2], unsigned char* smem) {
  using Smem = SlidingDecodeSmem<T>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) & 31;
  float weight[2][2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float maximum = fmaxf(score[0][h], score[1][h]);
    maximum = warp_max<16, 4>(maximum);
    const float reference = maximum == -INFINITY ? 0.0f : maximum;
    weight[0][h] = exp2_approx(score[0][h] - reference);
    weight[1][h] = exp2_approx(score[1][h] - reference);
    float total = weight[0][h] + weight[1][h];
    total = warp_sum<16, 4>(total);
    if (lane == 0) {
      reinterpret_cast<float2*>(smem + Smem::kStates)[warp * T::kHeads + h] = make_float2(maximum, total);
    }
  }
  if (lane % 4 == 0) {
    float2* const to = reinterpret_cast<float2*>(smem + Smem::kWeights) + warp * 16 + lane / 4;
    to[0] = make_float2(weight[0][0], weight[0][1]);
    to[8] = make_float2(weight[1][0], weight[1][1]);
  }
  __syncwarp();
}

/// The warp's weighted sums of values, left in shared memory where the last keys were.
template <class T>
__device__ __forceinline__ void add_values(const SlidingDecodeShare& share, unsigned char* smem) {
  using Smem = SlidingDecodeSmem<T>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) & 31;
  const std::uint32_t full = shared_address(smem + Smem::kFull), empty = shared_address(smem + Smem::kEmpty);
  float sum[T::kHeads][T::kValues] = {};
#pragma unroll 1
  for (int chunk = 0; chunk * T::kChunkKeys < share.n_key; ++chunk) {
    float weight[T::kWarpKeys * T::kHeads];
    load_values(reinterpret_cast<const float*>(smem + Smem::kWeights) + warp * 32 + chunk * T::kWarpKeys * T::kHeads,
                weight);
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
    store_values(
        reinterpret_cast<float*>(smem + Smem::kSums) + (warp * T::kHeads + h) * T::kHeadDim + lane * T::kValues,
        sum[h]);
  }
}

/// Two neighbouring values of a head, unnormalised, and the head's (maximum, sum of exponentials), of kCount parts in
/// their order: those of warps or of blocks.
struct MergedPair {
  float2 sum = make_float2(0.0f, 0.0f);
  float2 state = make_float2(-INFINITY, 0.0f);
};
template <class TState, class TPart>
[[nodiscard]] __device__ __forceinline__ MergedPair merge_parts(int count, const TState& state_of,
                                                                const TPart& part_of) {
  MergedPair merged;
#pragma unroll 8
  for (int i = 0; i < count; ++i) merged.state.x = fmaxf(merged.state.x, state_of(i).x);
  const float reference = merged.state.x == -INFINITY ? 0.0f : merged.state.x;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float2 state = state_of(i), part = part_of(i);
    const float factor = exp2_approx(state.x - reference);
    merged.sum.x = fmaf(part.x, factor, merged.sum.x);
    merged.sum.y = fmaf(part.y, factor, merged.sum.y);
    merged.state.y = fmaf(state.y, factor, merged.state.y);
  }
  return merged;
}

/// Merges the warps of this block and sends each block of the cluster what it finishes: 2 * head_dim / n_split values.
template <class T>
__device__ __forceinline__ void send_parts(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                           unsigned char* smem) {
  using Smem = SlidingDecodeSmem<T>;
  const int value = 2 * static_cast<int>(threadIdx.x), each = T::kHeads * T::kHeadDim / params.n_split;
  if (value >= T::kHeads * T::kHeadDim) return;
  const int h = value / T::kHeadDim, dim = value % T::kHeadDim;
  const MergedPair merged = merge_parts(
      T::kWarps, [&](int warp) { return reinterpret_cast<const float2*>(smem + Smem::kStates)[warp * T::kHeads + h]; },
      [&](int warp) {
        return *reinterpret_cast<const float2*>(smem + Smem::kSums + 4 * ((warp * T::kHeads + h) * T::kHeadDim + dim));
      });
  store_to_block(smem + Smem::kParts + 4 * (share.split * each + value % each), value / each, merged.sum);
  if (dim / 2 < params.n_split) {
    store_to_block(smem + Smem::kPartStates + 8 * (share.split * T::kHeads + h), dim / 2, merged.state);
  }
}

/// Merges what the blocks of the cluster have sent, and stores it.
template <class T>
__device__ __forceinline__ void finish_parts(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                             const unsigned char* smem) {
  using Smem = SlidingDecodeSmem<T>;
  const int each = T::kHeads * T::kHeadDim / params.n_split, in_share = 2 * static_cast<int>(threadIdx.x);
  if (in_share >= each) return;
  const int value = share.split * each + in_share, h = value / T::kHeadDim, dim = value % T::kHeadDim;
  if (2 * share.pair + h >= params.group) return;
  const MergedPair merged = merge_parts(
      params.n_split,
      [&](int split) { return reinterpret_cast<const float2*>(smem + Smem::kPartStates)[split * T::kHeads + h]; },
      [&](int split) { return *reinterpret_cast<const float2*>(smem + Smem::kParts + 4 * (split * each + in_share)); });
  const float inverse = 1.0f / merged.state.y;  // the newest key is always seen
  *reinterpret_cast<std::uint32_t*>(&params.out(0, share.head(params, h), dim)) =
      pack_bf16(merged.sum.x * inverse, merged.sum.y * inverse);
}

#endif

/// grid: clusters of n_split blocks, one a pair of query heads. Nothing before sm_90.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 2)
    sliding_decode_kernel(const __grid_constant__ SlidingDecodeParams params) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Smem = SlidingDecodeSmem<T>;
  extern __shared__ __align__(128) unsigned char sliding_smem_bytes[];
  unsigned char* const smem = sliding_smem_bytes;
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
    named_barrier_sync<32 * T::kWarps>(1);
    float score[2][2];
    score_keys_of_warp<T>(params, share, smem, score);
    weigh_keys<T>(score, smem);
    add_values<T>(share, smem);
    named_barrier_sync<32 * T::kWarps>(1);
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

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cache_hint.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/shared_memory.cuh"
#include "cuda/rms_norm.cuh"
#include "cuda/rope.cuh"
#include "cuda/softmax_state.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// What a block of sliding_decode_kernel works on and with: the tile, the shared memory, its heads and keys, and the
/// warp that copies the keys and values into the slots. cuda/sliding_decode/kernel.cuh says why.
namespace gemma4::cuda::detail {

inline constexpr int kSlidingDecodeKeys = 128;  ///< of a block
inline constexpr int kSlidingDecodeSplits = 8;  ///< the largest cluster that every device with clusters takes

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
  static constexpr int kTeamBarrier = 1;  ///< named barrier of the warps that compute
  static constexpr int kSumsBytes = kWarps * kHeads * kDim * 4;
  static constexpr int kSumsSlot = kChunks - kSumsBytes / kSlotBytes;  ///< see SlidingDecodeSmem::sums
  static_assert(kWarpKeys * kChunks == 16, "the keys of a warp are the rows of a product of matrices");
  static_assert(kHeads * kDim <= 2 * 32 * kWarps, "a thread merges two values");
  static_assert(kEarly <= kSlots && kSlots >= kChunks && kSlots <= 2 * kChunks && 2 * kChunks - kSlots <= kSumsSlot,
                "values that take the place of keys stay clear of the sums");
};

/// Shared memory of a block. Every array begins at a multiple of 16 bytes.
template <class T>
struct SlidingDecodeSmem {
  unsigned char slot[T::kSlots][T::kSlotBytes];  ///< chunks of keys and values, [kChunkKeys, head_dim] bf16
  Bf16 fresh[2][T::kHeadDim];                    ///< the newest k and v
  Bf16 q[T::kHeads][T::kHeadDim];
  float norms[2][T::kHeadDim];                                    ///< weights of the norms of q and of k
  float weights[T::kWarps][T::kChunks][T::kWarpKeys][T::kHeads];  ///< exponentials
  SoftmaxState states[T::kWarps][T::kHeads];
  float parts[T::kHeads * T::kHeadDim];                       ///< sums from the blocks of the cluster
  SoftmaxState part_states[kSlidingDecodeSplits][T::kHeads];  ///< and their states
  float2 cos_sin[T::kHeadDim / 2];
  std::uint64_t full[2 * T::kChunks];  ///< a barrier for each chunk that arrives, keys and then values
  std::uint64_t empty[T::kChunks];     ///< and for each chunk of keys that is done with

  /// [warp, head, head_dim]: what a warp has summed, where the last keys were.
  [[nodiscard]] __device__ float* sums(int warp, int head) {
    return reinterpret_cast<float*>(slot[T::kSumsSlot]) + (warp * T::kHeads + head) * T::kHeadDim;
  }
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

  __device__ __forceinline__ explicit SlidingDecodeShare(const SlidingDecodeParams& params)
      : SlidingDecodeShare(params, params.position != nullptr ? *params.position : params.position_host) {}
  /// That of a token at another position.
  __device__ __forceinline__ SlidingDecodeShare(const SlidingDecodeParams& params, int at) : position(at) {
    const int block = static_cast<int>(blockIdx.x);
    split = block % params.n_split;
    pair = block / params.n_split % params.n_pair;
    head_kv = block / params.n_split / params.n_pair;
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
                                            SlidingDecodeSmem<T>& smem, int chunk) {
  const int in_kind = chunk % T::kChunks, n_row = min(share.n_old - in_kind * T::kChunkKeys, T::kChunkKeys);
  if (in_kind * T::kChunkKeys >= share.n_key) return;
  const std::uint32_t barrier = shared_address(smem.full + chunk);
  if (n_row <= 0) return mbarrier_arrive(barrier);    // nothing but the newest
  const std::uint64_t policy = evict_first_policy();  // a ring is not read again before all weights have been
  const auto slot = static_cast<int>(ring_slot(static_cast<std::uint32_t>(share.first + in_kind * T::kChunkKeys),
                                               static_cast<std::uint32_t>(params.ring_len)));
  const int n_before_end = min(n_row, params.ring_len - slot);
  const View<Bf16, 3>& ring = chunk < T::kChunks ? params.ring_k : params.ring_v;
  const auto copy = [&](int to_row, int from_row, int count) {
    bulk_load(shared_address(smem.slot[chunk % T::kSlots]) + to_row * T::kHeadDim * 2,
              &ring(share.head_kv, from_row, 0), count * T::kHeadDim * 2, barrier, policy);
  };
  mbarrier_expect(barrier, n_row * T::kHeadDim * 2);
  copy(0, slot, n_before_end);
  if (n_before_end < n_row) copy(n_before_end, 0, n_row - n_before_end);
}

/// The copying warp before the projections are there.
template <class T>
__device__ __forceinline__ void fetch_early(const SlidingDecodeParams& params, const SlidingDecodeShare& share,
                                            SlidingDecodeSmem<T>& smem) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if (lane == 0) {
#pragma unroll 1
    for (int chunk = 0; chunk < 2 * T::kChunks; ++chunk) {
      mbarrier_init(shared_address(smem.full + chunk), 1);
      if (chunk < T::kChunks) mbarrier_init(shared_address(smem.empty + chunk), 32 * T::kWarps);
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
                                           SlidingDecodeSmem<T>& smem) {
  const int lane = static_cast<int>(threadIdx.x) & 31, n_chunk = (share.n_key + T::kChunkKeys - 1) / T::kChunkKeys;
  if (lane >= T::kEarly && lane < T::kSlots) fetch_chunk<T>(params, share, smem, lane);
  if (lane == 0) {
#pragma unroll 1
    for (int chunk = T::kSlots; chunk < T::kChunks + n_chunk; ++chunk) {
      mbarrier_wait(shared_address(smem.empty + chunk - T::kSlots), 0);
      fetch_chunk<T>(params, share, smem, chunk);
    }
  }
  __syncwarp();
}

#endif

}  // namespace gemma4::cuda::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cache_hint.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/shared_memory.cuh"
#include "cuda/sliding_decode/share.cuh"
#include "cuda/softmax_state.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/float16.hpp"

/// What a block of sliding_rows_kernel works on and with: share.cuh for up to four neighbouring tokens at once.
///
/// The keys of a block for one token are those for the token before, moved on by one key or by none at each end. So the
/// keys of all rows lie next to each other: key u is the one at position first + u, and row r sees the keys
/// [shift[r], shift[r] + n_key[r]), shift[r] <= r. Those at the rows' own positions are not taken from the ring.
namespace gemma4::cuda::detail {

template <int kDim>
struct SlidingRowsTraits : SlidingDecodeTraits<kDim> {
  using Base = SlidingDecodeTraits<kDim>;
  static constexpr int kRows = 4;                            ///< with two heads the eight columns of a product
  static constexpr int kAhead = kRows - 1;                   ///< keys of a chunk's rows that lie in the next one
  static constexpr int kKeys = kSlidingDecodeKeys + kAhead;  ///< of all rows
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kHalfKeys = 2 * Base::kChunkKeys + kAhead;  ///< of the first two chunks
  static constexpr int kPlaces = kKeys + kHalfKeys;  ///< all keys and the first values; the other values replace keys
  static constexpr int kScorePitch = (kKeys + 3) / 4 * 4;
  static_assert(kRows * Base::kHeads == 8, "rows and heads are the columns of mma_bf16()");
};

struct SlidingRowsParams {
  SlidingDecodeParams one;  ///< of the first row; q, k, v and out have n_row rows
  std::int32_t n_row;
  bool ring_rests;  ///< the kernel in front does not write the ring: old keys may be asked for before it has ended
  bool read_again;  ///< the next launch reads the same keys
};
static_assert(std::is_trivially_copyable_v<SlidingRowsParams>);

/// The share of a block: the heads, and the keys of all rows. A row's own share is SlidingDecodeShare at its position.
struct SlidingRowsShare {
  SlidingDecodeShare front;  ///< of row 0
  int n_row;
  int n_key;    ///< of all rows
  int n_old;    ///< of these, before the first row's position
  bool slides;  ///< every row sees as many keys, one further than the row before, in whole chunks: the window is full

  __device__ __forceinline__ explicit SlidingRowsShare(const SlidingRowsParams& params)
      : front(params.one), n_row(params.n_row) {
    const SlidingDecodeShare back(params.one, front.position + n_row - 1);
    n_key = back.first + back.n_key - front.first;
    n_old = min(max(front.position, 0) - front.first, n_key);
    slides = back.first - front.first == n_row - 1 && back.n_key == front.n_key &&
             front.n_key % SlidingDecodeTraits<64>::kChunkKeys == 0;
  }
  [[nodiscard]] __device__ __forceinline__ int n_fresh() const { return n_key - n_old; }
};

/// Shared memory of a block. Every array begins at a multiple of 16 bytes.
template <class T>
struct SlidingRowsSmem {
  /// What lies in the places once all rows are scored (parts, written by other blocks) and once all values are added
  /// (the sums of warps).
  struct Late {
    float low[2][T::kWarps][T::kHeads][T::kHeadDim];  ///< sums of rows 0 and 1
    float parts[T::kRows][T::kHeads * T::kHeadDim];   ///< sums from the blocks of the cluster
    SoftmaxState part_states[T::kRows][kSlidingDecodeSplits][T::kHeads];
    float high[2][T::kWarps][T::kHeads][T::kHeadDim];  ///< sums of rows 2 and 3
  };
  union {
    unsigned char place[T::kPlaces][T::kRowBytes];  ///< keys and values, [head_dim] bf16
    Late late;
  };
  Bf16 fresh[2][T::kRows][T::kHeadDim];  ///< the new k and v of the first rows, as many as the block needs
  union {
    Bf16 q[T::kRows][T::kHeads][T::kHeadDim];
    float weights[T::kRows][T::kWarps][T::kChunks][T::kWarpKeys][T::kHeads];  ///< exponentials, once all are scored
  };
  union {
    float2 cos_sin[T::kRows][T::kHeadDim / 2];
    float scores[T::kRows][T::kHeads][T::kScorePitch];  ///< of key u, once q and k are turned
  };
  SoftmaxState states[T::kRows][T::kWarps][T::kHeads];
  int2 range[T::kRows];                ///< shift and n_key of a row
  SlidingRowsShare share;              ///< so that it needs no registers meanwhile
  std::uint64_t full[2 * T::kChunks];  ///< a barrier for each chunk that arrives, keys and then values

  static_assert(sizeof(Late::low) == (T::kKeys - T::kHalfKeys) * T::kRowBytes,
                "parts come while the second half of the values is read");
  static_assert(sizeof(Late) - sizeof(Late::high) <= T::kKeys * T::kRowBytes, "and the first half");
  static_assert(sizeof(Late) <= T::kPlaces * T::kRowBytes);

  /// [head, head_dim]: what a warp has summed of a row.
  [[nodiscard]] __device__ float* sums(int row, int warp, int head) {
    return row < 2 ? late.low[row][warp][head] : late.high[row - 2][warp][head];
  }
};

/// Key u.
template <class T>
[[nodiscard]] __device__ __forceinline__ const unsigned char* key_at(const SlidingRowsShare& share,
                                                                     const SlidingRowsSmem<T>& smem, int u) {
  return u < share.n_old ? smem.place[u] : reinterpret_cast<const unsigned char*>(smem.fresh[0][u - share.n_old]);
}

/// Where the value of key u lies: the first half behind the keys, the second in the places of the first keys.
template <class T>
[[nodiscard]] __device__ __forceinline__ int place_of_value(int u) {
  return u < T::kHalfKeys ? T::kKeys + u : u - T::kHalfKeys;
}
template <class T>
[[nodiscard]] __device__ __forceinline__ const unsigned char* value_at(const SlidingRowsShare& share,
                                                                       const SlidingRowsSmem<T>& smem, int u) {
  return u < share.n_old ? smem.place[place_of_value<T>(u)]
                         : reinterpret_cast<const unsigned char*>(smem.fresh[1][u - share.n_old]);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// Asks for a chunk of old keys (chunk < kChunks) or values; one thread. A chunk holds what the same chunk of any row
/// needs beyond the chunks before: 32 keys, the first one kAhead more.
template <class T>
__device__ __forceinline__ void fetch_chunk_of_rows(const SlidingRowsParams& params, const SlidingRowsShare& share,
                                                    SlidingRowsSmem<T>& smem, int chunk) {
  const bool is_key = chunk < T::kChunks;
  const int in_kind = chunk % T::kChunks, begin = in_kind == 0 ? 0 : in_kind * T::kChunkKeys + T::kAhead;
  const int n_row = min(share.n_old, (in_kind + 1) * T::kChunkKeys + T::kAhead) - begin;
  const std::uint32_t barrier = shared_address(smem.full + chunk);
  if (n_row <= 0) return mbarrier_arrive(barrier);
  const auto slot = static_cast<int>(ring_slot(static_cast<std::uint32_t>(share.front.first + begin),
                                               static_cast<std::uint32_t>(params.one.ring_len)));
  const int n_before_end = min(n_row, params.one.ring_len - slot), place = is_key ? begin : place_of_value<T>(begin);
  const View<Bf16, 3>& ring = is_key ? params.one.ring_k : params.one.ring_v;
  const auto copy = [&](int to_row, int from_row, int count) {
    const std::uint32_t to = shared_address(smem.place[to_row]);
    const Bf16* const from = &ring(share.front.head_kv, from_row, 0);
    if (params.read_again) return bulk_load(to, from, count * T::kRowBytes, barrier);
    bulk_load(to, from, count * T::kRowBytes, barrier, evict_first_policy());  // not before all weights have been
  };
  mbarrier_expect(barrier, n_row * T::kRowBytes);
  copy(place, slot, n_before_end);
  if (n_before_end < n_row) copy(place + n_before_end, 0, n_row - n_before_end);
}

/// The chunks [first, end), a lane each.
template <class T>
__device__ __forceinline__ void fetch_chunks_of_rows(const SlidingRowsParams& params, const SlidingRowsShare& share,
                                                     SlidingRowsSmem<T>& smem, int first, int end) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if (lane >= first && lane < end) fetch_chunk_of_rows<T>(params, share, smem, lane);
  __syncwarp();
}

/// The copying warp before the projections are there.
template <class T>
__device__ __forceinline__ void fetch_early_of_rows(const SlidingRowsParams& params, const SlidingRowsShare& share,
                                                    SlidingRowsSmem<T>& smem) {
  if (threadIdx.x % 32 == 0) {
#pragma unroll 1
    for (int chunk = 0; chunk < 2 * T::kChunks; ++chunk) mbarrier_init(shared_address(smem.full + chunk), 1);
    mbarrier_init_fence();
  }
  __syncwarp();
  if (params.ring_rests) fetch_chunks_of_rows<T>(params, share, smem, 0, T::kChunks);
}

/// And after: the other half of what there is room for.
template <class T>
__device__ __forceinline__ void fetch_rest_of_rows(const SlidingRowsParams& params, const SlidingRowsShare& share,
                                                   SlidingRowsSmem<T>& smem) {
  fetch_chunks_of_rows<T>(params, share, smem, params.ring_rests ? T::kChunks : 0, T::kChunks + 2);
}

#endif

}  // namespace gemma4::cuda::detail

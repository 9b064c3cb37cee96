// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "cuda/ptx/cache_hint.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/shared_memory.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/rms_norm.cuh"
#include "cuda/rope.cuh"
#include "cuda/sliding_decode/kernel.cuh"
#include "cuda/sliding_decode/rows_share.cuh"
#include "cuda/sliding_decode/share.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/float16.hpp"

/// The kernel of sliding_decode_rows(): up to four neighbouring tokens of a sliding layer by clusters of blocks, which
/// read every key and value once for all of them.
///
/// Every row gets the bits that sliding_decode_kernel gives it alone, because whatever that kernel rounds is rounded
/// here in the same order:
/// - the keys of a row are shared out by SlidingDecodeShare itself, and within the block as there: key i of the row
///   belongs to chunk i / 32 and warp i % 32 / 4, whoever has computed its score;
/// - a score is two chains of mma.sync over the blocks of 32 dimensions, in the order 0, 1, 2, ... for an even i and
///   1, 0, 3, 2, ... for an odd one (score_keys_of_warp() reads odd rows so). Here both chains run over every key: a
///   row whose shift is odd takes the other one. An element of a product of matrices depends on its row and its column
///   alone;
/// - maxima, exponentials and their sums are weigh_keys(), the rows in neighbouring lanes;
/// - a warp adds weight times value from its first key to its last, an fma each, for each row by itself;
/// - warps, and then blocks, are merged by merge_parts().
/// Angles, norms and roundings of q, k and v are the same functions. What differs is what is added to nothing: keys and
/// values of a row that another row does not see take part in no sum of it.
namespace gemma4::cuda::detail {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// The warps that compute before the projections are there: which keys each row sees, the angles, and the weights of
/// the norms on their way.
template <class T>
__device__ __forceinline__ void prepare_rows_early(const SlidingRowsParams& params, const SlidingRowsShare& share,
                                                   SlidingRowsSmem<T>& smem) {
  constexpr int kLine = 32;  // floats
  const int i = static_cast<int>(threadIdx.x), n_angle = params.one.rope.n_pair;
  if (i < 2 * T::kHeadDim / kLine) {
    prefetch_line((i % 2 == 0 ? params.one.norms.q : params.one.norms.k) + i / 2 * kLine);
  }
  if (i < T::kRows) {
    const SlidingDecodeShare own(params.one, share.front.position + i);
    smem.range[i] = i < share.n_row ? make_int2(own.first - share.front.first, own.n_key) : make_int2(0, 0);
  }
  for (int angle = i; angle < share.n_row * n_angle; angle += 32 * T::kWarps) {
    const int row = angle / n_angle, pair = angle % n_angle;
    smem.cos_sin[row][pair % T::kValues * 16 + pair / T::kValues] =
        rope_cos_sin(share.front.position + row, params.one.rope.frequency[pair]);
  }
}

/// Normalises and turns the query heads of all rows and the new keys and values that the block needs, up to two vectors
/// a warp. The last split needs all of these and stores them in the ring; no block reads those slots.
template <class T>
__device__ __forceinline__ void prepare_rows(const SlidingRowsParams& params, const SlidingRowsShare& share,
                                             SlidingRowsSmem<T>& smem) {
  constexpr int kValues = T::kValues, kEach = 2;
  static_assert(T::kRows * (T::kHeads + 2) <= kEach * T::kWarps);
  const int n_fresh = share.n_fresh(), n_q = share.n_row * T::kHeads, n_vector = n_q + 2 * n_fresh;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane_first = (static_cast<int>(threadIdx.x) & 31) * kValues;
  const int front = share.front.position, head_kv = share.front.head_kv;
  const auto row_of = [&](int i) { return i < n_q ? i / T::kHeads : i < n_q + n_fresh ? i - n_q : i - n_q - n_fresh; };
  RawValues<kValues, float> raw[kEach];  // both on their way at once
#pragma unroll
  for (int each = 0; each < kEach; ++each) {
    const int i = warp + each * T::kWarps, row = row_of(i);
    if (i >= n_vector) break;
    raw[each].load(i < n_q             ? &params.one.q(row, share.front.head(params.one, i % T::kHeads), lane_first)
                   : i < n_q + n_fresh ? &params.one.k(row, head_kv, lane_first)
                                       : &params.one.v(row, head_kv, lane_first));
  }
#pragma unroll
  for (int each = 0; each < kEach; ++each) {
    const int i = warp + each * T::kWarps, row = row_of(i);
    const bool is_q = i < n_q, is_v = i >= n_q + n_fresh;
    if (i >= n_vector) break;
    float x[kValues];
    raw[each].widen(x);
    rms_norm_warp<T::kHeadDim>(x,
                               is_q   ? params.one.norms.q
                               : is_v ? nullptr
                                      : params.one.norms.k,
                               params.one.norms.epsilon);
    if (!is_v) rope_warp<T::kHeadDim>(smem.cos_sin[row], params.one.rope.n_pair, x);
    store_values((is_q ? smem.q[row][i % T::kHeads] : smem.fresh[is_v ? 1 : 0][row]) + lane_first, x);
    if (is_q || !share.front.has_newest || share.front.pair != 0 || front + row < 0) continue;
    const auto slot =
        ring_slot(static_cast<std::uint32_t>(front + row), static_cast<std::uint32_t>(params.one.ring_len));
    store_values(&(is_v ? params.one.ring_v : params.one.ring_k)(head_kv, slot, lane_first), x);
  }
}

/// Two chains of products over the blocks of 32 dimensions of a tile, for each half of a block.
struct ScoreChain {
  float sum[2][4] = {};

  /// @param low, high 16 bytes of the tile's rows g and g + 8
  __device__ __forceinline__ void add(const uint4& low, const uint4& high, const uint4& q) {
    const std::uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
    mma_bf16(sum[0], first, q.x, q.y);
    mma_bf16(sum[1], second, q.z, q.w);
  }
  [[nodiscard]] __device__ __forceinline__ float total(int c) const { return sum[0][c] + sum[1][c]; }
};

/// Scores of 16 keys for all rows by mma.sync, the keys as rows, row and head as columns: in base 2, left in shared
/// memory. Tile 8, of the warp that copies, has the keys behind the first 128. Banks are read as score_keys_of_warp()
/// reads them, and what odd rows have read is put in order.
template <class T>
__device__ __forceinline__ void score_tile(const SlidingRowsParams& params, const SlidingRowsShare& share,
                                           SlidingRowsSmem<T>& smem) {
  constexpr int kSteps = T::kHeadDim / 32;
  const int tile = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) & 31;
  const int g = lane / 4, t = lane % 4;
  if (share.n_key == 0 || (tile == T::kWarps && share.n_key <= kSlidingDecodeKeys)) return;
  uint4 q[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    q[step] = make_uint4(0, 0, 0, 0);
    if (g < share.n_row * T::kHeads) {
      q[step] = *reinterpret_cast<const uint4*>(smem.q[g / T::kHeads][g % T::kHeads] + step * 32 + t * 8);
    }
  }
#pragma unroll 1
  for (int chunk = 0; chunk < T::kChunks; ++chunk) mbarrier_wait(shared_address(smem.full + chunk), 0);
  int key[2];
  const unsigned char* row[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = g + 8 * i;
    key[i] = tile == T::kWarps ? kSlidingDecodeKeys + r
                               : r / T::kWarpKeys * T::kChunkKeys + tile * T::kWarpKeys + r % T::kWarpKeys;
    row[i] = key_at<T>(share, smem, min(key[i], share.n_key - 1));
  }
  ScoreChain ascending, swapped;
#pragma unroll
  for (int step = 0; step < kSteps; step += 2) {
    const int offset = (step ^ (g & 1)) * 64 + t * 16;
    uint4 low[2], high[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      low[i] = *reinterpret_cast<const uint4*>(row[0] + (offset ^ 64 * i));
      high[i] = *reinterpret_cast<const uint4*>(row[1] + (offset ^ 64 * i));
    }
    if (g % 2 != 0) {
      const uint4 of_low = low[0], of_high = high[0];
      low[0] = low[1], low[1] = of_low, high[0] = high[1], high[1] = of_high;
    }
    ascending.add(low[0], high[0], q[step]);
    swapped.add(low[1], high[1], q[step + 1]);
    ascending.add(low[1], high[1], q[step + 1]);
    swapped.add(low[0], high[0], q[step]);
  }
  const int shift = smem.range[t].x;  // columns 2 t and 2 t + 1 are row t
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool even = (key[i] - shift) % 2 == 0;
#pragma unroll
    for (int h = 0; h < T::kHeads; ++h) {
      const int c = 2 * i + h;
      const float sum = even ? ascending.total(c) : swapped.total(c);
      if (key[i] < share.n_key) smem.scores[t][h][key[i]] = sum * params.one.scale_log2;
    }
  }
}

/// Softmax of each row over the keys that are the warp's for it, a row in every fourth lane.
template <class T>
__device__ __forceinline__ void weigh_keys_of_rows(const SlidingRowsShare& share, SlidingRowsSmem<T>& smem) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) & 31;
  const int g = lane / 4, row = lane % 4;
  const int2 range = smem.range[row];
  float score[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = g + 8 * i, key = r / T::kWarpKeys * T::kChunkKeys + warp * T::kWarpKeys + r % T::kWarpKeys;
#pragma unroll
    for (int h = 0; h < T::kHeads; ++h) {
      score[i][h] = key < range.y ? smem.scores[row][h][key + range.x] : -INFINITY;
    }
  }
  weigh_keys(score, smem.states[row][warp], reinterpret_cast<float2*>(smem.weights[row][warp]), row < share.n_row);
}

/// [row, head]: a lane's weighted sums of values.
template <class T>
using SumsOfRows = float[T::kRows][T::kHeads][T::kValues];

template <class T>
__device__ __forceinline__ void load_value(const unsigned char* from, float (&v)[T::kValues]) {
  RawValues<T::kValues, Bf16> raw;
  raw.load(reinterpret_cast<const Bf16*>(from) + (static_cast<int>(threadIdx.x) & 31) * T::kValues);
  raw.widen(v);
}

template <class T>
__device__ __forceinline__ void add_value(const float (&weight)[T::kHeads], const float (&v)[T::kValues],
                                          float (&sum)[T::kHeads][T::kValues]) {
#pragma unroll
  for (int h = 0; h < T::kHeads; ++h) {
#pragma unroll
    for (int d = 0; d < T::kValues; ++d) sum[h][d] = fmaf(weight[h], v[d], sum[h][d]);
  }
}

/// The warp's weighted sums for kRows rows whose keys follow each other (SlidingRowsShare::slides): a value that is
/// read serves every row.
template <class T, int kRows>
__device__ __forceinline__ void add_sliding_values(const SlidingRowsShare& share, SlidingRowsSmem<T>& smem,
                                                   SumsOfRows<T>& sum) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
  for (int chunk = 0; chunk * T::kChunkKeys < share.front.n_key; ++chunk) {
    mbarrier_wait(shared_address(smem.full + T::kChunks + chunk), 0);
#pragma unroll
    for (int i = 0; i < T::kWarpKeys + kRows - 1; ++i) {
      float v[T::kValues];
      load_value<T>(value_at<T>(share, smem, chunk * T::kChunkKeys + warp * T::kWarpKeys + i), v);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (i < row || i >= row + T::kWarpKeys) continue;
        float weight[T::kHeads];
        load_values(smem.weights[row][warp][chunk][i - row], weight);
        add_value<T>(weight, v, sum[row]);
      }
    }
  }
}

/// The same for any rows, each by itself.
template <class T>
__device__ __forceinline__ void add_values_row_by_row(const SlidingRowsShare& share, SlidingRowsSmem<T>& smem,
                                                      SumsOfRows<T>& sum) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
  for (int chunk = 0; chunk < T::kChunks && chunk * T::kChunkKeys < share.n_key; ++chunk) {
    mbarrier_wait(shared_address(smem.full + T::kChunks + chunk), 0);
#pragma unroll
    for (int row = 0; row < T::kRows; ++row) {
      const int2 range = smem.range[row];
      if (chunk * T::kChunkKeys >= range.y) continue;
#pragma unroll 1
      for (int i = 0; i < T::kWarpKeys; ++i) {
        const int key = chunk * T::kChunkKeys + warp * T::kWarpKeys + i;
        float v[T::kValues], weight[T::kHeads];
        load_value<T>(value_at<T>(share, smem, min(key, range.y - 1) + range.x), v);
        load_values(smem.weights[row][warp][chunk][i], weight);
        add_value<T>(weight, v, sum[row]);
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void add_values_of_rows(const SlidingRowsShare& share, SlidingRowsSmem<T>& smem) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) & 31;
  SumsOfRows<T> sum = {};
  if (!share.slides) {
    add_values_row_by_row<T>(share, smem, sum);
  } else if (share.n_row == 2) {
    add_sliding_values<T, 2>(share, smem, sum);
  } else if (share.n_row == 3) {
    add_sliding_values<T, 3>(share, smem, sum);
  } else {
    add_sliding_values<T, 4>(share, smem, sum);
  }
  named_barrier_sync<T::kTeamBarrier, 32 * T::kWarps>();  // no warp still reads values, where the sums go
#pragma unroll
  for (int row = 0; row < T::kRows; ++row) {
    if (row >= share.n_row) break;
#pragma unroll
    for (int h = 0; h < T::kHeads; ++h) store_values(smem.sums(row, warp, h) + lane * T::kValues, sum[row][h]);
  }
}

/// Merges the warps of this block and sends each block of the cluster what it finishes, row by row as send_parts().
template <class T>
__device__ __forceinline__ void send_parts_of_rows(const SlidingRowsParams& params, const SlidingRowsShare& share,
                                                   SlidingRowsSmem<T>& smem) {
  const int value = 2 * static_cast<int>(threadIdx.x), n_split = params.one.n_split;
  const int each = T::kHeads * T::kHeadDim / n_split, split = share.front.split;
  if (value >= T::kHeads * T::kHeadDim) return;
  const int h = value / T::kHeadDim, dim = value % T::kHeadDim;
#pragma unroll 1
  for (int row = 0; row < share.n_row; ++row) {
    const MergedPair merged = merge_parts(
        T::kWarps, [&](int warp) { return smem.states[row][warp][h]; },
        [&](int warp) { return *reinterpret_cast<const float2*>(smem.sums(row, warp, h) + dim); });
    store_to_block(smem.late.parts[row] + split * each + value % each, value / each, merged.sum);
    if (dim / 2 < n_split) {
      store_to_block(&smem.late.part_states[row][split][h], dim / 2,
                     make_float2(merged.state.maximum, merged.state.sum));
    }
  }
}

/// Merges what the blocks of the cluster have sent, and stores it, row by row as finish_parts().
template <class T>
__device__ __forceinline__ void finish_parts_of_rows(const SlidingRowsParams& params, const SlidingRowsShare& share,
                                                     const SlidingRowsSmem<T>& smem) {
  const int n_split = params.one.n_split, each = T::kHeads * T::kHeadDim / n_split, half = each / 2;
  // Threads that one row leaves take others.
  for (int i = static_cast<int>(threadIdx.x); i < share.n_row * half; i += 32 * T::kWarps) {
    const int row = i / half, in_share = i % half * 2, value = share.front.split * each + in_share;
    const int h = value / T::kHeadDim, dim = value % T::kHeadDim;
    if (2 * share.front.pair + h >= params.one.group) continue;
    const MergedPair merged = merge_parts(
        n_split, [&](int from) { return smem.late.part_states[row][from][h]; },
        [&](int from) { return *reinterpret_cast<const float2*>(smem.late.parts[row] + from * each + in_share); });
    const float inverse = 1.0f / merged.state.sum;  // the newest key is always seen
    *reinterpret_cast<std::uint32_t*>(&params.one.out(row, share.front.head(params.one, h), dim)) =
        pack_bf16(merged.sum.x * inverse, merged.sum.y * inverse);
  }
}

#endif

/// grid: clusters of n_split blocks, one a pair of query heads. Nothing before sm_90.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 2)
    sliding_rows_kernel(const __grid_constant__ SlidingRowsParams params) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char sliding_smem_bytes[];
  auto& smem = *reinterpret_cast<SlidingRowsSmem<T>*>(sliding_smem_bytes);
  const bool copies = threadIdx.x / 32 == T::kWarps;
  {
    const SlidingRowsShare own(params);
    if (threadIdx.x == 0) {
      smem.share = own;
    }
    if (copies) {
      fetch_early_of_rows<T>(params, own, smem);
    } else {
      prepare_rows_early<T>(params, own, smem);
    }
  }
  __syncthreads();
  const SlidingRowsShare& share = smem.share;
  wait_for_previous_kernel();
  allow_next_kernel();
  if (copies) {
    fetch_rest_of_rows<T>(params, share, smem);
  } else {
    prepare_rows<T>(params, share, smem);
  }
  __syncthreads();
  score_tile<T>(params, share, smem);
  __syncthreads();           // no warp still reads keys or q
  cluster_arrive_release();  // "others may write parts"
  if (copies) {
    fetch_chunks_of_rows<T>(params, share, smem, T::kChunks + 2, 2 * T::kChunks);
  } else {
    weigh_keys_of_rows<T>(share, smem);
    add_values_of_rows<T>(share, smem);
    named_barrier_sync<T::kTeamBarrier, 32 * T::kWarps>();
  }
  cluster_wait_acquire();
  if (!copies) send_parts_of_rows<T>(params, share, smem);
  cluster_arrive_release();
  cluster_wait_acquire();
  if (!copies) finish_parts_of_rows<T>(params, share, smem);
#endif
}

}  // namespace gemma4::cuda::detail

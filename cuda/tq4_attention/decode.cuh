// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/opaque.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/softmax_state.cuh"
#include "cuda/tq4_attention/decode_params.cuh"
#include "cuda/tq4_attention/decode_query.cuh"
#include "cuda/tq4_attention/decode_records.cuh"
#include "cuda/tq4_attention/record_ring.cuh"
#include "cuda/tq4_cache.cuh"

/// Attention of a few query rows over TQ4 records: flash decoding on tensor cores by pairs of warps.
///
/// The rows of one KV head (token * group + head) are taken kRowTile = 8 at a time, the width of an mma B operand. A
/// pair of warps owns a run of records and keeps its own maximum, sum and output, so that the loop has no block
/// barrier:
///   S [16 tokens, 8 rows] = K q^T, fp16; K levels are decoded in registers into A fragments, each warp multiplies half
///   of the dims, and the two halves are exchanged through shared memory;
///   p = 2^(S * norm_k * scale - m), computed by both warps alike;
///   O^T [head_dim, 8 rows] += V^T (p * norm_v), bf16; each warp holds half of the dims.
/// A single warp a record (8 warps of 255 registers) took 5 % longer at 131072 keys and 15 % longer at 512.
/// In the end the pairs of a block are merged in order, each block leaves one partial, and a second kernel adds the
/// partials in block order, divides, rotates back and stores (cuda/tq4_attention/combine.cuh).
///
/// Which pair takes which records depends on kv_len, the number of blocks and of pairs, never on the buffer or on how
/// kv_len came: n_active = min(n_split, n_record) blocks, block i takes records [n i / n_active, n (i + 1) / n_active),
/// its pairs divide those in the same way. The grid is fixed, so a captured graph stays valid while kv_len grows.
///
/// q in fp16: a row is scaled by a power of two to a maximum in [1, 2), so its relative error is that of fp16
/// (2^-11) wherever its magnitude lies. Codebooks of 16 levels are read as bytes (byte_levels in
/// cuda/tq4_cache/layout.cuh, within 2^-8), others as fp16 (K) and bf16 (V). With byte levels the norms of V must lie
/// below 2^59: weights (below 2^8) are scaled by 2^60 against the 2^-133 of the levels. Bytes: 16 (D + 4) a record of
/// 16 tokens, read once per eight rows. The integer pipe is the second roof: 9 operations for 8 values.
namespace gemma4::cuda::detail {

/// Merges the pairs of a block in order and leaves the block's partial. Bit p of `live`: pair p had records.
template <class TTraits>
__device__ __forceinline__ void merge_pairs(Tq4DecodeState<TTraits>& state, const Tq4DecodeParams& params,
                                            unsigned char* smem, std::int64_t partial, unsigned live,
                                            const Tq4DecodeThread& at) {
  constexpr int kHeadDim = TTraits::kHeadDim, kPairs = TTraits::kPairs, kStride = TTraits::kMergeStride;
  auto* const ml = reinterpret_cast<float2*>(smem + TTraits::kMlOffset);  // [kPairs, kRowTile]
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    warp_sum_in_place<4, 16>(state.row[c].sum);
    if (at.g == 0 && at.half == 0)
      ml[at.pair * kRowTile + 2 * at.t + c] = make_float2(state.row[c].maximum, state.row[c].sum);
  }
  __syncthreads();  // from here on the rings are the merge's memory, too
  float factor[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float maximum = kFarBelow;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) maximum = fmaxf(maximum, ml[p * kRowTile + 2 * at.t + c].x);
    factor[c] = exp2_approx(state.row[c].maximum - maximum) * params.levels.v_scale;
    if (threadIdx.x >= 4) continue;
    float total = 0.0f;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const float2 part = ml[p * kRowTile + 2 * at.t + c];
      total += part.y * exp2_approx(part.x - maximum);
    }
    params.partial_ml[partial * kRowTile + 2 * at.t + c] = make_float2(maximum, total);
  }
  const auto slot = [&](int p) {
    return reinterpret_cast<float*>(smem + p * TTraits::kStages * TTraits::kRecordBytes);
  };
  if ((live >> at.pair) & 1u) {
    float* const mine = slot(at.pair) + 2 * at.t * kStride + at.half * (kHeadDim / TTraits::kTeamWarps) + at.g;
#pragma unroll
    for (int m = 0; m < TTraits::kVWords; ++m) {
      mine[16 * m] = state.o[m][0] * factor[0];
      mine[16 * m + kStride] = state.o[m][1] * factor[1];
      mine[16 * m + 8] = state.o[m][2] * factor[0];
      mine[16 * m + 8 + kStride] = state.o[m][3] * factor[1];
    }
  }
  __syncthreads();
  float* const target = params.partial_o + partial * kRowTile * kHeadDim;
  for (int item = threadIdx.x; item < kRowTile * (kHeadDim / 4); item += TTraits::kThreads) {
    const int row = item / (kHeadDim / 4), dim = item % (kHeadDim / 4) * 4;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      if (((live >> p) & 1u) == 0) continue;
      const float4 part = *reinterpret_cast<const float4*>(slot(p) + row * kStride + dim);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    *reinterpret_cast<float4*>(target + row * kHeadDim + dim) = sum;
  }
}

/// grid: x = split, y and z as in Tq4DecodeUnit; of rows see Tq4DecodePlace.
template <class TTraits>
__global__ void __launch_bounds__(TTraits::kThreads, TTraits::kBlocksPerSm)
    tq4_decode_kernel(const __grid_constant__ Tq4DecodeParams params) {
  extern __shared__ __align__(128) unsigned char smem[];
  constexpr int kWarps = 2 * TTraits::kPairs;
  const Tq4DecodeThread at = Tq4DecodeThread::here();
  const auto place = Tq4DecodePlace<TTraits>::here(params);
  const Tq4DecodeUnit& unit = place.unit;
  const int slot = static_cast<int>(threadIdx.x) / 32;  // row of q that this warp stages
  // The parameters that the first steps need are read before the wait: the misses of the constant cache, one a line,
  // then lie beside the end of the kernel before and not one after another behind the copies of this one.
  std::uint32_t negative = sign_bits<TTraits::kHeadDim>(params.rotation);
  std::uint32_t touched = params.levels.k_bytes[0] ^ params.levels.v_bytes[1] ^ params.levels.sixteen;
  have_now(negative, touched);
  wait_for_previous_kernel();
  allow_next_kernel();
  float x[TTraits::kValues];
  if (slot < kRowTile) load_query<TTraits>(params, unit, slot, x);  // its latency runs beside that of kv_len
  const Tq4DecodeKeys keys = decode_keys(params, place.token);
  const int block = place.split;
  if (block >= keys.n_active) return;  // the whole block; the merge knows

  const int first = share(keys.n_record, block, keys.n_active);
  const int count = share(keys.n_record, block + 1, keys.n_active) - first;
  const int begin = first + share(count, at.pair, TTraits::kPairs);
  int end = first + share(count, at.pair + 1, TTraits::kPairs);
  if (params.causal_skip) {
    const int last = key_limit(params, keys.kv_len, min(unit.row0 + kRowTile - 1, unit.n_row - 1));
    end = max(begin, min(end, (last + kTq4RecordTokens - 1) / kTq4RecordTokens));
  }
  typename TTraits::Ring ring;
  ring.start(smem + at.pair * TTraits::kStages * TTraits::kRecordBytes,
             smem + TTraits::kBarrierOffset + at.pair * TTraits::kStages * 8,
             reinterpret_cast<const unsigned char*>(params.cache.record(place.sequence, unit.head_kv, 0)), begin, end,
             TTraits::kTeamBarrier + at.pair);
  unsigned char* const q_smem = smem + TTraits::kQOffset;
  auto* const scales = reinterpret_cast<float*>(smem + TTraits::kScaleOffset);
  for (int row = slot; row < kRowTile; row += kWarps) {
    if (row != slot) load_query<TTraits>(params, unit, row, x);
    stage_query<TTraits>(params, x, negative, row, q_smem, scales);
  }
  ring.start_rest(begin, end);  // not sooner: what the staging still has to fetch would queue behind 26 MB of records
  __syncthreads();

  // Keys below this are seen by every row; one beyond the last sees nothing, but is not stored either.
  const int seen_by_all = params.mask != nullptr ? 0 : key_limit(params, keys.kv_len, unit.row0);
  Tq4DecodeState<TTraits> state;
  state.init();
  const int most = (count + TTraits::kPairs - 1) / TTraits::kPairs;  // of a pair
  const Tq4DecodeRun run{.begin = begin, .end = end, .most = most, .seen_by_all = seen_by_all};
  absorb_records<TTraits>(state, params, ring, smem, run, at);
  if (params.record_count != nullptr && at.half == 0 && at.lane == 0 && end > begin) {
    atomicAdd(params.record_count, static_cast<unsigned long long>(end - begin));
  }
  unsigned live = 0;  // from the count, not from begin and end: a pair whose records were skipped leaves zeros
#pragma unroll
  for (int p = 0; p < TTraits::kPairs; ++p) {
    live |= (share(count, p + 1, TTraits::kPairs) > share(count, p, TTraits::kPairs) ? 1u : 0u) << p;
  }
  merge_pairs<TTraits>(state, params, smem, unit.first + block, live, at);
}

}  // namespace gemma4::cuda::detail

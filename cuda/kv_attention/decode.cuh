// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/kv_attention/decode_batches.cuh"
#include "cuda/kv_attention/decode_params.cuh"
#include "cuda/kv_attention/decode_query.cuh"
#include "cuda/kv_attention/decode_records.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/tq4_attention.cuh"

/// Attention of a few query rows over records of one vector for K and V: flash decoding on tensor cores, as TQ4's
/// (cuda/tq4_attention/decode.cuh) in everything but what a team of warps does with a record.
///
///   S [16 tokens, 8 rows] = norm_V V qv^T + norm_R R qr^T, fp16: qv = H (w * q with zeros at the rotated places), qr =
///   H' (c * q at the rotated places); each warp of a team of four multiplies a quarter of the dims, and the parts are
///   added through shared memory; p = 2^(S * scale - m), computed by all of them alike; O^T [head_dim, 8 rows] += V^T
///   (p * norm_V), bf16; each warp holds a quarter of the dims, those that it multiplied.
///
/// A code of V is decoded once, into the A operand of the first product, tokens by dims. The second one contracts over
/// tokens and wants dims by tokens: the tile is turned in registers, by a product with the identity (two of them a
/// tile; the tensor cores have time) or by movmatrix. Decoding it twice would cost 13 integer operations for eight
/// codes of 5 bits once more, and a tile of 16-bit values in shared memory 32 KB of traffic a record, most of what a
/// multiprocessor has in the time that the memory takes for one.
///
/// Up to four tiles of eight rows share a decoded record where a KV head has more than eight: with two teams of 255
/// registers a thread. Configurations that take several records at a time make each weight once and meet less often
/// (cuda/kv_attention/decode_batches.cuh), with up to eight tiles of rows for one team.
///
/// Bytes: D (4 v + r) / 2 + 64 a record of 16 tokens, read once per eight rows, or 32. Integer pipe: 9 operations for 8
/// codes of 4 bits, 13 for 5. Tensor cores at head_dim 512: 32 + 8 products for S, 64 to turn, 32 for O, a record. q in
/// fp16 as TQ4 has it, V's part and R's part each with a power of two of its own; levels as bytes
/// (cuda/kv_cache/levels.cuh).
namespace gemma4::cuda::detail {

/// grid: x = split, y and z as in kv_unit().
template <class TTraits>
__global__ void __launch_bounds__(TTraits::kThreads, 1)
    kv_decode_kernel(const __grid_constant__ KvDecodeParams params) {
  extern __shared__ __align__(128) unsigned char smem[];
  const Tq4DecodeParams& base = params.base;
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) / 32;
  const Tq4DecodeThread at{warp / TTraits::kTeamWarps, warp % TTraits::kTeamWarps, lane, lane >> 2, lane & 3};
  const Tq4DecodeUnit unit = kv_unit<TTraits>(base, 0);
  KvStaging<TTraits> staging;
  staging.load_weights(params.k_weight, warp);
  wait_for_previous_kernel();
  allow_next_kernel();
  staging.load_queries(base, warp);  // its latency runs beside that of kv_len
  const Tq4DecodeKeys keys = kv_keys<TTraits>(base);
  const auto block = static_cast<int>(blockIdx.x);
  if (block >= keys.n_active) return;  // the whole block; the merge knows

  const int first = share(keys.n_record, block, keys.n_active);
  const int count = share(keys.n_record, block + 1, keys.n_active) - first;
  const int begin = first + share(count, at.pair, TTraits::kPairs);
  int end = first + share(count, at.pair + 1, TTraits::kPairs);
  if (!TTraits::kOfRows && base.causal_skip) {
    const int last = key_limit(base, keys.kv_len, min(unit.row0 + kRowTile * TTraits::kRowTiles - 1, unit.n_row - 1));
    end = max(begin, min(end, (last + kKvRecordTokens - 1) / kKvRecordTokens));
  }
  const std::int64_t n_record = (base.cache.buffer_len + kKvRecordTokens - 1) / kKvRecordTokens;
  typename TTraits::Bytes bytes{};
  if constexpr (TTraits::kVBits == 0) {
    bytes.bytes = static_cast<int>(kv_record_bytes(TTraits::kHeadDim, params.v_bits, params.r_bits));
  }
  typename TTraits::Ring ring;
  ring.start(
      smem + at.pair * TTraits::kStages * TTraits::kRecordBytes,
      smem + TTraits::kBarrierOffset + at.pair * TTraits::kStages * 8,
      reinterpret_cast<const unsigned char*>(params.records) +
          (std::int64_t{TTraits::kOfRows ? 0 : unit.batch} * base.n_head_kv + unit.head_kv) * n_record * bytes.get(),
      begin, end, TTraits::kTeamBarrier + at.pair, bytes);
  staging.stage(params, warp, smem);
  ring.start_rest(begin, end);  // not sooner: what the staging still has to fetch would queue behind the records
  __syncthreads();

  // Keys below this are seen by every row; one beyond the last sees nothing, but is not stored either.
  const int seen_by_all = base.mask != nullptr ? 0
                          : TTraits::kOfRows   ? keys.kv_len
                                               : key_limit(base, keys.kv_len, unit.row0);
  Tq4DecodeState<TTraits> state[TTraits::kRowTiles];
#pragma unroll
  for (auto& tile : state) tile.init();
  const int most = (count + TTraits::kPairs - 1) / TTraits::kPairs;  // of a team
  const Tq4DecodeRun run{.begin = begin, .end = end, .most = most, .seen_by_all = seen_by_all};
  if constexpr (TTraits::kBatch == 1) {
    absorb_kv_records<TTraits>(state, params, ring, smem, run, at);
  } else {
    absorb_kv_batches<TTraits>(state, params, ring, smem, run, at);
  }
  if (base.record_count != nullptr && at.half == 0 && at.lane == 0 && end > begin) {
    atomicAdd(base.record_count, static_cast<unsigned long long>(end - begin));
  }
  unsigned live = 0;  // from the count, not from begin and end: a team whose records were skipped leaves zeros
#pragma unroll
  for (int p = 0; p < TTraits::kPairs; ++p) {
    live |= (share(count, p + 1, TTraits::kPairs) > share(count, p, TTraits::kPairs) ? 1u : 0u) << p;
  }
#pragma unroll
  for (int tile = 0; tile < TTraits::kRowTiles; ++tile) {
    const Tq4DecodeUnit rows = kv_unit<TTraits>(base, tile);
    if ((tile > 0 || TTraits::kOfRows) && !kv_has_tile<TTraits>(base, rows, keys)) continue;  // of the whole block
    merge_pairs<TTraits>(state[tile], base, smem, rows.first + block, live, at);
  }
}

}  // namespace gemma4::cuda::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>

#include "cuda/kv_attention/decode_meeting.cuh"
#include "cuda/kv_attention/decode_params.cuh"
#include "cuda/kv_attention/decode_records.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/tq4_attention.cuh"

/// The loop of kv_decode_kernel over several records at a time, kBatch of them: what decode_records.cuh does with one,
/// in another division of labour.
///
/// There every warp of a team makes the weights of every record, all of them alike, with a barrier a record. Here a
/// warp decodes and scores its dims of all records of a batch and posts its parts; after a barrier each record's
/// weights, and for several tiles of rows each tile's, are made by one warp (a task), which posts them as the B
/// fragment of the second product; after a second barrier all warps take the weights of the batch. R's columns are
/// dealt to the warps by record, so that all of them have equally many, and the B fragments of q are read once a batch.
///
/// A task makes its weights relative to the team's reference as long as no score leaves that 2^8 below, and otherwise
/// relative to one of its own, which it posts; the second barrier tells all warps whether anybody did. They then go
/// over to the highest reference, and bring output, sums and weights there. References are whole numbers, so that these
/// factors are powers of two and round nothing: the number of barriers does not depend on the scores, and the results
/// differ from those of single records by the roundings of weights alone.
///
/// What is left of a run when it holds no whole batch more is taken one record at a time, by the same code.
///
/// Warp instructions of a record, of all warps of a team, counted in the loop's machine code for sm_90a at head_dim 512
/// (without the paths that raise a reference or hide tokens), and what issuing them takes for 131072 tokens of 4 heads
/// on 132 multiprocessors of four schedulers at 1.6 GHz, beside the bytes at 4.0 TB/s. What an H100 took is at
/// kKvDecodeTiles.
///
///                                 5 bits            4 bits
///   one at a time, 4 teams        1500   58 us      1396   54 us
///   four, 2 teams                 1063   41 us       848   33 us
///   two, 3 teams                  1212   47 us       990   38 us
///   bytes                                51 us              42 us       (TQ4: 1058, 41 us; bytes 68 us)
///   32 rows, one / two at a time  2832 / 1874
///   64 rows, two at a time        3400, once; with tiles of 32 rows 2 * 2832
///
/// Why 64 rows cannot cost what 8 do: 576 products of 16 x 8 x 16 a record are 19 GFLOP at 32768 tokens of 4 heads,
/// some 32 us of the tensor cores by warp-level instructions where the bytes take 13, and 33 splits of 64 rows are 17
/// MB of partials, written and read. 32 rows are half of both.
namespace gemma4::cuda::detail {

/// The warp's parts of the scores of kCount records from number `first` of the batch on, posted; its tiles of V,
/// turned.
template <class TTraits, int kCount>
__device__ __forceinline__ void score_kv_batch(KvTile (&tiles)[kCount][TTraits::kVWords], const unsigned char* batch,
                                               int first, const KvBatchContext<TTraits>& context) {
  constexpr int kWords = TTraits::kWords, kRowTiles = TTraits::kRowTiles, kRun = kWords < 2 ? kWords : 2;
  const Tq4DecodeThread& at = context.at;
  const unsigned char* const q_smem = context.smem + TTraits::kQOffset;
  const auto post = [&](const KvScores<TTraits>& s, int record, int index) {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      context.meeting.part(record * kRowTiles + tile, index)[at.lane] =
          make_float4(s[tile][0], s[tile][1], s[tile][2], s[tile][3]);
    }
  };
  const int of_r = at.half / TTraits::kRParts - first;  // the record whose R this warp takes
  if (0 <= of_r && of_r < kCount) {
    KvScores<TTraits> s = {};
    const std::uint32_t* const words =
        rotated_words<TTraits>(batch + (first + of_r) * context.kRecordBytes, context.params);
    const int column = at.half % TTraits::kRParts * TTraits::kRShare;
#pragma unroll
    for (int i = 0; i < TTraits::kRShare; ++i) {
      score_rotated_column<TTraits>(s, words, q_smem, context.params, column + i, at);
    }
    post(s, of_r, TTraits::kTeamWarps + at.half % TTraits::kRParts);
  }
  uint4 q[kRowTiles == 1 ? kWords : 1];  // of one tile; those of more are read for each record
  if constexpr (kRowTiles == 1) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      q[i] = reinterpret_cast<const uint4*>(q_smem)[(at.half * kWords + i) * 32 + at.lane];
    }
  }
#pragma unroll
  for (int record = 0; record < kCount; ++record) {
    KvScores<TTraits> s = {};
#pragma unroll
    for (int word = 0; word < kWords; word += kRun) {
      const auto queries = [&](int i, auto&& body) {
        if constexpr (kRowTiles == 1) {
          body(0, q[word + i]);
        } else {
          with_queries<TTraits>(q_smem, at.half * kWords + word + i, at, body);
        }
      };
      score_columns<TTraits, kRun>(s, tiles[record] + 2 * word, batch + (first + record) * context.kRecordBytes,
                                   queries, context.params, at.half * kWords + word, at);
    }
    post(s, record, at.half);
  }
}

/// The sum of kCount parts, in their order.
template <int kCount>
__device__ __forceinline__ void add_kv_parts(float (&s)[4], const float4* parts) {
  const float4 own = parts[0];
  s[0] = own.x, s[1] = own.y, s[2] = own.z, s[3] = own.w;
#pragma unroll
  for (int i = 1; i < kCount; ++i) {
    const float4 part = parts[32 * i];
    s[0] += part.x, s[1] += part.y, s[2] += part.z, s[3] += part.w;
  }
}

/// One task: the weights of a record against the rows of the warp's tile, posted with their reference, and their sums.
/// @param norms of the record
/// @param key   the first one of the record
/// @return whether the reference is above that of the team
template <class TTraits>
[[nodiscard]] __device__ __forceinline__ bool weigh_kv_task(KvOwnRows& own, int task, const unsigned char* norms,
                                                            int key, const KvBatchContext<TTraits>& context) {
  const Tq4DecodeThread& at = context.at;
  const int tile = context.own_tile();
  float s[4], r[4], v_norm[4];
  add_kv_parts<TTraits::kTeamWarps>(s, context.meeting.part(task, 0) + at.lane);
  add_kv_parts<TTraits::kRParts>(r, context.meeting.part(task, TTraits::kTeamWarps) + at.lane);
  const auto norm = KvTokenNorms::load(norms, at.g);
  const float4 scale = reinterpret_cast<const float4*>(context.smem + TTraits::kScaleOffset + 64 * tile)[at.t];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float of_v = norm.v[half], of_r = norm.r[half];
    s[2 * half] = fmaf(r[2 * half], of_r * scale.z, s[2 * half] * (of_v * scale.x));
    s[2 * half + 1] = fmaf(r[2 * half + 1], of_r * scale.w, s[2 * half + 1] * (of_v * scale.y));
    v_norm[2 * half] = v_norm[2 * half + 1] = of_v * context.params.levels.v_weight;
  }
  if (key + kKvRecordTokens > context.seen_by_all) {
    hide_kv_tokens<TTraits>(s, v_norm, context.params.base, tile, key, at);
  }
  bool rises = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) rises = rises || s[i] > own.reference[i & 1] + kTq4Slack;
  rises = __any_sync(~0u, rises);
  if (rises) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float before = own.reference[c];
      own.reference[c] = fmaxf(ceilf(warp_max<4, 16>(fmaxf(s[c], s[2 + c]))), before);
      own.sum[c] *= exp2_approx(before - own.reference[c]);
    }
  }
  float p[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    p[i] = exp2_approx(s[i] - own.reference[i & 1]);
    own.sum[i & 1] += p[i];
    p[i] *= v_norm[i];
  }
  context.meeting.weights(task)[at.lane] =
      make_uint2(transpose_matrix(pack_bf16(p[0], p[1])), transpose_matrix(pack_bf16(p[2], p[3])));
  if (at.g == 0) {
    reinterpret_cast<float2*>(context.meeting.reference(task))[at.t] = make_float2(own.reference[0], own.reference[1]);
  }
  return rises;
}

/// Two bf16 numbers times a power of two.
[[nodiscard]] __device__ __forceinline__ std::uint32_t scale_bf16_pair(std::uint32_t pair, float factor) {
  return pack_bf16(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xFFFF0000u) * factor);
}

/// Goes over to the highest reference that the tile has or a task of it has posted, and with it the output, the weights
/// and, where the batch ends and they are of this tile, the warp's own sums. (Before that they stay: what a task makes
/// of its record must not depend on the parts that a batch is taken in.)
template <class TTraits, int kCount>
__device__ __forceinline__ void follow_references(Tq4DecodeState<TTraits>& state, KvOwnTasks<TTraits>& own,
                                                  uint2 (&weights)[kCount], int tile, bool ends_batch,
                                                  const KvBatchContext<TTraits>& context) {
  const Tq4DecodeThread& at = context.at;
  float highest[2] = {state.row[0].maximum, state.row[1].maximum}, of_column = -INFINITY;
  if constexpr (TTraits::kHeld < TTraits::kBatch) {  // a part before may have risen above all of these
    const float even = __shfl_sync(~0u, highest[0], at.g >> 1), odd = __shfl_sync(~0u, highest[1], at.g >> 1);
    of_column = (at.g & 1) != 0 ? odd : even;
  }
#pragma unroll
  for (int record = 0; record < kCount; ++record) {
    const float* const posted = context.meeting.reference(record * TTraits::kRowTiles + tile);
#pragma unroll
    for (int c = 0; c < 2; ++c) highest[c] = fmaxf(highest[c], posted[2 * at.t + c]);
    of_column = fmaxf(of_column, posted[at.g]);  // a column of the B operand is a row of the tile
  }
#pragma unroll
  for (int record = 0; record < kCount; ++record) {
    const float factor = exp2_approx(context.meeting.reference(record * TTraits::kRowTiles + tile)[at.g] - of_column);
    weights[record].x = scale_bf16_pair(weights[record].x, factor);
    weights[record].y = scale_bf16_pair(weights[record].y, factor);
  }
  float alpha[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    alpha[c] = exp2_approx(state.row[c].maximum - highest[c]);
    state.row[c].maximum = highest[c];
  }
  if (ends_batch && tile == context.own_tile()) {
#pragma unroll
    for (int i = 0; i < TTraits::kOwnTasks; ++i) {
      KvOwnRows rows = own.get(i);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        rows.sum[c] *= exp2_approx(rows.reference[c] - highest[c]);
        rows.reference[c] = highest[c];
      }
      own.set(i, rows);
    }
  }
#pragma unroll
  for (auto& o : state.o) {
    o[0] *= alpha[0], o[1] *= alpha[1];
    o[2] *= alpha[0], o[3] *= alpha[1];
  }
}

/// Where a part stands in a batch. One that is taken alone is the first of its own.
struct KvPart {
  int first;  ///< record of the batch
  int own;    ///< of a warp's tasks of the batch, the first of the part
  bool ends_batch;
  bool rose;  ///< whether the reference of a task of the batch has risen already
};

/// Takes kCount records of a batch, the first of whose keys is `key`, into the state. Two barriers.
/// @param release is called when nothing of the part is needed any more
/// @return whether the reference of a task of the batch has risen
template <class TTraits, int kCount, class TRelease>
__device__ __forceinline__ bool take_kv_records(Tq4DecodeState<TTraits> (&state)[TTraits::kRowTiles],
                                                KvOwnTasks<TTraits>& own, const unsigned char* batch,
                                                const KvPart& part, int key, const KvBatchContext<TTraits>& context,
                                                const TRelease& release) {
  constexpr int kRowTiles = TTraits::kRowTiles, kThreads = 32 * TTraits::kTeamWarps;
  const Tq4DecodeThread& at = context.at;
  KvTile tiles[kCount][TTraits::kVWords];
  score_kv_batch<TTraits, kCount>(tiles, batch, part.first, context);
  named_barrier_sync<kThreads>(TTraits::kTeamBarrier + at.pair);
  bool rises = part.rose;
#pragma unroll
  for (int run = 0; run < (kCount * kRowTiles + TTraits::kTeamWarps - 1) / TTraits::kTeamWarps; ++run) {
    const int task = at.half + run * TTraits::kTeamWarps, record = task / kRowTiles;
    if (task >= kCount * kRowTiles) break;
    const unsigned char* const norms = batch + (part.first + record) * context.kRecordBytes + context.kNorms;
    KvOwnRows rows = own.get(part.own + run);
    const bool here = weigh_kv_task(rows, task, norms, key + record * kKvRecordTokens, context);
    own.set(part.own + run, rows);
    rises = rises || here;
  }
  const bool any = named_barrier_any<kThreads>(TTraits::kTeamBarrier + at.pair, rises);
  release();
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
    uint2 weights[kCount];
#pragma unroll
    for (int record = 0; record < kCount; ++record) {
      weights[record] = context.meeting.weights(record * kRowTiles + tile)[at.lane];
    }
    if (any) follow_references<TTraits, kCount>(state[tile], own, weights, tile, part.ends_batch, context);
#pragma unroll
    for (int record = 0; record < kCount; ++record) {
#pragma unroll
      for (int m = 0; m < TTraits::kVWords; ++m) {
        mma_bf16(state[tile].o[m], tiles[record][m].a, weights[record].x, weights[record].y);
      }
    }
  }
  return any;
}

/// A whole batch, part by part.
/// @param release is called when nothing of the batch is needed any more
template <class TTraits, class TRelease>
__device__ __forceinline__ void take_kv_batch(Tq4DecodeState<TTraits> (&state)[TTraits::kRowTiles],
                                              KvOwnTasks<TTraits>& own, const unsigned char* batch, int key,
                                              const KvBatchContext<TTraits>& context, const TRelease& release) {
  constexpr int kHeld = TTraits::kHeld, kParts = TTraits::kBatch / kHeld;
  bool rose = false;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const KvPart part{i * kHeld, i * TTraits::kTaskRuns, i == kParts - 1, rose};
    const auto done = [&] {
      if (part.ends_batch) release();
    };
    rose = take_kv_records<TTraits, kHeld>(state, own, batch, part, key + part.first * kKvRecordTokens, context, done);
  }
}

/// Gives each tile's state the sums that its warps have, task by task, all of them in the lanes with g = 0.
template <class TTraits>
__device__ __forceinline__ void share_kv_sums(Tq4DecodeState<TTraits> (&state)[TTraits::kRowTiles],
                                              KvOwnTasks<TTraits>& own, const KvBatchContext<TTraits>& context) {
  const Tq4DecodeThread& at = context.at;
  constexpr int kTasks = TTraits::kOwnTasks * TTraits::kTeamWarps;
  auto* const sums = reinterpret_cast<float2*>(context.meeting.memory);  // [kTasks, 4]
  static_assert(kTasks * 32 <= TTraits::kTeamScoreBytes);
#pragma unroll
  for (int i = 0; i < TTraits::kOwnTasks; ++i) {
    KvOwnRows rows = own.get(i);
#pragma unroll
    for (float& sum : rows.sum) warp_sum_in_place<4, 16>(sum);
    if (at.g == 0) sums[4 * (at.half + i * TTraits::kTeamWarps) + at.t] = make_float2(rows.sum[0], rows.sum[1]);
  }
  named_barrier_sync<32 * TTraits::kTeamWarps>(TTraits::kTeamBarrier + at.pair);
#pragma unroll
  for (int tile = 0; tile < TTraits::kRowTiles; ++tile) {
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int task = tile; task < kTasks; task += TTraits::kRowTiles) {
      const float2 part = sums[4 * task + at.t];
      total.x += part.x, total.y += part.y;
    }
    state[tile].row[0].sum = at.g == 0 ? total.x : 0.0f;
    state[tile].row[1].sum = at.g == 0 ? total.y : 0.0f;
  }
}

/// Barriers that a team meets over `count` records, at most, for any count up to `most`.
template <class TTraits>
[[nodiscard]] __device__ __forceinline__ int kv_batch_barriers(int count, bool or_less, int of_wait) {
  constexpr int kBatch = TTraits::kBatch;
  const int whole = count / kBatch, rest = or_less && whole > 0 ? kBatch - 1 : count % kBatch;
  return 2 * (whole * (kBatch / TTraits::kHeld) + rest) + of_wait * ((count + kBatch - 1) / kBatch);
}

/// Takes the records of a team into its state, and meets its barrier as often as any team of the block might, as
/// absorb_records() does.
template <class TTraits>
__device__ __forceinline__ void absorb_kv_batches(Tq4DecodeState<TTraits> (&state)[TTraits::kRowTiles],
                                                  const KvDecodeParams& params, typename TTraits::Ring& ring,
                                                  unsigned char* smem, const Tq4DecodeRun& run,
                                                  const Tq4DecodeThread& at) {
  constexpr int kBatch = TTraits::kBatch;
  static_assert(TTraits::kVBits != 0, "a batch's widths are known when it is compiled");
  static_assert(TTraits::kTeamWarps == kBatch * TTraits::kRParts, "each warp takes columns of one record's R");
  static_assert(TTraits::kTeamWarps % TTraits::kRowTiles == 0, "all tasks of a warp are of one tile");
  const KvBatchContext<TTraits> context{
      params, at, smem, {smem + TTraits::kScoreOffset + TTraits::kTeamScoreBytes * at.pair}, run.seen_by_all};
  KvOwnTasks<TTraits> own(context.meeting, at);
  for (int index = run.begin; index < run.end; index += kBatch) {
    const unsigned char* const batch = ring.wait();
    if (index + kBatch <= run.end) {
      const auto release = [&] { ring.release_last(index, run.end); };
      take_kv_batch<TTraits>(state, own, batch, index * kKvRecordTokens, context, release);
    } else {  // the last of the run: its place stays
#pragma unroll 1
      for (int i = 0; i < run.end - index; ++i) {
        take_kv_records<TTraits, 1>(state, own, batch, {i, 0, true, false}, (index + i) * kKvRecordTokens, context,
                                    [] {});
      }
    }
  }
  const int of_wait = ring.barriers_of_wait();
#pragma unroll 1
  for (int missing = kv_batch_barriers<TTraits>(run.most, true, of_wait) -
                     kv_batch_barriers<TTraits>(run.end - run.begin, false, of_wait);
       missing > 0; --missing) {
    named_barrier_sync<32 * TTraits::kTeamWarps>(TTraits::kTeamBarrier + at.pair);
  }
  share_kv_sums<TTraits>(state, own, context);
}

}  // namespace gemma4::cuda::detail

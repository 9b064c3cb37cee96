// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/softmax_state.cuh"
#include "cuda/tq4_attention/decode_params.cuh"
#include "cuda/tq4_attention/decode_query.cuh"
#include "cuda/tq4_attention/record_ring.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/float16.hpp"

/// The loop of tq4_decode_kernel: what a pair of warps does with one record after another
/// (cuda/tq4_attention/decode.cuh). Score, hide, weigh, add.
namespace gemma4::cuda::detail {

template <class TTraits, bool kKeys>
__device__ __forceinline__ void decode_levels(std::uint32_t word, const Tq4DecodeLevels& levels,
                                              std::uint32_t (&out)[4]) {
  if constexpr (TTraits::kByteLevels) {
    decode_word_bytes(word, kKeys ? levels.k_bytes : levels.v_bytes, levels.two_16, levels.sixteen, out);
  } else {
    decode_word(word, kKeys ? levels.k : levels.v, out);
  }
}

/// Softmax state of a pair's rows 2t and 2t + 1 (the maximum is the reference of the weights), and of the warp's half
/// of the output dims g and g + 8 of every 16.
template <class TTraits>
struct Tq4DecodeState {
  SoftmaxState row[2];
  float o[TTraits::kVWords][4];

  __device__ __forceinline__ void init() {
    row[0] = row[1] = {.maximum = kFarBelow, .sum = 0.0f};
#pragma unroll
    for (auto& tile : o) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
  }
};

/// The warp's half of the scores of the 16 tokens of a record against the eight rows, without norms and scale; c as in
/// mma_f16.
template <class TTraits>
__device__ __forceinline__ void score_record(float (&s)[4], const unsigned char* record, const unsigned char* q_smem,
                                             const Tq4DecodeThread& at, const Tq4DecodeLevels& levels) {
  constexpr int kWords = TTraits::kKWords, kRun = kWords < 4 ? kWords : 4;  // words of one token next to each other
  float chain[4][4] = {};
#pragma unroll
  for (int run = 0; run < kWords / kRun; ++run) {
    const int u0 = at.half * kWords + run * kRun;  // word of the lane's token, counted over both warps
    std::uint32_t first[kRun], second[kRun];
    const auto* codes = reinterpret_cast<const std::uint32_t*>(record) + 4 * at.lane;
    if constexpr (TTraits::kHeadDim == 64) {
      load_words(codes + u0, first);
      load_words(codes + 2 + u0, second);
    } else {
      load_words(codes + 256 * (u0 / 4) + u0 % 4, first);
      load_words(codes + 256 * (u0 / 4) + 128 + u0 % 4, second);
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const uint4 q = reinterpret_cast<const uint4*>(q_smem)[(u0 + i) * 32 + at.lane];
      std::uint32_t a[4], b[4];
      decode_levels<TTraits, true>(first[i], levels, a);
      decode_levels<TTraits, true>(second[i], levels, b);
      mma_f16(chain[(2 * i) & 3], {a[0], b[0], a[1], b[1]}, q.x, q.y);
      mma_f16(chain[(2 * i + 1) & 3], {a[2], b[2], a[3], b[3]}, q.z, q.w);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = (chain[0][i] + chain[1][i]) + (chain[2][i] + chain[3][i]);
}

/// Gives the score -inf and the norm zero to keys that a row does not see, whose norms may be NaN: those of the record
/// that begins at key `first`. Most records are seen whole, so what this needs is worked out here and not kept in
/// registers.
/// @param token of a call of rows
__device__ __forceinline__ void hide_tokens(float (&s)[4], float (&v_norm)[4], const Tq4DecodeParams& params,
                                            const Tq4DecodeUnit& unit, int first, const Tq4DecodeThread& at,
                                            int token = 0) {
  const int kv_len = decode_keys(params, token).kv_len;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int row = unit.row0 + 2 * at.t + c;
    int limit = key_limit(params, kv_len, row);
    const std::uint8_t* mask = nullptr;
    if (params.mask != nullptr && limit > 0) {
      limit = min(limit, static_cast<int>(params.mask_extent));
      mask = params.mask + (std::int64_t{unit.batch} * params.n_query + token_of(params, row)) * params.mask_extent;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first + at.g + 8 * half;
      const bool visible = key < limit && (mask == nullptr || mask[key] != 0);
      if (visible) continue;
      s[2 * half + c] = -INFINITY;
      v_norm[2 * half + c] = 0.0f;
    }
  }
}

/// How far (base 2) a score may rise above the reference before the reference follows: weights stay below 2^8.
inline constexpr float kTq4Slack = 8.0f;

/// Brings the reference of the rows to the maximum of what they have seen, and with it the sums and the output.
template <class TTraits>
__device__ __forceinline__ void raise_reference(Tq4DecodeState<TTraits>& state, const float (&s)[4]) {
  float alpha[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    SoftmaxState& row = state.row[c];
    const float maximum = fmaxf(warp_max<4, 16>(fmaxf(s[c], s[2 + c])), row.maximum);
    alpha[c] = exp2_approx(row.maximum - maximum);
    row.maximum = maximum;
    row.sum *= alpha[c];
  }
#pragma unroll
  for (auto& tile : state.o) {
    tile[0] *= alpha[0], tile[1] *= alpha[1];
    tile[2] *= alpha[0], tile[3] *= alpha[1];
  }
}

/// Weights of the 16 tokens of a record relative to the rows' reference, added to their sums: `fragment` becomes the B
/// operand p * norm_v. The reference moves only when a score leaves it far below, which a vote finds out: most records
/// then cost neither the shuffles of a maximum nor a pass over the output.
template <class TTraits>
__device__ __forceinline__ void weigh_tokens(Tq4DecodeState<TTraits>& state, const float (&s)[4],
                                             const float (&v_norm)[4], std::uint32_t (&fragment)[2]) {
  bool rises = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) rises = rises || s[i] > state.row[i & 1].maximum + kTq4Slack;
  if (__any_sync(~0u, rises)) raise_reference(state, s);
  float p[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    p[i] = exp2_approx(s[i] - state.row[i & 1].maximum);
    state.row[i & 1].sum += p[i];
    p[i] *= v_norm[i];
  }
  fragment[0] = transpose_matrix(pack_bf16(p[0], p[1]));
  fragment[1] = transpose_matrix(pack_bf16(p[2], p[3]));
}

/// O^T += V^T weight for the warp's half of the dims.
template <class TTraits>
__device__ __forceinline__ void add_values(Tq4DecodeState<TTraits>& state, const unsigned char* record,
                                           const std::uint32_t (&weight)[2], const Tq4DecodeThread& at,
                                           const Tq4DecodeLevels& levels) {
  constexpr int kWords = TTraits::kVWords, kRun = kWords < 4 ? kWords : 4;
  const auto* codes =
      reinterpret_cast<const std::uint32_t*>(record + tq4_v_codes_offset(TTraits::kHeadDim)) + 4 * at.lane;
#pragma unroll
  for (int run = 0; run < kWords / kRun; ++run) {
    const int m0 = at.half * kWords + run * kRun;
    std::uint32_t words[kRun];
    load_words(codes + 128 * (m0 / 4) + m0 % 4, words);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      std::uint32_t a[4];
      decode_levels<TTraits, false>(words[i], levels, a);
      mma_bf16(state.o[run * kRun + i], a, weight[0], weight[1]);
    }
  }
}

/// Shows the warp's half of the scores of record `index` to the other warp. Two buffers alternate, so that one barrier
/// a record is enough.
__device__ __forceinline__ void post_scores(const float (&s)[4], unsigned char* scores, const Tq4DecodeThread& at,
                                            int index) {
  reinterpret_cast<float4*>(scores)[64 * (index & 1) + 32 * at.half + at.lane] = make_float4(s[0], s[1], s[2], s[3]);
}

/// Adds the other warp's half, after a barrier; both warps of a pair then have the same bits.
__device__ __forceinline__ void take_scores(float (&s)[4], const unsigned char* scores, const Tq4DecodeThread& at,
                                            int index) {
  const float4 other = reinterpret_cast<const float4*>(scores)[64 * (index & 1) + 32 * (1 - at.half) + at.lane];
  s[0] += other.x, s[1] += other.y, s[2] += other.z, s[3] += other.w;
}

/// Norms of the lane's tokens g and g + 8.
struct Tq4TokenNorms {
  float value[2];

  [[nodiscard]] static __device__ __forceinline__ Tq4TokenNorms load(const unsigned char* norms, int g, float factor) {
    const auto* tokens = reinterpret_cast<const Bf16*>(norms) + g;
    return {{to_float(tokens[0]) * factor, to_float(tokens[8]) * factor}};
  }
};

/// The records of a pair.
struct Tq4DecodeRun {
  int begin, end;
  int most;         ///< of a pair of the block
  int seen_by_all;  ///< keys below this are seen by every row
};

/// Takes the records of a pair into its state. A pair with fewer than `run.most` meets its barrier as often as
/// if it had that many: where the pairs of a block do so unequally often, racecheck (compute-sanitizer 2025.3) loses
/// the block barriers that follow. (Computing the scores of the next record before the softmax of this one was as fast:
/// the other warps fill the gaps, and the memory sets the pace.)
template <class TTraits>
__device__ __forceinline__ void absorb_records(Tq4DecodeState<TTraits>& state, const Tq4DecodeParams& params,
                                               typename TTraits::Ring& ring, unsigned char* smem,
                                               const Tq4DecodeRun& run, const Tq4DecodeThread& at) {
  const int begin = run.begin, end = run.end;
  constexpr int kHeadDim = TTraits::kHeadDim;
  const unsigned char* const q_smem = smem + TTraits::kQOffset;
  unsigned char* const scores = smem + TTraits::kScoreOffset + 2048 * at.pair;
  const auto* const scales = reinterpret_cast<const float*>(smem + TTraits::kScaleOffset) + 2 * at.t;
  const float row_scale[2] = {scales[0], scales[1]};
  for (int index = begin; index < end; ++index) {
    const unsigned char* const record = ring.wait();
    float s[4];
    score_record<TTraits>(s, record, q_smem, at, params.levels);
    post_scores(s, scores, at, index);
    named_barrier_sync<64>(TTraits::kTeamBarrier + at.pair);
    if (index > begin) ring.release(index - 1, end);
    take_scores(s, scores, at, index);
    const auto k_norm = Tq4TokenNorms::load(record + tq4_k_norms_offset(kHeadDim), at.g, 1.0f);
    const auto v_norms = Tq4TokenNorms::load(record + tq4_v_norms_offset(kHeadDim), at.g, params.levels.v_weight);
    float v_norm[4] = {v_norms.value[0], v_norms.value[0], v_norms.value[1], v_norms.value[1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] *= k_norm.value[i >> 1] * row_scale[i & 1];
    const int first = index * kTq4RecordTokens;
    if (first + kTq4RecordTokens > run.seen_by_all) {
      const auto place = Tq4DecodePlace<TTraits>::here(params);
      hide_tokens(s, v_norm, params, place.unit, first, at, place.token);
    }
    std::uint32_t weights[2];
    weigh_tokens(state, s, v_norm, weights);
    add_values(state, record, weights, at, params.levels);
  }
#pragma unroll 1
  for (int missing = (run.most - (end - begin)) * (1 + ring.barriers_of_wait()); missing > 0; --missing) {
    named_barrier_sync<64>(TTraits::kTeamBarrier + at.pair);
  }
}

}  // namespace gemma4::cuda::detail

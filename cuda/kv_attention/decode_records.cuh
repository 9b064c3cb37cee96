// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/kv_attention/decode_params.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/tq4_attention.cuh"
#include "gemma4/kv_format.hpp"

/// The loop of kv_decode_kernel: what a team of warps does with one record after another
/// (cuda/kv_attention/decode.cuh). Decode, score, turn, hide, weigh, add.
namespace gemma4::cuda::detail {

/// kCount neighbouring words of a group, from number `first` on, as decode_kv_word() takes them: their number is then
/// counted from `first`.
template <int kBits, int kCount>
struct KvGroupWords {
  std::uint32_t nibbles[kCount], signs = 0, extra = 0;

  __device__ __forceinline__ void load(const std::uint32_t* words, int n_group, int group, int first) {
    if constexpr (kBits == 3) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int word = first + i;
        nibbles[i] = (words[2 * group + (word >> 1)] >> (2 * (word & 1))) & 0x33333333u;
      }
    } else {
      load_words(words + (first & 2) * n_group + 2 * group + (first & 1), nibbles);
    }
    if constexpr (kBits != 4) signs = words[(kBits == 3 ? 2 : 4) * n_group + group] << (2 * first);
    if constexpr (kBits == 6) extra = words[5 * n_group + group] << (2 * first);
  }
};

/// One decoded tile of 16 dims and 16 tokens: the A operand of tokens by dims, or, turned, of dims by tokens.
struct KvTile {
  std::uint32_t a[4];
};

/// The A operand of a product with the identity, in fp16.
struct KvIdentity {
  std::uint32_t a[4];

  [[nodiscard]] static __device__ __forceinline__ KvIdentity of(const Tq4DecodeThread& at) {
    const std::uint32_t one = at.g >> 1 == at.t ? ((at.g & 1) != 0 ? 0x3C000000u : 0x3C00u) : 0u;
    return {{one, 0u, 0u, one}};
  }
};

/// A tile of tokens by dims as one of dims by tokens. The values are whole multiples of 2^-24 below 2^-16, which fp16
/// holds exactly, and come out of a product with 1 as they went in: the tensor cores neither round nor flush them.
template <bool kByProduct>
__device__ __forceinline__ void turn_tile(KvTile& tile, const KvIdentity& identity) {
  if constexpr (kByProduct) {
    std::uint32_t first[2], second[2];
    mma_f16_to_f16(first, identity.a, tile.a[0], tile.a[2]);
    mma_f16_to_f16(second, identity.a, tile.a[1], tile.a[3]);
    tile = {{first[0], first[1], second[0], second[1]}};
  } else {
    tile = {{transpose_matrix(tile.a[0]), transpose_matrix(tile.a[2]), transpose_matrix(tile.a[1]),
             transpose_matrix(tile.a[3])}};
  }
}

/// Scores of a record's 16 tokens against the rows of each tile, c as in mma_f16.
template <class TTraits>
using KvScores = float[TTraits::kRowTiles][4];

/// The B fragments of a column of 32 dims, for each tile of rows. Columns of R follow those of V.
template <class TTraits, class TBody>
__device__ __forceinline__ void with_queries(const unsigned char* q_smem, int column, const Tq4DecodeThread& at,
                                             TBody&& body) {
#pragma unroll
  for (int tile = 0; tile < TTraits::kRowTiles; ++tile) {
    body(tile, reinterpret_cast<const uint4*>(q_smem + tile * TTraits::kQTileBytes)[column * 32 + at.lane]);
  }
}

/// One or two words of each of a lane's two tokens (four at a time spill): tiles of 16 dims from `tiles` on, and their
/// products with the rows, added to `s`.
/// @param column    of 32 dims, the first
/// @param queries   queries(i, body) calls body(tile, B fragments of column + i) for each tile of rows
template <class TTraits, int kCount, class TQueries>
__device__ __forceinline__ void score_columns(KvScores<TTraits>& s, KvTile* tiles, const unsigned char* record,
                                              const TQueries& queries, const KvDecodeParams& params, int column,
                                              const Tq4DecodeThread& at) {
  constexpr int kN = TTraits::kHeadDim;
  const auto* const words = reinterpret_cast<const std::uint32_t*>(record);
  const int group = kN == 64 ? at.lane : 64 * (column >> 2) + at.lane, word = kN == 64 ? column : column & 3;
  constexpr int kSecondGroup = kN == 64 ? 0 : 32, kSecondWord = kN == 64 ? 2 : 0;  // of tokens g + 8
  const KvIdentity identity = KvIdentity::of(at);
  with_kv_bits<TTraits::kVBits>(params.v_bits, [&]<int kBits>(std::integral_constant<int, kBits>) {
    KvGroupWords<kBits, kCount> first, second;
    first.load(words, kN / 2, group, word);
    second.load(words, kN / 2, group + kSecondGroup, word + kSecondWord);
    const auto take = [&]<int kWord>() {
      std::uint32_t a[4], b[4];
      decode_kv_word<kBits, kWord>(first.nibbles[kWord], first.signs, first.extra, params.levels.v,
                                   params.levels.shifts, a);
      decode_kv_word<kBits, kWord>(second.nibbles[kWord], second.signs, second.extra, params.levels.v,
                                   params.levels.shifts, b);
      KvTile &low = tiles[2 * kWord], &high = tiles[2 * kWord + 1];
      low = {{a[0], b[0], a[1], b[1]}};
      high = {{a[2], b[2], a[3], b[3]}};
      queries(kWord, [&](int tile, const uint4& q) {
        mma_f16(s[tile], low.a, q.x, q.y);
        mma_f16(s[tile], high.a, q.z, q.w);
      });
      turn_tile<TTraits::kConfiguration.by_product>(low, identity);
      turn_tile<TTraits::kConfiguration.by_product>(high, identity);
    };
    take.template operator()<0>();
    if constexpr (kCount > 1) take.template operator()<1>();
  });
}

/// The warp's part of the products of V with the rows, added to `s`; its dims of V stay behind in `tiles`, turned. One
/// chain of products: the other warps fill the gaps, and a second one would take registers that there are not.
template <class TTraits>
__device__ __forceinline__ void score_values(KvScores<TTraits>& s, KvTile (&tiles)[TTraits::kVWords],
                                             const unsigned char* record, const unsigned char* q_smem,
                                             const KvDecodeParams& params, const Tq4DecodeThread& at) {
  constexpr int kWords = TTraits::kWords, kCount = kWords < 2 ? kWords : 2;
#pragma unroll
  for (int run = 0; run < kWords / kCount; ++run) {
    const int column = at.half * kWords + kCount * run;
    const auto queries = [&](int word, auto&& body) { with_queries<TTraits>(q_smem, column + word, at, body); };
    score_columns<TTraits, kCount>(s, tiles + 2 * kCount * run, record, queries, params, column, at);
  }
}

/// The products of one column of 32 dims of R with the rows, added to `s`. `words` are R's codes of the record.
template <class TTraits>
__device__ __forceinline__ void score_rotated_column(KvScores<TTraits>& s, const std::uint32_t* words,
                                                     const unsigned char* q_smem, const KvDecodeParams& params,
                                                     int column, const Tq4DecodeThread& at) {
  constexpr int kN = TTraits::kRotated;
  with_kv_bits<TTraits::kRBits>(params.r_bits, [&]<int kBits>(std::integral_constant<int, kBits>) {
    const auto decode = [&](int token, std::uint32_t(&out)[4]) {
      const KvPlace place = kv_place(kN, token, 32 * column + 2 * at.t);
      KvGroupWords<kBits, 1> codes;
      codes.load(words, kN / 2, place.group, place.word);
      decode_kv_word<kBits, 0>(codes.nibbles[0], codes.signs, codes.extra, params.levels.r, params.levels.shifts, out);
    };
    std::uint32_t a[4];
    [[maybe_unused]] std::uint32_t b[4];  // of tokens g + 8
    decode(at.g, a);
    if constexpr (kN > 16) decode(at.g + 8, b);
    with_queries<TTraits>(q_smem, TTraits::kHeadDim / 32 + column, at, [&](int tile, const uint4& q) {
      if constexpr (kN == 16) {  // a word holds both tokens
        mma_f16(s[tile], {a[0], a[2], a[1], a[3]}, q.x, q.y);
      } else {
        mma_f16(s[tile], {a[0], b[0], a[1], b[1]}, q.x, q.y);
        mma_f16(s[tile], {a[2], b[2], a[3], b[3]}, q.z, q.w);
      }
    });
  });
}

/// R's codes of a record.
template <class TTraits>
[[nodiscard]] __device__ __forceinline__ const std::uint32_t* rotated_words(const unsigned char* record,
                                                                            const KvDecodeParams& params) {
  const int v_bits = TTraits::kVBits != 0 ? TTraits::kVBits : params.v_bits;
  return reinterpret_cast<const std::uint32_t*>(record + kv_set_bytes(TTraits::kHeadDim, v_bits));
}

/// The warp's part of the products of R with the rows, added to `s`: its columns of 32 dims, where it has one.
template <class TTraits>
__device__ __forceinline__ void score_rotated(KvScores<TTraits>& s, const unsigned char* record,
                                              const unsigned char* q_smem, const KvDecodeParams& params,
                                              const Tq4DecodeThread& at) {
  constexpr int kColumns = TTraits::kRWords;
  const std::uint32_t* const words = rotated_words<TTraits>(record, params);
#pragma unroll
  for (int run = 0; run < (kColumns + TTraits::kTeamWarps - 1) / TTraits::kTeamWarps; ++run) {
    const int column = at.half + run * TTraits::kTeamWarps;
    if (kColumns % TTraits::kTeamWarps != 0 && column >= kColumns) return;
    score_rotated_column<TTraits>(s, words, q_smem, params, column, at);
  }
}

/// Norms of V and of R of the lane's tokens g and g + 8.
struct KvTokenNorms {
  float v[2], r[2];

  [[nodiscard]] static __device__ __forceinline__ KvTokenNorms load(const unsigned char* norms, int g) {
    static_assert(kv_norm_place(true, 9) == 5 && kv_norm_place(false, 1) == 6);
    const uint2 four = reinterpret_cast<const uint2*>(norms)[g];
    const auto low = [](std::uint32_t pair) { return widen_f16(static_cast<std::uint16_t>(pair)); };
    return {{low(four.x), low(four.x >> 16)}, {low(four.y), low(four.y >> 16)}};
  }
};

/// Shows the warp's part of the scores of record `index` to the others of its team. Two buffers alternate, so that one
/// barrier a record is enough.
template <class TTraits>
__device__ __forceinline__ void post_part(const KvScores<TTraits>& s, unsigned char* scores, const Tq4DecodeThread& at,
                                          int index) {
  constexpr int kTurn = TTraits::kTeamWarps * TTraits::kRowTiles * 32;
  auto* const parts = reinterpret_cast<float4*>(scores) + (index & 1) * kTurn + at.half * 32 + at.lane;
#pragma unroll
  for (int tile = 0; tile < TTraits::kRowTiles; ++tile) {
    parts[tile * TTraits::kTeamWarps * 32] = make_float4(s[tile][0], s[tile][1], s[tile][2], s[tile][3]);
  }
}

/// The sum of all parts of a tile of rows, after a barrier, in the order of the warps: the same bits in each.
template <class TTraits>
__device__ __forceinline__ void take_parts(float (&s)[4], const unsigned char* scores, const Tq4DecodeThread& at,
                                           int index, int tile) {
  constexpr int kTurn = TTraits::kTeamWarps * TTraits::kRowTiles * 32;
  const auto* parts =
      reinterpret_cast<const float4*>(scores) + (index & 1) * kTurn + tile * TTraits::kTeamWarps * 32 + at.lane;
  const float4 own = parts[0];
  s[0] = own.x, s[1] = own.y, s[2] = own.z, s[3] = own.w;
#pragma unroll
  for (int warp = 1; warp < TTraits::kTeamWarps; ++warp) {
    const float4 part = parts[32 * warp];
    s[0] += part.x, s[1] += part.y, s[2] += part.z, s[3] += part.w;
  }
}

/// The warp's part of the scores of a record, with norms and scales; its tiles of V, turned. @return norms of V
template <class TTraits>
[[nodiscard]] __device__ __forceinline__ KvTokenNorms
score_kv_record(KvScores<TTraits>& s, KvTile (&tiles)[TTraits::kVWords], const unsigned char* record,
                const unsigned char* smem, int norms, const KvDecodeParams& params, const Tq4DecodeThread& at) {
  const unsigned char* const q_smem = smem + TTraits::kQOffset;
  KvScores<TTraits> of_r = {};
#pragma unroll
  for (int tile = 0; tile < TTraits::kRowTiles; ++tile) s[tile][0] = s[tile][1] = s[tile][2] = s[tile][3] = 0.0f;
  score_rotated<TTraits>(of_r, record, q_smem, params, at);
  score_values<TTraits>(s, tiles, record, q_smem, params, at);
  const auto norm = KvTokenNorms::load(record + norms, at.g);
#pragma unroll
  for (int tile = 0; tile < TTraits::kRowTiles; ++tile) {
    // Read here, once a record: registers are what this loop has fewest of. Of V for rows 2t and 2t + 1, of R.
    const float4 scale = reinterpret_cast<const float4*>(smem + TTraits::kScaleOffset + 64 * tile)[at.t];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float v = norm.v[half], r = norm.r[half];
      s[tile][2 * half] = fmaf(of_r[tile][2 * half], r * scale.z, s[tile][2 * half] * (v * scale.x));
      s[tile][2 * half + 1] = fmaf(of_r[tile][2 * half + 1], r * scale.w, s[tile][2 * half + 1] * (v * scale.y));
    }
  }
  return norm;
}

/// hide_tokens() for the rows of a tile.
template <class TTraits>
__device__ __forceinline__ void hide_kv_tokens(float (&s)[4], float (&v_norm)[4], const Tq4DecodeParams& params,
                                               int tile, int first, const Tq4DecodeThread& at) {
  const Tq4DecodeUnit unit = kv_unit<TTraits>(params, tile);
  hide_tokens(s, v_norm, params, unit, first, at, TTraits::kOfRows ? unit.batch : 0);
}

/// Takes the records of a team into its state. A team with fewer than `run.most` meets its barrier as often as if it
/// had that many, as in absorb_records().
template <class TTraits>
__device__ __forceinline__ void absorb_kv_records(Tq4DecodeState<TTraits> (&state)[TTraits::kRowTiles],
                                                  const KvDecodeParams& params, typename TTraits::Ring& ring,
                                                  unsigned char* smem, const Tq4DecodeRun& run,
                                                  const Tq4DecodeThread& at) {
  const int begin = run.begin, end = run.end;
  unsigned char* const scores =
      smem + TTraits::kScoreOffset + 2 * TTraits::kTeamWarps * TTraits::kRowTiles * 512 * at.pair;
  const int norms =
      static_cast<int>(TTraits::kVBits != 0 ? TTraits::kRecordBytes
                                            : kv_record_bytes(TTraits::kHeadDim, params.v_bits, params.r_bits)) -
      64;
  for (int index = begin; index < end; ++index) {
    const unsigned char* const record = ring.wait();
    KvTile tiles[TTraits::kVWords];
    KvScores<TTraits> parts;
    const KvTokenNorms norm = score_kv_record<TTraits>(parts, tiles, record, smem, norms, params, at);
    post_part<TTraits>(parts, scores, at, index);
    named_barrier_sync<32 * TTraits::kTeamWarps>(TTraits::kTeamBarrier + at.pair);
    if (index > begin) ring.release(index - 1, end);
    const int first = index * kKvRecordTokens;
#pragma unroll
    for (int tile = 0; tile < TTraits::kRowTiles; ++tile) {
      float s[4], v_norm[4];
      take_parts<TTraits>(s, scores, at, index, tile);
#pragma unroll
      for (int i = 0; i < 4; ++i) v_norm[i] = norm.v[i >> 1] * params.levels.v_weight;
      if (first + kKvRecordTokens > run.seen_by_all) {
        hide_kv_tokens<TTraits>(s, v_norm, params.base, tile, first, at);
      }
      std::uint32_t weights[2];
      weigh_tokens(state[tile], s, v_norm, weights);
#pragma unroll
      for (int m = 0; m < TTraits::kVWords; ++m) mma_bf16(state[tile].o[m], tiles[m].a, weights[0], weights[1]);
    }
  }
#pragma unroll 1
  for (int missing = (run.most - (end - begin)) * (1 + ring.barriers_of_wait()); missing > 0; --missing) {
    named_barrier_sync<32 * TTraits::kTeamWarps>(TTraits::kTeamBarrier + at.pair);
  }
}

}  // namespace gemma4::cuda::detail

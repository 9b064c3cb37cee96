// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/opaque.cuh"
#include "cuda/ptx/shared_memory.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/rotation.cuh"
#include "cuda/tq4_attention/decode_params.cuh"
#include "cuda/tq4_cache/layout.cuh"

/// Attention of a few query rows over TQ4 records: flash decoding on tensor cores by pairs of warps.
///
/// The rows of one KV head (token * group + head) are taken eight at a time, the width of an mma B operand. A pair of
/// warps owns a run of records and keeps its own maximum, sum and output, so that the loop has no block barrier:
///   S [16 tokens, 8 rows] = K q^T, fp16; K levels are decoded in registers into A fragments, each warp multiplies half
///   of the dims, and the two halves are exchanged through shared memory;
///   p = 2^(S * norm_k * scale - m), computed by both warps alike;
///   O^T [head_dim, 8 rows] += V^T (p * norm_v), bf16; each warp holds half of the dims.
/// A single warp a record (8 warps of 255 registers) took 5 % longer at 131072 keys and 15 % longer at 512.
/// In the end the pairs of a block are merged in order, each block leaves one partial, and a second kernel adds the
/// partials in block order, divides, rotates back and stores (tq4_attention_combine.cuh).
///
/// Which pair takes which records depends on kv_len, the number of blocks and of pairs, never on the buffer or on how
/// kv_len came: n_active = min(n_split, n_record) blocks, block i takes records [n i / n_active, n (i + 1) / n_active),
/// its pairs divide those in the same way. The grid is fixed, so a captured graph stays valid while kv_len grows.
///
/// q in fp16: a row is scaled by a power of two to a maximum in [1, 2), so its relative error is that of fp16
/// (2^-11) wherever its magnitude lies. Codebooks of 16 levels are read as bytes (byte_levels in tq4_layout.cuh, within
/// 2^-8), others as fp16 (K) and bf16 (V).
/// With byte levels the norms of V must lie below 2^59: weights (below 2^8) are scaled by 2^60 against the 2^-133 of
/// the levels. Bytes: 16 (D + 4) a record of 16 tokens, read once per eight rows. The integer pipe is the second roof:
/// 9 operations for 8 values.
namespace gemma4::cuda {

namespace detail {

/// Position of a thread: its pair, its half of the dims, and within the warp the lane 4 g + t.
struct Tq4DecodeThread {
  int pair, half, lane, g, t;

  [[nodiscard]] static __device__ __forceinline__ Tq4DecodeThread here() {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) & 31;
    return {warp >> 1, warp & 1, lane, lane >> 2, lane & 3};
  }
};

/// floor(n * i / of) for i <= of, in 32 bits.
[[nodiscard]] __device__ __forceinline__ int share(int n, int i, int of) {
  return n / of * i + n % of * i / of;
}

/// What a block works on: rows row0 .. row0 + 7 of a KV head. grid: y = KV head, z = batch * n_row_tile + tile.
struct Tq4DecodeUnit {
  int batch, head_kv, row0;
  int n_row;           ///< rows of the KV head in all
  std::int64_t first;  ///< partial of the first split

  [[nodiscard]] static __device__ __forceinline__ Tq4DecodeUnit here(const Tq4DecodeParams& params) {
    const auto head = static_cast<int>(blockIdx.y), z = static_cast<int>(blockIdx.z);
    const int batch = params.n_row_tile == 1 ? z : z / params.n_row_tile;  // divisions cost before the first load
    return {batch, head, 8 * (z - batch * params.n_row_tile), params.n_query * params.group,
            (std::int64_t{z} * params.n_head_kv + head) * params.n_split};
  }
};

/// Token of a row of a KV head.
[[nodiscard]] __device__ __forceinline__ int token_of(const Tq4DecodeParams& params, int row) {
  return params.n_query == 1 ? 0 : row / params.group;
}

/// The keys of a call.
struct Tq4DecodeKeys {
  int kv_len, n_record;
  int n_active;  ///< blocks that have records
};

[[nodiscard]] __device__ __forceinline__ Tq4DecodeKeys decode_keys(const Tq4DecodeParams& params) {
  const int given = params.kv_len != nullptr ? *params.kv_len : params.kv_len_host;
  const int kv_len = max(0, min(given, static_cast<int>(params.cache.buffer_len)));
  const int n_record = (kv_len + kTq4RecordTokens - 1) / kTq4RecordTokens;
  return {kv_len, n_record, min(params.n_split, n_record)};
}

/// One more than the last key that row `row` may see before any mask; 0 for a row beyond the last.
[[nodiscard]] __device__ __forceinline__ int key_limit(const Tq4DecodeParams& params, int kv_len, int row) {
  if (row >= params.n_query * params.group) return 0;
  return params.causal ? max(0, min(kv_len, kv_len - params.n_query + token_of(params, row) + 1)) : kv_len;
}

/// Reads row `slot` of the unit, zeros beyond the last.
template <class TTraits>
__device__ __forceinline__ void load_query(const Tq4DecodeParams& params, const Tq4DecodeUnit& unit, int slot,
                                           float (&x)[TTraits::kValues]) {
  const int row = unit.row0 + slot;
  if (row < unit.n_row) {
    const int token = token_of(params, row);
    load_values(params.q + unit.batch * params.q_stride[0] + token * params.q_stride[1] +
                    (unit.head_kv * params.group + row - token * params.group) * params.q_stride[2] +
                    static_cast<int>(threadIdx.x & 31) * TTraits::kValues,
                x);
  } else {
#pragma unroll
    for (float& value : x) value = 0.0f;
  }
}

/// Rotates row `slot`, scales it by a power of two and stores it as B fragments: 16-byte piece u * 32 + 4 * slot + t
/// holds the eight dims that word u of lane t of the K codes holds.
template <class TTraits>
__device__ __forceinline__ void stage_query(const Tq4DecodeParams& params, float (&x)[TTraits::kValues],
                                            std::uint32_t negative, int slot, unsigned char* q_smem, float* row_scale) {
  constexpr int kValues = TTraits::kValues, kHeadDim = TTraits::kHeadDim;
  const int lane = threadIdx.x & 31, dim0 = lane * kValues;
  rotate_warp<kHeadDim>(params.rotation, negative, x);
  float largest = 0.0f;
#pragma unroll
  for (const float value : x) largest = fmaxf(largest, fabsf(value));
  largest = warp_max(largest);
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);  // biased; 0: zero, 255: not finite
  const bool scaled = exponent > 0 && exponent < 254;
  const float down = scaled ? __uint_as_float(static_cast<std::uint32_t>(254 - exponent) << 23) : 1.0f;
  const float up = scaled ? __uint_as_float(static_cast<std::uint32_t>(exponent) << 23) : 1.0f;
  if (lane == 0) row_scale[slot] = params.scale_log2 * params.levels.k_scale * up;
#pragma unroll
  for (int i = 0; i < kValues; i += 2) {
    const int dim = dim0 + i;
    const int t = kHeadDim == 64 ? dim >> 4 : (dim >> 5) & 3;
    const int u = kHeadDim == 64 ? (dim >> 3) & 1 : ((dim >> 7) << 2) + ((dim >> 3) & 3);
    *reinterpret_cast<std::uint32_t*>(q_smem + (u * 32 + 4 * slot + t) * 16 + (dim & 7) * 2) =
        pack_f16(x[i] * down, x[i + 1] * down);
  }
}

template <class TTraits, bool kKeys>
__device__ __forceinline__ void decode_levels(std::uint32_t word, const Tq4DecodeLevels& levels,
                                              std::uint32_t (&out)[4]) {
  if constexpr (TTraits::kByteLevels) {
    decode_word_bytes(word, kKeys ? levels.k_bytes : levels.v_bytes, levels.two_16, levels.sixteen, out);
  } else {
    decode_word(word, kKeys ? levels.k : levels.v, out);
  }
}

/// Reference of a row that has seen no key. Finite, so that a difference of two of them is a number; a score that low
/// has no weight beside any other.
inline constexpr float kTq4NoKey = -1e30f;

/// Softmax state of a pair's rows 2t and 2t + 1 (m: the reference of the weights, base 2), and of the warp's half of
/// the output dims g and g + 8 of every 16.
template <class TTraits>
struct Tq4DecodeState {
  float m[2], l[2];
  float o[TTraits::kVWords][4];

  __device__ __forceinline__ void init() {
    m[0] = m[1] = kTq4NoKey;
    l[0] = l[1] = 0.0f;
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
__device__ __forceinline__ void hide_tokens(float (&s)[4], float (&v_norm)[4], const Tq4DecodeParams& params, int first,
                                            const Tq4DecodeThread& at) {
  const Tq4DecodeUnit unit = Tq4DecodeUnit::here(params);
  const int kv_len = decode_keys(params).kv_len;
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
    const float maximum = fmaxf(warp_max<4, 16>(fmaxf(s[c], s[2 + c])), state.m[c]);
    alpha[c] = exp2_approx(state.m[c] - maximum);
    state.m[c] = maximum;
    state.l[c] *= alpha[c];
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
  for (int i = 0; i < 4; ++i) rises = rises || s[i] > state.m[i & 1] + kTq4Slack;
  if (__any_sync(~0u, rises)) raise_reference(state, s);
  float p[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    p[i] = exp2_approx(s[i] - state.m[i & 1]);
    state.l[i & 1] += p[i];
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

/// Takes the records [begin, end) of a pair into its state. A pair with fewer than `most` meets its barrier as often as
/// if it had that many: where the pairs of a block do so unequally often, racecheck (compute-sanitizer 2025.3) loses
/// the block barriers that follow. (Computing the scores of the next record before the softmax of this one was as fast:
/// the other warps fill the gaps, and the memory sets the pace.)
template <class TTraits>
__device__ __forceinline__ void absorb_records(Tq4DecodeState<TTraits>& state, const Tq4DecodeParams& params,
                                               typename TTraits::Ring& ring, unsigned char* smem, int begin, int end,
                                               int most, int seen_by_all, const Tq4DecodeThread& at) {
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
    named_barrier_sync<64>(1 + at.pair);
    if (index > begin) ring.release(index - 1, end);
    take_scores(s, scores, at, index);
    const auto k_norm = Tq4TokenNorms::load(record + tq4_k_norms_offset(kHeadDim), at.g, 1.0f);
    const auto v_norms = Tq4TokenNorms::load(record + tq4_v_norms_offset(kHeadDim), at.g, params.levels.v_weight);
    float v_norm[4] = {v_norms.value[0], v_norms.value[0], v_norms.value[1], v_norms.value[1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] *= k_norm.value[i >> 1] * row_scale[i & 1];
    const int first = index * kTq4RecordTokens;
    if (first + kTq4RecordTokens > seen_by_all) hide_tokens(s, v_norm, params, first, at);
    std::uint32_t weights[2];
    weigh_tokens(state, s, v_norm, weights);
    add_values(state, record, weights, at, params.levels);
  }
#pragma unroll 1
  for (int missing = (most - (end - begin)) * (1 + ring.barriers_of_wait()); missing > 0; --missing) {
    named_barrier_sync<64>(1 + at.pair);
  }
}

/// Merges the pairs of a block in order and leaves the block's partial. Bit p of `live`: pair p had records.
template <class TTraits>
__device__ __forceinline__ void merge_pairs(Tq4DecodeState<TTraits>& state, const Tq4DecodeParams& params,
                                            unsigned char* smem, std::int64_t partial, unsigned live,
                                            const Tq4DecodeThread& at) {
  constexpr int kHeadDim = TTraits::kHeadDim, kPairs = TTraits::kPairs, kStride = TTraits::kMergeStride;
  auto* const ml = reinterpret_cast<float2*>(smem + TTraits::kMlOffset);  // [kPairs, 8]
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    warp_sum_in_place<4, 16>(state.l[c]);
    if (at.g == 0 && at.half == 0) ml[at.pair * 8 + 2 * at.t + c] = make_float2(state.m[c], state.l[c]);
  }
  __syncthreads();  // from here on the rings are the merge's memory, too
  float factor[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float maximum = kTq4NoKey;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) maximum = fmaxf(maximum, ml[p * 8 + 2 * at.t + c].x);
    factor[c] = exp2_approx(state.m[c] - maximum) * params.levels.v_scale;
    if (threadIdx.x >= 4) continue;
    float total = 0.0f;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const float2 part = ml[p * 8 + 2 * at.t + c];
      total += part.y * exp2_approx(part.x - maximum);
    }
    params.partial_ml[partial * 8 + 2 * at.t + c] = make_float2(maximum, total);
  }
  const auto slot = [&](int p) {
    return reinterpret_cast<float*>(smem + p * TTraits::kStages * TTraits::kRecordBytes);
  };
  if ((live >> at.pair) & 1u) {
    float* const mine = slot(at.pair) + 2 * at.t * kStride + at.half * (kHeadDim / 2) + at.g;
#pragma unroll
    for (int m = 0; m < TTraits::kVWords; ++m) {
      mine[16 * m] = state.o[m][0] * factor[0];
      mine[16 * m + kStride] = state.o[m][1] * factor[1];
      mine[16 * m + 8] = state.o[m][2] * factor[0];
      mine[16 * m + 8 + kStride] = state.o[m][3] * factor[1];
    }
  }
  __syncthreads();
  float* const target = params.partial_o + partial * 8 * kHeadDim;
  for (int item = threadIdx.x; item < 2 * kHeadDim; item += TTraits::kThreads) {
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

/// grid: x = split, y and z as in Tq4DecodeUnit.
template <class TTraits>
__global__ void __launch_bounds__(TTraits::kThreads, TTraits::kBlocksPerSm)
    tq4_decode_kernel(const __grid_constant__ Tq4DecodeParams params) {
  extern __shared__ __align__(128) unsigned char smem[];
  constexpr int kWarps = 2 * TTraits::kPairs;
  const Tq4DecodeThread at = Tq4DecodeThread::here();
  const Tq4DecodeUnit unit = Tq4DecodeUnit::here(params);
  const int slot = static_cast<int>(threadIdx.x) / 32;  // row of q that this warp stages
  // The parameters that the first steps need are read before the wait: the misses of the constant cache, one a line,
  // then lie beside the end of the kernel before and not one after another behind the copies of this one.
  std::uint32_t negative = sign_bits<TTraits::kHeadDim>(params.rotation);
  std::uint32_t touched = params.levels.k_bytes[0] ^ params.levels.v_bytes[1] ^ params.levels.sixteen;
  have_now(negative, touched);
  wait_for_previous_kernel();
  allow_next_kernel();
  float x[TTraits::kValues];
  if (slot < 8) load_query<TTraits>(params, unit, slot, x);  // its latency runs beside that of kv_len
  const Tq4DecodeKeys keys = decode_keys(params);
  const auto block = static_cast<int>(blockIdx.x);
  if (block >= keys.n_active) return;  // the whole block; the merge knows

  const int first = share(keys.n_record, block, keys.n_active);
  const int count = share(keys.n_record, block + 1, keys.n_active) - first;
  const int begin = first + share(count, at.pair, TTraits::kPairs);
  int end = first + share(count, at.pair + 1, TTraits::kPairs);
  if (params.causal_skip) {
    const int last = key_limit(params, keys.kv_len, min(unit.row0 + 7, unit.n_row - 1));
    end = max(begin, min(end, (last + kTq4RecordTokens - 1) / kTq4RecordTokens));
  }
  typename TTraits::Ring ring;
  ring.start(smem + at.pair * TTraits::kStages * TTraits::kRecordBytes,
             smem + TTraits::kBarrierOffset + at.pair * TTraits::kStages * 8,
             reinterpret_cast<const unsigned char*>(params.cache.record(unit.batch, unit.head_kv, 0)), begin, end,
             1 + at.pair);
  unsigned char* const q_smem = smem + TTraits::kQOffset;
  auto* const scales = reinterpret_cast<float*>(smem + TTraits::kScaleOffset);
  for (int row = slot; row < 8; row += kWarps) {
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
  absorb_records<TTraits>(state, params, ring, smem, begin, end, most, seen_by_all, at);
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

}  // namespace detail
}  // namespace gemma4::cuda

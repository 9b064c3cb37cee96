// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/kv_cache/layout.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/rotation.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/float16.hpp"
#include "gemma4/kv_format.hpp"

/// How a warp compresses a vector into its place of a record, and reads one again (cuda/kv_cache/layout.cuh).
///
/// A vector of n values lies in a warp as cuda/rotation.cuh has it, max(n, 32) / 32 values a lane; with n = 16 the
/// upper lanes hold zeros. The codes go through shared memory, a byte each, so that a lane gets whole words of them.
/// With n >= 128 a word belongs to one token and is stored; below that tokens g and g + 8 share words, and a token
/// flips its own bits with an atomic XOR of integers, whose result does not depend on order.
namespace gemma4::cuda {

/// One side's table as kernels take it.
struct KvSideParams {
  float edge[KvCodebook::kMaxHalf - 1];
  float level[KvCodebook::kMaxHalf];
  int bits, n_half;
};

struct KvCodecParams {
  RotationParams v_rotation, r_rotation;
  KvSideParams v, r;
  bool corrected = true;
};
static_assert(std::is_trivially_copyable_v<KvCodecParams>);

namespace detail {

/// Calls body(integral_constant<int, bits>) for a width that is known here, or told.
template <int kBits, class TBody>
__device__ __forceinline__ void with_kv_bits(int bits, TBody&& body) {
  if constexpr (kBits != 0) {
    body(std::integral_constant<int, kBits>{});
  } else {
    if (bits == 3) return body(std::integral_constant<int, 3>{});
    if (bits == 4) return body(std::integral_constant<int, 4>{});
    if (bits == 5) return body(std::integral_constant<int, 5>{});
    body(std::integral_constant<int, 6>{});
  }
}

inline constexpr int kKvStoreWarps = 4;  ///< of a block that stores

/// Values that a lane holds of a vector of n.
template <int kN>
inline constexpr int kKvValues = kN < 32 ? 1 : kN / 32;

/// rotate_warp and rotate_back_warp, for vectors of 16 values too.
template <int kN, bool kForward>
__device__ __forceinline__ void kv_rotate_warp(const RotationParams& rotation, float (&x)[kKvValues<kN>]) {
  if constexpr (kN >= 32) {
    if constexpr (kForward) {
      rotate_warp<kN>(rotation, x);
    } else {
      rotate_back_warp<kN>(rotation, x);
    }
  } else {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    if (rotation.kind == RotationKind::kDenseHaar) {
      const float* const columns = kForward ? rotation.transposed : rotation.matrix;
      float y = 0.0f;
      for (int i = 0; i < kN; ++i) y = fmaf(columns[i * kN + (lane & (kN - 1))], __shfl_sync(~0u, x[0], i), y);
      x[0] = lane < kN ? y : 0.0f;
      return;
    }
    const bool negative = ((rotation.negative[0] >> lane) & 1u) != 0;
    if (kForward && negative) x[0] = -x[0];
#pragma unroll
    for (int lane_bit = 1; lane_bit < kN; lane_bit *= 2) {
      const float sign = (lane & lane_bit) != 0 ? -1.0f : 1.0f;
      x[0] = fmaf(sign, x[0], __shfl_xor_sync(~0u, x[0], lane_bit));
    }
    x[0] *= rotation.scale;
    if (!kForward && negative) x[0] = -x[0];
  }
}

/// Codes of this lane's values; returns the length of the levels that the warp chose.
template <int kN>
__device__ __forceinline__ double kv_quantize_warp(const KvSideParams& side, const float (&y)[kKvValues<kN>],
                                                   int (&code)[kKvValues<kN>]) {
  constexpr int kValues = kKvValues<kN>;
  float level[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) code[i] = 0, level[i] = side.level[0];
#pragma unroll 1
  for (int b = 0; b < side.n_half - 1; ++b) {
    const float edge = side.edge[b], above = side.level[b + 1];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const bool is_above = fabsf(y[i]) > edge;  // a tie goes towards zero, NaN gets 0
      code[i] += is_above ? 1 : 0;
      level[i] = is_above ? above : level[i];
    }
  }
  const bool counts = kN >= 32 || (threadIdx.x & 31) < kN;
  double squares = 0.0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (y[i] < 0.0f) code[i] |= 1 << (side.bits - 1);
    if (counts) squares = fma(static_cast<double>(level[i]), static_cast<double>(level[i]), squares);
  }
  return sqrt(warp_sum(squares));
}

/// The bits of one word of a token, by plane, and which bits of the planes' words are the token's.
struct KvWordBits {
  std::uint32_t nibbles = 0, nibble_mask = 0, signs = 0, extra = 0, slot_mask = 0;
};

/// Puts `bits` where `mask` is set, the rest staying what it is.
template <bool kWhole>
__device__ __forceinline__ void kv_put(std::uint32_t* word, std::uint32_t bits, std::uint32_t mask) {
  if constexpr (kWhole) {
    *word = bits;
  } else {
    atomicXor(word, (__ldcg(word) ^ bits) & mask);
  }
}

/// Group and number of word `w` of the words of a token in a set of n values, in the order of the lanes that write
/// them.
template <int kN>
[[nodiscard]] __device__ __forceinline__ KvPlace kv_word_place(int token, int w) {
  const int half = token >> 3, g = token & 7;
  if constexpr (kN >= 128) {
    return {(2 * (w >> 4) + half) * 32 + 4 * g + ((w >> 2) & 3), w & 3, 0};
  } else if constexpr (kN == 64) {
    return {4 * g + (w >> 1), 2 * half + (w & 1), 0};
  } else if constexpr (kN == 32) {
    return {(4 * g + w) >> 1, 2 * (w & 1) + half, 0};
  } else {
    return {g, w, 0};
  }
}

/// What word `at` of a token holds. @param codes [n], a byte each
template <int kN>
[[nodiscard]] __device__ __forceinline__ KvWordBits kv_word_bits(const KvSet& set, int token, KvPlace at,
                                                                 const unsigned char* codes) {
  KvWordBits bits;
#pragma unroll
  for (int i = 0; i < (kN == 16 ? 4 : 8); ++i) {
    at.element = kN == 16 ? i + 4 * (token >> 3) : i;
    const int code = codes[kv_source(kN, at).dim];
    const std::uint32_t slot = 1u << kv_slot(at);
    bits.nibbles |= set.nibble_of(code) << set.nibble_bit(at);
    bits.slot_mask |= slot;
    if (set.bits == 4) {
      bits.nibbles |= set.is_negative(code) ? 1u << tq4_sign_bit(at.element) : 0u;
      bits.nibble_mask |= tq4_element_mask(at.element);
    } else {
      bits.nibble_mask |= (set.bits == 3 ? 3u : 15u) << set.nibble_bit(at);
      bits.signs |= set.is_negative(code) ? slot : 0u;
      bits.extra |= (code & 2) != 0 ? slot : 0u;
    }
  }
  return bits;
}

/// The codes of a token into the set at `words`. @param codes [n] in shared memory, of this warp, complete
template <int kN>
__device__ __forceinline__ void kv_store_codes(std::uint32_t* words, const KvSet& set, int token,
                                               const unsigned char* codes) {
  constexpr bool kWhole = kN >= 128;
  constexpr int kWords = kN == 16 ? 4 : kN / 8, kOfGroup = kN >= 128 || kN == 16 ? 4 : 2;  // words of the token
  const int lane = static_cast<int>(threadIdx.x) & 31;
#pragma unroll
  for (int first = 0; first < kWords; first += 32) {
    const bool writes = first + lane < kWords;
    const KvPlace at = kv_word_place<kN>(token, (first + lane) % kWords);
    KvWordBits bits = kv_word_bits<kN>(set, token, at, codes);
    if (set.bits == 3 && kN != 32) {  // words 2j and 2j + 1 share one
      bits.nibbles |= __shfl_xor_sync(~0u, bits.nibbles, 1);
      bits.nibble_mask |= __shfl_xor_sync(~0u, bits.nibble_mask, 1);
    }
    const bool is_first = set.bits != 3 || kN == 32 || (lane & 1) == 0;
    if (writes && is_first) kv_put<kWhole>(words + set.nibble_word(at), bits.nibbles, bits.nibble_mask);
    if (!set.has_sign_plane()) continue;
#pragma unroll
    for (int lane_bit = 1; lane_bit < kOfGroup; lane_bit *= 2) {
      bits.signs |= __shfl_xor_sync(~0u, bits.signs, lane_bit);
      bits.extra |= __shfl_xor_sync(~0u, bits.extra, lane_bit);
      bits.slot_mask |= __shfl_xor_sync(~0u, bits.slot_mask, lane_bit);
    }
    if (!writes || lane % kOfGroup != 0) continue;
    kv_put<kWhole>(words + set.sign_word(at.group), bits.signs, bits.slot_mask);
    if (set.bits == 6) kv_put<kWhole>(words + set.extra_word(at.group), bits.extra, bits.slot_mask);
  }
}

/// Compresses the vector x in a warp; x is used up. @param codes [n] bytes of shared memory, of this warp
template <int kN>
__device__ __forceinline__ void kv_store_vector(const KvSideParams& side, const RotationParams& rotation,
                                                bool corrected, float (&x)[kKvValues<kN>], std::byte* set_memory,
                                                KvNorm* norm, int token, unsigned char* codes) {
  constexpr int kValues = kKvValues<kN>;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const double length = normalize_warp < kN < 32 ? 32 : kN > (x);
  kv_rotate_warp<kN, true>(rotation, x);
  int code[kValues];
  const double levels = kv_quantize_warp<kN>(side, x, code);
  if (kN >= 32 || lane < kN) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) codes[lane * kValues + i] = static_cast<unsigned char>(code[i]);
  }
  __syncwarp();
  with_kv_bits<0>(side.bits, [&]<int kBits>(std::integral_constant<int, kBits>) {
    kv_store_codes<kN>(reinterpret_cast<std::uint32_t*>(set_memory), KvSet{kN, kBits}, token, codes);
  });
  __syncwarp();
  if (lane == 0) *norm = to_f16(static_cast<float>(corrected ? length / levels : length));
}

/// The scales c of a lane's values of R, from the weight w [head_dim] of k's norm.
template <int kHeadDim>
__device__ __forceinline__ void kv_load_scales(const float* k_weight, float (&scale)[kKvValues<kHeadDim / 4>]) {
  constexpr int kN = kHeadDim / 4, kCount = kKvValues<kN>;
  const int lane = static_cast<int>(threadIdx.x) & 31;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    scale[i] = kv_rotated_scale(k_weight, kHeadDim, (kN < 32 ? lane & (kN - 1) : lane * kCount) + i);
  }
}

/// The rotated values of a K vector in a warp, in R's order and layout, through shared memory.
template <int kHeadDim>
__device__ __forceinline__ void kv_gather_rotated(const float (&x)[kHeadDim / 32], float* shared,
                                                  float (&r)[kKvValues<kHeadDim / 4>]) {
  constexpr int kValues = kHeadDim / 32, kN = kHeadDim / 4;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if ((lane & 15) < 4) {  // lanes 0 to 3 hold the first halves of the pairs, 16 to 19 the second ones
    float* const target = shared + (lane < 16 ? lane : lane - 12) * kValues;
#pragma unroll
    for (int i = 0; i < kValues; ++i) target[i] = x[i];
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kKvValues<kN>; ++i) r[i] = kN >= 32 || lane < kN ? shared[lane * kKvValues<kN> + i] : 0.0f;
  __syncwarp();
}

/// Stores a K or V vector of a warp at `position`, which lies in the buffer: V whole, of K what is rotated, over its
/// scales. x is used up. The block has kKvStoreWarps warps.
template <int kHeadDim>
__device__ __forceinline__ void kv_store(const KvCodecParams& codec, const float* k_weight, bool is_k,
                                         float (&x)[kHeadDim / 32], const KvRecords& cache, std::int64_t b,
                                         std::int64_t h, std::int64_t position) {
  constexpr int kRotated = kHeadDim / 4, kRValues = kKvValues<kRotated>;
  __shared__ __align__(16) unsigned char code_memory[kKvStoreWarps][kHeadDim];
  __shared__ float rotated_memory[kKvStoreWarps][kRotated];
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) / 32;
  std::byte* const record = cache.record(b, h, position / kKvRecordTokens);
  const int token = static_cast<int>(position % kKvRecordTokens);
  auto* const norms = reinterpret_cast<KvNorm*>(record + cache.norms_offset());
  float r[kRValues];
  if (is_k) {
    float scale[kRValues];
    kv_load_scales<kHeadDim>(k_weight, scale);
    kv_gather_rotated<kHeadDim>(x, rotated_memory[warp], r);
#pragma unroll
    for (int i = 0; i < kRValues; ++i) r[i] /= scale[i];
  }
  if (!cache.has_codes()) {
    auto* const values = reinterpret_cast<Bf16*>(record + (is_k ? cache.r_offset() : 0));
    if (!is_k) {
      store_values(values + token * kHeadDim + lane * (kHeadDim / 32), x);
    } else if (kRotated >= 32 || lane < kRotated) {
      store_values(values + token * kRotated + lane * kRValues, r);
    }
  } else if (is_k) {
    kv_store_vector<kRotated>(codec.r, codec.r_rotation, codec.corrected, r, record + cache.r_offset(),
                              norms + kv_norm_place(false, token), token, code_memory[warp]);
  } else {
    kv_store_vector<kHeadDim>(codec.v, codec.v_rotation, codec.corrected, x, record, norms + kv_norm_place(true, token),
                              token, code_memory[warp]);
  }
}

/// Values of token `token` of a set, still rotated, times the norm. @param level [n_half] in shared memory
template <int kN>
__device__ __forceinline__ void kv_read_vector(const std::byte* set_memory, int bits, const float* level, float norm,
                                               int token, float (&x)[kKvValues<kN>]) {
  const auto* const words = reinterpret_cast<const std::uint32_t*>(set_memory);
  const int lane = static_cast<int>(threadIdx.x) & 31;
  with_kv_bits<0>(bits, [&]<int kBits>(std::integral_constant<int, kBits>) {
    constexpr KvSet kSet{kN, kBits};
#pragma unroll
    for (int i = 0; i < kKvValues<kN>; ++i) {
      const int dim = (kN >= 32 ? lane : lane & (kN - 1)) * kKvValues<kN> + i;
      const int code = kSet.code(words, kv_place(kN, token, dim));
      const float value = norm * level[code & ((1 << (kBits - 1)) - 1)];
      x[i] = kSet.is_negative(code) ? -value : value;
      if (kN < 32 && lane >= kN) x[i] = 0.0f;
    }
  });
}

}  // namespace detail
}  // namespace gemma4::cuda

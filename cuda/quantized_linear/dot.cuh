// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/weights/activation_blocks.cuh"
#include "cuda/weights/layout.cuh"
#include "gemma4/platform.hpp"

/// One lane's product: a group of 32 weights of a row with the same group of the activations of up to 8 tokens.
///
/// A format's Weights are a group as integers with its scales, made once; term() adds their product with one token to
/// a float. Integer sums are exact; they start at kMagic, so that their bits read as a float are kMagicFloat plus
/// the sum: a subtraction converts them. The operations and their order are spelled out, so that
/// every instance of the kernel rounds alike whatever the compiler would like to fuse.
namespace gemma4::cuda::detail {

[[nodiscard]] __device__ __forceinline__ float from_magic(int bits) {
  return __fsub_rn(__int_as_float(bits), kMagicFloat);
}

/// The lane's group of one token.
struct LaneActivation {
  std::uint32_t low[4], high[4];  ///< codes 0-15, 16-31
  float scale;
  std::uint32_t sums;

  __device__ __forceinline__ void load(const std::uint8_t* activations, int n_group, int group, bool valid) {
    const uint4 a = *reinterpret_cast<const uint4*>(activations + 16 * group);
    const uint4 b = *reinterpret_cast<const uint4*>(activations + 16 * (n_group + group));
    const BlockTail tail = reinterpret_cast<const BlockTail*>(activations + 32 * n_group)[group];
    low[0] = a.x, low[1] = a.y, low[2] = a.z, low[3] = a.w;
    high[0] = b.x, high[1] = b.y, high[2] = b.z, high[3] = b.w;
    scale = valid ? tail.scale : 0.0f;
    sums = tail.sums;
  }
  [[nodiscard]] __device__ __forceinline__ int low_sum() const { return static_cast<std::int16_t>(sums & 0xFFFFu); }
  [[nodiscard]] __device__ __forceinline__ int high_sum() const { return static_cast<std::int32_t>(sums) >> 16; }
};

/// Scale and minimum of a group of Q4_K and Q5_K from its meta record: d * s, and 64 * dmin * m (the 64 saves a shift).
struct ScaledMeta {
  float scale, min64;

  __device__ __forceinline__ void load(const std::uint8_t* meta, int group) {
    const int j = group & 7;
    const std::uint8_t* const record = meta + 2 * (group & ~7);
    const __half2 steps = *reinterpret_cast<const __half2*>(record);
    const std::uint32_t byte = record[4 + j];
    const std::uint32_t upper = record[12 + j / 2] >> (4 * (j & 1));
    const std::uint32_t joined = byte + (upper << 8);  // scale in bits 0-5, minimum in bits 6-11
    // 0x4B000000 is 2^23: an integer below it, in the low bits, is added to it.
    const float s = __fsub_rn(__int_as_float(static_cast<int>((joined & 0x3Fu) | 0x4B000000u)), 8388608.0f);
    const float m = __fsub_rn(__int_as_float(static_cast<int>((joined & 0xFC0u) | 0x4B000000u)), 8388608.0f);
    scale = __fmul_rn(__low2float(steps), s);
    min64 = __fmul_rn(__high2float(steps), m);
  }
};

template <TensorType kType>
struct LinearFormat;

/// The format as the kernel for kTokens tokens has it: weights that one token alone multiplies may stay as they are.
template <TensorType kType, int kTokens>
struct LinearFormatFor : LinearFormat<kType> {};

/// sum q x = s_x ((d s) (sum of codes) - (dmin m) (sum of x codes))
template <>
struct LinearFormat<TensorType::kQ4K> {
  struct Weights {
    std::uint32_t low[4], high[4];  ///< high: 16 times the code
    ScaledMeta meta;
    __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group) {
      const uint4 codes = *reinterpret_cast<const uint4*>(chunk + 16 * group);
      const std::uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) low[i] = word[i] & 0x0F0F0F0Fu, high[i] = word[i] & 0xF0F0F0F0u;
      meta.load(chunk + 16 * groups, group);
    }
  };
  [[nodiscard]] static __device__ __forceinline__ float term(const Weights& w, const LaneActivation& x, float sum) {
    int low = 0, high = kMagic;
#pragma unroll
    for (int i = 0; i < 4; ++i) low = dot4(w.low[i], x.low[i], low), high = dot4_unsigned(w.high[i], x.high[i], high);
    const float products = from_magic(16 * low + high);  // at most 2 * 16 * 240 * 127 < 2^22
    const float minima = __fmul_rn(x.scale * -0x1p-6f, static_cast<float>(x.low_sum() + x.high_sum()));
    sum = __fmaf_rn(__fmul_rn(w.meta.scale, x.scale * 0x1p-4f), products, sum);
    return __fmaf_rn(w.meta.min64, minima, sum);
  }
};

template <>
struct LinearFormat<TensorType::kQ5K> {
  struct Weights {
    std::uint32_t low[4], high[4];
    ScaledMeta meta;
    __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group) {
      const uint4 codes = *reinterpret_cast<const uint4*>(chunk + 16 * group);
      const std::uint32_t fifth = *reinterpret_cast<const std::uint32_t*>(chunk + 16 * groups + 4 * group);
      const std::uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[i] = (word[i] & 0x0F0F0F0Fu) | ((fifth << (4 - i)) & 0x10101010u);
        high[i] = ((word[i] >> 4) & 0x0F0F0F0Fu) | ((fifth >> i) & 0x10101010u);
      }
      meta.load(chunk + 20 * groups, group);
    }
  };
  [[nodiscard]] static __device__ __forceinline__ float term(const Weights& w, const LaneActivation& x, float sum) {
    int low = 0, high = kMagic;
#pragma unroll
    for (int i = 0; i < 4; ++i) low = dot4(w.low[i], x.low[i], low), high = dot4(w.high[i], x.high[i], high);
    const float products = from_magic(low + high);
    const float minima = __fmul_rn(x.scale * -0x1p-6f, static_cast<float>(x.low_sum() + x.high_sum()));
    sum = __fmaf_rn(__fmul_rn(w.meta.scale, x.scale), products, sum);
    return __fmaf_rn(w.meta.min64, minima, sum);
  }
};

/// sum (q - 32) x = s_x d (s_0 (sum_low q x - 32 sum_low x) + s_1 (the same of the upper 16))
template <>
struct LinearFormat<TensorType::kQ6K> {
  struct Weights {
    std::uint32_t low[4], high[4];
    float low_scale, high_scale;
    __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group) {
      const uint4 codes = *reinterpret_cast<const uint4*>(chunk + 16 * group);
      const uint2 upper = *reinterpret_cast<const uint2*>(chunk + 16 * groups + 8 * group);
      const char2 scales = *reinterpret_cast<const char2*>(chunk + 24 * groups + 2 * group);
      const __half d = *reinterpret_cast<const __half*>(chunk + 26 * groups + (group >> 3) * 2);
      const std::uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t low_bits = i < 2 ? upper.x << (4 - 2 * i) : upper.x >> (2 * i - 4);
        const std::uint32_t high_bits = i < 2 ? upper.y << (4 - 2 * i) : upper.y >> (2 * i - 4);
        low[i] = (word[i] & 0x0F0F0F0Fu) | (low_bits & 0x30303030u);
        high[i] = ((word[i] >> 4) & 0x0F0F0F0Fu) | (high_bits & 0x30303030u);
      }
      low_scale = __fmul_rn(__half2float(d), static_cast<float>(scales.x));
      high_scale = __fmul_rn(__half2float(d), static_cast<float>(scales.y));
    }
  };
  [[nodiscard]] static __device__ __forceinline__ float term(const Weights& w, const LaneActivation& x, float sum) {
    int low = kMagic - 32 * x.low_sum(), high = kMagic - 32 * x.high_sum();
#pragma unroll
    for (int i = 0; i < 4; ++i) low = dot4(w.low[i], x.low[i], low), high = dot4(w.high[i], x.high[i], high);
    const float products = __fmaf_rn(w.high_scale, from_magic(high), __fmul_rn(w.low_scale, from_magic(low)));
    return __fmaf_rn(x.scale, products, sum);
  }
};

template <>
struct LinearFormat<TensorType::kQ8_0> {
  struct Weights {
    std::uint32_t low[4], high[4];
    float scale;
    __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group) {
      const uint4 a = *reinterpret_cast<const uint4*>(chunk + 16 * group);
      const uint4 b = *reinterpret_cast<const uint4*>(chunk + 16 * (groups + group));
      low[0] = a.x, low[1] = a.y, low[2] = a.z, low[3] = a.w;
      high[0] = b.x, high[1] = b.y, high[2] = b.z, high[3] = b.w;
      scale = __half2float(*reinterpret_cast<const __half*>(chunk + 32 * groups + 2 * group));
    }
  };
  [[nodiscard]] static __device__ __forceinline__ float term(const Weights& w, const LaneActivation& x, float sum) {
    int low = 0, high = kMagic;
#pragma unroll
    for (int i = 0; i < 4; ++i) low = dot4(w.low[i], x.low[i], low), high = dot4(w.high[i], x.high[i], high);
    return __fmaf_rn(__fmul_rn(w.scale, x.scale), from_magic(low + high), sum);
  }
};

}  // namespace gemma4::cuda::detail

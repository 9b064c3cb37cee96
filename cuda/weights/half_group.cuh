// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/weights/codes.cuh"
#include "cuda/weights/layout.cuh"
#include "gemma4/gguf/block_formats.hpp"
#include "gemma4/gguf/gguf.hpp"

/// Sixteen weights of a packed row as a thread holds them, and then as numbers: what dequantising and embedding rows do
/// for each format.
namespace gemma4::cuda::detail {

/// Byte i of `codes` as a float: 0x4B000000 is 2^23, and an integer below it, in the low bits, is added to it.
[[nodiscard]] __device__ __forceinline__ float code_value(std::uint32_t codes, int i, float offset) {
  return __fsub_rn(__uint_as_float(__byte_perm(codes, 0x4B000000u, 0x7440u | static_cast<unsigned>(i))),
                   8388608.0f + offset);
}

/// Scale and minimum of a group of Q4_K and Q5_K: d * s and dmin * m, both exact.
struct ScaleAndMin {
  float scale, min;

  __device__ __forceinline__ ScaleAndMin(const uint4& record, int group) {
    const int j = group & 7;
    const std::uint32_t byte = (j < 4 ? record.y : record.z) >> (8 * (j & 3));
    const std::uint32_t minimum = ((byte >> 6) & 3u) | (((record.w >> (4 * j)) & 15u) << 2);
    const float2 steps = __half22float2(reinterpret_cast<const __half2&>(record.x));
    scale = __fmul_rn(steps.x, code_value(byte & 63u, 0, 0.0f));
    min = __fmul_rn(steps.y, code_value(minimum, 0, 0.0f));
  }
};

/// Half a group as it lies in memory, then as numbers: weights 8 * half to 8 * half + 7 (`low`) and those 16 further on
/// (`high`), whose codes share bytes. Loading is one step and dequantising another, so that a thread can have the bytes
/// of several rows on their way.
template <TensorType kType>
struct HalfGroup;

template <TensorType kType>
requires(kType == TensorType::kQ4K || kType == TensorType::kQ5K) struct HalfGroup<kType> {
  uint2 codes;
  std::uint32_t fifth = 0;
  uint4 meta;

  __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group, int half) {
    constexpr bool kFifth = kType == TensorType::kQ5K;
    codes = *reinterpret_cast<const uint2*>(chunk + 16 * group + 8 * half);
    if (kFifth) fifth = *reinterpret_cast<const std::uint32_t*>(chunk + 16 * groups + 4 * group);
    meta = *reinterpret_cast<const uint4*>(chunk + (kFifth ? 20 : 16) * groups + 2 * (group & ~7));
  }
  __device__ __forceinline__ void dequantise(int group, int half, float (&low)[8], float (&high)[8]) const {
    const ScaleAndMin step(meta, group);
    const std::uint32_t upper = fifth >> (2 * half);
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const std::uint32_t bytes = word == 0 ? codes.x : codes.y;
      std::uint32_t first = bytes & 0x0F0F0F0Fu, second = (bytes >> 4) & 0x0F0F0F0Fu;
      if constexpr (kType == TensorType::kQ5K) {
        first |= ((upper >> word) & 0x01010101u) << 4, second |= ((upper >> (4 + word)) & 0x01010101u) << 4;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // scale * code is exact: the fused form rounds where the difference would
        low[4 * word + i] = __fmaf_rn(step.scale, code_value(first, i, 0.0f), -step.min);
        high[4 * word + i] = __fmaf_rn(step.scale, code_value(second, i, 0.0f), -step.min);
      }
    }
  }
};

template <>
struct HalfGroup<TensorType::kQ6K> {
  uint2 codes, upper;
  char2 scales;
  __half d;

  __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group, int half) {
    codes = *reinterpret_cast<const uint2*>(chunk + 16 * group + 8 * half);
    upper = *reinterpret_cast<const uint2*>(chunk + 16 * groups + 8 * group);
    scales = *reinterpret_cast<const char2*>(chunk + 24 * groups + 2 * group);
    d = *reinterpret_cast<const __half*>(chunk + 26 * groups + (group >> 3) * 2);
  }
  __device__ __forceinline__ void dequantise(int, int half, float (&low)[8], float (&high)[8]) const {
    constexpr float kOffset = static_cast<float>(Q6KBlock::kOffset);
    const float step = __half2float(d), low_step = __fmul_rn(step, static_cast<float>(scales.x)),
                high_step = __fmul_rn(step, static_cast<float>(scales.y));
    const std::uint32_t x = upper.x >> (4 * half), y = upper.y >> (4 * half);
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const std::uint32_t bytes = word == 0 ? codes.x : codes.y;
      const std::uint32_t first = (bytes & 0x0F0F0F0Fu) | ((x >> (2 * word)) & 0x03030303u) << 4;
      const std::uint32_t second = ((bytes >> 4) & 0x0F0F0F0Fu) | ((y >> (2 * word)) & 0x03030303u) << 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[4 * word + i] = __fmul_rn(low_step, code_value(first, i, kOffset));
        high[4 * word + i] = __fmul_rn(high_step, code_value(second, i, kOffset));
      }
    }
  }
};

template <>
struct HalfGroup<TensorType::kQ8_0> {
  uint2 first, second;
  __half d;

  __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group, int half) {
    first = *reinterpret_cast<const uint2*>(chunk + 16 * group + 8 * half);
    second = *reinterpret_cast<const uint2*>(chunk + 16 * groups + 16 * group + 8 * half);
    d = *reinterpret_cast<const __half*>(chunk + 32 * groups + 2 * group);
  }
  __device__ __forceinline__ void dequantise(int, int, float (&low)[8], float (&high)[8]) const {
    const float step = __half2float(d);
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const std::uint32_t a = (word == 0 ? first.x : first.y) ^ 0x80808080u;
      const std::uint32_t b = (word == 0 ? second.x : second.y) ^ 0x80808080u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[4 * word + i] = __fmul_rn(step, code_value(a, i, 128.0f));
        high[4 * word + i] = __fmul_rn(step, code_value(b, i, 128.0f));
      }
    }
  }
};

/// The blocks of 32 weights with codes of 4 or 5 bits, under a step and, Q4_1 and Q5_1, an offset.
template <TensorType kType>
requires(kType == TensorType::kQ4_0 || kType == TensorType::kQ4_1 || kType == TensorType::kQ5_0 ||
         kType == TensorType::kQ5_1) struct HalfGroup<kType> {
  static constexpr bool kHasFifth = kType == TensorType::kQ5_0 || kType == TensorType::kQ5_1;
  static constexpr bool kHasOffset = kType == TensorType::kQ4_1 || kType == TensorType::kQ5_1;
  static constexpr float kZero = kType == TensorType::kQ4_0   ? float{Q40Block::kOffset}
                                 : kType == TensorType::kQ5_0 ? float{Q50Block::kOffset}
                                                              : 0.0f;  ///< the code of the value zero
  uint2 codes;
  std::uint32_t fifth = 0;
  __half d, m = {};

  __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group, int half) {
    codes = *reinterpret_cast<const uint2*>(chunk + 16 * group + 8 * half);
    if constexpr (kHasFifth) fifth = *reinterpret_cast<const std::uint32_t*>(chunk + 16 * groups + 4 * group);
    const std::uint8_t* const steps = chunk + (kHasFifth ? 20 : 16) * groups + (kHasOffset ? 4 : 2) * group;
    d = *reinterpret_cast<const __half*>(steps);
    if constexpr (kHasOffset) m = *reinterpret_cast<const __half*>(steps + 2);
  }
  __device__ __forceinline__ void dequantise(int, int half, float (&low)[8], float (&high)[8]) const {
    const float step = __half2float(d), offset = __half2float(m);
    const auto value = [&](std::uint32_t bytes, int i) {
      const float code = code_value(bytes, i, kZero);
      return kHasOffset ? __fmaf_rn(step, code, offset) : __fmul_rn(step, code);
    };
    const std::uint32_t upper = fifth >> (2 * half);
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const std::uint32_t bytes = word == 0 ? codes.x : codes.y;
      std::uint32_t first = bytes & 0x0F0F0F0Fu, second = (bytes >> 4) & 0x0F0F0F0Fu;
      if constexpr (kHasFifth) {
        first |= ((upper >> word) & 0x01010101u) << 4, second |= ((upper >> (4 + word)) & 0x01010101u) << 4;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) low[4 * word + i] = value(first, i), high[4 * word + i] = value(second, i);
    }
  }
};

/// The two formats of the 4-bit table: words of codes, under a step of the group or one of the block and a scale.
template <TensorType kType>
requires(kType == TensorType::kIq4Nl || kType == TensorType::kIq4Xs) struct HalfGroup<kType> {
  uint2 codes;
  uint2 meta;

  __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group, int half) {
    codes = *reinterpret_cast<const uint2*>(chunk + 16 * group + 8 * half);
    if constexpr (kType == TensorType::kIq4Xs) {
      meta = *reinterpret_cast<const uint2*>(chunk + 16 * groups + (group & ~7));
    } else {
      meta.x = *reinterpret_cast<const std::uint16_t*>(chunk + 16 * groups + 2 * group);
    }
  }
  __device__ __forceinline__ void dequantise(int group, int, float (&low)[8], float (&high)[8]) const {
    float step = __low2float(reinterpret_cast<const __half2&>(meta.x));
    if constexpr (kType == TensorType::kIq4Xs) {
      step = __fmul_rn(step, code_value(iq4_xs_scale(meta, group), 0, float{Iq4XsBlock::kScaleOffset}));
    }
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      std::uint32_t first, second;
      look_up_codes(word == 0 ? codes.x : codes.y, first, second);
      first ^= 0x80808080u, second ^= 0x80808080u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[4 * word + i] = __fmul_rn(step, code_value(first, i, 128.0f));
        high[4 * word + i] = __fmul_rn(step, code_value(second, i, 128.0f));
      }
    }
  }
};

template <>
struct HalfGroup<TensorType::kQ3K> {
  uint2 words;
  std::uint32_t rest;
  std::uint8_t scales, upper_scales;
  __half d;

  __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group, int) {
    words = *reinterpret_cast<const uint2*>(chunk + 8 * group);
    rest = *reinterpret_cast<const std::uint32_t*>(chunk + 8 * groups + 4 * group);
    scales = chunk[12 * groups + group];
    upper_scales = chunk[13 * groups + group / 2];
    d = *reinterpret_cast<const __half*>(chunk + 108 * (groups / 8) + 2 * (group / 8));
  }
  __device__ __forceinline__ void dequantise(int group, int half, float (&low)[8], float (&high)[8]) const {
    constexpr auto kZero = static_cast<float>(Q3KBlock::kOffset);
    constexpr auto kZeroScale = static_cast<float>(Q3KBlock::kScaleOffset);
    const float step = __half2float(d);
    const std::uint32_t upper = std::uint32_t{upper_scales} >> (4 * (group & 1));
    const float low_step = __fmul_rn(step, code_value((scales & 15u) | ((upper & 3u) << 4), 0, kZeroScale)),
                high_step = __fmul_rn(step, code_value((scales >> 4) | ((upper & 12u) << 2), 0, kZeroScale));
    const ThreeBitCodes code(words, rest);
#pragma unroll
    for (int word = 0; word < 2; ++word) {  // code[1] and code[5] are 8 times what they stand for, and so is code[7]
      const std::uint32_t first = half == 0 ? (word == 0 ? code.low[0] : code.low[1] >> 3) : code.low[2 + word];
      const std::uint32_t second =
          (half == 0 ? (word == 0 ? code.high[0] : code.high[1] >> 3) : (word == 0 ? code.high[2] : code.high[3] >> 3));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[4 * word + i] = __fmul_rn(low_step, code_value(first, i, kZero));
        high[4 * word + i] = __fmul_rn(high_step, code_value(second, i, kZero));
      }
    }
  }
};

template <>
struct HalfGroup<TensorType::kQ2K> {
  uint2 codes;
  std::uint16_t scales;
  __half2 steps;

  __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group, int) {
    codes = *reinterpret_cast<const uint2*>(chunk + 8 * group);
    scales = *reinterpret_cast<const std::uint16_t*>(chunk + 8 * groups + 2 * group);
    steps = *reinterpret_cast<const __half2*>(chunk + 10 * groups + 4 * (group / 8));
  }
  __device__ __forceinline__ void dequantise(int, int half, float (&low)[8], float (&high)[8]) const {
    const std::uint32_t scale = scales & 0x0F0Fu, minimum = (std::uint32_t{scales} >> 4) & 0x0F0Fu;
    const float d = __low2float(steps), dmin = __high2float(steps);
    const float low_step = __fmul_rn(d, code_value(scale, 0, 0.0f)),
                high_step = __fmul_rn(d, code_value(scale, 1, 0.0f));
    const float low_min = __fmul_rn(dmin, code_value(minimum, 0, 0.0f)),
                high_min = __fmul_rn(dmin, code_value(minimum, 1, 0.0f));
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const std::uint32_t first = (codes.x >> (4 * half + 2 * word)) & 0x03030303u;
      const std::uint32_t second = (codes.y >> (4 * half + 2 * word)) & 0x03030303u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[4 * word + i] = __fmaf_rn(low_step, code_value(first, i, 0.0f), -low_min);
        high[4 * word + i] = __fmaf_rn(high_step, code_value(second, i, 0.0f), -high_min);
      }
    }
  }
};

}  // namespace gemma4::cuda::detail

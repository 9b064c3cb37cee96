// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/quantized_linear/int8_dot.cuh"
#include "cuda/weights/codes.cuh"
#include "gemma4/gguf/block_formats.hpp"
#include "gemma4/gguf/gguf.hpp"

/// Products on tensor cores, as in int8_dot.cuh, for the formats that the kernel of the K-quants does not know: the
/// floats of dot_every.cuh.
namespace gemma4::cuda::detail {

/// f16 steps and offsets of 8 groups, of which the first lies at a multiple of 4 bytes.
struct Int8StepsAndOffsets {
  __half2 pair[8];

  __device__ __forceinline__ explicit Int8StepsAndOffsets(const std::uint8_t* from) {
#pragma unroll
    for (int j = 0; j < 8; ++j) pair[j] = reinterpret_cast<const __half2*>(from)[j];
  }
  /// @param factor of the step, a power of two
  [[nodiscard]] __device__ __forceinline__ float term(int j, float factor, float products, const Int8Tail& tail) const {
    const float sum = __fmaf_rn(__fmul_rn(__low2float(pair[j]) * factor, tail.scale), products, 0.0f);
    return __fmaf_rn(__high2float(pair[j]), tail.scaled_sum, sum);
  }
};

template <>
struct Int8Format<TensorType::kQ4_0> : Int8Traits {
  using Sum = Int8Sum<0>;
  struct Row : Int8SteppedRow<16, 16> {
    using Int8SteppedRow<16, 16>::Int8SteppedRow;
    /// 16 (q - 8)
    __device__ __forceinline__ void fragments(int half, std::uint32_t (&low)[4], std::uint32_t (&high)[4]) const {
      load_words(at, 0, half, high);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[i] = ((high[i] << 4) & 0xF0F0F0F0u) ^ 0x80808080u, high[i] = (high[i] & 0xF0F0F0F0u) ^ 0x80808080u;
      }
    }
  };
};

template <>
struct Int8Format<TensorType::kQ4_1> : Int8Traits {
  static constexpr bool kUnsigned = true, kHasSums = true;
  using Sum = Int8Sum<0>;
  struct Row {
    Int8Place at;
    Int8StepsAndOffsets steps;
    __device__ __forceinline__ explicit Row(const Int8Place& place)
        : at(place), steps(at.chunk + 16 * at.groups + 4 * at.first) {}
    __device__ __forceinline__ void fragments(int half, std::uint32_t (&low)[4], std::uint32_t (&high)[4]) const {
      load_words(at, 0, half, high);
#pragma unroll
      for (int i = 0; i < 4; ++i) low[i] = (high[i] << 4) & 0xF0F0F0F0u, high[i] &= 0xF0F0F0F0u;
    }
    [[nodiscard]] __device__ __forceinline__ float term(int j, const Int8Sums& sums, const Int8Tail& tail) const {
      return steps.term(j, 0x1p-4f, Sum::value(sums.low), tail);
    }
  };
};

template <>
struct Int8Format<TensorType::kQ5_0> : Int8Traits {
  using Sum = Int8Sum<0>;
  struct Row {
    Int8Place at;
    __half2 steps[4];  ///< of two groups each
    __device__ __forceinline__ explicit Row(const Int8Place& place) : at(place) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        steps[i] = reinterpret_cast<const __half2*>(at.chunk + 20 * at.groups + 2 * at.first)[i];
      }
    }
    /// q - 16: four bits and, where the fifth is not set, ones above them.
    __device__ __forceinline__ void fragments(int half, std::uint32_t (&low)[4], std::uint32_t (&high)[4]) const {
      five_bit_fragments(at, half, low, high);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // adds 0x70 to each byte, without a carry, and turns its top bit
        low[i] = (low[i] + 0x70707070u) ^ 0x80808080u, high[i] = (high[i] + 0x70707070u) ^ 0x80808080u;
      }
    }
    [[nodiscard]] __device__ __forceinline__ float term(int j, const Int8Sums& sums, const Int8Tail& tail) const {
      const float step = j % 2 == 0 ? __low2float(steps[j / 2]) : __high2float(steps[j / 2]);
      return __fmaf_rn(__fmul_rn(step, tail.scale), Sum::value(sums.low), 0.0f);
    }
  };
};

template <>
struct Int8Format<TensorType::kQ5_1> : Int8Traits {
  static constexpr bool kHasSums = true;
  using Sum = Int8Sum<0>;
  struct Row {
    Int8Place at;
    Int8StepsAndOffsets steps;
    __device__ __forceinline__ explicit Row(const Int8Place& place)
        : at(place), steps(at.chunk + 20 * at.groups + 4 * at.first) {}
    __device__ __forceinline__ void fragments(int half, std::uint32_t (&low)[4], std::uint32_t (&high)[4]) const {
      five_bit_fragments(at, half, low, high);
    }
    [[nodiscard]] __device__ __forceinline__ float term(int j, const Int8Sums& sums, const Int8Tail& tail) const {
      return steps.term(j, 1.0f, Sum::value(sums.low), tail);
    }
  };
};

/// The values of table codes.
__device__ __forceinline__ void table_fragments(const Int8Place& at, int half, std::uint32_t (&low)[4],
                                                std::uint32_t (&high)[4]) {
  std::uint32_t word[4];
  load_words(at, 0, half, word);
#pragma unroll
  for (int i = 0; i < 4; ++i) look_up_codes(word[i], low[i], high[i]);
}

template <>
struct Int8Format<TensorType::kIq4Nl> : Int8Traits {
  using Sum = Int8Sum<0>;
  struct Row : Int8SteppedRow<16> {
    using Int8SteppedRow<16>::Int8SteppedRow;
    __device__ __forceinline__ void fragments(int half, std::uint32_t (&low)[4], std::uint32_t (&high)[4]) const {
      table_fragments(at, half, low, high);
    }
  };
};

template <>
struct Int8Format<TensorType::kIq4Xs> : Int8Traits {
  using Sum = Int8Sum<0>;
  struct Row {
    Int8Place at;
    uint2 meta;
    __device__ __forceinline__ explicit Row(const Int8Place& place)
        : at(place), meta(*reinterpret_cast<const uint2*>(at.chunk + 16 * at.groups + at.first)) {}
    __device__ __forceinline__ void fragments(int half, std::uint32_t (&low)[4], std::uint32_t (&high)[4]) const {
      table_fragments(at, half, low, high);
    }
    [[nodiscard]] __device__ __forceinline__ float term(int j, const Int8Sums& sums, const Int8Tail& tail) const {
      const std::uint32_t bits = iq4_xs_scale(meta, j) | 0x4B000000u;  // 2^23 and an integer below it
      const float s = __fsub_rn(__uint_as_float(bits), 8388608.0f + float{Iq4XsBlock::kScaleOffset});
      const float scale = __fmul_rn(__low2float(reinterpret_cast<const __half2&>(meta.x)), s);
      return __fmaf_rn(__fmul_rn(scale, tail.scale), Sum::value(sums.low), 0.0f);
    }
  };
};

template <>
struct Int8Format<TensorType::kQ3K> : Int8Traits {
  static constexpr bool kSplit = true;
  using Sum = Int8Sum<2>;  ///< 8 times sums of codes from ones of 32 times the codes
  struct Row {
    Int8Place at;
    std::uint32_t low_scale[2], high_scale[2];  ///< of four groups each
    float d8;
    __device__ __forceinline__ explicit Row(const Int8Place& place) : at(place) {
      const uint2 lower = *reinterpret_cast<const uint2*>(at.chunk + 12 * at.groups + at.first);
      const std::uint32_t upper = *reinterpret_cast<const std::uint32_t*>(at.chunk + 13 * at.groups + at.first / 2);
      const std::uint32_t bytes[2] = {lower.x, lower.y};
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // a nibble a group, two of them in a byte
        const std::uint32_t pairs = permute_bytes(upper, 0, i == 0 ? 0x1100u : 0x3322u);
        low_scale[i] = (bytes[i] & 0x0F0F0F0Fu) | ((pairs << 4) & 0x00300030u) | (pairs & 0x30003000u);
        high_scale[i] = ((bytes[i] >> 4) & 0x0F0F0F0Fu) | ((pairs << 2) & 0x00300030u) | ((pairs >> 2) & 0x30003000u);
      }
      d8 = 0x1p-3f *
           __half2float(*reinterpret_cast<const __half*>(at.chunk + 108 * (at.groups / 8) + 2 * (at.first / 8)));
    }
    /// 32 (q - 4): the code in bits 5-7, of which bit 7 is the other way. Which bits a lane takes depends on its word
    /// of the group: 0-2 or 3-5 of the first, 6-7 of the first and one of the third, or three of the third.
    __device__ __forceinline__ void fragments(int half, std::uint32_t (&low)[4], std::uint32_t (&high)[4]) const {
      const int t = lane_word();
      const bool is_third = t == 3;
      const int low_turn = t == 1 ? 2 : t == 2 ? 31 : 5, high_turn = t == 0 ? 5 : t == 2 ? 31 : 2;
      const std::uint32_t mask = t == 2 ? 0x60606060u : 0xE0E0E0E0u, top = t == 2 ? 0x80808080u : 0u;
      std::uint32_t third[4];
      load_word_pairs(at.chunk + 8 * at.first, half, low, high);
      load_single_words(at.chunk + 8 * at.groups + 4 * at.first, half, third);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t x = is_third ? third[i] : low[i], y = is_third ? third[i] : high[i];
        low[i] = (__funnelshift_l(x, x, low_turn) & mask) ^ ((third[i] << 1) & top) ^ 0x80808080u;
        high[i] = (__funnelshift_l(y, y, high_turn) & mask) ^ (third[i] & top) ^ 0x80808080u;
      }
    }
    [[nodiscard]] __device__ __forceinline__ float term(int j, const Int8Sums& sums, const Int8Tail& tail) const {
      constexpr float kBelow = 32768.0f + float{Q3KBlock::kScaleOffset};
      const float s_low = __fsub_rn(byte_above(low_scale[j / 4], j % 4), kBelow);
      const float s_high = __fsub_rn(byte_above(high_scale[j / 4], j % 4), kBelow);
      // All integers below 2^24.
      const float products = __fmaf_rn(s_high, Sum::value(sums.high), __fmul_rn(s_low, Sum::value(sums.low)));
      return __fmaf_rn(__fmul_rn(d8, tail.scale), products, 0.0f);
    }
  };
};

template <>
struct Int8Format<TensorType::kQ2K> : Int8Traits {
  static constexpr bool kSplit = true, kHasMinima = true;
  using Sum = Int8Sum<0>;
  struct Row {
    Int8Place at;
    std::uint32_t scale[4], minimum[4];  ///< of two groups each, lower and upper half
    float d4, minus_min;
    __device__ __forceinline__ explicit Row(const Int8Place& place) : at(place) {
      const uint4 pairs = *reinterpret_cast<const uint4*>(at.chunk + 8 * at.groups + 2 * at.first);
      const std::uint32_t word[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) scale[i] = word[i] & 0x0F0F0F0Fu, minimum[i] = (word[i] >> 4) & 0x0F0F0F0Fu;
      const float2 steps =
          __half22float2(*reinterpret_cast<const __half2*>(at.chunk + 10 * at.groups + 4 * (at.first / 8)));
      d4 = 0x1p-2f * steps.x, minus_min = -steps.y;
    }
    /// 4 times the codes
    __device__ __forceinline__ void fragments(int half, std::uint32_t (&low)[4], std::uint32_t (&high)[4]) const {
      const int turn = (2 - 2 * lane_word()) & 31;
      load_word_pairs(at.chunk + 8 * at.first, half, low, high);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[i] = __funnelshift_l(low[i], low[i], turn) & 0x0C0C0C0Cu;
        high[i] = __funnelshift_l(high[i], high[i], turn) & 0x0C0C0C0Cu;
      }
    }
    /// Every code the minimum of its half.
    __device__ __forceinline__ void minima(int j, std::uint32_t& low, std::uint32_t& high) const {
      low = permute_bytes(minimum[j / 2], 0, j % 2 == 0 ? 0x0000u : 0x2222u);
      high = permute_bytes(minimum[j / 2], 0, j % 2 == 0 ? 0x1111u : 0x3333u);
    }
    [[nodiscard]] __device__ __forceinline__ float term(int j, const Int8Sums& sums, const Int8Tail& tail) const {
      const float s_low = __fsub_rn(byte_above(scale[j / 2], j % 2 * 2), 32768.0f);
      const float s_high = __fsub_rn(byte_above(scale[j / 2], j % 2 * 2 + 1), 32768.0f);
      const float products = __fmaf_rn(s_high, Sum::value(sums.high), __fmul_rn(s_low, Sum::value(sums.low)));
      const float sum = __fmaf_rn(__fmul_rn(d4, tail.scale), products, 0.0f);
      return __fmaf_rn(minus_min, __fmul_rn(tail.scale, Int8Sum<0>::value(sums.minima)), sum);
    }
  };
};

}  // namespace gemma4::cuda::detail

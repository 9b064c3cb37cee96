// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/opaque.cuh"
#include "cuda/weights/activation_blocks.cuh"
#include "cuda/weights/layout.cuh"
#include "gemma4/platform.hpp"

/// Products on tensor cores: how a format's weights become operand a of an mma of 8-bit integers, and its exact integer
/// sums the float that dot.cuh has for the same group and token, bit for bit.
///
/// A step is a super-block: 8 groups of 32 weights of 8 rows. Lane 4g + t gives bytes 4t to 4t + 3 and those 16 further
/// on of row g (`low`, `high`: a word of each group), and scales sums of row g. Codes lie in the file's order so that
/// one ldmatrix brings a word of four groups to every lane.
///
/// Three identities keep the bits of dot.cuh at fewer instructions. (1) A factor of a power of two moves from one
/// operand of a rounded product to the other. (2) Codes with an offset are signed bytes at the top of their byte, one
/// exclusive or away: the sums are then a power of two times those of dot.cuh, which Int8Sum takes out. (3) d s of a
/// scale s of 6 or 8 bits is exact, so that fma(d, 2^15 + s, -2^15 d) is it.
/// (Where a step d is not finite, dot.cuh may say infinity and these NaN; and scaled sums are infinite where a block
/// has values above 2^122, which products of Q4_K and Q5_K by dot.cuh are not yet.)
namespace gemma4::cuda::detail {

/// Integer sums as floats, divided by 2^kShift: they start at kBits, the bits of a float whose last place is 2^-kShift.
/// |sum| < 2^22.
template <int kShift>
struct Int8Sum {
  static constexpr float kFloat = kMagicFloat / static_cast<float>(1 << kShift);
  static constexpr int kBits = bit_cast<int>(kFloat);
  [[nodiscard]] static __device__ __forceinline__ float value(int bits) {
    return __fsub_rn(__int_as_float(bits), kFloat);
  }
};

/// Where a lane finds a step.
struct Int8Place {
  const std::uint8_t* chunk;  ///< of the lane's row
  std::uint32_t matrices;     ///< shared address of 16 bytes of the step's codes: row l % 8, group {0, 4, 1, 5}[l / 8]
  int groups;                 ///< of the chunk
  int first;                  ///< group of the step in it, a multiple of 8
};

/// The group of the step that words of `half` (0, 1) have at index i.
[[nodiscard]] GEMMA4_HD constexpr int int8_group(int half, int i) {
  return 2 * half + i / 2 + i % 2 * 4;
}

/// Words of four groups of a plane that has 16 bytes a group.
__device__ __forceinline__ void load_words(const Int8Place& at, int plane, int half, std::uint32_t (&word)[4]) {
  load_matrix_x4(word, at.matrices + plane + 32 * half);
}

/// The lane's word of a group. Opaque: what a format makes of it would otherwise wait in registers for all of a block's
/// stages.
[[nodiscard]] __device__ __forceinline__ int lane_word() {
  return static_cast<int>(opaque(std::uint32_t{threadIdx.x & 3}));
}

/// 2^15 + byte j of a word.
[[nodiscard]] __device__ __forceinline__ float byte_above(std::uint32_t word, int j) {
  return __uint_as_float(permute_bytes(word, 0x47000000u, 0x7404u | (static_cast<unsigned>(j) << 4)));
}

/// step * (byte - kZero), exactly, for a step of 11 bits.
template <int kZero>
struct ByteSteps {
  float step, below;

  ByteSteps() = default;
  __device__ __forceinline__ explicit ByteSteps(float value)
      : step(value), below(value * -(32768.0f + static_cast<float>(kZero))) {}
  [[nodiscard]] __device__ __forceinline__ float of(std::uint32_t word, int j) const {
    return __fmaf_rn(step, byte_above(word, j), below);
  }
};

/// Sums of a group with one token, as the mma leaves them.
struct Int8Sums {
  int low, high;  ///< `low` alone where the format is not split
  int minima;     ///< of the format's minima, where it has some
};
/// Scale of the token's block, and that times the sum of its codes.
struct Int8Tail {
  float scale, scaled_sum;
};

/// What a format is unless it says otherwise.
struct Int8Traits {
  static constexpr bool kSplit = false;     ///< codes 0-15 and 16-31 have sums of their own
  static constexpr bool kUnsigned = false;  ///< bytes of a
  static constexpr bool kHasSums = false;   ///< Int8Tail::scaled_sum takes part
  static constexpr bool kHasMinima = false;
};

/// Row: a step of the lane's row.
///   fragments(half, low, high)  words of int8_group(half, 0 to 3)
///   term(j, sums, tail)         of group j
template <TensorType kType>
struct Int8Format;

/// Scales and minima of 8 groups of Q4_K and Q5_K, out of their meta record.
struct Int8Meta {
  std::uint32_t scale[2], minimum[2];  ///< bytes of four groups each
  ByteSteps<0> steps, minus_minima;

  /// @param factor of the scales, a power of two
  __device__ __forceinline__ Int8Meta(const std::uint8_t* record, float factor) {
    const uint4 word = *reinterpret_cast<const uint4*>(record);
    const float2 d = __half22float2(reinterpret_cast<const __half2&>(word.x));
    steps = ByteSteps<0>(d.x * factor), minus_minima = ByteSteps<0>(-d.y);
    const std::uint32_t bytes[2] = {word.y, word.z};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Nibbles 4i to 4i + 3 of the last word, two in a byte, are bits 2-5 of the minima.
      const std::uint32_t pairs = permute_bytes(word.w, 0, i == 0 ? 0x1100u : 0x3322u);
      const std::uint32_t upper = ((pairs << 2) & 0x003C003Cu) | ((pairs >> 2) & 0x3C003C00u);
      scale[i] = bytes[i] & 0x3F3F3F3Fu;
      minimum[i] = ((bytes[i] >> 6) & 0x03030303u) | upper;
    }
  }
  /// sum + (scale * block scale) products - minimum * scaled sum
  [[nodiscard]] __device__ __forceinline__ float term(int j, float products, const Int8Tail& tail) const {
    const float scaled = __fmul_rn(steps.of(scale[j / 4], j % 4), tail.scale);
    const float sum = __fmaf_rn(scaled, products, 0.0f);
    return __fmaf_rn(minus_minima.of(minimum[j / 4], j % 4), tail.scaled_sum, sum);
  }
};

template <>
struct Int8Format<TensorType::kQ4K> : Int8Traits {
  static constexpr bool kUnsigned = true, kHasSums = true;
  using Sum = Int8Sum<0>;
  struct Row {
    Int8Place at;
    Int8Meta meta;
    __device__ __forceinline__ explicit Row(const Int8Place& place)
        : at(place), meta(at.chunk + 16 * at.groups + 2 * at.first, 0x1p-4f) {}
    /// 16 times the codes: sums are at most 32 * 240 * 127 < 2^22.
    __device__ __forceinline__ void fragments(int half, std::uint32_t (&low)[4], std::uint32_t (&high)[4]) const {
      load_words(at, 0, half, high);
#pragma unroll
      for (int i = 0; i < 4; ++i) low[i] = (high[i] << 4) & 0xF0F0F0F0u, high[i] &= 0xF0F0F0F0u;
    }
    [[nodiscard]] __device__ __forceinline__ float term(int j, const Int8Sums& sums, const Int8Tail& tail) const {
      return meta.term(j, Sum::value(sums.low), tail);
    }
  };
};

/// Words of four groups of a half, from a plane that has one a group; `from` is that of group 0.
__device__ __forceinline__ void load_single_words(const std::uint8_t* from, int half, std::uint32_t (&word)[4]) {
  const uint2 a = *reinterpret_cast<const uint2*>(from + 8 * half);
  const uint2 b = *reinterpret_cast<const uint2*>(from + 8 * half + 16);
  word[0] = a.x, word[1] = b.x, word[2] = a.y, word[3] = b.y;
}

/// The same from a plane with two words a group.
__device__ __forceinline__ void load_word_pairs(const std::uint8_t* from, int half, std::uint32_t (&first)[4],
                                                std::uint32_t (&second)[4]) {
  const uint4 a = *reinterpret_cast<const uint4*>(from + 16 * half);
  const uint4 b = *reinterpret_cast<const uint4*>(from + 16 * half + 32);
  first[0] = a.x, first[1] = b.x, first[2] = a.z, first[3] = b.z;
  second[0] = a.y, second[1] = b.y, second[2] = a.w, second[3] = b.w;
}

/// Codes of 5 bits of the groups of a half: four as they lie in memory, and the plane of fifth bits.
__device__ __forceinline__ void five_bit_fragments(const Int8Place& at, int half, std::uint32_t (&low)[4],
                                                   std::uint32_t (&high)[4]) {
  std::uint32_t fifth[4];
  load_words(at, 0, half, high);
  load_single_words(at.chunk + 16 * at.groups + 4 * at.first, half, fifth);
  const int t = lane_word();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t codes = high[i];
    low[i] = (codes & 0x0F0F0F0Fu) | ((fifth[i] << (4 - t)) & 0x10101010u);
    high[i] = ((codes >> 4) & 0x0F0F0F0Fu) | ((fifth[i] >> t) & 0x10101010u);
  }
}

template <>
struct Int8Format<TensorType::kQ5K> : Int8Traits {
  static constexpr bool kHasSums = true;
  using Sum = Int8Sum<0>;
  struct Row {
    Int8Place at;
    Int8Meta meta;
    __device__ __forceinline__ explicit Row(const Int8Place& place)
        : at(place), meta(at.chunk + 20 * at.groups + 2 * at.first, 1.0f) {}
    __device__ __forceinline__ void fragments(int half, std::uint32_t (&low)[4], std::uint32_t (&high)[4]) const {
      five_bit_fragments(at, half, low, high);
    }
    [[nodiscard]] __device__ __forceinline__ float term(int j, const Int8Sums& sums, const Int8Tail& tail) const {
      return meta.term(j, Sum::value(sums.low), tail);
    }
  };
};

template <>
struct Int8Format<TensorType::kQ6K> : Int8Traits {
  static constexpr bool kSplit = true;
  using Sum = Int8Sum<2>;
  struct Row {
    Int8Place at;
    std::uint32_t scale[4];  ///< of two groups each, lower and upper half, plus 128
    ByteSteps<128> steps;
    __device__ __forceinline__ explicit Row(const Int8Place& place) : at(place) {
      const uint4 word = *reinterpret_cast<const uint4*>(at.chunk + 24 * at.groups + 2 * at.first);
      scale[0] = word.x ^ 0x80808080u, scale[1] = word.y ^ 0x80808080u;
      scale[2] = word.z ^ 0x80808080u, scale[3] = word.w ^ 0x80808080u;
      steps =
          ByteSteps<128>(__half2float(*reinterpret_cast<const __half*>(at.chunk + 26 * at.groups + at.first / 8 * 2)));
    }
    /// 4 (q - 32): the code in bits 2-7, of which bit 7 is the other way.
    __device__ __forceinline__ void fragments(int half, std::uint32_t (&low)[4], std::uint32_t (&high)[4]) const {
      std::uint32_t low_upper[4], high_upper[4];
      load_words(at, 0, half, high);
      load_word_pairs(at.chunk + 16 * at.groups + 8 * at.first, half, low_upper, high_upper);
      const int shift = 6 - 2 * lane_word();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t codes = high[i];
        low[i] = (((codes << 2) & 0x3C3C3C3Cu) | 0x80808080u) ^ ((low_upper[i] << shift) & 0xC0C0C0C0u);
        high[i] = (((codes >> 2) & 0x3C3C3C3Cu) | 0x80808080u) ^ ((high_upper[i] << shift) & 0xC0C0C0C0u);
      }
    }
    [[nodiscard]] __device__ __forceinline__ float term(int j, const Int8Sums& sums, const Int8Tail& tail) const {
      const float low_scale = steps.of(scale[j / 2], j % 2 * 2), high_scale = steps.of(scale[j / 2], j % 2 * 2 + 1);
      const float products = __fmaf_rn(high_scale, Sum::value(sums.high), __fmul_rn(low_scale, Sum::value(sums.low)));
      return __fmaf_rn(tail.scale, products, 0.0f);
    }
  };
};

/// f16 steps of 8 groups, at a multiple of 16 bytes.
struct alignas(16) Int8Steps {
  __half2 pair[4];

  [[nodiscard]] static __device__ __forceinline__ Int8Steps at(const std::uint8_t* from) {
    return *reinterpret_cast<const Int8Steps*>(from);
  }
  [[nodiscard]] __device__ __forceinline__ float of(int j) const {
    return j % 2 == 0 ? __low2float(pair[j / 2]) : __high2float(pair[j / 2]);
  }
};

/// A row of a format with one step a group, behind the codes, and nothing else.
/// @tparam kCodeBytes of a group
/// @tparam kTimes     codes are so many times their value
template <int kCodeBytes, int kTimes = 1>
struct Int8SteppedRow {
  Int8Place at;
  Int8Steps steps;
  __device__ __forceinline__ explicit Int8SteppedRow(const Int8Place& place)
      : at(place), steps(Int8Steps::at(at.chunk + kCodeBytes * at.groups + 2 * at.first)) {}
  [[nodiscard]] __device__ __forceinline__ float term(int j, const Int8Sums& sums, const Int8Tail& tail) const {
    return __fmaf_rn(__fmul_rn(steps.of(j) * (1.0f / kTimes), tail.scale), Int8Sum<0>::value(sums.low), 0.0f);
  }
};

template <>
struct Int8Format<TensorType::kQ8_0> : Int8Traits {
  using Sum = Int8Sum<0>;
  struct Row : Int8SteppedRow<32> {
    using Int8SteppedRow<32>::Int8SteppedRow;
    __device__ __forceinline__ void fragments(int half, std::uint32_t (&low)[4], std::uint32_t (&high)[4]) const {
      load_words(at, 0, half, low);
      load_words(at, 16 * at.groups, half, high);
    }
  };
};

}  // namespace gemma4::cuda::detail

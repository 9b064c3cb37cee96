// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

/// Twin of cuda/ptx/mma.cuh. Products of 16-bit values are summed in double and rounded to float once, then added to c.
namespace gemma4::cuda {

namespace detail {

/// The operands of a lane; a product of half the depth has no a[2], a[3] and b[1].
template <class TSum>
struct MmaIn {
  TSum c[4];
  std::uint32_t a[4], b[2];
};
template <class TSum>
struct MmaOut {
  TSum c[4];
};

/// The operands of a warp as matrices. kEach values are in a register; value(word, i) of a and of b is number i of
/// them.
/// @param kDepth 8 values of a row of `a` a register of a lane: 8 * kEach, or half of it
template <int kEach, int kDepth, class TValue>
struct MmaOperands {
  TValue a[16][kDepth], b[kDepth][8];

  template <class TSum, class TValueA, class TValueB>
  MmaOperands(const MmaIn<TSum>* in, const TValueA& value_a, const TValueB& value_b) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int part = 0; part < kDepth / (4 * kEach); ++part) {
        for (int i = 0; i < kEach; ++i) {
          const int k = 4 * kEach * part + kEach * t + i;
          a[g][k] = value_a(in[lane].a[2 * part], i);
          a[g + 8][k] = value_a(in[lane].a[2 * part + 1], i);
          b[k][g] = value_b(in[lane].b[part], i);
        }
      }
    }
  }

  /// a b, each sum from first to last.
  template <class TSum>
  void multiply(TSum (&product)[16][8]) const {
    for (int row = 0; row < 16; ++row) {
      std::fill_n(product[row], 8, TSum{0});
      for (int k = 0; k < kDepth; ++k) {
        for (int col = 0; col < 8; ++col)
          product[row][col] += static_cast<TSum>(a[row][k]) * static_cast<TSum>(b[k][col]);
      }
    }
  }
};

/// Element i of the four of c that a lane holds.
template <class T>
[[nodiscard]] inline T of_lane(const T (&product)[16][8], int lane, int i) {
  return product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

template <float (*kValue)(std::uint32_t)>
inline void multiply_16_bits(const MmaIn<float>* in, double (&product)[16][8]) {
  const auto value = [](std::uint32_t word, int i) { return kValue(word >> 16 * i & 0xFFFF); };
  MmaOperands<2, 16, float>(in, value, value).multiply(product);
}

template <float (*kValue)(std::uint32_t)>
inline void mma_16_bits(const char* name, float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                        std::uint32_t b1) {
  const MmaIn<float> in{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto multiply = [](const MmaIn<float>* in, MmaOut<float>* out) {
    double product[16][8];
    multiply_16_bits<kValue>(in, product);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) out[lane].c[i] = in[lane].c[i] + static_cast<float>(of_lane(product, lane, i));
    }
  };
  const auto sums = emulator::warp_operation<MmaOut<float>>(name, in, multiply);
  std::copy_n(sums.c, 4, c);
}

/// @tparam TA std::int8_t or std::uint8_t, the values of a
template <class TA, int kDepth>
inline void mma_8_bits(const char* name, int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  const MmaIn<int> in{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto multiply = [](const MmaIn<int>* in, MmaOut<int>* out) {
    const auto value_a = [](std::uint32_t word, int i) { return static_cast<TA>(word >> 8 * i); };
    const auto value_b = [](std::uint32_t word, int i) { return static_cast<std::int8_t>(word >> 8 * i); };
    int product[16][8];
    MmaOperands<4, kDepth, int>(in, value_a, value_b).multiply(product);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {  // around where the sum leaves 32 bits, as the device does
        out[lane].c[i] =
            static_cast<int>(static_cast<unsigned>(in[lane].c[i]) + static_cast<unsigned>(of_lane(product, lane, i)));
      }
    }
  };
  const auto sums = emulator::warp_operation<MmaOut<int>>(name, in, multiply);
  std::copy_n(sums.c, 4, c);
}

}  // namespace detail

__device__ __forceinline__ void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1) {
  detail::mma_16_bits<emulator::bf16_value>("mma_bf16", c, a, b0, b1);
}

__device__ __forceinline__ void mma_f16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                        std::uint32_t b1) {
  detail::mma_16_bits<emulator::half_value>("mma_f16", c, a, b0, b1);
}

__device__ __forceinline__ void mma_f16_to_f16(std::uint32_t (&c)[2], const std::uint32_t (&a)[4], std::uint32_t b0,
                                               std::uint32_t b1) {
  struct Out {
    std::uint32_t c[2];
  };
  const detail::MmaIn<float> in{{}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto multiply = [](const detail::MmaIn<float>* in, Out* out) {
    double product[16][8];
    detail::multiply_16_bits<emulator::half_value>(in, product);
    const auto rounded = [&](int lane, int i) {
      return emulator::half_bits(static_cast<float>(detail::of_lane(product, lane, i)));
    };
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 2; ++i) out[lane].c[i] = rounded(lane, 2 * i) | rounded(lane, 2 * i + 1) << 16;
    }
  };
  const auto pairs = emulator::warp_operation<Out>("mma_f16_to_f16", in, multiply);
  std::copy_n(pairs.c, 2, c);
}

__device__ __forceinline__ void mma_s8(int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  detail::mma_8_bits<std::int8_t, 32>("mma_s8", c, a, b0, b1);
}

__device__ __forceinline__ void mma_u8_s8(int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                          std::uint32_t b1) {
  detail::mma_8_bits<std::uint8_t, 32>("mma_u8_s8", c, a, b0, b1);
}

__device__ __forceinline__ void mma_s8_half(int (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b) {
  detail::mma_8_bits<std::int8_t, 16>("mma_s8_half", c, {a0, a1, 0u, 0u}, b, 0u);
}

}  // namespace gemma4::cuda

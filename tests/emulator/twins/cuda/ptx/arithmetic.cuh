// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

/// Twin of cuda/ptx/arithmetic.cuh. What is approximate there is exact here, subnormal numbers are 0 as there.
namespace gemma4::cuda {

namespace detail {

[[nodiscard]] inline float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

/// c plus the products of kCount parts of a by as many of b.
template <class TA, class TB, int kCount>
[[nodiscard]] inline int dot(std::uint32_t a, std::uint32_t b, int c) {
  for (int i = 0; i < kCount; ++i) {
    c += static_cast<TA>(a >> 8 * static_cast<int>(sizeof(TA)) * i) *
         static_cast<TB>(b >> 8 * static_cast<int>(sizeof(TB)) * i);
  }
  return c;
}

}  // namespace detail

[[nodiscard]] __device__ __forceinline__ float exp2_approx(float x) {
  return detail::flushed(std::exp2(detail::flushed(x)));
}

[[nodiscard]] __device__ __forceinline__ float reciprocal_approx(float x) {
  return detail::flushed(1.0f / detail::flushed(x));
}

[[nodiscard]] __device__ __forceinline__ float max_or_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<float>::quiet_NaN() : std::fmax(a, b);
}

[[nodiscard]] __device__ __forceinline__ int dot4(std::uint32_t a, std::uint32_t b, int c) {
  return detail::dot<std::int8_t, std::int8_t, 4>(a, b, c);
}

[[nodiscard]] __device__ __forceinline__ int dot4_unsigned(std::uint32_t a, std::uint32_t b, int c) {
  return detail::dot<std::uint8_t, std::int8_t, 4>(a, b, c);
}

[[nodiscard]] __device__ __forceinline__ int dot2(std::uint32_t a, std::uint32_t b, int c) {
  return detail::dot<std::int16_t, std::uint8_t, 2>(a, b, c);
}

[[nodiscard]] __device__ __forceinline__ std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b,
                                                                     std::uint32_t selector) {
  const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t chosen = selector >> 4 * i & 15;
    std::uint32_t byte = static_cast<std::uint32_t>(bytes >> 8 * (chosen & 7)) & 255;
    if (chosen >= 8) byte = byte >= 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Conversions in one instruction: two floats rounded to nearest even and packed, and back. Source: the PTX ISA, "cvt".
namespace gemma4::cuda {

/// To bf16, `low` in the low half.
[[nodiscard]] __device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

/// To fp16, `low` in the low half.
[[nodiscard]] __device__ __forceinline__ std::uint32_t pack_f16(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

/// An fp16 number of these bits, exactly; what gemma4/float16.hpp says in a dozen operations.
[[nodiscard]] __device__ __forceinline__ float widen_f16(std::uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

}  // namespace gemma4::cuda

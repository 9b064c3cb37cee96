// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Two floats rounded to nearest even and packed, in one instruction. Source: the PTX ISA, "cvt".
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

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Arithmetic that C++ does not spell. Source: the PTX ISA, "ex2", "rcp", "max", "dp4a", "dp2a", "prmt".
namespace gemma4::cuda {

/// 2^x, error below 2 ulp; -inf gives 0.
[[nodiscard]] __device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x to 1 ulp, where neither is subnormal.
[[nodiscard]] __device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The larger of two, NaN where either is.
[[nodiscard]] __device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

/// Four times a x b of bytes, both signed, plus c.
[[nodiscard]] __device__ __forceinline__ int dot4(std::uint32_t a, std::uint32_t b, int c) {
  int d;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

/// The same with the bytes of a unsigned.
[[nodiscard]] __device__ __forceinline__ int dot4_unsigned(std::uint32_t a, std::uint32_t b, int c) {
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

/// Both 16-bit halves of a times bytes 0 and 1 of b, the halves signed and the bytes not, plus c.
[[nodiscard]] __device__ __forceinline__ int dot2(std::uint32_t a, std::uint32_t b, int c) {
  int d;
  asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

/// Byte permutation of b:a; unlike __byte_perm it does not mask the selector again, whose bits 3, 7, 11 and 15
/// replicate a sign.
[[nodiscard]] __device__ __forceinline__ std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b,
                                                                     std::uint32_t selector) {
  std::uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

}  // namespace gemma4::cuda

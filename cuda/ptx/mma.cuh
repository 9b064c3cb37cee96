// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Warp-level products of matrices of 16-bit values with float32 accumulation (but for the last), from sm_80 on:
///   c += a b,   a [16, 16], b [16, 8], c [16, 8].
/// Lane l holds, with g = l / 4 and t = l % 4:
///   a: rows g and g + 8, columns 2t, 2t + 1 and those + 8: a[0] (g, 2t), a[1] (g + 8, 2t), a[2] (g, 2t + 8),
///      a[3] (g + 8, 2t + 8), each with its right neighbour in the high half
///   b: b0 rows 2t and 2t + 1 of column g, b1 those + 8
///   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
/// And of 8-bit integers, b signed, with exact int32 sums:
///   a [16, 32], b [32, 8]: a[0] (g, 4t), a[1] (g + 8, 4t), a[2] (g, 4t + 16), a[3] (g + 8, 4t + 16), each with the
///   three values behind it in the higher bytes; b0 rows 4t to 4t + 3 of column g, b1 those + 16; c as above. With
///   16 in the place of 32: a[0], a[1] and b0 alone.
/// Source: the PTX ISA, "mma".
namespace gemma4::cuda {

__device__ __forceinline__ void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_f16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                        std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// a b of fp16 values, rounded to fp16: c[0] (g, 2t), c[1] (g + 8, 2t), each with its right neighbour in the high half.
__device__ __forceinline__ void mma_f16_to_f16(std::uint32_t (&c)[2], const std::uint32_t (&a)[4], std::uint32_t b0,
                                               std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %8};"
      : "=r"(c[0]), "=r"(c[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0u));
}

/// 16 x 32 times 32 x 8, both signed.
__device__ __forceinline__ void mma_s8(int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// The same with a unsigned.
__device__ __forceinline__ void mma_u8_s8(int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                          std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// 16 x 16 times 16 x 8, both signed.
__device__ __forceinline__ void mma_s8_half(int (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

}  // namespace gemma4::cuda

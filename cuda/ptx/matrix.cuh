// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// 8x8 matrices of 16-bit values between shared memory and the registers of a warp. Lane 4 g + t holds columns 2t and
/// 2t + 1 of row g, the first in the low half of a register. Source: the PTX ISA, "ldmatrix", "stmatrix", "movmatrix".
namespace gemma4::cuda {

/// Four matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&fragment)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address));
}

/// The same, each matrix transposed.
__device__ __forceinline__ void load_matrix_x4_transposed(std::uint32_t (&fragment)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address));
}

/// Four matrices to shared memory; addresses as for load_matrix_x4(). From sm_90 on.
__device__ __forceinline__ void store_matrix_x4(std::uint32_t address, std::uint32_t f0, std::uint32_t f1,
                                                std::uint32_t f2, std::uint32_t f3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(f0), "r"(f1),
               "r"(f2), "r"(f3)
               : "memory");
}

/// The transpose of a matrix in registers.
[[nodiscard]] __device__ __forceinline__ std::uint32_t transpose_matrix(std::uint32_t pair) {
  std::uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Shared memory by its own 32-bit addresses, as the matrix instructions and the copy engine take them. Every access
/// here stays where it is written: the compiler neither moves it across another nor keeps its value.
/// Source: the PTX ISA, "ld", "st".
namespace gemma4::cuda {

/// Address of a pointer into shared memory.
[[nodiscard]] __device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

[[nodiscard]] __device__ __forceinline__ float load_shared(std::uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared(std::uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

/// 16 bytes at a multiple of 16.
__device__ __forceinline__ void load_shared_x4(std::uint32_t (&word)[4], std::uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void store_shared_x4(std::uint32_t address, std::uint32_t a, std::uint32_t b,
                                                std::uint32_t c, std::uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

}  // namespace gemma4::cuda

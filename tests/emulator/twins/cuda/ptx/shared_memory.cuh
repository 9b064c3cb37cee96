// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>

/// Twin of cuda/ptx/shared_memory.cuh.
namespace gemma4::cuda {

namespace detail {

template <int kBytes>
[[nodiscard]] inline unsigned char* aligned_shared(std::uint32_t address) {
  if (address % kBytes != 0) emulator::fail(kBytes, " bytes of shared memory at ", address, ", which is no multiple");
  return emulator::from_shared(address);
}

}  // namespace detail

[[nodiscard]] __device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return emulator::to_shared(pointer);
}

[[nodiscard]] __device__ __forceinline__ float load_shared(std::uint32_t address) {
  float value;
  std::memcpy(&value, detail::aligned_shared<4>(address), 4);
  return value;
}

__device__ __forceinline__ void store_shared(std::uint32_t address, float value) {
  std::memcpy(detail::aligned_shared<4>(address), &value, 4);
}

__device__ __forceinline__ void load_shared_x4(std::uint32_t (&word)[4], std::uint32_t address) {
  std::memcpy(word, detail::aligned_shared<16>(address), 16);
}

__device__ __forceinline__ void store_shared_x4(std::uint32_t at, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                                std::uint32_t d) {
  const std::uint32_t word[4] = {a, b, c, d};
  std::memcpy(detail::aligned_shared<16>(at), word, 16);
}

}  // namespace gemma4::cuda

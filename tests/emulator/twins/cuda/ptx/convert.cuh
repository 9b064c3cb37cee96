// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Twin of cuda/ptx/convert.cuh.
namespace gemma4::cuda {

[[nodiscard]] __device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  return emulator::bf16_bits(low) | emulator::bf16_bits(high) << 16;
}

[[nodiscard]] __device__ __forceinline__ std::uint32_t pack_f16(float low, float high) {
  return emulator::half_bits(low) | emulator::half_bits(high) << 16;
}

[[nodiscard]] __device__ __forceinline__ float widen_f16(std::uint16_t bits) {
  return emulator::half_value(bits);
}

}  // namespace gemma4::cuda

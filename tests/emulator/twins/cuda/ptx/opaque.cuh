// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Twin of cuda/ptx/opaque.cuh: what the compiler knows changes no value.
namespace gemma4::cuda {

__device__ __forceinline__ void have_now(std::uint32_t&, std::uint32_t&) {}
__device__ __forceinline__ void have_now(std::uint32_t&, float&) {}

[[nodiscard]] __device__ __forceinline__ std::uint64_t opaque(std::uint64_t value) {
  return value;
}

[[nodiscard]] __device__ __forceinline__ std::uint32_t opaque(std::uint32_t value) {
  return value;
}

}  // namespace gemma4::cuda

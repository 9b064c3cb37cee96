// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// No instruction at all: values that the compiler must have at this point, and about which it knows nothing after it.
/// That fixes when something is read or computed. The order of several such points is kept.
namespace gemma4::cuda {

__device__ __forceinline__ void have_now(std::uint32_t& a, std::uint32_t& b) {
  asm volatile("" : "+r"(a), "+r"(b));
}
__device__ __forceinline__ void have_now(std::uint32_t& a, float& b) {
  asm volatile("" : "+r"(a), "+f"(b));
}

/// The same value, of which the compiler no longer knows where it is from.
[[nodiscard]] __device__ __forceinline__ std::uint64_t opaque(std::uint64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

[[nodiscard]] __device__ __forceinline__ std::uint32_t opaque(std::uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace gemma4::cuda

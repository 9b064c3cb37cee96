// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Language level and the one macro of the project.
static_assert(__cplusplus >= 202002L, "gemma4 needs C++20: pass -std=c++20 to the compiler (nvcc too)");

/// Marks a function that both rooms call: host and device under nvcc, nothing elsewhere.
#if defined(__CUDACC__)
#define GEMMA4_HD __host__ __device__
#else
#define GEMMA4_HD
#endif

namespace gemma4 {

/// std::bit_cast that device code may call too.
template <class TTo, class TFrom>
[[nodiscard]] GEMMA4_HD constexpr TTo bit_cast(const TFrom& value) {
  return __builtin_bit_cast(TTo, value);
}

}  // namespace gemma4

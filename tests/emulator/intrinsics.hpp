// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>

#include "tests/emulator/shared_memory.hpp"

/// CUDA's functions of one thread. Source: the CUDA math API, the CUDA C++ programming guide.
namespace gemma4::emulator {

/// The same value, rounded: it does not become part of a fused product.
template <class T>
[[nodiscard]] inline T rounded(T value) {
  asm volatile("" : "+x"(value));
  return value;
}

}  // namespace gemma4::emulator

inline float __fmul_rn(float a, float b) {
  return gemma4::emulator::rounded(a * b);
}
inline float __fadd_rn(float a, float b) {
  return gemma4::emulator::rounded(a) + gemma4::emulator::rounded(b);
}
inline float __fsub_rn(float a, float b) {
  return gemma4::emulator::rounded(a) - gemma4::emulator::rounded(b);
}
inline double __dadd_rn(double a, double b) {
  return gemma4::emulator::rounded(a) + gemma4::emulator::rounded(b);
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fmaf(a, b, c);
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fsqrt_rn(float a) {
  return std::sqrt(a);
}
inline void sincospif(float x, float* sine, float* cosine) {
  const double angle = std::remainder(static_cast<double>(x), 2.0) * std::numbers::pi;
  *sine = static_cast<float>(std::sin(angle)), *cosine = static_cast<float>(std::cos(angle));
}

inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
inline int __float_as_int(float value) {
  return std::bit_cast<int>(value);
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline float __int_as_float(int bits) {
  return std::bit_cast<float>(bits);
}
inline long long __double_as_longlong(double value) {
  return std::bit_cast<long long>(value);
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(std::uint64_t{a} * b >> 32);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((std::uint64_t{high} << 32 | low) << (by & 31) >> 32);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
inline std::size_t __cvta_generic_to_shared(const void* pointer) {
  return gemma4::emulator::to_shared(pointer);
}
[[noreturn]] inline void __trap() {
  gemma4::emulator::fail("__trap()");
}

/// min() and max() as device code has them: of numbers of one type, of int and unsigned as unsigned.
inline float min(float a, float b) {
  return std::fmin(a, b);
}
inline float max(float a, float b) {
  return std::fmax(a, b);
}
inline unsigned min(int a, unsigned b) {
  return static_cast<unsigned>(a) < b ? static_cast<unsigned>(a) : b;
}
inline unsigned min(unsigned a, int b) {
  return min(b, a);
}
inline unsigned max(int a, unsigned b) {
  return static_cast<unsigned>(a) < b ? b : static_cast<unsigned>(a);
}
inline unsigned max(unsigned a, int b) {
  return max(b, a);
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

/// fp16 and bf16 by their bits, rounded to nearest even.
namespace gemma4::emulator {

[[nodiscard]] inline float half_value(std::uint32_t bits) {
  return _cvtsh_ss(static_cast<unsigned short>(bits));
}
[[nodiscard]] inline std::uint32_t half_bits(float value) {
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}

[[nodiscard]] inline float bf16_value(std::uint32_t bits) {
  return std::bit_cast<float>(bits << 16);
}
[[nodiscard]] inline std::uint32_t bf16_bits(float value) {
  constexpr std::uint32_t kSign = 0x80000000u, kInfinity = 0x7F800000u, kNan = 0x7FFFu;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & ~kSign) > kInfinity) return kNan;
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

}  // namespace gemma4::emulator

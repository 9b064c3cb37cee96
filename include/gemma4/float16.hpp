// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "gemma4/platform.hpp"

/// The two 16-bit storage types. Arithmetic is done in float; these only hold bits.
namespace gemma4 {

/// bfloat16: sign 1, exponent 8, fraction 7. Bit-compatible with __nv_bfloat16.
struct Bf16 {
  std::uint16_t bits;
  bool operator==(const Bf16&) const = default;
};

/// IEEE binary16: sign 1, exponent 5, fraction 10. Bit-compatible with __half.
struct F16 {
  std::uint16_t bits;
  bool operator==(const F16&) const = default;
};
static_assert(sizeof(Bf16) == 2 && sizeof(F16) == 2);

[[nodiscard]] GEMMA4_HD constexpr float to_float(float value) {
  return value;
}

[[nodiscard]] GEMMA4_HD constexpr float to_float(Bf16 value) {
  return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

[[nodiscard]] GEMMA4_HD constexpr float to_float(F16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (value.bits >> 10) & 0x1Fu;
  const std::uint32_t fraction = value.bits & 0x3FFu;
  if (exponent == 0x1Fu) return bit_cast<float>(sign | 0x7F800000u | (fraction << 13));
  if (exponent != 0) return bit_cast<float>(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // subnormal or zero, exact
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(magnitude));
}

/// Round to nearest, ties to even; NaN stays NaN.
[[nodiscard]] GEMMA4_HD constexpr Bf16 to_bf16(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

/// Round to nearest, ties to even; values beyond 65504 become infinity, NaN stays NaN.
[[nodiscard]] GEMMA4_HD constexpr F16 to_f16(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<std::uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return {static_cast<std::uint16_t>(sign | 0x7C00u)};
  if (magnitude < 0x38800000u) {
    // Subnormal in binary16: adding 0.5 aligns the fraction so that float addition does the rounding.
    const float aligned = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(aligned) - 0x3F000000u))};
  }
  const std::uint32_t rounded = magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
}

/// `value` rounded to the storage type `TStorage` (float, Bf16 or F16).
template <class TStorage>
[[nodiscard]] GEMMA4_HD constexpr TStorage from_float(float value) {
  if constexpr (sizeof(TStorage) == sizeof(float)) {
    return value;
  } else if constexpr (std::is_same_v<TStorage, Bf16>) {
    return to_bf16(value);
  } else {
    return to_f16(value);
  }
}

}  // namespace gemma4

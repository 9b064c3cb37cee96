// SPDX-License-Identifier: Apache-2.0
#include "gemma4/float16.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

/// The two 16-bit formats over all of their values: each back to itself, and every float between two of them to the
/// nearer one, a tie to the even one.
namespace {

using namespace gemma4;

constexpr float kInf = std::numeric_limits<float>::infinity();

/// The value by the definition of a binary format with a sign, exponent bits and fraction bits.
double by_definition(std::uint16_t bits, int n_exponent, int n_fraction) {
  const int exponent = bits >> n_fraction & ((1 << n_exponent) - 1), fraction = bits & ((1 << n_fraction) - 1);
  const int bias = (1 << (n_exponent - 1)) - 1;
  const double sign = bits >> 15 != 0 ? -1 : 1;
  if (exponent == (1 << n_exponent) - 1) return fraction == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - n_fraction);
  return sign * std::ldexp(fraction + (1 << n_fraction), exponent - bias - n_fraction);
}

template <class TStorage>
void expect_every_value(int n_exponent, int n_fraction) {
  for (std::uint32_t i = 0; i < 0x10000u; ++i) {
    const TStorage value{static_cast<std::uint16_t>(i)};
    const float wide = to_float(value);
    const double expected = by_definition(value.bits, n_exponent, n_fraction);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(wide)) << i;
      ASSERT_TRUE(std::isnan(to_float(from_float<TStorage>(wide)))) << i;
      continue;
    }
    ASSERT_EQ(static_cast<double>(wide), expected) << i;
    ASSERT_EQ(std::signbit(wide), std::signbit(expected)) << i;
    ASSERT_EQ(from_float<TStorage>(wide), value) << i;
  }
}

/// From a positive value to the next: the midpoint and the floats beside it, with both signs.
template <class TStorage>
void expect_nearest(std::uint16_t infinity) {
  for (std::uint16_t i = 0; i < infinity; ++i) {
    const TStorage low{i}, high{static_cast<std::uint16_t>(i + 1)};
    // Beyond the largest value the next would be a power of two, and stands for infinity.
    const double below = to_float(low);
    const double above = high.bits == infinity ? 2 * below - to_float(TStorage{static_cast<std::uint16_t>(i - 1)})
                                               : static_cast<double>(to_float(high));
    const auto middle = static_cast<float>((below + above) / 2);
    if (static_cast<double>(middle) != (below + above) / 2) continue;  // not a float: the end of bf16's subnormals
    const TStorage even = i % 2 == 0 ? low : high;
    for (const std::uint16_t sign : {0, 0x8000}) {
      const auto signed_of = [&](float x) { return sign == 0 ? x : -x; };
      const auto with_sign = [&](TStorage x) { return TStorage{static_cast<std::uint16_t>(x.bits | sign)}; };
      ASSERT_EQ(from_float<TStorage>(signed_of(middle)), with_sign(even)) << i;
      ASSERT_EQ(from_float<TStorage>(signed_of(std::nextafter(middle, 0.0f))), with_sign(low)) << i;
      ASSERT_EQ(from_float<TStorage>(signed_of(std::nextafter(middle, kInf))), with_sign(high)) << i;
    }
  }
  EXPECT_EQ(from_float<TStorage>(std::numeric_limits<float>::max()).bits, infinity);
  EXPECT_EQ(from_float<TStorage>(kInf).bits, infinity);
  EXPECT_EQ(from_float<TStorage>(-kInf).bits, infinity | 0x8000);
  EXPECT_EQ(from_float<TStorage>(-0.0f).bits, 0x8000);
}

TEST(Float16, EveryValueOfBf16ComesBack) {
  expect_every_value<Bf16>(8, 7);
}
TEST(Float16, EveryValueOfF16ComesBack) {
  expect_every_value<F16>(5, 10);
}
TEST(Float16, Bf16IsTheNearestAndTiesGoToEven) {
  expect_nearest<Bf16>(0x7F80);
}
TEST(Float16, F16IsTheNearestAndTiesGoToEven) {
  expect_nearest<F16>(0x7C00);
}

TEST(Float16, ANaNStaysOneWhateverItsBits) {
  // A NaN whose upper bits are those of an infinity must not become one.
  for (const std::uint32_t bits : {0x7F800001u, 0x7F80FFFFu, 0xFF800001u, 0x7FC00000u, 0x7FFFFFFFu, 0xFFFFFFFFu}) {
    EXPECT_TRUE(std::isnan(to_float(to_bf16(std::bit_cast<float>(bits))))) << bits;
    EXPECT_TRUE(std::isnan(to_float(to_f16(std::bit_cast<float>(bits))))) << bits;
  }
}

}  // namespace

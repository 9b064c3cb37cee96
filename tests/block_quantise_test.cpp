// SPDX-License-Identifier: Apache-2.0
#include "gemma4/gguf/block_quantise.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gemma4/gguf/block_dequantise.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"

namespace gemma4 {
namespace {

using testkit::close;
using testkit::rc_require;

constexpr std::array kBlockTypes = {TensorType::kQ4_0, TensorType::kQ4K, TensorType::kQ6K, TensorType::kQ8_0};
constexpr std::array kEncodedTypes = {TensorType::kQ4_0, TensorType::kQ4K, TensorType::kQ6K, TensorType::kQ8_0,
                                      TensorType::kBf16, TensorType::kF16, TensorType::kF32};

std::vector<std::byte> encode(TensorType type, const std::vector<float>& values) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(row_bytes(type, static_cast<std::int64_t>(values.size()))));
  encode_row(type, values, bytes);
  return bytes;
}

std::vector<float> decode(TensorType type, const std::vector<std::byte>& bytes, std::size_t n) {
  std::vector<float> values(n);
  dequantise_row(type, bytes, values);
  return values;
}

std::vector<float> round_trip(TensorType type, const std::vector<float>& values) {
  return decode(type, encode(type, values), values.size());
}

std::vector<float> normal_weights(std::size_t n, float sigma, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> values(n);
  for (float& value : values) value = normal(random);
  return values;
}

double relative_rms(const std::vector<float>& actual, const std::vector<float>& expected) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    error += std::pow(static_cast<double>(actual[i]) - expected[i], 2);
    norm += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::sqrt(error / norm);
}

double promised_rms(TensorType type) {
  if (type == TensorType::kQ4_0) return 0.10;
  if (type == TensorType::kQ4K) return 0.09;
  return type == TensorType::kQ6K ? 0.02 : 0.007;
}

TEST(BlockEncode, NormalWeightsKeepThePromisedError) {
  for (const TensorType type : kBlockTypes) {
    for (const float sigma : {1e-3f, 0.02f, 1.0f, 100.0f}) {
      const std::vector<float> values = normal_weights(1 << 16, sigma, 11);
      std::vector<float> decoded = round_trip(type, values);
      const double rms = relative_rms(decoded, values);
      EXPECT_LE(rms, promised_rms(type)) << type_name(type) << " sigma " << sigma;
      // Control: the promise is near what the format can do, so that one bit less breaks it.
      EXPECT_GE(2 * rms, promised_rms(type)) << type_name(type) << " sigma " << sigma;
      std::rotate(decoded.begin(), decoded.begin() + 1, decoded.end());
      EXPECT_GT(relative_rms(decoded, values), 1.0);
    }
  }
}

struct Range {
  double min, max, magnitude;
};

Range range_of(std::span<const float> values) {
  const auto [min, max] = std::ranges::minmax(values);
  return {min, max, std::max(std::abs(static_cast<double>(min)), std::abs(static_cast<double>(max)))};
}

/// What f16 rounding of a step can add: half a unit of the subnormals, 2^-25, for each multiple of the step.
double subnormal(int multiples) {
  return multiples * 0x1p-25;
}

constexpr double kF16Rounding = 0x1p-11;  ///< relative, of a step that is no subnormal
constexpr double kSlack = 1.005;          ///< for that, and for the divisions, which are done in float

/// Q8_0: half a step of max|x| / 127.
double q80_bound(std::span<const float> block) {
  return kSlack * (0.5 * range_of(block).magnitude / 127 + subnormal(127));
}

/// Q4_0: half a step of max|x| / 8. Values of the other side than the extreme's end at 7 steps: one that lies between
/// 7.5 and 8 steps is up to a whole step short, and by what f16 takes of the 7.
double q40_bound(std::span<const float> block, std::size_t i) {
  const Range range = range_of(block);
  const double step = range.magnitude / 8, side = range.max == range.magnitude ? 1 : -1;
  const double beyond = -side * static_cast<double>(block[i]) - 7 * (1 - kF16Rounding) * step;
  return kSlack * std::max(0.5 * step, beyond) + subnormal(8);
}

/// Q6_K: with s = max|x| / 32 in the sub-block and d = max(s) / 127 in the block, the coded step is within d / 2 of s.
/// A value of the longer side, up to 32 s, is coded within half a step, plus 16 d where the coded step is too short;
/// one of the other side ends at the quant 31, which is a whole s short.
double q6k_bound(std::span<const float> block, std::size_t i) {
  const double d = range_of(block).magnitude / 32 / 127;
  const double s = range_of(block.subspan(i / 16 * 16, 16)).magnitude / 32;
  return kSlack * (s + 16 * d) + subnormal(32 * 127);
}

/// Q4_K: with s = (max - min) / 15 in the sub-block, the coded step is within d / 2 of s and the coded minimum within
/// dmin / 2 of it: half a step, plus 15 d / 2 where the coded step is too short, plus dmin / 2.
double q4k_bound(std::span<const float> block, std::size_t i) {
  double largest_step = 0, largest_min = 0, step = 0;
  for (std::size_t b = 0; b < 8; ++b) {
    const Range range = range_of(block.subspan(32 * b, 32));
    const double s = (std::max(range.max, 0.0) - std::min(range.min, 0.0)) / 15;
    largest_step = std::max(largest_step, s);
    largest_min = std::max(largest_min, -range.min);
    if (b == i / 32) step = s;
  }
  return kSlack * (step / 2 + 7.5 * largest_step / 63 + largest_min / 63 / 2) + subnormal(16 * 63);
}

std::vector<double> bounds(TensorType type, const std::vector<float>& values) {
  std::vector<double> bound;
  const auto size = static_cast<std::size_t>(block_size(type));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto block = std::span(values).subspan(i / size * size, size);
    if (type == TensorType::kQ4_0) bound.push_back(q40_bound(block, i % size));
    if (type == TensorType::kQ4K) bound.push_back(q4k_bound(block, i % size));
    if (type == TensorType::kQ6K) bound.push_back(q6k_bound(block, i % size));
    if (type == TensorType::kQ8_0) bound.push_back(q80_bound(block));
  }
  return bound;
}

/// Weights of many kinds: each group of 16 has its own size and offset, some are constant, some are zero.
std::vector<float> patchy_weights(std::size_t n, std::uint32_t seed, int log2_size) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  float size = 0, offset = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (i % 16 == 0) {
      size = random() % 4 == 0 ? 0.0f : std::ldexp(1.0f, log2_size + static_cast<int>(random() % 8));
      offset = random() % 2 == 0 ? 0.0f : std::ldexp(normal(random), log2_size + static_cast<int>(random() % 8));
    }
    values[i] = size * normal(random) + offset;
  }
  return values;
}

RC_GTEST_PROP(BlockEncode, EveryWeightIsWithinItsDerivedBound, ()) {
  const auto seed = *rc::gen::arbitrary<std::uint32_t>();
  const int log2_size = *rc::gen::inRange(-30, 8);
  const std::vector<float> values = patchy_weights(512, seed, log2_size);
  for (const TensorType type : kBlockTypes) {
    rc_require(close(round_trip(type, values), values, bounds(type, values)), std::string(type_name(type)));
  }
}

// Control: the bounds are not so wide that a wrong neighbour passes.
TEST(BlockEncode, TheDerivedBoundsRejectANeighboursWeight) {
  const std::vector<float> values = normal_weights(512, 0.02f, 3);
  for (const TensorType type : kBlockTypes) {
    std::vector<float> decoded = round_trip(type, values);
    EXPECT_TRUE(close(decoded, values, bounds(type, values)));
    std::rotate(decoded.begin(), decoded.begin() + 1, decoded.end());
    EXPECT_FALSE(close(decoded, values, bounds(type, values)));
  }
}

// Every group of 16 spans the same range, so that each coded scale is the largest one. With scales below 32 of 127 this
// is no law: the extreme quant may then be 31 in place of 32, and the second step is shorter than the first.
RC_GTEST_PROP(BlockEncode, EvenlyScaledWeightsAreEncodedOnceAndForAll, ()) {
  std::mt19937 random(*rc::gen::arbitrary<std::uint32_t>());
  const float size = std::ldexp(static_cast<float>(*rc::gen::inRange(1024, 2048)), *rc::gen::inRange(-11, -4));
  std::uniform_real_distribution<float> uniform(-size, size);
  std::vector<float> values(512);
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = i % 16 == 0 ? -size : i % 16 == 7 ? size : uniform(random);
  for (const TensorType type : kEncodedTypes) {
    const std::vector<std::byte> once = encode(type, values);
    RC_ASSERT((encode(type, decode(type, once, values.size())) == once));
  }
}

// What was trained for Q4_0 lies on its grid: nothing is lost. A block whose quants all lie within 7 steps has no such
// promise, and is the control.
RC_GTEST_PROP(BlockEncode, ABlockOfQ4_0WithAQuantAtItsEndSurvives, ()) {
  std::mt19937 random(*rc::gen::arbitrary<std::uint32_t>());
  Q40Block block;
  block.d = F16{static_cast<std::uint16_t>(*rc::gen::inRange(1, 0x6C00) | *rc::gen::element(0, 0x8000))};
  for (std::uint8_t& byte : block.quants) byte = static_cast<std::uint8_t>(random());
  const auto bytes_of = [](const Q40Block& from) {
    const auto view = std::as_bytes(std::span(&from, 1));
    return std::vector<std::byte>(view.begin(), view.end());
  };
  const auto again = [&] { return encode(TensorType::kQ4_0, decode(TensorType::kQ4_0, bytes_of(block), 32)); };
  block.quants[random() % 16] &= 0xF0;
  RC_ASSERT((again() == bytes_of(block)));
  for (std::uint8_t& byte : block.quants) byte = static_cast<std::uint8_t>(byte % 2 == 0 ? 0x99 : 0x77);
  RC_ASSERT((again() != bytes_of(block)));
}

RC_GTEST_PROP(BlockEncode, ABlockDependsOnItsOwnWeightsOnly, ()) {
  const auto seed = *rc::gen::arbitrary<std::uint32_t>();
  for (const TensorType type : kBlockTypes) {
    const auto size = static_cast<std::size_t>(block_size(type));
    std::vector<float> values = normal_weights(3 * size, 1.0f, seed);
    const std::vector<float> middle(values.begin() + static_cast<std::ptrdiff_t>(size),
                                    values.begin() + static_cast<std::ptrdiff_t>(2 * size));
    const std::vector<std::byte> all = encode(type, values), alone = encode(type, middle);
    RC_ASSERT((std::ranges::equal(std::span(all).subspan(alone.size(), alone.size()), alone)));
  }
}

TEST(BlockEncode, ZerosStayZero) {
  for (const TensorType type : kEncodedTypes) {
    EXPECT_EQ(round_trip(type, std::vector<float>(256, 0.0f)), std::vector<float>(256, 0.0f)) << type_name(type);
    EXPECT_EQ(round_trip(type, std::vector<float>(256, -0.0f)), std::vector<float>(256, 0.0f)) << type_name(type);
  }
}

TEST(BlockEncode, TinyWeightsBecomeZeroNotGarbage) {
  constexpr float kTiny = std::numeric_limits<float>::denorm_min();
  for (const TensorType type : kBlockTypes) {
    for (const float tiny : {kTiny, -kTiny, 1e-38f, -1e-12f}) {
      EXPECT_EQ(round_trip(type, std::vector<float>(256, tiny)), std::vector<float>(256, 0.0f)) << type_name(type);
    }
  }
}

TEST(BlockEncode, WeightsTheFormatCannotHoldAreRefused) {
  for (const TensorType type : kBlockTypes) {
    for (const float bad : {HUGE_VALF, -HUGE_VALF, std::nanf(""), 3e38f, -1e9f}) {
      std::vector<float> values(512, 0.5f);
      values[300] = bad;
      std::vector<std::byte> bytes(static_cast<std::size_t>(row_bytes(type, 512)));
      EXPECT_THROW(encode_row(type, values, bytes), std::invalid_argument) << type_name(type) << ' ' << bad;
    }
    EXPECT_NO_THROW(static_cast<void>(encode(type, std::vector<float>(512, 60000.0f))));
  }
}

TEST(BlockEncode, WrongSizesAndTypesAreRefused) {
  std::vector<float> values(256);
  std::vector<std::byte> bytes(144);
  EXPECT_THROW(encode_row(TensorType::kQ4K, values, std::span(bytes).first(143)), std::invalid_argument);
  EXPECT_THROW(encode_row(TensorType::kQ4K, std::span(values).first(255), bytes), std::invalid_argument);
  EXPECT_THROW(encode_row(TensorType::kI8, std::span(values).first(144), bytes), std::invalid_argument);
  std::vector<std::byte> q5k(176);
  EXPECT_THROW(encode_row(TensorType::kQ5K, values, q5k), std::invalid_argument);
  EXPECT_NO_THROW(encode_row(TensorType::kQ4K, values, bytes));
}

}  // namespace
}  // namespace gemma4

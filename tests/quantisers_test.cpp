// SPDX-License-Identifier: Apache-2.0
#include "gemma4/quantisers.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/rotation.hpp"
#include "gemma4/tq4_codebook.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/quantiser_case.hpp"
#include "tests/support/text_file.hpp"

namespace {

using namespace gemma4;
using testkit::close;
using testkit::length_of;
using testkit::normal_values;
using testkit::rc_require;
using testkit::relative_error;
using testkit::roundtrip;
using testkit::same_bits;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kBf16Unit = 0x1p-8, kF16Unit = 0x1p-11;  // the largest relative errors of rounding to them

/// fn(quantiser) for each shipped kind.
template <class TFunction>
void for_each_quantiser(const TFunction& fn) {
  for (const auto& [k_bits, v_bits] : {std::pair{4, 4}, {2, 8}, {5, 3}}) fn(ScalarCodes::make(k_bits, v_bits));
  fn(Int8Token{});
  fn(Q80Cache{});
  fn(Q40Cache{});
  fn(TrellisCodes::make(4, 8));
  fn(TrellisCodes::make(3, 10));
}

// ---- Names

TEST(Quantisers, NamesRoundTrip) {
  std::vector<std::string> names = {"sim-int8", "sim-q8_0", "sim-q4_0"};
  for (const char* trellis : {"3l8", "3l9", "3l10", "4l8", "4l9", "4l10"}) names.push_back(concat("sim-t", trellis));
  for (int k = 2; k <= 8; ++k) {
    for (int v = 2; v <= 8; ++v) names.push_back(concat("sim-k", k, "v", v));
  }
  for (const std::string& stem : names) {
    for (const std::string& name : {stem, stem + "-had"}) {
      const auto format = ShippedSimulatedFormats::parse(name);
      ASSERT_TRUE(format.has_value()) << name;
      EXPECT_EQ(std::visit([](const auto& f) { return f.name(); }, *format), name);
      EXPECT_EQ(std::visit([](const auto& f) { return f.hadamard; }, *format), name != stem) << name;
    }
  }
  for (const char* other : {"sim-",
                            "sim",
                            "k4v4",
                            "sim-k1v4",
                            "sim-k4v9",
                            "sim-k4",
                            "sim-k4v",
                            "sim-k4v44",
                            "sim-k04v4",
                            "sim-int8-",
                            "sim-t5l8",
                            "sim-t4l11",
                            "sim-t4",
                            "sim-t4l8l8",
                            "sim-int8-hadamard",
                            "sim-int8-had-had",
                            "sim-q8_1",
                            "sim--had",
                            "tq4",
                            ""}) {
    EXPECT_FALSE(ShippedSimulatedFormats::parse(other).has_value()) << other;
  }
  EXPECT_FALSE(*Simulated<ScalarCodes>::parse("sim-k4v3") == *Simulated<ScalarCodes>::parse("sim-k3v4"));
}

TEST(Quantisers, RowBytesCountScalesAndNorms) {
  const auto bytes = [](const char* name, CacheSide side, std::int64_t head_dim) {
    return std::visit([&](const auto& f) { return f.row_bytes(side, head_dim); },
                      *ShippedSimulatedFormats::parse(name));
  };
  EXPECT_EQ(bytes("sim-k4v4-had", CacheSide::kKey, 512), tq4_row_bytes(512));
  EXPECT_EQ(bytes("sim-k3v6", CacheSide::kKey, 512), 192 + 2);
  EXPECT_EQ(bytes("sim-k3v6", CacheSide::kValue, 512), 384 + 2);
  EXPECT_EQ(bytes("sim-k3v6", CacheSide::kKey, 4), 2 + 2);
  EXPECT_EQ(bytes("sim-t4l8-had", CacheSide::kKey, 512), 256 + 1 + 2) << "4 bits of the first state are its own";
  EXPECT_EQ(bytes("sim-t3l10", CacheSide::kValue, 512), 192 + 1 + 2);
  EXPECT_EQ(bytes("sim-int8", CacheSide::kValue, 512), 512 + 2);
  EXPECT_EQ(bytes("sim-q8_0", CacheSide::kKey, 512), 16 * 34);
  EXPECT_EQ(bytes("sim-q4_0", CacheSide::kKey, 512), 16 * 18);
}

// ---- The table

TEST(UnitCodebook, ObeysBothOfLloydsRulesAtEveryWidth) {
  // The mean of each cell by Simpson's rule with 200 intervals, which shares nothing with the closed forms: its error
  // on cells of at most 8 standard deviations is below 1e-7. Levels are floats below 4.7, half an ulp 2.4e-7.
  const auto density = [](double x) { return std::exp(-0.5 * x * x); };
  for (int bits = 2; bits <= 8; ++bits) {
    const UnitCodebook table = solve_unit_codebook(bits);
    ASSERT_EQ(table.n_half, 1 << (bits - 1));
    for (int i = 0; i < table.n_half; ++i) {
      const double lower = i == 0 ? 0.0 : table.edge[i - 1], upper = i + 1 < table.n_half ? table.edge[i] : 9.0;
      double mass = 0.0, moment = 0.0;
      for (int j = 0; j <= 200; ++j) {
        const double x = lower + (upper - lower) * j / 200, weight = j == 0 || j == 200 ? 1 : j % 2 == 1 ? 4 : 2;
        mass += weight * density(x);
        moment += weight * density(x) * x;
      }
      EXPECT_TRUE(close(static_cast<double>(table.level[i]), moment / mass, 1e-6)) << bits << " bits, level " << i;
      if (i + 1 == table.n_half) continue;
      EXPECT_TRUE(close(table.edge[i], 0.5f * (table.level[i] + table.level[i + 1]), 5e-7));
    }
  }
}

TEST(UnitCodebook, IsTheCodebookOfTheCompressedCacheWhereBothExist) {
  for (int bits = 2; bits <= 4; ++bits) {
    const UnitCodebook table = solve_unit_codebook(bits);
    const Codebook book = solve_codebook(CodebookKind::kFull, bits, 1);
    for (int i = 0; i < table.n_half; ++i) {
      const auto at = static_cast<std::size_t>(table.n_half + i);
      EXPECT_EQ(table.level[i], book.centroids[at]) << bits;
      if (i + 1 < table.n_half) {
        EXPECT_EQ(table.edge[i], book.boundaries[at]) << bits;
      }
    }
    std::vector<float> values = normal_values(3, 1000);
    for (int i = 0; i + 1 < book.n_level; ++i) {  // ties and their neighbours
      const float edge = book.boundaries[static_cast<std::size_t>(i)];
      for (const float y : {edge, std::nextafter(edge, -9.0f), std::nextafter(edge, 9.0f)}) values.push_back(y);
    }
    for (const float y : values) {
      EXPECT_EQ(table.nearest(y), book.centroids[static_cast<std::size_t>(codebook_index(book, y))])
          << bits << ' ' << y;
    }
  }
  EXPECT_THROW(static_cast<void>(solve_unit_codebook(1)), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(solve_unit_codebook(9)), std::invalid_argument);
}

// ---- Each quantiser against its definition

/// Panter and Dite: the squared error of a fine table is pi sqrt(3) / 2 / 4^bits of the variance; a coarse one has
/// less.
TEST(ScalarCodes, ErrorFallsAsTheWidthSays) {
  const std::vector<float> x = normal_values(5, 512 * 64);
  double last = 1.0;
  for (int bits = 2; bits <= 8; ++bits) {
    const ScalarCodes quantiser = ScalarCodes::make(bits, 10 - bits);
    double squares = 0.0;
    for (std::size_t at = 0; at < x.size(); at += 512) {
      const std::vector<float> row(x.begin() + static_cast<std::ptrdiff_t>(at),
                                   x.begin() + static_cast<std::ptrdiff_t>(at + 512));
      const std::vector<float> k = roundtrip(quantiser, CacheSide::kKey, row);
      EXPECT_NEAR(length_of(k) / length_of(row), 1.0, kBf16Unit + 1e-6);
      squares += std::pow(relative_error(k, row), 2) / 64;
      // The other side's width is another: 10 - bits.
      const ScalarCodes swapped = ScalarCodes::make(10 - bits, bits);
      EXPECT_TRUE(same_bits(roundtrip(swapped, CacheSide::kValue, row), k));
      EXPECT_EQ(bool{same_bits(roundtrip(swapped, CacheSide::kKey, row), k)}, bits == 5);
    }
    const double fine = std::numbers::pi * std::sqrt(3.0) / 2.0 / std::pow(4.0, bits);
    EXPECT_LT(squares, 1.15 * fine + kBf16Unit * kBf16Unit) << bits;  // the norm's rounding adds its square
    EXPECT_GT(squares, 0.6 * fine) << bits;
    EXPECT_LT(squares, 0.4 * last);
    last = squares;
  }
}

/// Half a step, and of the scale's rounding what 127 of it add up to: (1/2 + 127 * 2^-9) steps at most.
TEST(Int8Token, ErrorIsWithinAStepOfTheLargest) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const std::vector<float> x = normal_values(seed, 256, 3.0f);
    const std::vector<float> read = roundtrip(Int8Token{}, CacheSide::kKey, x);
    const double step = static_cast<double>(block_magnitude(x.data(), 256)) / 127.0;
    EXPECT_TRUE(close(read, x, (0.5 + 127 * kBf16Unit / 2) * step * (1 + kBf16Unit)));
    EXPECT_FALSE(close(read, x, 0.3 * step)) << "negative control: no format of 255 steps is this good";
    std::vector<double> codes;
    const float scale = to_float(to_bf16(static_cast<float>(step)));
    for (const float value : read) codes.push_back(value / static_cast<double>(scale));
    for (const double code : codes) EXPECT_EQ(code, std::nearbyint(code));
  }
}

/// The bytes of a q8_0 block after ggml's reference, written out here, and dequantised by the project's weight reader.
std::vector<float> q8_0_through_bytes(const std::vector<float>& x) {
  std::vector<float> out(x.size());
  for (std::size_t at = 0; at < x.size(); at += 32) {
    float amax = 0.0f;
    for (std::size_t i = 0; i < 32; ++i) amax = std::max(amax, std::abs(x[at + i]));
    const float d = amax / 127.0f, id = d != 0.0f ? 1.0f / d : 0.0f;
    Q80Block block{.d = to_f16(d), .quants = {}};
    for (std::size_t i = 0; i < 32; ++i) block.quants[i] = static_cast<std::int8_t>(std::lround(x[at + i] * id));
    dequantise_block(block, std::span<float, 32>(&out[at], 32));
  }
  return out;
}

/// The same of q4_0: nibble i of the low ones is value i, of the high ones value 16 + i.
std::vector<float> q4_0_through_bytes(const std::vector<float>& x) {
  std::vector<float> out(x.size());
  for (std::size_t at = 0; at < x.size(); at += 32) {
    const auto begin = x.begin() + static_cast<std::ptrdiff_t>(at);
    const float m = *std::max_element(begin, begin + 32, [](float a, float b) { return std::abs(a) < std::abs(b); });
    const float d = m / -8.0f, id = d != 0.0f ? 1.0f / d : 0.0f;
    std::array<std::uint8_t, 16> nibbles = {};
    const auto code = [&](std::size_t i) {
      volatile const float x0 = x[at + i] * id;  // rounded before the sum
      return std::min(15, static_cast<int>(static_cast<std::int8_t>(x0 + 8.5f)));
    };
    for (std::size_t i = 0; i < 16; ++i) nibbles[i] = static_cast<std::uint8_t>(code(i) | code(i + 16) << 4);
    for (std::size_t i = 0; i < 16; ++i) {
      out[at + i] = to_float(to_f16(d)) * static_cast<float>((nibbles[i] & 15) - 8);
      out[at + 16 + i] = to_float(to_f16(d)) * static_cast<float>((nibbles[i] >> 4) - 8);
    }
  }
  return out;
}

RC_GTEST_PROP(BlockQuantisers, ReadBackWhatLlamaCppStores, (std::uint64_t seed)) {
  const float scale = std::ldexp(1.0f, *rc::gen::inRange(-12, 12));
  std::vector<float> x = normal_values(seed, 128, scale);
  for (int i = 0; i < 4; ++i) x[*rc::gen::inRange<std::size_t>(0, 128)] = scale * 3.0f;  // equal largest values
  for (int i = 0; i < 4; ++i) x[*rc::gen::inRange<std::size_t>(0, 128)] = scale * -3.0f;
  rc_require(close(roundtrip(Q80Cache{}, CacheSide::kKey, x), q8_0_through_bytes(x), 0.0), "q8_0");
  rc_require(close(roundtrip(Q40Cache{}, CacheSide::kValue, x), q4_0_through_bytes(x), 0.0), "q4_0");
  // Negative control: a block's scale is its own.
  std::vector<float> shifted(x.begin() + 1, x.end());
  shifted.push_back(9.0f * scale);
  RC_ASSERT(!close(roundtrip(Q80Cache{}, CacheSide::kKey, shifted), q8_0_through_bytes(x), 0.0));
}

/// A quotient of 2.4999993 in float, whose sum with 8.5 rounds up to 11: g++ 12 fused the two, also through a sum in
/// double, and got 10.
TEST(BlockQuantisers, ProductIsRoundedBeforeTheSum) {
  std::vector<float> x(32, 0.0f);
  x[0] = 0x1.0c92bap-11f, x[1] = -0x1.4fb764p-13f;
  EXPECT_EQ(roundtrip(Q40Cache{}, CacheSide::kKey, x)[1], 3.0f * to_float(to_f16(x[0] / -8.0f)));
  EXPECT_LT(std::fma(x[1], 1.0f / (x[0] / -8.0f), 8.5f), 11.0f) << "negative control: fused, it is another code";
}

/// Worked by hand. q4_0: the largest is -4, so d = 0.5: 3.74 / 0.5 + 8.5 = 15.98 -> 15, read back 3.5; the same but 4
/// is the code 16, cut to 15. q8_0: d = 1 exactly, ties go away from zero.
TEST(BlockQuantisers, KnownValues) {
  std::vector<float> x(32, 0.0f), q4(32, 0.0f);
  const std::array<std::pair<float, float>, 6> cases = {
      {{-4.0f, -4.0f}, {4.0f, 3.5f}, {3.74f, 3.5f}, {0.24f, 0.0f}, {-0.26f, -0.5f}, {0.25f, 0.5f}}};
  for (std::size_t i = 0; i < cases.size(); ++i) std::tie(x[i], q4[i]) = cases[i];
  EXPECT_TRUE(close(roundtrip(Q40Cache{}, CacheSide::kKey, x), q4, 0.0));
  x[0] = 4.0f, x[1] = -4.0f;  // the sign of the first of the largest decides which end has the ninth level
  EXPECT_EQ(roundtrip(Q40Cache{}, CacheSide::kKey, x)[0], 4.0f);
  EXPECT_EQ(roundtrip(Q40Cache{}, CacheSide::kKey, x)[1], -3.5f);
  std::vector<float> y(32, 0.0f), q8(32, 0.0f);
  const std::array<std::pair<float, float>, 5> eight = {
      {{127.0f, 127.0f}, {0.5f, 1.0f}, {-0.5f, -1.0f}, {1.5f, 2.0f}, {-2.49f, -2.0f}}};
  for (std::size_t i = 0; i < eight.size(); ++i) std::tie(y[i], q8[i]) = eight[i];
  EXPECT_TRUE(close(roundtrip(Q80Cache{}, CacheSide::kKey, y), q8, 0.0));
}

// ---- Edges, of all

TEST(Quantisers, ZerosStayZerosAndOddSizesOfNumbersAreHeld) {
  for_each_quantiser([](const auto& quantiser) {
    const std::vector<float> zeros(64, 0.0f), x = normal_values(11, 64);
    EXPECT_TRUE(close(roundtrip(quantiser, CacheSide::kKey, zeros), zeros, 0.0)) << quantiser.name();
    const double error = relative_error(roundtrip(quantiser, CacheSide::kKey, x), x);
    EXPECT_LT(error, 0.5) << quantiser.name();
    const bool f16_scale = quantiser.block_size(64) == 32;
    for (const int exponent : {-100, -60, 60, 120}) {
      std::vector<float> scaled;
      for (const float value : x) scaled.push_back(std::ldexp(value, exponent));
      const std::vector<float> read = roundtrip(quantiser, CacheSide::kKey, scaled);
      if (!f16_scale) {
        EXPECT_NEAR(relative_error(read, scaled), error, 1e-6) << quantiser.name() << ' ' << exponent;
      } else if (exponent < 0) {
        EXPECT_TRUE(close(read, zeros, 0.0)) << quantiser.name();
      } else {  // beyond f16: seen, not clamped
        EXPECT_FALSE(std::any_of(read.begin(), read.end(), [](float v) { return std::isfinite(v); }));
      }
    }
    std::vector<float> tiny(64, 0x1p-140f);
    for (const float value : roundtrip(quantiser, CacheSide::kValue, tiny)) {
      EXPECT_TRUE(std::abs(value) <= 0x1p-139f) << quantiser.name();
    }
  });
}

TEST(Quantisers, WhatIsNotFiniteIsSeenInTheWholeBlock) {
  for_each_quantiser([](const auto& quantiser) {
    const auto block = static_cast<std::size_t>(quantiser.block_size(64));
    for (const float bad : {quiet_nan(), -quiet_nan(), kInfinity, -kInfinity}) {
      std::vector<float> x = normal_values(2, 64);
      const std::vector<float> clean = roundtrip(quantiser, CacheSide::kKey, x);
      x[5] = bad;
      const std::vector<float> read = roundtrip(quantiser, CacheSide::kKey, x);
      EXPECT_TRUE(same_bits(std::span(read).first(block), std::vector<float>(block, quiet_nan())))
          << quantiser.name() << ' ' << bad;
      EXPECT_TRUE(same_bits(std::span(read).subspan(block), std::span(clean).subspan(block)));
    }
  });
}

/// How large the errors of the linear formats are on the vectors that they are made for.
TEST(Quantisers, RelativeErrorOfANormalVector) {
  const std::vector<float> x = normal_values(17, 512);
  const auto error = [&](const auto& quantiser) { return relative_error(roundtrip(quantiser, CacheSide::kKey, x), x); };
  // A uniform step s makes s / sqrt(12): of 512 normal values the largest is 3.2 on average (2.6 to 4.5), of 32 it is
  // 2.1 (1.2 to 4).
  EXPECT_LT(error(Int8Token{}), 4.5 / 127 / std::sqrt(12.0) + kBf16Unit / 2);
  EXPECT_GT(error(Int8Token{}), 2.6 / 127 / std::sqrt(12.0));
  EXPECT_LT(error(Q80Cache{}), 3.0 / 127 / std::sqrt(12.0) + kF16Unit);
  EXPECT_LT(error(Q80Cache{}), error(Int8Token{}));
  EXPECT_GT(error(Q40Cache{}), 10 * error(Q80Cache{}));
  EXPECT_LT(error(Q40Cache{}), 3.0 / 8 / std::sqrt(12.0));
}

// ---- What an idea costs

/// The files of the recipe "add a simulated cache format", and one line in the list of gemma4/quantisers.hpp.
TEST(Recipes, AnAccuracyRowCostsThreeFilesAndEightyLines) {
  std::ptrdiff_t lines = 1;
  for (const char* file : {"recipes/e4m3_token.hpp", "recipes_test.cpp"}) {
    const std::string text = testkit::read_text(std::string(GEMMA4_TEST_DATA) + "/../" + file);
    lines += std::count(text.begin(), text.end(), '\n');
  }
  EXPECT_LE(lines, 80);
}

}  // namespace

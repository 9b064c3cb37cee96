// SPDX-License-Identifier: Apache-2.0
#include "gemma4/gguf/block_dequantise.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "gemma4/gguf/gguf_reader.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"

namespace gemma4 {
namespace {

const std::filesystem::path kData = GEMMA4_TEST_DATA;

using Bytes = std::vector<std::uint8_t>;

// ---- A second dequantiser, one weight at a time from the byte maps, in double. Every product and difference below is
// exact in double (d spans 2^-24 to 2^16 with 11 bits, the integer factors at most 2^13), so that its one rounding to
// float is the one that block_dequantise.hpp promises, and the two must be equal.

double f16_at(const Bytes& block, std::size_t at) {
  const int bits = block[at] | block[at + 1] << 8;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 != 0 ? -magnitude : magnitude;
}

/// Bits [first, first + count) of a byte.
int bits_of(int byte, int first, int count) {
  return byte >> first & ((1 << count) - 1);
}

struct Pair {
  int scale, min;
};

Pair pair_of(const Bytes& block, int b) {
  if (b < 4) return {bits_of(block[4 + b], 0, 6), bits_of(block[8 + b], 0, 6)};
  const int j = b - 4;
  return {bits_of(block[12 + j], 0, 4) + 16 * bits_of(block[4 + j], 6, 2),
          bits_of(block[12 + j], 4, 4) + 16 * bits_of(block[8 + j], 6, 2)};
}

double q4k_weight(const Bytes& block, int i) {
  const Pair pair = pair_of(block, i / 32);
  const int quant = bits_of(block[16 + i / 64 * 32 + i % 32], i / 32 % 2 * 4, 4);
  return f16_at(block, 0) * pair.scale * quant - f16_at(block, 2) * pair.min;
}

double q5k_weight(const Bytes& block, int i) {
  const Pair pair = pair_of(block, i / 32);
  const int low = bits_of(block[48 + i / 64 * 32 + i % 32], i / 32 % 2 * 4, 4);
  const int quant = low + 16 * bits_of(block[16 + i % 32], i / 32, 1);
  return f16_at(block, 0) * pair.scale * quant - f16_at(block, 2) * pair.min;
}

double q6k_weight(const Bytes& block, int i) {
  const int half = i / 128, quarter = i % 128 / 32, l = i % 32;
  const int low = bits_of(block[64 * half + 32 * (quarter % 2) + l], quarter / 2 * 4, 4);
  const int high = bits_of(block[128 + 32 * half + l], 2 * quarter, 2);
  const auto scale = static_cast<std::int8_t>(block[192 + i / 16]);
  return f16_at(block, 208) * scale * (low + 16 * high - 32);
}

double q80_weight(const Bytes& block, int i) {
  return f16_at(block, 0) * static_cast<std::int8_t>(block[2 + i]);
}

/// Nibble of a block of 32: weight i in byte at + i % 16.
int nibble(const Bytes& block, std::size_t at, int i) {
  return bits_of(block[at + static_cast<std::size_t>(i % 16)], i / 16 * 4, 4);
}

double q40_weight(const Bytes& block, int i) {
  return f16_at(block, 0) * (nibble(block, 2, i) - 8);
}

double q41_weight(const Bytes& block, int i) {
  return f16_at(block, 0) * nibble(block, 4, i) + f16_at(block, 2);
}

double q50_weight(const Bytes& block, int i) {
  return f16_at(block, 0) * (nibble(block, 6, i) + 16 * bits_of(block[2 + i / 8], i % 8, 1) - 16);
}

double q51_weight(const Bytes& block, int i) {
  return f16_at(block, 0) * (nibble(block, 8, i) + 16 * bits_of(block[4 + i / 8], i % 8, 1)) + f16_at(block, 2);
}

double iq4_value(int code) {
  constexpr int kPositive[8] = {1, 13, 25, 38, 53, 69, 89, 113}, kNegative[8] = {127, 104, 83, 65, 49, 35, 22, 10};
  return code < 8 ? -kNegative[code] : kPositive[code - 8];
}

double iq4nl_weight(const Bytes& block, int i) {
  return f16_at(block, 0) * iq4_value(nibble(block, 2, i));
}

double iq4xs_weight(const Bytes& block, int i) {
  const int b = i / 32;
  const int scale = bits_of(block[4 + b / 2], b % 2 * 4, 4) + 16 * bits_of(block[2 + b / 4], b % 4 * 2, 2);
  return f16_at(block, 0) * (scale - 32) * iq4_value(nibble(block, static_cast<std::size_t>(8 + 16 * b), i % 32));
}

double q3k_weight(const Bytes& block, int i) {
  const int half = i / 128, quarter = i % 128 / 32, l = i % 32, b = i / 16;
  const int scale = bits_of(block[96 + b % 8], b / 8 * 4, 4) + 16 * bits_of(block[104 + b % 4], b / 4 * 2, 2);
  const int quant = bits_of(block[32 + 32 * half + l], 2 * quarter, 2) + 4 * bits_of(block[l], 4 * half + quarter, 1);
  return f16_at(block, 108) * (scale - 32) * (quant - 4);
}

double q2k_weight(const Bytes& block, int i) {
  const int half = i / 128, quarter = i % 128 / 32, l = i % 32, b = i / 16;
  return f16_at(block, 80) * bits_of(block[b], 0, 4) * bits_of(block[16 + 32 * half + l], 2 * quarter, 2) -
         f16_at(block, 82) * bits_of(block[b], 4, 4);
}

struct Fill {
  std::size_t begin, end;
  std::uint8_t byte;
};

struct Format {
  TensorType type;
  std::function<double(const Bytes&, int)> weight;
  std::vector<std::size_t> steps;  ///< where the f16 numbers lie
  std::size_t quants_begin, quants_end;
  std::vector<Fill> unit = {};  ///< bytes that make every scale 1
};

const std::vector<Format>& formats() {
  static const std::vector<Format> kFormats = {
      {TensorType::kQ4_0, q40_weight, {0}, 2, 18},
      {TensorType::kQ4_1, q41_weight, {0, 2}, 4, 20},
      {TensorType::kQ5_0, q50_weight, {0}, 2, 22},
      {TensorType::kQ5_1, q51_weight, {0, 2}, 4, 24},
      {TensorType::kQ8_0, q80_weight, {0}, 2, 34},
      {TensorType::kQ2K, q2k_weight, {80, 82}, 16, 80, {{0, 16, 1}}},
      {TensorType::kQ3K, q3k_weight, {108}, 0, 96, {{96, 104, 0x11}, {104, 108, 0xAA}}},
      {TensorType::kQ4K, q4k_weight, {0, 2}, 16, 144, {{4, 16, 1}}},
      {TensorType::kQ5K, q5k_weight, {0, 2}, 16, 176, {{4, 16, 1}}},
      {TensorType::kQ6K, q6k_weight, {208}, 0, 192, {{192, 208, 1}}},
      {TensorType::kIq4Nl, iq4nl_weight, {0}, 2, 18},
      {TensorType::kIq4Xs, iq4xs_weight, {0}, 8, 136, {{2, 4, 0xAA}, {4, 8, 0x11}}}};
  return kFormats;
}

TEST(BlockDequantise, EveryTypeOfBlocksHasAByteMapHere) {
  for (const TensorType type : kWeightTypes) {
    EXPECT_EQ(std::ranges::count(formats(), type, &Format::type), block_size(type) > 1) << type_name(type);
  }
}

std::vector<float> dequantise(TensorType type, const Bytes& bytes) {
  const auto blocks = static_cast<std::int64_t>(bytes.size()) / block_bytes(type);
  std::vector<float> values(static_cast<std::size_t>(blocks * block_size(type)));
  dequantise_row(type, std::as_bytes(std::span(bytes)), values);
  return values;
}

std::vector<float> dequantise_slowly(const Format& format, const Bytes& bytes) {
  const auto block_size_bytes = static_cast<std::size_t>(block_bytes(format.type));
  std::vector<float> values;
  for (std::size_t at = 0; at < bytes.size(); at += block_size_bytes) {
    const Bytes block(bytes.begin() + static_cast<std::ptrdiff_t>(at),
                      bytes.begin() + static_cast<std::ptrdiff_t>(at + block_size_bytes));
    for (int i = 0; i < block_size(format.type); ++i) values.push_back(static_cast<float>(format.weight(block, i)));
  }
  return values;
}

/// Any bytes whose steps are finite: exponents of all ones are lowered.
Bytes random_bytes(const Format& format, std::size_t n_block, std::uint32_t seed) {
  const auto block_size_bytes = static_cast<std::size_t>(block_bytes(format.type));
  Bytes bytes(n_block * block_size_bytes);
  std::mt19937 random(seed);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
  for (std::size_t block = 0; block < n_block; ++block) {
    for (const std::size_t step : format.steps) {
      std::uint8_t& high = bytes[block * block_size_bytes + step + 1];
      if ((high & 0x7C) == 0x7C) high &= 0xBF;
    }
  }
  return bytes;
}

RC_GTEST_PROP(BlockDequantise, EqualsTheByteMapsOnAnyBlock, ()) {
  const auto seed = *rc::gen::arbitrary<std::uint32_t>();
  for (const Format& format : formats()) {
    const Bytes bytes = random_bytes(format, 3, seed);
    RC_ASSERT(dequantise(format.type, bytes) == dequantise_slowly(format, bytes));
  }
}

TEST(BlockDequantise, EveryBitOfTheQuantsBelongsToOneWeight) {
  for (const Format& format : formats()) {
    Bytes block = random_bytes(format, 1, 5);
    // Unit scales: each weight is its quant, times a step of 1, with no minimum.
    for (const std::size_t step : format.steps) block[step] = 0, block[step + 1] = step == format.steps[0] ? 0x3C : 0;
    for (const Fill& fill : format.unit) {
      for (std::size_t at = fill.begin; at < fill.end; ++at) block[at] = fill.byte;
    }
    const bool is_linear = format.type != TensorType::kIq4Nl && format.type != TensorType::kIq4Xs;
    const std::vector<float> before = dequantise(format.type, block);
    std::vector<int> n_bits(before.size());
    for (std::size_t bit = format.quants_begin * 8; bit < format.quants_end * 8; ++bit) {
      block[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
      const std::vector<float> after = dequantise(format.type, block);
      block[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
      std::size_t changed = 0;
      for (std::size_t i = 0; i < after.size(); ++i) {
        if (after[i] == before[i]) continue;
        ++changed;
        ++n_bits[i];
        if (!is_linear) continue;
        EXPECT_EQ(std::exp2(std::round(std::log2(std::abs(after[i] - before[i])))), std::abs(after[i] - before[i]));
      }
      EXPECT_EQ(changed, 1u) << type_name(format.type) << " bit " << bit;
    }
    const auto bits_each = static_cast<int>((format.quants_end - format.quants_begin) * 8 / before.size());
    EXPECT_EQ(std::ranges::count(n_bits, bits_each), static_cast<std::ptrdiff_t>(n_bits.size()));
  }
}

// Worked by hand from the byte map.
TEST(BlockDequantise, Q4KKnownAnswer) {
  Bytes block(144);
  block[1] = 0x38;                  // d = 0.5
  block[3] = 0x34;                  // dmin = 0.25
  block[4] = 0b10'000011;           // scale 0 = 3, high bits of scale 4 = 2
  block[8] = 0b01'000101;           // min 0 = 5, high bits of min 4 = 1
  block[12] = 0b0110'1001;          // low bits: scale 4 = 9 + 32, min 4 = 6 + 16
  block[7] = block[11] = 0b111111;  // scale 3 = min 3 = 63
  block[16] = 0xA7;                 // weight 0 = 7, weight 32 = 10
  block[16 + 32 + 31] = 0xF0;       // weight 95 = 0, weight 127 = 15
  block[16 + 64] = 0x02;            // weight 128 = 2
  const std::vector<float> values = dequantise(TensorType::kQ4K, block);
  EXPECT_EQ(values[0], 0.5f * 3 * 7 - 0.25f * 5);
  EXPECT_EQ(values[1], -0.25f * 5);
  EXPECT_EQ(values[32], 0.0f);  // sub-block 1 has no scale and no minimum
  EXPECT_EQ(values[127], 0.5f * 63 * 15 - 0.25f * 63);
  EXPECT_EQ(values[95], 0.0f);
  EXPECT_EQ(values[128], 0.5f * 41 * 2 - 0.25f * 22);
  EXPECT_EQ(values[129], -0.25f * 22);
  EXPECT_EQ(values[255], 0.0f);
}

TEST(BlockDequantise, Q5KKnownAnswer) {
  Bytes block(176);
  block[1] = 0x3C;               // d = 1
  block[3] = 0x40;               // dmin = 2
  block[4 + 1] = 7;              // scale 1 = 7
  block[8 + 1] = 1;              // min 1 = 1
  block[12 + 3] = 0x0B;          // scale 7 = 11
  block[16 + 31] = 0b1000'0010;  // bit 4 of the weights 63 and 255
  block[48 + 31] = 0x50;         // weight 63 = 5 + 16
  block[48 + 96 + 31] = 0x60;    // weight 255 = 6 + 16
  const std::vector<float> values = dequantise(TensorType::kQ5K, block);
  EXPECT_EQ(values[63], 7.0f * 21 - 2);
  EXPECT_EQ(values[62], -2.0f);
  EXPECT_EQ(values[255], 11.0f * 22);
  EXPECT_EQ(values[31], 0.0f);
}

TEST(BlockDequantise, Q6KKnownAnswer) {
  Bytes block(210);
  block[209] = 0x3C;            // d = 1
  block[192] = 2;               // scale of the weights 0 to 15
  block[192 + 13] = 0xFD;       // -3, of the weights 208 to 223
  block[0] = 0x05;              // weight 0: low bits 5
  block[128] = 0x03;            // weight 0: high bits 3
  block[64 + 16] = 0xE0;        // half 1, quarter 2, l = 16, weight 208: low bits 14
  block[128 + 32 + 16] = 0x10;  // weight 208: high bits 1
  const std::vector<float> values = dequantise(TensorType::kQ6K, block);
  EXPECT_EQ(values[0], 2.0f * (53 - 32));
  EXPECT_EQ(values[1], 2.0f * -32);
  EXPECT_EQ(values[208], -3.0f * (30 - 32));
  EXPECT_EQ(values[209], -3.0f * -32);
  EXPECT_EQ(values[16], 0.0f);
}

TEST(BlockDequantise, PlainTypesKnownAnswers) {
  EXPECT_EQ(dequantise(TensorType::kBf16, {0x80, 0x3F, 0x20, 0xC1}), (std::vector<float>{1.0f, -10.0f}));
  EXPECT_EQ(dequantise(TensorType::kF16, {0x00, 0x3C, 0x00, 0xC9, 0x01, 0x00}),
            (std::vector<float>{1.0f, -10.0f, 0x1p-24f}));
  EXPECT_EQ(dequantise(TensorType::kF32, {0x00, 0x00, 0x20, 0xC1}), std::vector<float>{-10.0f});
  EXPECT_EQ(dequantise(TensorType::kQ8_0, Bytes(34, 0x40))[31], to_float(F16{0x4040}) * 64);
}

TEST(BlockDequantise, DoesNotDependOnTheAddress) {
  for (const Format& format : formats()) {
    const Bytes bytes = random_bytes(format, 2, 9);
    Bytes shifted(bytes.size() + 1);
    std::ranges::copy(bytes, shifted.begin() + 1);
    std::vector<float> values(static_cast<std::size_t>(2 * block_size(format.type)));
    dequantise_row(format.type, std::as_bytes(std::span(shifted)).subspan(1), values);
    EXPECT_EQ(values, dequantise(format.type, bytes)) << type_name(format.type);
  }
}

TEST(BlockDequantise, RefusesWrongSizesAndTypes) {
  std::vector<std::byte> bytes(144);
  std::vector<float> values(256);
  EXPECT_THROW(dequantise_row(TensorType::kQ4K, std::span(bytes).first(143), values), std::invalid_argument);
  EXPECT_THROW(dequantise_row(TensorType::kQ4K, bytes, std::span(values).first(255)), std::invalid_argument);
  EXPECT_THROW(dequantise_row(TensorType::kI8, bytes, std::span(values).first(144)), std::invalid_argument);
  EXPECT_THROW(dequantise_row(TensorType{18}, std::span(bytes).first(98), values), std::invalid_argument) << "IQ3_XXS";
  EXPECT_NO_THROW(dequantise_row(TensorType::kQ4K, bytes, values));
}

// ---- A peer's files: the same weights, encoded by its Q4_K and its Q6_K.

double relative_rms(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    error += std::pow(static_cast<double>(a[i]) - b[i], 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(error / norm);
}

Bytes bytes_of(const GgufTensor& tensor) {
  Bytes bytes;
  for (const std::byte byte : tensor.data) bytes.push_back(std::to_integer<std::uint8_t>(byte));
  return bytes;
}

// The peer's encoders lose about 7 % and 2 %; a dequantiser that puts a weight or a scale in a wrong place loses more
// than 100 %, as the control shows for two neighbouring nibbles.
TEST(BlockDequantise, APeersQ4KAndQ6KOfTheSameWeightsAgree) {
  const GgufFile q4 = GgufFile::open(kData / "tiny/tiny-a-Q4_K_M.gguf");
  const GgufFile q6 = GgufFile::open(kData / "tiny/tiny-a-Q6_K.gguf");
  int compared = 0;
  for (const GgufTensor& tensor : q4.tensors()) {
    const GgufTensor& twin = q6.tensor(tensor.name);
    if (tensor.type != TensorType::kQ4K || twin.type != TensorType::kQ6K) continue;
    std::vector<float> coarse = dequantise(tensor.type, bytes_of(tensor));
    const std::vector<float> fine = dequantise(twin.type, bytes_of(twin));
    EXPECT_LE(relative_rms(coarse, fine), 0.09) << tensor.name;
    for (std::size_t i = 0; i < coarse.size(); i += 64) {
      std::swap_ranges(coarse.begin() + static_cast<std::ptrdiff_t>(i),
                       coarse.begin() + static_cast<std::ptrdiff_t>(i + 32),
                       coarse.begin() + static_cast<std::ptrdiff_t>(i + 32));
    }
    EXPECT_GT(relative_rms(coarse, fine), 1.0) << tensor.name;
    ++compared;
  }
  EXPECT_GE(compared, 20);
}

TEST(BlockDequantise, EqualsTheByteMapsOnAPeersTensors) {
  int compared = 0;
  for (const char* name : {"tiny/tiny-a-Q4_K_M.gguf", "tiny/tiny-a-Q6_K.gguf", "nano/nano-Q4_K_M.gguf"}) {
    const GgufFile file = GgufFile::open(kData / name);
    for (const GgufTensor& tensor : file.tensors()) {
      const auto format = std::ranges::find(formats(), tensor.type, &Format::type);
      if (format == formats().end()) continue;
      const std::span<const std::byte> row = tensor.row(tensor.rows() / 2);
      Bytes bytes;
      for (const std::byte byte : row) bytes.push_back(std::to_integer<std::uint8_t>(byte));
      ASSERT_EQ(dequantise(tensor.type, bytes), dequantise_slowly(*format, bytes)) << name << ' ' << tensor.name;
      ++compared;
    }
  }
  EXPECT_GE(compared, 100);
}

TEST(BlockFormats, PackedScaleMinsKeepEachPairApart) {
  PackedScaleMins packed{};
  std::mt19937 random(3);
  ScaleMin expected[8] = {};
  for (int step = 0; step < 1000; ++step) {
    const int b = static_cast<int>(random() % 8);
    expected[b] = {static_cast<std::uint8_t>(random() % 64), static_cast<std::uint8_t>(random() % 64)};
    packed.set(b, expected[b]);
    for (int other = 0; other < 8; ++other) ASSERT_EQ(packed.get(other), expected[other]) << step;
  }
}

}  // namespace
}  // namespace gemma4

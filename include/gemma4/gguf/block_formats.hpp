// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "gemma4/float16.hpp"
#include "gemma4/platform.hpp"

/// Byte maps of the quantised blocks: where each bit of a weight lies. Ranges are [begin:end) in bytes of the block,
/// and "nibble 0" is the low one. Source: the block structs of the ggml project, which wrote these formats first.
/// Arithmetic lives elsewhere: block_dequantise.hpp and block_quantise.hpp on the host, the weight kernels on the
/// device.
namespace gemma4 {

/// Scale and minimum of one sub-block of Q4_K and Q5_K, 6 bits each.
struct ScaleMin {
  std::uint8_t scale;
  std::uint8_t min;
  bool operator==(const ScaleMin&) const = default;
};

/// Eight pairs (scale s, minimum m) of 6 bits in 12 bytes, for the sub-blocks 0 to 7:
///   [0:4)   byte j:     bits 0-5 s[j],           bits 6-7 the high two bits of s[j+4]
///   [4:8)   byte 4+j:   bits 0-5 m[j],           bits 6-7 the high two bits of m[j+4]
///   [8:12)  byte 8+j:   bits 0-3 s[j+4] low four, bits 4-7 m[j+4] low four      (j = 0..3)
struct PackedScaleMins {
  std::uint8_t bytes[12];

  [[nodiscard]] GEMMA4_HD constexpr ScaleMin get(int sub_block) const {
    const int j = sub_block & 3;
    const unsigned s = bytes[j];
    const unsigned m = bytes[4 + j];
    if (sub_block < 4) return {static_cast<std::uint8_t>(s & 63u), static_cast<std::uint8_t>(m & 63u)};
    const unsigned low = bytes[8 + j];
    return {static_cast<std::uint8_t>((low & 15u) | ((s >> 6) << 4)),
            static_cast<std::uint8_t>((low >> 4) | ((m >> 6) << 4))};
  }

  /// Stores a pair whose members are below 64. Each call replaces only the bits of its own sub-block.
  GEMMA4_HD constexpr void set(int sub_block, ScaleMin pair) {
    const int j = sub_block & 3;
    if (sub_block < 4) {
      bytes[j] = static_cast<std::uint8_t>((bytes[j] & 0xC0u) | pair.scale);
      bytes[4 + j] = static_cast<std::uint8_t>((bytes[4 + j] & 0xC0u) | pair.min);
    } else {
      bytes[j] = static_cast<std::uint8_t>((bytes[j] & 0x3Fu) | ((pair.scale >> 4) << 6));
      bytes[4 + j] = static_cast<std::uint8_t>((bytes[4 + j] & 0x3Fu) | ((pair.min >> 4) << 6));
      bytes[8 + j] = static_cast<std::uint8_t>((pair.scale & 15u) | ((pair.min & 15u) << 4));
    }
  }
};
static_assert(sizeof(PackedScaleMins) == 12);

/// Q4_K: 256 weights in 144 bytes (4.5 bits a weight), eight sub-blocks of 32 with a scale and a minimum each.
///   [0:2)     d      f16, step of the scales
///   [2:4)     dmin   f16, step of the minima
///   [4:16)    scales 8 x (6 + 6) bits, see PackedScaleMins
///   [16:144)  quants 4 bits: weight 64c + l in nibble 0, weight 64c + 32 + l in nibble 1 of byte 16 + 32c + l
/// Weight i of sub-block b = i / 32 is (d * scale[b]) * q[i] - dmin * min[b].
struct Q4KBlock {
  static constexpr std::int64_t kSize = 256;
  static constexpr int kSubBlocks = 8;
  static constexpr int kSubBlockSize = 32;
  F16 d;
  F16 dmin;
  PackedScaleMins scales;
  std::uint8_t quants[128];
};
static_assert(sizeof(Q4KBlock) == 144 && std::is_trivially_copyable_v<Q4KBlock>);

/// Q5_K: 256 weights in 176 bytes (5.5 bits a weight); Q4_K with a fifth bit for each weight.
///   [0:2)     d      f16, step of the scales
///   [2:4)     dmin   f16, step of the minima
///   [4:16)    scales 8 x (6 + 6) bits, see PackedScaleMins
///   [16:48)   high   bit 4 of the quants: weight 32b + l in bit b of byte 16 + l
///   [48:176)  low    bits 0-3 of the quants: weight 64c + l in nibble 0, 64c + 32 + l in nibble 1 of byte 48 + 32c + l
/// Weight i of sub-block b = i / 32 is (d * scale[b]) * q[i] - dmin * min[b].
struct Q5KBlock {
  static constexpr std::int64_t kSize = 256;
  static constexpr int kSubBlocks = 8;
  static constexpr int kSubBlockSize = 32;
  F16 d;
  F16 dmin;
  PackedScaleMins scales;
  std::uint8_t high[32];
  std::uint8_t low[128];
};
static_assert(sizeof(Q5KBlock) == 176 && std::is_trivially_copyable_v<Q5KBlock>);

/// Q6_K: 256 weights in 210 bytes (6.5625 bits a weight), sixteen sub-blocks of 16 with a signed scale each.
/// The halves h = 0, 1 hold 128 weights, in four quarters r = 0..3 of 32:
///   [0:128)    low    bits 0-3: weight 128h + 32r + l in nibble r / 2 of byte 64h + 32 (r % 2) + l
///   [128:192)  high   bits 4-5: weight 128h + 32r + l in bits 2r, 2r + 1 of byte 128 + 32h + l
///   [192:208)  scales i8, one for each 16 weights in order
///   [208:210)  d      f16, step of the scales
/// Weight i of sub-block b = i / 16 is (d * scale[b]) * (q[i] - 32).
struct Q6KBlock {
  static constexpr std::int64_t kSize = 256;
  static constexpr int kSubBlocks = 16;
  static constexpr int kSubBlockSize = 16;
  static constexpr int kOffset = 32;  ///< what a stored quant holds for the value zero
  std::uint8_t low[128];
  std::uint8_t high[64];
  std::int8_t scales[16];
  F16 d;
};
static_assert(sizeof(Q6KBlock) == 210 && std::is_trivially_copyable_v<Q6KBlock>);

/// Q8_0: 32 weights in 34 bytes (8.5 bits a weight).
///   [0:2)   d      f16, the step
///   [2:34)  quants i8
/// Weight i is d * q[i].
struct Q80Block {
  static constexpr std::int64_t kSize = 32;
  F16 d;
  std::int8_t quants[32];
};
static_assert(sizeof(Q80Block) == 34 && std::is_trivially_copyable_v<Q80Block>);

/// Q4_0: 32 weights in 18 bytes (4.5 bits a weight).
///   [0:2)   d      f16, the step
///   [2:18)  quants 4 bits: weight l in nibble 0, weight 16 + l in nibble 1 of byte 2 + l
/// Weight i is d * (q[i] - 8).
struct Q40Block {
  static constexpr std::int64_t kSize = 32;
  static constexpr int kOffset = 8;  ///< what a stored quant holds for the value zero
  F16 d;
  std::uint8_t quants[16];
};
static_assert(sizeof(Q40Block) == 18 && std::is_trivially_copyable_v<Q40Block>);

/// Q4_1: 32 weights in 20 bytes (5 bits a weight).
///   [0:2)   d      f16, the step
///   [2:4)   m      f16, the value of the quant zero
///   [4:20)  quants 4 bits: weight l in nibble 0, weight 16 + l in nibble 1 of byte 4 + l
/// Weight i is d * q[i] + m.
struct Q41Block {
  static constexpr std::int64_t kSize = 32;
  F16 d;
  F16 m;
  std::uint8_t quants[16];
};
static_assert(sizeof(Q41Block) == 20 && std::is_trivially_copyable_v<Q41Block>);

/// Q5_0: 32 weights in 22 bytes (5.5 bits a weight); Q4_0 with a fifth bit for each weight.
///   [0:2)   d      f16, the step
///   [2:6)   high   bit 4 of the quants: weight i in bit i % 8 of byte 2 + i / 8
///   [6:22)  low    bits 0-3 of the quants: weight l in nibble 0, weight 16 + l in nibble 1 of byte 6 + l
/// Weight i is d * (q[i] - 16).
struct Q50Block {
  static constexpr std::int64_t kSize = 32;
  static constexpr int kOffset = 16;  ///< what a stored quant holds for the value zero
  F16 d;
  std::uint8_t high[4];
  std::uint8_t low[16];
};
static_assert(sizeof(Q50Block) == 22 && std::is_trivially_copyable_v<Q50Block>);

/// Q5_1: 32 weights in 24 bytes (6 bits a weight); Q4_1 with a fifth bit for each weight.
///   [0:2)   d      f16, the step
///   [2:4)   m      f16, the value of the quant zero
///   [4:8)   high   bit 4 of the quants: weight i in bit i % 8 of byte 4 + i / 8
///   [8:24)  low    bits 0-3 of the quants: weight l in nibble 0, weight 16 + l in nibble 1 of byte 8 + l
/// Weight i is d * q[i] + m.
struct Q51Block {
  static constexpr std::int64_t kSize = 32;
  F16 d;
  F16 m;
  std::uint8_t high[4];
  std::uint8_t low[16];
};
static_assert(sizeof(Q51Block) == 24 && std::is_trivially_copyable_v<Q51Block>);

/// The values of the 4-bit codes of IQ4_NL and IQ4_XS: a fixed table, denser near zero, where weights are.
/// Not for the device, which keeps a copy where its threads can reach it.
inline constexpr std::int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                               1,    13,   25,  38,  53,  69,  89,  113};

/// IQ4_NL: 32 weights in 18 bytes (4.5 bits a weight); Q4_0 whose quants are indices into kIq4Values.
///   [0:2)   d      f16, the step
///   [2:18)  codes  4 bits: weight l in nibble 0, weight 16 + l in nibble 1 of byte 2 + l
/// Weight i is d * kIq4Values[code[i]].
struct Iq4NlBlock {
  static constexpr std::int64_t kSize = 32;
  F16 d;
  std::uint8_t codes[16];
};
static_assert(sizeof(Iq4NlBlock) == 18 && std::is_trivially_copyable_v<Iq4NlBlock>);

/// IQ4_XS: 256 weights in 136 bytes (4.25 bits a weight), eight sub-blocks of 32 with a scale of 6 bits each.
///   [0:2)    d            f16, step of the scales
///   [2:4)    scales_high  bits 4-5 of the scales: scale b in bits 2 (b % 4) and up of byte 2 + b / 4
///   [4:8)    scales_low   bits 0-3 of the scales: scale b in nibble b % 2 of byte 4 + b / 2
///   [8:136)  codes        4 bits: weight 32b + l in nibble 0, weight 32b + 16 + l in nibble 1 of byte 8 + 16b + l
/// Weight i of sub-block b = i / 32 is (d * (scale[b] - 32)) * kIq4Values[code[i]].
struct Iq4XsBlock {
  static constexpr std::int64_t kSize = 256;
  static constexpr int kSubBlocks = 8;
  static constexpr int kSubBlockSize = 32;
  static constexpr int kScaleOffset = 32;  ///< what a stored scale holds for the value zero
  F16 d;
  std::uint8_t scales_high[2];
  std::uint8_t scales_low[4];
  std::uint8_t codes[128];

  /// Scale of a sub-block, without its offset: -32 to 31.
  [[nodiscard]] GEMMA4_HD constexpr int scale(int sub_block) const {
    const int low = scales_low[sub_block / 2] >> 4 * (sub_block % 2) & 15;
    const int high = scales_high[sub_block / 4] >> 2 * (sub_block % 4) & 3;
    return (low | high << 4) - kScaleOffset;
  }
};
static_assert(sizeof(Iq4XsBlock) == 136 && std::is_trivially_copyable_v<Iq4XsBlock>);

/// Q3_K: 256 weights in 110 bytes (3.4375 bits a weight), sixteen sub-blocks of 16 with a scale of 6 bits each.
/// The halves h = 0, 1 hold 128 weights, in four quarters r = 0..3 of 32:
///   [0:32)     high   bit 2 of the quants: weight 128h + 32r + l in bit 4h + r of byte l
///   [32:96)    low    bits 0-1: weight 128h + 32r + l in bits 2r, 2r + 1 of byte 32 + 32h + l
///   [96:104)   scales bits 0-3 of the scales: scale b in nibble b / 8 of byte 96 + b % 8
///   [104:108)  scales bits 4-5 of the scales: scale b in bits 2 (b / 4) and up of byte 104 + b % 4
///   [108:110)  d      f16, step of the scales
/// Weight i of sub-block b = i / 16 is (d * (scale[b] - 32)) * (q[i] - 4).
struct Q3KBlock {
  static constexpr std::int64_t kSize = 256;
  static constexpr int kSubBlocks = 16;
  static constexpr int kSubBlockSize = 16;
  static constexpr int kOffset = 4;        ///< what a stored quant holds for the value zero
  static constexpr int kScaleOffset = 32;  ///< what a stored scale holds for the value zero
  std::uint8_t high[32];
  std::uint8_t low[64];
  std::uint8_t scales[12];
  F16 d;

  /// Scale of a sub-block, without its offset: -32 to 31.
  [[nodiscard]] GEMMA4_HD constexpr int scale(int sub_block) const {
    const int low_bits = scales[sub_block % 8] >> 4 * (sub_block / 8) & 15;
    const int high_bits = scales[8 + sub_block % 4] >> 2 * (sub_block / 4) & 3;
    return (low_bits | high_bits << 4) - kScaleOffset;
  }
};
static_assert(sizeof(Q3KBlock) == 110 && std::is_trivially_copyable_v<Q3KBlock>);

/// Q2_K: 256 weights in 84 bytes (2.625 bits a weight), sixteen sub-blocks of 16 with a scale and a minimum of 4 bits.
/// The halves h = 0, 1 hold 128 weights, in four quarters r = 0..3 of 32:
///   [0:16)   scales byte b: nibble 0 scale[b], nibble 1 min[b]
///   [16:80)  quants 2 bits: weight 128h + 32r + l in bits 2r, 2r + 1 of byte 16 + 32h + l
///   [80:82)  d      f16, step of the scales
///   [82:84)  dmin   f16, step of the minima
/// Weight i of sub-block b = i / 16 is (d * scale[b]) * q[i] - dmin * min[b].
struct Q2KBlock {
  static constexpr std::int64_t kSize = 256;
  static constexpr int kSubBlocks = 16;
  static constexpr int kSubBlockSize = 16;
  std::uint8_t scales[16];
  std::uint8_t quants[64];
  F16 d;
  F16 dmin;
};
static_assert(sizeof(Q2KBlock) == 84 && std::is_trivially_copyable_v<Q2KBlock>);

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "gemma4/error.hpp"
#include "gemma4/gguf/block_formats.hpp"
#include "gemma4/gguf/gguf.hpp"
#include "gemma4/plan/packed_rows.hpp"
#include "gemma4/platform.hpp"
#include "gemma4/quantized_matrix.hpp"

/// How quantised weights lie in device memory: the bits of the file, permuted within a row so that a warp loads them in
/// whole 16-byte pieces and each lane gets the 32 weights of one group.
///
/// A row is a run of chunks of `chunk_groups(cols)` groups, the last one possibly shorter; each chunk stands for itself
/// and has a multiple of 16 bytes, so that one bulk copy brings it. For G groups in a chunk and group g in it:
///   Q4_K    [0:16G) codes of g at 16g | [16G:18G) meta, 16 B for each 8 groups
///   Q5_K    [0:16G) codes | [16G:20G) fifth bits of g at 4g | [20G:22G) meta
///   Q6_K    [0:16G) codes | [16G:24G) upper bits of g at 8g | [24G:26G) i8 scales of g at 2g |
///           [26G:26.25G) f16 d of 8 groups
///   Q8_0    [0:16G) weights 0-15 of g | [16G:32G) weights 16-31 | [32G:34G) f16 d
///   Q4_0    [0:16G) codes | [16G:18G) f16 d of g at 2g
///   Q4_1    [0:16G) codes | [16G:20G) f16 d and f16 m of g at 4g
///   Q5_0    [0:16G) codes | [16G:20G) fifth bits | [20G:22G) f16 d
///   Q5_1    [0:16G) codes | [16G:20G) fifth bits | [20G:24G) f16 d and f16 m
///   IQ4_NL  [0:16G) table codes of g at 16g | [16G:18G) f16 d
///   IQ4_XS  [0:16G) table codes | [16G:17G) for each 8 groups the first 8 bytes of their block: d and the scales
///   Q3_K    [0:8G) codes of three bits, two words of g at 8g | [8G:12G) their third word at 4g |
///           [12G:13G) byte g: bits 0-3 of two scales | [13G:13.5G) nibble g: bits 4-5 of two scales |
///           [13.5G:13.75G) f16 d of 8 groups
///   Q2_K    [0:8G) codes of two bits of g at 8g | [8G:10G) bytes 2g and 2g + 1: scale and minimum, as in the file |
///           [10G:10.5G) f16 d and f16 dmin of 8 groups
/// and zeros up to a multiple of 16.
///   codes: byte b of 16 holds bits 0-3 of weight b in nibble 0 and of weight 16 + b in nibble 1
///   fifth bits: byte e of 4 holds, in bit j, that of weight 4j + e, in bit 4 + j that of weight 16 + 4j + e
///   upper bits (Q6_K): bytes e and 4 + e of 8 hold, in bits 2j and 2j + 1, those of weights 4j + e and 16 + 4j + e
///   codes of two bits: as the upper bits of Q6_K
///   table codes: word j of 4 holds, in nibbles e and 4 + e, those of weights 4j + e and 16 + 4j + e: half a word is
///         what a byte permutation takes
///   codes of three bits: byte e of word 0 holds weight e from bit 0, weight 4 + e from bit 3, bits 0-1 of weight
///         8 + e from bit 6; word 1 the same, 16 weights further on; word 2 weight 12 + e from bit 0, weight 28 + e
///         from bit 3, bit 2 of weights 8 + e and 24 + e in bits 6 and 7
///   meta: [0:2) f16 d | [2:4) f16 dmin | [4:12) byte j: scale j in bits 0-5, bits 0-1 of minimum j in bits 6-7 |
///         [12:16) nibble j: bits 2-5 of minimum j
/// BF16, F16 and F32 rows stay as they are. Bits a weight at 5376 and 21504 columns: those of the file, but for the
/// padding of K-quants that are no multiple of 16: Q6_K 6.571 (6.5625), IQ4_XS 4.262 (4.25), Q3_K 3.452 (3.4375),
/// Q2_K 2.643 (2.625).
namespace gemma4::cuda {

using gemma4::chunk_bytes;
using gemma4::chunk_groups;
using gemma4::groups_of_chunk;
using gemma4::is_packed_type;
using gemma4::kGroup;
using gemma4::kMaxChunkGroups;
using gemma4::packed_row_bytes;
using gemma4::row_chunks;
using gemma4::row_groups;

/// A weight matrix in device memory, in the layout above. Borrowed.
struct PackedMatrix {
  TensorType type = TensorType::kF32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  const std::byte* data = nullptr;

  [[nodiscard]] std::int64_t row_bytes() const { return packed_row_bytes(type, cols); }
  [[nodiscard]] std::int64_t bytes() const { return rows * row_bytes(); }
};

namespace detail {

/// Nibble n (0 or 1) of a byte.
[[nodiscard]] GEMMA4_HD constexpr unsigned nibble(unsigned byte, int n) {
  return (byte >> (4 * n)) & 15u;
}

/// Where weight w of a group has its upper bits: 1 bit of 32 (Q5_K) or 2 bits of 64 (Q6_K); byte of the group, shift.
struct UpperPlace {
  int byte, shift;
};
[[nodiscard]] GEMMA4_HD constexpr UpperPlace q5_upper(int w) {
  return {w % 4, w / 16 * 4 + w % 16 / 4};
}
[[nodiscard]] GEMMA4_HD constexpr UpperPlace q6_upper(int w) {
  return {w / 16 * 4 + w % 4, 2 * (w % 16 / 4)};
}

GEMMA4_HD constexpr void put_f16(std::uint8_t* to, F16 value) {
  to[0] = static_cast<std::uint8_t>(value.bits & 0xFFu);
  to[1] = static_cast<std::uint8_t>(value.bits >> 8);
}
[[nodiscard]] GEMMA4_HD constexpr F16 get_f16(const std::uint8_t* from) {
  return {static_cast<std::uint16_t>(from[0] | (from[1] << 8))};
}

GEMMA4_HD constexpr void pack_meta(F16 d, F16 dmin, const PackedScaleMins& scales, std::uint8_t* meta) {
  put_f16(meta, d);
  put_f16(meta + 2, dmin);
  for (int j = 0; j < 8; ++j) {
    const ScaleMin pair = scales.get(j);
    meta[4 + j] = static_cast<std::uint8_t>(pair.scale | ((pair.min & 3u) << 6));
    const auto upper = static_cast<std::uint8_t>((pair.min >> 2) << (4 * (j % 2)));
    meta[12 + j / 2] = static_cast<std::uint8_t>(j % 2 == 0 ? upper : meta[12 + j / 2] | upper);
  }
}

GEMMA4_HD constexpr void unpack_meta(const std::uint8_t* meta, F16& d, F16& dmin, PackedScaleMins& scales) {
  d = get_f16(meta);
  dmin = get_f16(meta + 2);
  for (std::uint8_t& byte : scales.bytes) byte = 0;
  for (int j = 0; j < 8; ++j) {
    const unsigned upper = nibble(meta[12 + j / 2], j % 2);
    scales.set(j, {static_cast<std::uint8_t>(meta[4 + j] & 63u),
                   static_cast<std::uint8_t>((meta[4 + j] >> 6) | (upper << 2))});
  }
}

/// Blocks of 256 weights have 8 groups; `at` counts blocks within the chunk.
template <class TBlock>
struct BlockPacking;

template <>
struct BlockPacking<Q4KBlock> {
  GEMMA4_HD static constexpr void pack(const Q4KBlock& block, std::uint8_t* chunk, int groups, int at) {
    for (int g = 0; g < 8; ++g) {
      const std::uint8_t* const quants = block.quants + 32 * (g / 2);
      std::uint8_t* const codes = chunk + 16 * (8 * at + g);
      for (int b = 0; b < 16; ++b) {
        codes[b] = static_cast<std::uint8_t>(nibble(quants[b], g % 2) | (nibble(quants[16 + b], g % 2) << 4));
      }
    }
    pack_meta(block.d, block.dmin, block.scales, chunk + 16 * groups + 16 * at);
  }
  GEMMA4_HD static constexpr void unpack(const std::uint8_t* chunk, int groups, int at, Q4KBlock& block) {
    for (std::uint8_t& byte : block.quants) byte = 0;
    for (int w = 0; w < 256; ++w) {
      const unsigned quant = nibble(chunk[16 * (8 * at + w / 32) + w % 16], w % 32 / 16);
      block.quants[w / 64 * 32 + w % 32] |= static_cast<std::uint8_t>(quant << (4 * (w / 32 % 2)));
    }
    unpack_meta(chunk + 16 * groups + 16 * at, block.d, block.dmin, block.scales);
  }
};

template <>
struct BlockPacking<Q5KBlock> {
  GEMMA4_HD static constexpr void pack(const Q5KBlock& block, std::uint8_t* chunk, int groups, int at) {
    for (int g = 0; g < 8; ++g) {
      const std::uint8_t* const low = block.low + 32 * (g / 2);
      std::uint8_t* const codes = chunk + 16 * (8 * at + g);
      std::uint8_t* const fifth = chunk + 16 * groups + 4 * (8 * at + g);
      for (int b = 0; b < 16; ++b) {
        codes[b] = static_cast<std::uint8_t>(nibble(low[b], g % 2) | (nibble(low[16 + b], g % 2) << 4));
      }
      for (int b = 0; b < 4; ++b) fifth[b] = 0;
      for (int w = 0; w < 32; ++w) {
        const UpperPlace place = q5_upper(w);
        fifth[place.byte] |= static_cast<std::uint8_t>(((block.high[w] >> g) & 1u) << place.shift);
      }
    }
    pack_meta(block.d, block.dmin, block.scales, chunk + 20 * groups + 16 * at);
  }
  GEMMA4_HD static constexpr void unpack(const std::uint8_t* chunk, int groups, int at, Q5KBlock& block) {
    for (std::uint8_t& byte : block.low) byte = 0;
    for (std::uint8_t& byte : block.high) byte = 0;
    for (int w = 0; w < 256; ++w) {
      const int g = 8 * at + w / 32;
      const unsigned quant = nibble(chunk[16 * g + w % 16], w % 32 / 16);
      block.low[w / 64 * 32 + w % 32] |= static_cast<std::uint8_t>(quant << (4 * (w / 32 % 2)));
      const UpperPlace place = q5_upper(w % 32);
      const unsigned fifth = (chunk[16 * groups + 4 * g + place.byte] >> place.shift) & 1u;
      block.high[w % 32] |= static_cast<std::uint8_t>(fifth << (w / 32));
    }
    unpack_meta(chunk + 20 * groups + 16 * at, block.d, block.dmin, block.scales);
  }
};

template <>
struct BlockPacking<Q6KBlock> {
  /// Where weight w of the block has its bits in the file: byte of `low` and its nibble, byte of `high` and its shift.
  struct Place {
    int low, nibble, high, shift;
  };
  [[nodiscard]] GEMMA4_HD static constexpr Place place(int w) {
    const int half = w / 128, quarter = w % 128 / 32, l = w % 32;
    return {64 * half + 32 * (quarter % 2) + l, quarter / 2, 32 * half + l, 2 * quarter};
  }
  GEMMA4_HD static constexpr void pack(const Q6KBlock& block, std::uint8_t* chunk, int groups, int at) {
    for (int g = 0; g < 8; ++g) {
      std::uint8_t* const codes = chunk + 16 * (8 * at + g);
      std::uint8_t* const upper = chunk + 16 * groups + 8 * (8 * at + g);
      for (int b = 0; b < 16; ++b) codes[b] = 0;
      for (int b = 0; b < 8; ++b) upper[b] = 0;
      for (int w = 0; w < 32; ++w) {
        const Place from = place(32 * g + w);
        const UpperPlace to = q6_upper(w);
        codes[w % 16] |= static_cast<std::uint8_t>(nibble(block.low[from.low], from.nibble) << (4 * (w / 16)));
        upper[to.byte] |= static_cast<std::uint8_t>(((block.high[from.high] >> from.shift) & 3u) << to.shift);
      }
    }
    for (int j = 0; j < 16; ++j) chunk[24 * groups + 16 * at + j] = static_cast<std::uint8_t>(block.scales[j]);
    put_f16(chunk + 26 * groups + 2 * at, block.d);
  }
  GEMMA4_HD static constexpr void unpack(const std::uint8_t* chunk, int groups, int at, Q6KBlock& block) {
    for (std::uint8_t& byte : block.low) byte = 0;
    for (std::uint8_t& byte : block.high) byte = 0;
    for (int w = 0; w < 256; ++w) {
      const Place to = place(w);
      const UpperPlace from = q6_upper(w % 32);
      const int g = 8 * at + w / 32;
      const unsigned upper = (chunk[16 * groups + 8 * g + from.byte] >> from.shift) & 3u;
      block.low[to.low] |= static_cast<std::uint8_t>(nibble(chunk[16 * g + w % 16], w % 32 / 16) << (4 * to.nibble));
      block.high[to.high] |= static_cast<std::uint8_t>(upper << to.shift);
    }
    for (int j = 0; j < 16; ++j) block.scales[j] = static_cast<std::int8_t>(chunk[24 * groups + 16 * at + j]);
    block.d = get_f16(chunk + 26 * groups + 2 * at);
  }
};

template <>
struct BlockPacking<Q80Block> {
  GEMMA4_HD static constexpr void pack(const Q80Block& block, std::uint8_t* chunk, int groups, int at) {
    for (int w = 0; w < 32; ++w) {
      chunk[16 * (w / 16 * groups + at) + w % 16] = static_cast<std::uint8_t>(block.quants[w]);
    }
    put_f16(chunk + 32 * groups + 2 * at, block.d);
  }
  GEMMA4_HD static constexpr void unpack(const std::uint8_t* chunk, int groups, int at, Q80Block& block) {
    for (int w = 0; w < 32; ++w) {
      block.quants[w] = static_cast<std::int8_t>(chunk[16 * (w / 16 * groups + at) + w % 16]);
    }
    block.d = get_f16(chunk + 32 * groups + 2 * at);
  }
};

}  // namespace detail

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/weights/layout.cuh"
#include "gemma4/gguf/block_formats.hpp"
#include "gemma4/gguf/gguf.hpp"
#include "gemma4/platform.hpp"

/// The blocks of 32 weights, those of the 4-bit table and those of few bits, into the layout of cuda/weights/layout.cuh
/// and back; and which block a type has.
namespace gemma4::cuda::detail {

GEMMA4_HD constexpr void copy_bytes(const std::uint8_t* from, int count, std::uint8_t* to) {
  for (int i = 0; i < count; ++i) to[i] = from[i];
}

/// `count` bits from bit `shift` of a word of bytes, which may lie at any address.
[[nodiscard]] GEMMA4_HD constexpr unsigned get_bits(const std::uint8_t* word, int shift, int count) {
  return (unsigned{word[shift / 8]} >> (shift % 8)) & ((1u << count) - 1u);
}
/// Adds them to a word that has zeros there. They lie in one byte.
GEMMA4_HD constexpr void put_bits(std::uint8_t* word, int shift, unsigned bits) {
  word[shift / 8] = static_cast<std::uint8_t>(word[shift / 8] | (bits << (shift % 8)));
}

/// The fifth bits of a block of 32: in the file that of weight w in bit w of a word.
GEMMA4_HD constexpr void pack_fifth_bits(const std::uint8_t* high, std::uint8_t* fifth) {
  for (int b = 0; b < 4; ++b) fifth[b] = 0;
  for (int w = 0; w < 32; ++w) put_bits(fifth + q5_upper(w).byte, q5_upper(w).shift, get_bits(high, w, 1));
}
GEMMA4_HD constexpr void unpack_fifth_bits(const std::uint8_t* fifth, std::uint8_t* high) {
  for (int b = 0; b < 4; ++b) high[b] = 0;
  for (int w = 0; w < 32; ++w) put_bits(high, w, get_bits(fifth + q5_upper(w).byte, q5_upper(w).shift, 1));
}

template <>
struct BlockPacking<Q40Block> {
  GEMMA4_HD static constexpr void pack(const Q40Block& block, std::uint8_t* chunk, int groups, int at) {
    copy_bytes(block.quants, 16, chunk + 16 * at);
    put_f16(chunk + 16 * groups + 2 * at, block.d);
  }
  GEMMA4_HD static constexpr void unpack(const std::uint8_t* chunk, int groups, int at, Q40Block& block) {
    copy_bytes(chunk + 16 * at, 16, block.quants);
    block.d = get_f16(chunk + 16 * groups + 2 * at);
  }
};

template <>
struct BlockPacking<Q41Block> {
  GEMMA4_HD static constexpr void pack(const Q41Block& block, std::uint8_t* chunk, int groups, int at) {
    copy_bytes(block.quants, 16, chunk + 16 * at);
    put_f16(chunk + 16 * groups + 4 * at, block.d);
    put_f16(chunk + 16 * groups + 4 * at + 2, block.m);
  }
  GEMMA4_HD static constexpr void unpack(const std::uint8_t* chunk, int groups, int at, Q41Block& block) {
    copy_bytes(chunk + 16 * at, 16, block.quants);
    block.d = get_f16(chunk + 16 * groups + 4 * at);
    block.m = get_f16(chunk + 16 * groups + 4 * at + 2);
  }
};

template <>
struct BlockPacking<Q50Block> {
  GEMMA4_HD static constexpr void pack(const Q50Block& block, std::uint8_t* chunk, int groups, int at) {
    copy_bytes(block.low, 16, chunk + 16 * at);
    pack_fifth_bits(block.high, chunk + 16 * groups + 4 * at);
    put_f16(chunk + 20 * groups + 2 * at, block.d);
  }
  GEMMA4_HD static constexpr void unpack(const std::uint8_t* chunk, int groups, int at, Q50Block& block) {
    copy_bytes(chunk + 16 * at, 16, block.low);
    unpack_fifth_bits(chunk + 16 * groups + 4 * at, block.high);
    block.d = get_f16(chunk + 20 * groups + 2 * at);
  }
};

template <>
struct BlockPacking<Q51Block> {
  GEMMA4_HD static constexpr void pack(const Q51Block& block, std::uint8_t* chunk, int groups, int at) {
    copy_bytes(block.low, 16, chunk + 16 * at);
    pack_fifth_bits(block.high, chunk + 16 * groups + 4 * at);
    put_f16(chunk + 20 * groups + 4 * at, block.d);
    put_f16(chunk + 20 * groups + 4 * at + 2, block.m);
  }
  GEMMA4_HD static constexpr void unpack(const std::uint8_t* chunk, int groups, int at, Q51Block& block) {
    copy_bytes(chunk + 16 * at, 16, block.low);
    unpack_fifth_bits(chunk + 16 * groups + 4 * at, block.high);
    block.d = get_f16(chunk + 20 * groups + 4 * at);
    block.m = get_f16(chunk + 20 * groups + 4 * at + 2);
  }
};

/// Where the table code of weight w of a group lies: its word, and the first of four bits.
struct TablePlace {
  int word, shift;
};
[[nodiscard]] GEMMA4_HD constexpr TablePlace table_place(int w) {
  return {w % 16 / 4, w / 16 * 16 + w % 4 * 4};
}

/// Codes of a group: in the file weights b and 16 + b in byte b.
GEMMA4_HD constexpr void pack_table_codes(const std::uint8_t* from, std::uint8_t* codes) {
  for (int b = 0; b < 16; ++b) codes[b] = 0;
  for (int w = 0; w < 32; ++w) {
    put_bits(codes + 4 * table_place(w).word, table_place(w).shift, nibble(from[w % 16], w / 16));
  }
}
GEMMA4_HD constexpr void unpack_table_codes(const std::uint8_t* codes, std::uint8_t* to) {
  for (int b = 0; b < 16; ++b) to[b] = 0;
  for (int w = 0; w < 32; ++w) {
    put_bits(to + w % 16, 4 * (w / 16), get_bits(codes + 4 * table_place(w).word, table_place(w).shift, 4));
  }
}

template <>
struct BlockPacking<Iq4NlBlock> {
  GEMMA4_HD static constexpr void pack(const Iq4NlBlock& block, std::uint8_t* chunk, int groups, int at) {
    pack_table_codes(block.codes, chunk + 16 * at);
    put_f16(chunk + 16 * groups + 2 * at, block.d);
  }
  GEMMA4_HD static constexpr void unpack(const std::uint8_t* chunk, int groups, int at, Iq4NlBlock& block) {
    unpack_table_codes(chunk + 16 * at, block.codes);
    block.d = get_f16(chunk + 16 * groups + 2 * at);
  }
};

template <>
struct BlockPacking<Iq4XsBlock> {
  GEMMA4_HD static constexpr void pack(const Iq4XsBlock& block, std::uint8_t* chunk, int groups, int at) {
    for (int g = 0; g < 8; ++g) pack_table_codes(block.codes + 16 * g, chunk + 16 * (8 * at + g));
    std::uint8_t* const meta = chunk + 16 * groups + 8 * at;
    put_f16(meta, block.d);
    copy_bytes(block.scales_high, 2, meta + 2);
    copy_bytes(block.scales_low, 4, meta + 4);
  }
  GEMMA4_HD static constexpr void unpack(const std::uint8_t* chunk, int groups, int at, Iq4XsBlock& block) {
    for (int g = 0; g < 8; ++g) unpack_table_codes(chunk + 16 * (8 * at + g), block.codes + 16 * g);
    const std::uint8_t* const meta = chunk + 16 * groups + 8 * at;
    block.d = get_f16(meta);
    copy_bytes(meta + 2, 2, block.scales_high);
    copy_bytes(meta + 4, 4, block.scales_low);
  }
};

template <>
struct BlockPacking<Q3KBlock> {
  /// Where weight w of a group has its code: the first two bits and the third, each in one of three words.
  struct Place {
    int word, shift, top_word, top;
  };
  [[nodiscard]] GEMMA4_HD static constexpr Place place(int w) {
    const int upper = w / 16, quarter = w % 16 / 4, first = 8 * (w % 4);
    if (quarter == 3) return {2, first + 3 * upper, 2, first + 3 * upper + 2};
    if (quarter == 2) return {upper, first + 6, 2, first + 6 + upper};
    return {upper, first + 3 * quarter, upper, first + 3 * quarter + 2};
  }
  /// Word `word` of group g.
  [[nodiscard]] GEMMA4_HD static constexpr int word_at(int groups, int g, int word) {
    return word == 2 ? 8 * groups + 4 * g : 8 * g + 4 * word;
  }
  GEMMA4_HD static constexpr void pack(const Q3KBlock& block, std::uint8_t* chunk, int groups, int at) {
    for (int j = 0; j < 8; ++j) {
      const int g = 8 * at + j;
      for (int word = 0; word < 3; ++word) {
        for (int b = 0; b < 4; ++b) chunk[word_at(groups, g, word) + b] = 0;
      }
      for (int w = 0; w < 32; ++w) {
        const Place to = place(w);
        put_bits(chunk + word_at(groups, g, to.word), to.shift, (block.low[32 * (j / 4) + w] >> (2 * (j % 4))) & 3u);
        put_bits(chunk + word_at(groups, g, to.top_word), to.top, (block.high[w] >> j) & 1u);
      }
      const int first = block.scale(2 * j) + Q3KBlock::kScaleOffset;
      const int second = block.scale(2 * j + 1) + Q3KBlock::kScaleOffset;
      chunk[12 * groups + g] = static_cast<std::uint8_t>((first & 15) | ((second & 15) << 4));
      std::uint8_t* const upper = chunk + 13 * groups + g / 2;
      if (j % 2 == 0) *upper = 0;
      put_bits(upper, 4 * (j % 2), static_cast<unsigned>((first >> 4) | ((second >> 4) << 2)));
    }
    put_f16(chunk + 108 * (groups / 8) + 2 * at, block.d);
  }
  GEMMA4_HD static constexpr void unpack(const std::uint8_t* chunk, int groups, int at, Q3KBlock& block) {
    for (std::uint8_t& byte : block.low) byte = 0;
    for (std::uint8_t& byte : block.high) byte = 0;
    for (std::uint8_t& byte : block.scales) byte = 0;
    for (int j = 0; j < 8; ++j) {
      const int g = 8 * at + j;
      for (int w = 0; w < 32; ++w) {
        const Place from = place(w);
        put_bits(block.low + 32 * (j / 4) + w, 2 * (j % 4),
                 get_bits(chunk + word_at(groups, g, from.word), from.shift, 2));
        put_bits(block.high + w, j, get_bits(chunk + word_at(groups, g, from.top_word), from.top, 1));
      }
      for (int i = 0; i < 2; ++i) {
        const int b = 2 * j + i;
        put_bits(block.scales + b % 8, 4 * (b / 8), get_bits(chunk + 12 * groups + g, 4 * i, 4));
        put_bits(block.scales + 8 + b % 4, 2 * (b / 4), get_bits(chunk + 13 * groups + g / 2, 4 * (j % 2) + 2 * i, 2));
      }
    }
    block.d = get_f16(chunk + 108 * (groups / 8) + 2 * at);
  }
};

template <>
struct BlockPacking<Q2KBlock> {
  GEMMA4_HD static constexpr void pack(const Q2KBlock& block, std::uint8_t* chunk, int groups, int at) {
    for (int j = 0; j < 8; ++j) {
      std::uint8_t* const codes = chunk + 8 * (8 * at + j);
      for (int b = 0; b < 8; ++b) codes[b] = 0;
      for (int w = 0; w < 32; ++w) {
        const UpperPlace to = q6_upper(w);
        put_bits(codes + to.byte, to.shift, (block.quants[32 * (j / 4) + w] >> (2 * (j % 4))) & 3u);
      }
    }
    copy_bytes(block.scales, 16, chunk + 8 * groups + 16 * at);
    put_f16(chunk + 10 * groups + 4 * at, block.d);
    put_f16(chunk + 10 * groups + 4 * at + 2, block.dmin);
  }
  GEMMA4_HD static constexpr void unpack(const std::uint8_t* chunk, int groups, int at, Q2KBlock& block) {
    for (std::uint8_t& byte : block.quants) byte = 0;
    for (int j = 0; j < 8; ++j) {
      const std::uint8_t* const codes = chunk + 8 * (8 * at + j);
      for (int w = 0; w < 32; ++w) {
        const UpperPlace from = q6_upper(w);
        put_bits(block.quants + 32 * (j / 4) + w, 2 * (j % 4), get_bits(codes + from.byte, from.shift, 2));
      }
    }
    copy_bytes(chunk + 8 * groups + 16 * at, 16, block.scales);
    block.d = get_f16(chunk + 10 * groups + 4 * at);
    block.dmin = get_f16(chunk + 10 * groups + 4 * at + 2);
  }
};

/// Calls body.operator()<kType, TBlock>() for a packed type.
/// @return whether the type is one
template <class TBody>
bool for_packed_block(TensorType type, TBody&& body) {
  switch (type) {
    case TensorType::kQ4_0:
      return body.template operator()<TensorType::kQ4_0, Q40Block>(), true;
    case TensorType::kQ4_1:
      return body.template operator()<TensorType::kQ4_1, Q41Block>(), true;
    case TensorType::kQ5_0:
      return body.template operator()<TensorType::kQ5_0, Q50Block>(), true;
    case TensorType::kQ5_1:
      return body.template operator()<TensorType::kQ5_1, Q51Block>(), true;
    case TensorType::kQ8_0:
      return body.template operator()<TensorType::kQ8_0, Q80Block>(), true;
    case TensorType::kQ2K:
      return body.template operator()<TensorType::kQ2K, Q2KBlock>(), true;
    case TensorType::kQ3K:
      return body.template operator()<TensorType::kQ3K, Q3KBlock>(), true;
    case TensorType::kQ4K:
      return body.template operator()<TensorType::kQ4K, Q4KBlock>(), true;
    case TensorType::kQ5K:
      return body.template operator()<TensorType::kQ5K, Q5KBlock>(), true;
    case TensorType::kQ6K:
      return body.template operator()<TensorType::kQ6K, Q6KBlock>(), true;
    case TensorType::kIq4Nl:
      return body.template operator()<TensorType::kIq4Nl, Iq4NlBlock>(), true;
    case TensorType::kIq4Xs:
      return body.template operator()<TensorType::kIq4Xs, Iq4XsBlock>(), true;
    default:
      return false;
  }
}

}  // namespace gemma4::cuda::detail

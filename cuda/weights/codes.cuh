// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/ptx/arithmetic.cuh"
#include "gemma4/gguf/block_formats.hpp"

/// Codes that do not lie in bytes as they are, out of the words of cuda/weights/layout.cuh: what products and
/// dequantising share.
namespace gemma4::cuda::detail {

/// Four values of the 4-bit table as bytes of a word, from the first of them on.
[[nodiscard]] constexpr std::uint32_t table_word(int first) {
  std::uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    word |= std::uint32_t{static_cast<std::uint8_t>(kIq4Values[first + i])} << (8 * i);
  }
  return word;
}
inline constexpr std::uint32_t kTableWord0 = table_word(0), kTableWord4 = table_word(4), kTableWord8 = table_word(8),
                               kTableWord12 = table_word(12);

/// Eight table codes of IQ4_NL or IQ4_XS: their values, signed bytes of weights 4j to 4j + 3 (`low`) and of those 16
/// further on. Bits 0-2 of a code select a byte of the table's lower and of its upper half, both at once for four
/// codes; bit 3, spread over a byte, chooses between them. 10 operations and a product for eight values.
__device__ __forceinline__ void look_up_codes(std::uint32_t word, std::uint32_t& low, std::uint32_t& high) {
  // Signs of bytes, each eight times: odd codes have bit 3 there in the word, even ones in the word shifted.
  constexpr std::uint32_t kTopsOfLow = 0x9D8Cu, kTopsOfHigh = 0xBFAEu;
  const std::uint32_t places = word & 0x77777777u, upper_places = places >> 16, shifted = word << 4;
  const std::uint32_t low_top = permute_bytes(word, shifted, kTopsOfLow);
  const std::uint32_t high_top = permute_bytes(word, shifted, kTopsOfHigh);
  low = (permute_bytes(kTableWord0, kTableWord4, places) & ~low_top) |
        (permute_bytes(kTableWord8, kTableWord12, places) & low_top);
  high = (permute_bytes(kTableWord0, kTableWord4, upper_places) & ~high_top) |
         (permute_bytes(kTableWord8, kTableWord12, upper_places) & high_top);
}

/// Word i of the upper half of the table from its end: byte e is value 15 - 4i - e, and 1.
[[nodiscard]] constexpr std::uint32_t reversed_table_word(int i) {
  std::uint32_t word = 0;
  for (int e = 0; e < 4; ++e) {
    word |= std::uint32_t{static_cast<std::uint8_t>(kIq4Values[15 - 4 * i - e] + 1)} << (8 * e);
  }
  return word;
}
inline constexpr std::uint32_t kUpperReversed0 = reversed_table_word(0), kUpperReversed4 = reversed_table_word(1);

/// The scale of a group of IQ4_XS with its offset, from the first 8 bytes of the block: 0 to 63.
[[nodiscard]] __device__ __forceinline__ std::uint32_t iq4_xs_scale(const uint2& meta, int group) {
  const int j = group & 7;
  return ((meta.y >> (4 * j)) & 15u) | ((meta.x >> (12 + 2 * j)) & 0x30u);
}

/// The codes of a group of Q3_K, in bytes: of weights 4j to 4j + 3 in low[j], 16 further on in high[j]. low[1], high[1]
/// and high[3] are 8 times the codes, which saves their shifts.
struct ThreeBitCodes {
  std::uint32_t low[4], high[4];

  ThreeBitCodes() = default;
  __device__ __forceinline__ ThreeBitCodes(const uint2& words, std::uint32_t rest)
      : low{words.x & 0x07070707u, words.x & 0x38383838u, ((words.x >> 6) & 0x03030303u) | ((rest >> 4) & 0x04040404u),
            rest & 0x07070707u},
        high{words.y & 0x07070707u, words.y & 0x38383838u, ((words.y >> 6) & 0x03030303u) | ((rest >> 5) & 0x04040404u),
             rest & 0x38383838u} {}
};

}  // namespace gemma4::cuda::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/gguf/block_formats.hpp"
#include "gemma4/gguf/gguf.hpp"
#include "gemma4/quantized_matrix.hpp"

/// Quantised weights to float, on the host; byte maps and formulas in block_formats.hpp.
/// The result does not depend on whether the compiler fuses multiply and add. d, dmin and m carry 11 significant bits,
/// scales and minima at most 7, quants at most 5 (Q8_0, which has no scales: 8; IQ4: 7, with scales of 5), so that
/// every product has at most 23 bits and is exact in float; the one rounding is that of the final sum or difference in
/// Q4_1, Q5_1, Q2_K, Q4_K and Q5_K.
namespace gemma4 {

inline void dequantise_block(const Q4KBlock& block, std::span<float, Q4KBlock::kSize> out) {
  for (int c = 0; c < 4; ++c) {
    const ScaleMin even = block.scales.get(2 * c);
    const ScaleMin odd = block.scales.get(2 * c + 1);
    const float scale0 = to_float(block.d) * even.scale, min0 = to_float(block.dmin) * even.min;
    const float scale1 = to_float(block.d) * odd.scale, min1 = to_float(block.dmin) * odd.min;
    const std::uint8_t* const quants = block.quants + 32 * c;
    float* const values = out.data() + 64 * c;
    for (int l = 0; l < 32; ++l) values[l] = scale0 * static_cast<float>(quants[l] & 15) - min0;
    for (int l = 0; l < 32; ++l) values[32 + l] = scale1 * static_cast<float>(quants[l] >> 4) - min1;
  }
}

inline void dequantise_block(const Q5KBlock& block, std::span<float, Q5KBlock::kSize> out) {
  for (int b = 0; b < Q5KBlock::kSubBlocks; ++b) {
    const ScaleMin pair = block.scales.get(b);
    const float scale = to_float(block.d) * pair.scale, min = to_float(block.dmin) * pair.min;
    const std::uint8_t* const low = block.low + 32 * (b / 2);
    const int low_shift = 4 * (b % 2);
    float* const values = out.data() + 32 * b;
    for (int l = 0; l < 32; ++l) {
      const int quant = ((low[l] >> low_shift) & 15) | (((block.high[l] >> b) & 1) << 4);
      values[l] = scale * static_cast<float>(quant) - min;
    }
  }
}

inline void dequantise_block(const Q6KBlock& block, std::span<float, Q6KBlock::kSize> out) {
  for (int b = 0; b < Q6KBlock::kSubBlocks; ++b) {
    const int half = b / 8, quarter = b / 2 % 4, first = 16 * (b % 2);
    const std::uint8_t* const low = block.low + 64 * half + 32 * (quarter % 2) + first;
    const std::uint8_t* const high = block.high + 32 * half + first;
    const int low_shift = 4 * (quarter / 2), high_shift = 2 * quarter;
    const float scale = to_float(block.d) * block.scales[b];
    float* const values = out.data() + 16 * b;
    for (int l = 0; l < 16; ++l) {
      const int quant = ((low[l] >> low_shift) & 15) | (((high[l] >> high_shift) & 3) << 4);
      values[l] = scale * static_cast<float>(quant - Q6KBlock::kOffset);
    }
  }
}

inline void dequantise_block(const Q80Block& block, std::span<float, Q80Block::kSize> out) {
  const float d = to_float(block.d);
  for (int l = 0; l < 32; ++l) out[static_cast<std::size_t>(l)] = d * static_cast<float>(block.quants[l]);
}

inline void dequantise_block(const Q40Block& block, std::span<float, Q40Block::kSize> out) {
  const float d = to_float(block.d);
  for (int l = 0; l < 16; ++l) out.data()[l] = d * static_cast<float>((block.quants[l] & 15) - Q40Block::kOffset);
  for (int l = 0; l < 16; ++l) out.data()[16 + l] = d * static_cast<float>((block.quants[l] >> 4) - Q40Block::kOffset);
}

inline void dequantise_block(const Q41Block& block, std::span<float, Q41Block::kSize> out) {
  const float d = to_float(block.d), m = to_float(block.m);
  for (int l = 0; l < 16; ++l) out.data()[l] = d * static_cast<float>(block.quants[l] & 15) + m;
  for (int l = 0; l < 16; ++l) out.data()[16 + l] = d * static_cast<float>(block.quants[l] >> 4) + m;
}

namespace detail {

/// Quant i of Q5_0 or Q5_1: 0 to 31.
template <class TBlock>
[[nodiscard]] int fifth_bit_quant(const TBlock& block, int i) {
  return ((block.low[i % 16] >> 4 * (i / 16)) & 15) | (((block.high[i / 8] >> i % 8) & 1) << 4);
}

}  // namespace detail

inline void dequantise_block(const Q50Block& block, std::span<float, Q50Block::kSize> out) {
  const float d = to_float(block.d);
  for (int i = 0; i < 32; ++i) {
    out.data()[i] = d * static_cast<float>(detail::fifth_bit_quant(block, i) - Q50Block::kOffset);
  }
}

inline void dequantise_block(const Q51Block& block, std::span<float, Q51Block::kSize> out) {
  const float d = to_float(block.d), m = to_float(block.m);
  for (int i = 0; i < 32; ++i) out.data()[i] = d * static_cast<float>(detail::fifth_bit_quant(block, i)) + m;
}

namespace detail {

/// Sixteen bytes of codes of IQ4_NL or IQ4_XS times `step`: 32 values.
inline void dequantise_iq4_codes(const std::uint8_t* codes, float step, float* values) {
  for (int l = 0; l < 16; ++l) values[l] = step * static_cast<float>(kIq4Values[codes[l] & 15]);
  for (int l = 0; l < 16; ++l) values[16 + l] = step * static_cast<float>(kIq4Values[codes[l] >> 4]);
}

}  // namespace detail

inline void dequantise_block(const Iq4NlBlock& block, std::span<float, Iq4NlBlock::kSize> out) {
  detail::dequantise_iq4_codes(block.codes, to_float(block.d), out.data());
}

inline void dequantise_block(const Iq4XsBlock& block, std::span<float, Iq4XsBlock::kSize> out) {
  for (int b = 0; b < Iq4XsBlock::kSubBlocks; ++b) {
    const float step = to_float(block.d) * static_cast<float>(block.scale(b));
    detail::dequantise_iq4_codes(block.codes + 16 * b, step, out.data() + 32 * b);
  }
}

inline void dequantise_block(const Q3KBlock& block, std::span<float, Q3KBlock::kSize> out) {
  for (int b = 0; b < Q3KBlock::kSubBlocks; ++b) {
    const int half = b / 8, quarter = b / 2 % 4, first = 16 * (b % 2);
    const std::uint8_t* const low = block.low + 32 * half + first;
    const std::uint8_t* const high = block.high + first;
    const int low_shift = 2 * quarter, high_shift = 4 * half + quarter;
    const float step = to_float(block.d) * static_cast<float>(block.scale(b));
    float* const values = out.data() + 16 * b;
    for (int l = 0; l < 16; ++l) {
      const int quant = ((low[l] >> low_shift) & 3) | (((high[l] >> high_shift) & 1) << 2);
      values[l] = step * static_cast<float>(quant - Q3KBlock::kOffset);
    }
  }
}

inline void dequantise_block(const Q2KBlock& block, std::span<float, Q2KBlock::kSize> out) {
  for (int b = 0; b < Q2KBlock::kSubBlocks; ++b) {
    const std::uint8_t* const quants = block.quants + 32 * (b / 8) + 16 * (b % 2);
    const int shift = 2 * (b / 2 % 4);
    const float step = to_float(block.d) * static_cast<float>(block.scales[b] & 15);
    const float min = to_float(block.dmin) * static_cast<float>(block.scales[b] >> 4);
    float* const values = out.data() + 16 * b;
    for (int l = 0; l < 16; ++l) values[l] = step * static_cast<float>((quants[l] >> shift) & 3) - min;
  }
}

namespace detail {

/// Dequantises a row of TBlock. Each block is copied to the stack first: the source may lie at any address, and the
/// compiler vectorises the loops above only when it sees that storing a float cannot change the quants.
template <class TBlock>
void dequantise_blocks(std::span<const std::byte> bytes, std::span<float> out) {
  constexpr auto kSize = static_cast<std::size_t>(TBlock::kSize);
  for (std::size_t index = 0; index < out.size() / kSize; ++index) {
    TBlock block;
    std::memcpy(&block, bytes.data() + index * sizeof(TBlock), sizeof(TBlock));
    dequantise_block(block, out.subspan(index * kSize).template first<kSize>());
  }
}

/// Dequantises a row of 16-bit floats.
template <class TStorage>
void dequantise_halves(std::span<const std::byte> bytes, std::span<float> out) {
  for (std::size_t index = 0; index < out.size(); ++index) {
    TStorage value;
    std::memcpy(&value, bytes.data() + index * sizeof(TStorage), sizeof(TStorage));
    out[index] = to_float(value);
  }
}

}  // namespace detail

/// The values of a row, or of any number of whole blocks.
/// @param bytes row_bytes(type, out.size()) bytes, at any alignment
/// @param out   a multiple of block_size(type) values
/// @throws std::invalid_argument when the sizes disagree or the type holds no weights
inline void dequantise_row(TensorType type, std::span<const std::byte> bytes, std::span<float> out) {
  const auto expected = static_cast<std::size_t>(row_bytes(type, static_cast<std::int64_t>(out.size())));
  require(bytes.size() == expected, "dequantise_row: ", bytes.size(), " bytes of ", type_name(type), ", expected ",
          expected, " for ", out.size(), " values");
  switch (type) {
    case TensorType::kF32:
      if (!out.empty()) std::memcpy(out.data(), bytes.data(), bytes.size());
      return;
    case TensorType::kF16:
      return detail::dequantise_halves<F16>(bytes, out);
    case TensorType::kBf16:
      return detail::dequantise_halves<Bf16>(bytes, out);
    case TensorType::kQ4_0:
      return detail::dequantise_blocks<Q40Block>(bytes, out);
    case TensorType::kQ4_1:
      return detail::dequantise_blocks<Q41Block>(bytes, out);
    case TensorType::kQ5_0:
      return detail::dequantise_blocks<Q50Block>(bytes, out);
    case TensorType::kQ5_1:
      return detail::dequantise_blocks<Q51Block>(bytes, out);
    case TensorType::kIq4Nl:
      return detail::dequantise_blocks<Iq4NlBlock>(bytes, out);
    case TensorType::kIq4Xs:
      return detail::dequantise_blocks<Iq4XsBlock>(bytes, out);
    case TensorType::kQ2K:
      return detail::dequantise_blocks<Q2KBlock>(bytes, out);
    case TensorType::kQ3K:
      return detail::dequantise_blocks<Q3KBlock>(bytes, out);
    case TensorType::kQ4K:
      return detail::dequantise_blocks<Q4KBlock>(bytes, out);
    case TensorType::kQ5K:
      return detail::dequantise_blocks<Q5KBlock>(bytes, out);
    case TensorType::kQ6K:
      return detail::dequantise_blocks<Q6KBlock>(bytes, out);
    case TensorType::kQ8_0:
      return detail::dequantise_blocks<Q80Block>(bytes, out);
    default:
      require(false, "dequantise_row: ", type_name(type), " does not hold weights; expected one of ",
              weight_type_names());
  }
}

}  // namespace gemma4

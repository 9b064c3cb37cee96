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

/// Quantised weights to float, on the host; byte maps and formulas in block_formats.hpp.
/// The result does not depend on whether the compiler fuses multiply and add. d and dmin carry 11 significant bits,
/// scales and minima at most 7, quants at most 5, so that every product has at most 23 bits and is exact in float; the
/// one rounding is that of the final difference in Q4_K and Q5_K.
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
    case TensorType::kQ4K:
      return detail::dequantise_blocks<Q4KBlock>(bytes, out);
    case TensorType::kQ5K:
      return detail::dequantise_blocks<Q5KBlock>(bytes, out);
    case TensorType::kQ6K:
      return detail::dequantise_blocks<Q6KBlock>(bytes, out);
    case TensorType::kQ8_0:
      return detail::dequantise_blocks<Q80Block>(bytes, out);
    default:
      require(false, "dequantise_row: ", type_name(type),
              " does not hold weights; expected F32, F16, BF16, Q4_K, Q5_K, ", "Q6_K or Q8_0");
  }
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "gemma4/float16.hpp"
#include "gemma4/quantized_matrix.hpp"

/// Random weight matrices in every block format, for tests of whatever multiplies with them.
namespace gemma4::testkit {

using gemma4::kWeightTypes;

/// A weight matrix that owns its bytes.
struct OwnedMatrix {
  TensorType type;
  std::int64_t rows, cols;
  std::vector<std::byte> bytes;

  [[nodiscard]] QuantizedMatrix view() const { return {type, rows, cols, bytes}; }
};

namespace detail {

template <class T>
void put(std::span<std::byte> bytes, std::size_t offset, T value) {
  std::memcpy(bytes.data() + offset, &value, sizeof(T));
}

/// Random codes and small scales under `d` (and `dmin` or `m`), so that the values of a block are of order `scale`.
/// Steps and offsets of the types that encoders give either sign have either.
inline void fill_block(TensorType type, std::span<std::byte> block, float scale, std::mt19937& random) {
  for (std::byte& byte : block) byte = static_cast<std::byte>(random());
  std::uniform_real_distribution<float> factor(0.5f, 1.5f);
  const auto either_sign = [&] { return random() % 2 == 0 ? factor(random) : -factor(random); };
  switch (type) {
    case TensorType::kQ4_0:
    case TensorType::kQ5_0:
    case TensorType::kIq4Nl: {
      const float top = type == TensorType::kQ4_0 ? 8.0f : type == TensorType::kQ5_0 ? 16.0f : 127.0f;
      put(block, 0, to_f16(scale * either_sign() / top));  // d
      break;
    }
    case TensorType::kQ4_1:
    case TensorType::kQ5_1:
      put(block, 0, to_f16(scale * factor(random) / (type == TensorType::kQ4_1 ? 15.0f : 31.0f)));  // d
      put(block, 2, to_f16(scale * either_sign() * 0.5f));                                          // m
      break;
    case TensorType::kIq4Xs:
      put(block, 0, to_f16(scale * either_sign() / (32.0f * 127.0f)));  // d
      break;
    case TensorType::kQ3K:
      put(block, 108, to_f16(scale * either_sign() / (32.0f * 4.0f)));  // d
      break;
    case TensorType::kQ2K:
      put(block, 80, to_f16(scale * factor(random) / (3.0f * 15.0f)));  // d
      put(block, 82, to_f16(scale * factor(random) * 0.5f / 15.0f));    // dmin
      break;
    case TensorType::kQ4K:
    case TensorType::kQ5K: {
      const float top = type == TensorType::kQ4K ? 15.0f : 31.0f;
      put(block, 0, to_f16(scale * factor(random) / (top * 63.0f)));  // d
      put(block, 2, to_f16(scale * factor(random) * 0.5f / 63.0f));   // dmin
      break;
    }
    case TensorType::kQ6K:
      put(block, 208, to_f16(scale * factor(random) / (32.0f * 127.0f)));  // d
      break;
    case TensorType::kQ8_0:
      put(block, 0, to_f16(scale * factor(random) / 127.0f));  // d
      break;
    case TensorType::kBf16:
      put(block, 0, to_bf16(scale * (2 * factor(random) - 2)));
      break;
    case TensorType::kF16:
      put(block, 0, to_f16(scale * (2 * factor(random) - 2)));
      break;
    default:
      put(block, 0, scale * (2 * factor(random) - 2));
  }
}

}  // namespace detail

/// Values of order `scale`; cols must be a multiple of the type's block.
[[nodiscard]] inline OwnedMatrix random_weights(TensorType type, std::int64_t rows, std::int64_t cols,
                                                std::uint32_t seed, float scale = 1.0f) {
  OwnedMatrix matrix{type, rows, cols, {}};
  matrix.bytes.resize(static_cast<std::size_t>(rows * row_bytes(type, cols)));
  std::mt19937 random(seed);
  const auto step = static_cast<std::size_t>(block_bytes(type));
  for (std::size_t at = 0; at < matrix.bytes.size(); at += step) {
    detail::fill_block(type, std::span(matrix.bytes).subspan(at, step), scale, random);
  }
  return matrix;
}

}  // namespace gemma4::testkit

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "gemma4/gguf/gguf.hpp"

namespace gemma4 {

/// The types that a weight matrix may have.
[[nodiscard]] constexpr bool is_weight_type(TensorType type) {
  switch (type) {
    case TensorType::kQ4K:
    case TensorType::kQ5K:
    case TensorType::kQ6K:
    case TensorType::kQ8_0:
    case TensorType::kBf16:
    case TensorType::kF16:
    case TensorType::kF32:
      return true;
    default:
      return false;
  }
}

/// A borrowed weight matrix in its file format: `rows` outputs, `cols` inputs, each row a run of whole blocks.
struct QuantizedMatrix {
  TensorType type = TensorType::kF32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::span<const std::byte> data;

  [[nodiscard]] bool empty() const { return rows == 0; }
  [[nodiscard]] std::span<const std::byte> row(std::int64_t index) const {
    const std::size_t stride = data.size() / static_cast<std::size_t>(rows);
    return data.subspan(static_cast<std::size_t>(index) * stride, stride);
  }
};

}  // namespace gemma4

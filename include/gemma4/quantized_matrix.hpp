// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf.hpp"

namespace gemma4 {

/// The types that a weight matrix may have, smallest blocks first within a family.
inline constexpr std::array kWeightTypes = {
    TensorType::kQ4_0,  TensorType::kQ4_1,  TensorType::kQ5_0, TensorType::kQ5_1, TensorType::kQ8_0,
    TensorType::kQ2K,   TensorType::kQ3K,   TensorType::kQ4K,  TensorType::kQ5K,  TensorType::kQ6K,
    TensorType::kIq4Nl, TensorType::kIq4Xs, TensorType::kBf16, TensorType::kF16,  TensorType::kF32};

[[nodiscard]] constexpr bool is_weight_type(TensorType type) {
  for (const TensorType known : kWeightTypes) {
    if (type == known) return true;
  }
  return false;
}

/// "Q4_0, Q4_1, ... and F32": the types of a weight matrix, for messages.
[[nodiscard]] inline std::string weight_type_names() {
  std::string names;
  for (std::size_t i = 0; i < kWeightTypes.size(); ++i) {
    const bool is_last = i + 1 == kWeightTypes.size();
    names += concat(i == 0 ? "" : is_last ? " and " : ", ", type_name(kWeightTypes[i]));
  }
  return names;
}

/// Why a tensor of this type is no weight matrix: "is IQ3_XXS, which is not supported; supported are ...".
[[nodiscard]] inline std::string unsupported_weight_type(TensorType type) {
  return concat("is ", type_name(type), ", which is not supported; supported are ", weight_type_names());
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

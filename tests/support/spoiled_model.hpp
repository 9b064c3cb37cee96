// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

#include "gemma4/gguf/block_formats.hpp"
#include "tests/support/small_model.hpp"

/// A small model with NaN in a weight.
namespace gemma4::testkit {

struct SpoiledModel : SmallModel {
  using SmallModel::SmallModel;

  /// `vector` becomes one of NaN.
  void spoil(std::span<const float>& vector) {
    vector = vectors_.emplace_back(vector.size(), std::numeric_limits<float>::quiet_NaN());
  }

  /// The first block of a row of `matrix` gets a scale that is NaN; a head that is tied to the embedding stays so.
  void spoil(QuantizedMatrix& matrix, std::int64_t row) {
    std::vector<std::byte>& bytes = matrices_.emplace_back(matrix.data.begin(), matrix.data.end());
    const std::size_t at = static_cast<std::size_t>(row) * (bytes.size() / static_cast<std::size_t>(matrix.rows));
    constexpr std::uint16_t kNan = 0x7E00;  // float16
    switch (matrix.type) {
      case TensorType::kQ4K:
        std::memcpy(bytes.data() + at + offsetof(Q4KBlock, d), &kNan, sizeof(kNan));
        break;
      case TensorType::kQ6K:
        std::memcpy(bytes.data() + at + offsetof(Q6KBlock, d), &kNan, sizeof(kNan));
        break;
      default:
        throw std::logic_error("spoil: a type without a place for NaN");
    }
    const bool is_head_too = &matrix == &weights.token_embd && weights.is_tied();
    matrix.data = bytes;
    if (is_head_too) weights.output = matrix;
  }

 private:
  std::deque<std::vector<float>> vectors_;
  std::deque<std::vector<std::byte>> matrices_;
};

/// Three layers, sliding and full; a window that the chunks of the tests exceed.
[[nodiscard]] inline ModelConfig config_to_spoil() {
  ModelConfig config = gemma4_tiny();
  config.vocab = 300;
  config.window = 9;
  config.is_sliding = {1, 0, 1};
  return config;
}

}  // namespace gemma4::testkit

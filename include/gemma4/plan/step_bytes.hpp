// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <variant>
#include <vector>

#include "gemma4/cache_formats.hpp"
#include "gemma4/config.hpp"
#include "gemma4/error.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "gemma4/plan/packed_rows.hpp"

/// The bytes that a decode step must read from the memory of a device, whatever its kernels do: the roofline of a step
/// is their time at the rate of a copy.
namespace gemma4 {

struct StepBytes {
  std::int64_t weights = 0;  ///< every matrix once, as its rows are packed, and the norms
  std::int64_t cache = 0;    ///< the keys and values that the new token sees, but its own

  [[nodiscard]] std::int64_t total() const { return weights + cache; }
};

namespace detail {

/// Of the keys and values that a token behind `depth` others sees, as they are allocated.
template <class TFormat>
[[nodiscard]] std::int64_t cache_read_bytes(const ModelConfig& config, const TFormat& format, std::int64_t depth) {
  std::int64_t bytes = 0;
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    const AttentionConfig& attention = config.attention(layer);
    const auto row = [&](CacheSide side) { return format.allocated_row_bytes(side, attention.head_dim); };
    bytes += config.sliding_layer(layer)
                 ? std::min(depth, config.window - 1) * attention.n_head_kv * 2 * TFormat::kRingValueBytes *
                       attention.head_dim
                 : depth * attention.n_head_kv * (row(CacheSide::kKey) + row(CacheSide::kValue));
  }
  return bytes;
}

}  // namespace detail

/// Of one step behind `depth` tokens. The embedding is the output matrix too, and is read whole for the logits; the row
/// that is looked up is among it. Where there is an output matrix beside it, of the embedding that row is read.
/// Activations stay in the cache of the device and do not count.
/// @throws std::invalid_argument for a negative depth
[[nodiscard]] inline StepBytes step_read_bytes(const ModelConfig& config, const std::vector<ModelTensor>& tensors,
                                               const CacheSpec& cache, std::int64_t depth) {
  require(depth >= 0, "step_read_bytes: depth ", depth, ", need at least 0");
  StepBytes bytes;
  const bool has_output =
      std::ranges::any_of(tensors, [](const auto& tensor) { return tensor.name == "output.weight"; });
  for (const ModelTensor& tensor : tensors) {
    if (tensor.dims.size() > 1) {
      const bool is_looked_up = has_output && tensor.name == "token_embd.weight";
      bytes.weights += (is_looked_up ? 1 : tensor.rows()) * packed_row_bytes(tensor.type, tensor.row_len());
    } else if (is_device_vector(tensor)) {
      bytes.weights += 4 * tensor.size();
    }
  }
  std::visit([&](const auto& format) { bytes.cache = detail::cache_read_bytes(config, format, depth); }, cache);
  return bytes;
}

/// Mean of `n_token` steps, the first of them behind `depth` tokens.
/// @throws std::invalid_argument for less than one token
[[nodiscard]] inline double mean_step_read_bytes(const ModelConfig& config, const std::vector<ModelTensor>& tensors,
                                                 const CacheSpec& cache, std::int64_t depth, std::int64_t n_token) {
  require(n_token >= 1, "mean_step_read_bytes: ", n_token, " tokens, need at least 1");
  double sum = 0;
  for (std::int64_t i = 0; i < n_token; ++i) {
    sum += static_cast<double>(step_read_bytes(config, tensors, cache, depth + i).total());
  }
  return sum / static_cast<double>(n_token);
}

}  // namespace gemma4

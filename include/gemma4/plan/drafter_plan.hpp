// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gemma4/assistant_config.hpp"
#include "gemma4/draft/drafter.hpp"
#include "gemma4/error.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "gemma4/quantized_matrix.hpp"

/// The bytes that a drafter takes beside its target: weights and the activations of one token. It has no cache, and its
/// attention and products leave their parts in the target's buffers.
namespace gemma4 {

/// The activations of a drafter on a device, in bytes; each begins at kDeviceAlignment. It takes a token at a time.
struct AssistantActivations {
  std::int64_t input = 0;   ///< f32: the embedded token, and the state beside it
  std::int64_t stream = 0;  ///< f32
  std::int64_t normed = 0;  ///< bf16
  std::int64_t newest = 0;  ///< bf16, K and V of the newest key of the sliding layer that it reads
  DecodeActivations decode = {};

  [[nodiscard]] std::int64_t total() const { return input + stream + normed + newest + decode.total(); }
};

[[nodiscard]] inline AssistantActivations assistant_activations(const AssistantConfig& config) {
  constexpr std::int64_t kBf16 = 2, kF32 = 4;
  const ModelConfig& own = config.own;
  const auto up = [](std::int64_t bytes) { return detail::round_up(bytes, kDeviceAlignment); };
  return {.input = up(config.n_input() * kF32),
          .stream = up(own.hidden * kF32),
          .normed = up(own.hidden * kBf16),
          .newest = 2 * up(own.sliding.n_head_kv * own.sliding.head_dim * kBf16),
          .decode = decode_activations(own, 1)};
}

namespace detail {

/// All of the reference's are float32.
[[nodiscard]] inline std::int64_t reference_activations(const AssistantConfig& config) {
  const ModelConfig& own = config.own;
  const std::int64_t stream = 3 * own.hidden;  // the stream, what is pending, and normalised
  return 4 * (config.n_input() + config.hidden_target + stream + 3 * qkv_widths(own).q + 3 * own.ffn_hidden);
}

}  // namespace detail

/// For MemoryPlanOptions::drafter.
/// @param tensors assistant_tensors(config), or model_tensors(file)
/// @throws std::invalid_argument naming a matrix whose type no backend can run
[[nodiscard]] inline std::vector<PlannedBuffer> drafter_buffers(const AssistantConfig& config,
                                                                const std::vector<ModelTensor>& tensors,
                                                                PlanTarget target) {
  constexpr std::int64_t kF32 = 4;
  for (const ModelTensor& tensor : tensors) {
    if (tensor.dims.size() == 1 || is_weight_type(tensor.type)) continue;
    require(false, "memory plan: tensor '", tensor.name, "' of the drafter ", unsupported_weight_type(tensor.type));
  }
  const ModelConfig& own = config.own;
  const bool is_device = target == PlanTarget::kCuda;
  const auto up = [&](std::int64_t bytes) { return is_device ? detail::round_up(bytes, kDeviceAlignment) : bytes; };
  std::int64_t weights = 0;
  for (const ModelTensor& tensor : tensors) weights += is_device ? device_bytes(tensor) : tensor.bytes();
  const std::int64_t logits = (is_device ? draft::kMaxDrafts : 1) * own.vocab * kF32;
  const std::int64_t activations =
      is_device ? assistant_activations(config).total() : detail::reference_activations(config);
  return {{"drafter_weights", weights, is_device ? "matrices, rows repacked, and norms" : "the file as mapped"},
          {"drafter_logits", up(logits),
           is_device ? concat(draft::kMaxDrafts, " rows x vocab x f32, of the tokens of a draft") : "vocab x f32"},
          {"drafter_activations", activations, "input, stream, q, attended, gate and up of one token"}};
}

}  // namespace gemma4

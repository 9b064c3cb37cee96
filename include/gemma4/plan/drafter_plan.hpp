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

/// For MemoryPlanOptions::drafter.
/// @param tensors assistant_tensors(config), or model_tensors(file)
/// @throws std::invalid_argument naming a matrix whose type no backend can run
[[nodiscard]] inline std::vector<PlannedBuffer> drafter_buffers(const AssistantConfig& config,
                                                                const std::vector<ModelTensor>& tensors,
                                                                PlanTarget target) {
  constexpr std::int64_t kBf16 = 2, kF32 = 4;
  for (const ModelTensor& tensor : tensors) {
    if (tensor.dims.size() == 1 || is_weight_type(tensor.type)) continue;
    require(false, "memory plan: tensor '", tensor.name, "' of the drafter ", unsupported_weight_type(tensor.type));
  }
  const ModelConfig& own = config.own;
  const bool is_device = target == PlanTarget::kCuda;
  const std::int64_t value = is_device ? kBf16 : kF32;
  const auto up = [&](std::int64_t bytes) { return is_device ? detail::round_up(bytes, kDeviceAlignment) : bytes; };
  std::int64_t weights = 0;
  for (const ModelTensor& tensor : tensors) weights += is_device ? device_bytes(tensor) : tensor.bytes();
  const std::int64_t q_dim = detail::qkv_widths(own).q;
  const std::int64_t logits = (is_device ? draft::kMaxDrafts : 1) * own.vocab * kF32;
  const std::int64_t stream = own.hidden * (2 * kF32 + value);  // the stream, what is pending, and normalised
  const std::int64_t activations = up(config.n_input() * value) + up(config.hidden_target * kF32) + up(stream) +
                                   up(2 * q_dim * value) + up(q_dim * kF32) + up(2 * own.ffn_hidden * kF32) +
                                   up(own.ffn_hidden * value);
  return {{"drafter_weights", weights, is_device ? "matrices, rows repacked, and norms" : "the file as mapped"},
          {"drafter_logits", up(logits),
           is_device ? concat(draft::kMaxDrafts, " rows x vocab x f32, of the tokens of a draft") : "vocab x f32"},
          {"drafter_activations", activations, "input, state, stream, q, attended, gate and up of one token"}};
}

}  // namespace gemma4

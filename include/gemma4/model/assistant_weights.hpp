// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "gemma4/gguf/assistant_from_gguf.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/quantized_matrix.hpp"

/// The tensors of a drafter, bound by name from a GGUF file as those of a model are.
namespace gemma4 {

struct AssistantWeights {
  AssistantConfig config;
  QuantizedMatrix token_embd;                                        ///< [vocab, hidden]: its output matrix alone
  QuantizedMatrix pre_projection;                                    ///< [hidden, 2 * hidden_target]
  QuantizedMatrix post_projection;                                   ///< [hidden_target, hidden]
  std::vector<LayerWeights> layers;                                  ///< without attn_k, attn_v and attn_k_norm
  std::span<const float> output_norm;                                ///< [hidden]
  std::vector<std::shared_ptr<const std::vector<float>>> converted;  ///< norms that the file has in another type
};

/// @param target the model whose caches and states it will read
/// @throws FormatError naming a tensor that is missing, has another shape or type, or is not known; or what of the
///         drafter is not the target's
[[nodiscard]] inline AssistantWeights assistant_weights_from_gguf(const GgufFile& file, const ModelConfig& target) {
  AssistantWeights weights;
  weights.config = assistant_config_from_gguf(file);
  require_assistant_fits(file.path().string(), weights.config, target);
  const ModelConfig& own = weights.config.own;
  detail::TensorBinder binder(file);
  weights.token_embd =
      binder.token_matrix("token_embd.weight", own.vocab, file.tensor("token_embd.weight").dims[1], own.hidden);
  weights.pre_projection = binder.matrix("nextn.pre_projection.weight", own.hidden, weights.config.n_input());
  weights.post_projection = binder.matrix("nextn.post_projection.weight", weights.config.hidden_target, own.hidden);
  weights.output_norm = binder.vector("output_norm.weight", own.hidden);
  for (std::int64_t layer = 0; layer < own.n_layer(); ++layer) {
    weights.layers.push_back(detail::bind_layer(binder, own, layer, detail::LayerCacheUse::kReadsAnothers));
  }
  binder.refuse_strangers();
  weights.converted = binder.converted();
  return weights;
}

}  // namespace gemma4

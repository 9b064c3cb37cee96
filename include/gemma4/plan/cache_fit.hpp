// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "gemma4/cache_formats.hpp"
#include "gemma4/config.hpp"
#include "gemma4/error.hpp"
#include "gemma4/gguf/model_tensors.hpp"

/// Whether a model can have a cache format at all: asked before anything is planned, loaded or allocated.
namespace gemma4 {

/// Refuses a format that reads keys from values for a full layer whose V is no projection of K's, and for layers whose
/// RoPE turns more places than the format keeps.
/// @param has_own_v has_own_v(layer): the layer has an attn_v
/// @throws std::invalid_argument naming the format, the layer and what to choose instead
template <class THasOwnV>
void require_cache_suits(const CacheSpec& cache, const ModelConfig& config, const THasOwnV& has_own_v) {
  if (std::visit([]<class TFormat>(const TFormat&) { return !TFormat::kReadsKeysFromValues; }, cache)) return;
  if (config.n_full_layer() == 0) return;
  const std::string name = to_string(cache);
  require(config.full.rope_pairs <= config.full.head_dim / 8, "cache ", name, ": RoPE of the full layers turns ",
          config.full.rope_pairs, " pairs of head_dim ", config.full.head_dim,
          ", the format keeps head_dim / 8 = ", config.full.head_dim / 8, " of them; choose tq4 or bf16");
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    require(config.sliding_layer(layer) || !has_own_v(layer), "cache ", name,
            ": reads keys from values, but full layer ", layer, " has values of its own (blk.", layer,
            ".attn_v.weight); choose tq4 or bf16");
  }
}

/// The same, from the tensors of the model.
inline void require_cache_suits(const CacheSpec& cache, const ModelConfig& config,
                                const std::vector<ModelTensor>& tensors) {
  require_cache_suits(cache, config, [&](std::int64_t layer) {
    const std::string name = concat("blk.", layer, ".attn_v.weight");
    return std::any_of(tensors.begin(), tensors.end(), [&](const ModelTensor& tensor) { return tensor.name == name; });
  });
}

}  // namespace gemma4

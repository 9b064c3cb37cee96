// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gemma4/assistant_config.hpp"
#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf.hpp"
#include "gemma4/gguf/model_tensors.hpp"

/// The tensors of a drafter's file: names, types and shapes, without data.
namespace gemma4 {

/// In the order of the files that llama.cpp's tools write: vectors F32, every matrix in `type`.
/// @throws std::invalid_argument for layers that no backend can run, or a row that does not divide into blocks
[[nodiscard]] inline std::vector<ModelTensor> assistant_tensors(const AssistantConfig& config,
                                                                TensorType type = TensorType::kQ8_0) {
  const ModelConfig& own = config.own;
  require_config(own);
  std::vector<ModelTensor> tensors;
  const auto vector = [&](const std::string& name, std::int64_t size) {
    tensors.push_back({name, TensorType::kF32, {size}});
  };
  const auto matrix = [&](const std::string& name, std::int64_t rows, std::int64_t cols) {
    require(cols % block_size(type) == 0, "tensor '", name, "': rows of ", cols, " values do not divide into ",
            type_name(type), " blocks of ", block_size(type));
    tensors.push_back({name, type, {cols, rows}});
  };
  matrix("token_embd.weight", own.vocab, own.hidden);
  vector("output_norm.weight", own.hidden);
  if (own.n_full_layer() > 0) vector("rope_freqs.weight", own.full.head_dim / 2);
  matrix("nextn.pre_projection.weight", own.hidden, config.n_input());
  matrix("nextn.post_projection.weight", config.hidden_target, own.hidden);
  for (std::int64_t layer = 0; layer < own.n_layer(); ++layer) {
    const std::int64_t head_dim = own.attention(layer).head_dim, q_dim = own.n_head * head_dim;
    const auto name = [&](const char* part) { return concat("blk.", layer, ".", part, ".weight"); };
    vector(name("attn_norm"), own.hidden);
    vector(name("attn_q_norm"), head_dim);
    vector(name("post_attention_norm"), own.hidden);
    vector(name("ffn_norm"), own.hidden);
    vector(name("post_ffw_norm"), own.hidden);
    matrix(name("attn_q"), q_dim, own.hidden);
    matrix(name("attn_output"), own.hidden, q_dim);
    matrix(name("ffn_gate"), own.ffn_hidden, own.hidden);
    matrix(name("ffn_up"), own.ffn_hidden, own.hidden);
    matrix(name("ffn_down"), own.hidden, own.ffn_hidden);
    vector(name("layer_output_scale"), 1);
  }
  return tensors;
}

}  // namespace gemma4

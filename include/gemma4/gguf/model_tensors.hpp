// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/gguf/gguf.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/text_model.hpp"

/// The tensors of a model file: names, types and shapes, without data. What a writer of models writes and a memory plan
/// counts.
namespace gemma4 {

struct ModelTensor {
  std::string name;
  TensorType type = TensorType::kF32;
  std::vector<std::int64_t> dims;  ///< GGUF order, innermost first

  [[nodiscard]] std::int64_t row_len() const { return dims.front(); }
  [[nodiscard]] std::int64_t rows() const {
    std::int64_t count = 1;
    for (std::size_t axis = 1; axis < dims.size(); ++axis) count *= dims[axis];
    return count;
  }
  [[nodiscard]] std::int64_t size() const { return row_len() * rows(); }
  /// Bytes in the file.
  [[nodiscard]] std::int64_t bytes() const { return rows() * row_bytes(type, row_len()); }
  bool operator==(const ModelTensor&) const = default;
};

/// Whether entry `index` of the `count` attn_v (or ffn_down) matrices of a Q4_K_M file is Q6_K: the first eighth, the
/// last eighth, and every third between. attn_v is counted over the layers that have one. Held against files that a
/// peer's quantizer wrote.
[[nodiscard]] constexpr bool q4_k_m_wants_more_bits(std::int64_t index, std::int64_t count) {
  return index < count / 8 || index >= 7 * count / 8 || (index - count / 8) % 3 == 2;
}

/// The types of matrices that published files mix.
enum class WeightMix {
  kQ4KM,    ///< what a peer's quantizer makes of any model: Q4_K and Q6_K
  kQatQ40,  ///< what was trained for it: Q4_0, under an embedding in Q6_K
};

struct WeightMixInfo {
  WeightMix mix;
  std::string_view name;
  std::uint32_t file_type;  ///< number of general.file_type that llama.cpp prints for it
};

inline constexpr std::array kWeightMixes = {WeightMixInfo{WeightMix::kQ4KM, "q4_k_m", 15},
                                            WeightMixInfo{WeightMix::kQatQ40, "qat-q4_0", 2}};

namespace detail {

/// Lists tensors in the order of the files that llama.cpp's tools write.
class TensorLister {
 public:
  TensorLister(const ModelConfig& config, std::optional<TensorType> only, WeightMix mix)
      : config_(config), only_(only), mix_(mix) {}

  [[nodiscard]] std::vector<ModelTensor> list() {
    vector("output_norm.weight", config_.hidden);
    if (config_.n_full_layer() > 0) vector("rope_freqs.weight", config_.full.head_dim / 2);
    matrix("token_embd.weight", TensorType::kQ6K, config_.vocab, config_.hidden);
    for (std::int64_t layer = 0; layer < config_.n_layer(); ++layer) add_layer(layer);
    return std::move(tensors_);
  }

 private:
  void vector(const std::string& name, std::int64_t size) { tensors_.push_back({name, TensorType::kF32, {size}}); }

  void matrix(const std::string& name, TensorType type, std::int64_t rows, std::int64_t cols) {
    const TensorType chosen = only_.value_or(type);
    require(cols % block_size(chosen) == 0, "tensor '", name, "': rows of ", cols, " values do not divide into ",
            type_name(chosen), " blocks of ", block_size(chosen),
            "; hidden, ffn_hidden and n_head * head_dim must be multiples of it");
    tensors_.push_back({name, chosen, {cols, rows}});
  }

  void add_layer(std::int64_t layer) {
    const AttentionConfig& attention = config_.attention(layer);
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    const std::int64_t q_dim = config_.n_head * attention.head_dim;
    const std::int64_t kv_dim = attention.n_head_kv * attention.head_dim;
    const bool is_qat = mix_ == WeightMix::kQatQ40;
    const TensorType most = is_qat ? TensorType::kQ4_0 : TensorType::kQ4K;
    const auto more_bits = [&](bool more) { return more && !is_qat ? TensorType::kQ6K : most; };
    matrix(prefix + "attn_k.weight", most, kv_dim, config_.hidden);
    vector(prefix + "attn_k_norm.weight", attention.head_dim);
    vector(prefix + "attn_norm.weight", config_.hidden);
    matrix(prefix + "attn_output.weight", most, config_.hidden, q_dim);
    matrix(prefix + "attn_q.weight", most, q_dim, config_.hidden);
    vector(prefix + "attn_q_norm.weight", attention.head_dim);
    if (config_.sliding_layer(layer)) {
      const std::int64_t n_sliding = config_.n_layer() - config_.n_full_layer();
      matrix(prefix + "attn_v.weight", more_bits(q4_k_m_wants_more_bits(n_attn_v_++, n_sliding)), kv_dim,
             config_.hidden);
    }
    matrix(prefix + "ffn_down.weight", more_bits(q4_k_m_wants_more_bits(layer, config_.n_layer())), config_.hidden,
           config_.ffn_hidden);
    matrix(prefix + "ffn_gate.weight", most, config_.ffn_hidden, config_.hidden);
    vector(prefix + "ffn_norm.weight", config_.hidden);
    matrix(prefix + "ffn_up.weight", most, config_.ffn_hidden, config_.hidden);
    vector(prefix + "layer_output_scale.weight", 1);
    vector(prefix + "post_attention_norm.weight", config_.hidden);
    vector(prefix + "post_ffw_norm.weight", config_.hidden);
  }

  const ModelConfig& config_;
  std::optional<TensorType> only_;
  WeightMix mix_;
  std::int64_t n_attn_v_ = 0;
  std::vector<ModelTensor> tensors_;
};

}  // namespace detail

/// The tensors of a model of this shape: token_embd Q6_K (tied: it is the output matrix too), vectors F32, and the
/// other matrices by the mix. q4_k_m: attn_v and ffn_down by q4_k_m_wants_more_bits(), the others Q4_K. qat-q4_0: all
/// Q4_0, as the files with weights that were trained for that type have them. With `only`, every matrix has that type.
/// @throws std::invalid_argument for a config that no backend can run, or a row that does not divide into blocks
[[nodiscard]] inline std::vector<ModelTensor> model_tensors(const ModelConfig& config,
                                                            std::optional<TensorType> only = std::nullopt,
                                                            WeightMix mix = WeightMix::kQ4KM) {
  require_config(config);
  return detail::TensorLister(config, only, mix).list();
}

/// Whether the rows of a tensor are those of the vocabulary.
[[nodiscard]] inline bool is_token_matrix(std::string_view name) {
  return name == "token_embd.weight" || name == "output.weight";
}

/// The tensors of a file that are the text model's, with the rows that stand for tokens: what is loaded of it.
[[nodiscard]] inline std::vector<ModelTensor> model_tensors(const GgufFile& file) {
  std::vector<ModelTensor> tensors;
  for (const GgufTensor& tensor : file.tensors()) {
    if (!is_text_tensor(tensor.name)) continue;
    tensors.push_back({tensor.name, tensor.type, tensor.dims});
    std::vector<std::int64_t>& dims = tensors.back().dims;
    if (is_token_matrix(tensor.name) && dims.size() == 2)
      dims[1] = std::min(dims[1], n_tokenizer_token(file).value_or(dims[1]));
  }
  return tensors;
}

[[nodiscard]] inline std::int64_t total_bytes(const std::vector<ModelTensor>& tensors) {
  std::int64_t sum = 0;
  for (const ModelTensor& tensor : tensors) sum += tensor.bytes();
  return sum;
}

}  // namespace gemma4

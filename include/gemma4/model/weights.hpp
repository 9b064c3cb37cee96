// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/gguf/config_from_gguf.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/quantized_matrix.hpp"

/// The tensors of a model, bound by name from a GGUF file; nothing is copied, the file's mapping owns the bytes. Norms
/// that are not float32 are the exception.
namespace gemma4 {

struct LayerWeights {
  std::span<const float> attn_norm;            ///< [hidden]
  QuantizedMatrix attn_q;                      ///< [n_head * head_dim, hidden]
  QuantizedMatrix attn_k;                      ///< [n_head_kv * head_dim, hidden]
  QuantizedMatrix attn_v;                      ///< the same; empty on a full layer whose V is its K projection
  std::span<const float> attn_q_norm;          ///< [head_dim]
  std::span<const float> attn_k_norm;          ///< [head_dim]
  QuantizedMatrix attn_output;                 ///< [hidden, n_head * head_dim]
  std::span<const float> post_attention_norm;  ///< [hidden]
  std::span<const float> ffn_norm;             ///< [hidden]
  QuantizedMatrix ffn_gate;                    ///< [ffn_hidden, hidden]
  QuantizedMatrix ffn_up;                      ///< [ffn_hidden, hidden]
  QuantizedMatrix ffn_down;                    ///< [hidden, ffn_hidden]
  std::span<const float> post_ffw_norm;        ///< [hidden]
  float output_scale = 1.0f;                   ///< the residual stream is multiplied by it at the end of the layer
};

struct ModelWeights {
  ModelConfig config;
  QuantizedMatrix token_embd;  ///< [vocab, hidden]
  QuantizedMatrix output;      ///< [vocab, hidden], of the logits: output.weight, or token_embd where the file has none
  std::vector<LayerWeights> layers;
  std::span<const float> output_norm;                                ///< [hidden]
  std::vector<std::shared_ptr<const std::vector<float>>> converted;  ///< norms that the file has in another type

  /// Whether the embedding is the output matrix too.
  [[nodiscard]] bool is_tied() const { return output.data.data() == token_embd.data.data(); }
};

namespace detail {

/// Binds tensors by name, checks their shapes, and remembers which were used so that a stranger is refused.
class TensorBinder {
 public:
  explicit TensorBinder(const GgufFile& file) : file_(file) {}

  QuantizedMatrix matrix(const std::string& name, std::int64_t rows, std::int64_t cols) {
    const GgufTensor& tensor = bind(name, {cols, rows});
    if (!is_weight_type(tensor.type)) require_format(false, where(name), unsupported_weight_type(tensor.type));
    return {tensor.type, rows, cols, tensor.data};
  }

  /// The first `n_token` of the `rows` rows of a matrix; the rest of them pads it.
  QuantizedMatrix token_matrix(const std::string& name, std::int64_t n_token, std::int64_t rows, std::int64_t cols) {
    QuantizedMatrix whole = matrix(name, rows, cols);
    whole.rows = n_token;
    whole.data = whole.data.first(static_cast<std::size_t>(n_token * row_bytes(whole.type, cols)));
    return whole;
  }

  [[nodiscard]] bool has(const std::string& name) const { return file_.find_tensor(name) != nullptr; }

  std::span<const float> vector(const std::string& name, std::int64_t size) {
    const GgufTensor& tensor = bind(name, {size});
    if (tensor.type == TensorType::kF32) return data_as<float>(tensor);
    require_format(tensor.type == TensorType::kF16 || tensor.type == TensorType::kBf16, where(name), "has type ",
                   type_name(tensor.type), ", expected F32, F16 or BF16");
    const auto values = std::make_shared<std::vector<float>>(static_cast<std::size_t>(size));
    dequantise_row(tensor.type, tensor.data, *values);
    converted_.push_back(values);
    return *values;
  }

  /// Every tensor of the text model must have been bound or be `rope_freqs.weight`, which the config has read.
  void refuse_strangers() const {
    for (const GgufTensor& tensor : file_.tensors()) {
      if (!is_text_tensor(tensor.name)) continue;
      require_format(tensor.name == "rope_freqs.weight" || bound_.contains(tensor.name), where(tensor.name),
                     "is not part of the architecture that is implemented");
    }
  }

  /// What vector() converted; to be kept as long as its spans.
  [[nodiscard]] std::vector<std::shared_ptr<const std::vector<float>>> converted() const { return converted_; }

 private:
  [[nodiscard]] std::string where(const std::string& name) const {
    return concat(file_.path().string(), ": tensor '", name, "' ");
  }

  const GgufTensor& bind(const std::string& name, std::initializer_list<std::int64_t> dims) {
    const GgufTensor& tensor = file_.tensor(name);
    const auto text = [](const auto& list) {
      std::string joined = "[";
      for (const std::int64_t extent : list) joined += (joined.size() > 1 ? ", " : "") + std::to_string(extent);
      return joined + "]";
    };
    const std::vector<std::int64_t> expected(dims);
    require_format(tensor.dims == expected, where(name), "has dimensions ", text(tensor.dims), ", expected ",
                   text(expected), " (innermost first)");
    bound_.insert(name);
    return tensor;
  }

  const GgufFile& file_;
  std::set<std::string, std::less<>> bound_;
  std::vector<std::shared_ptr<const std::vector<float>>> converted_;
};

/// Whether a layer writes keys and values, or only has queries for those of another model.
enum class LayerCacheUse { kHasItsOwn, kReadsAnothers };

inline LayerWeights bind_layer(TensorBinder& binder, const ModelConfig& config, std::int64_t layer,
                               LayerCacheUse use = LayerCacheUse::kHasItsOwn) {
  const std::string prefix = "blk." + std::to_string(layer) + ".";
  const AttentionConfig& attention = config.attention(layer);
  const std::int64_t q_dim = config.n_head * attention.head_dim;
  const std::int64_t kv_dim = attention.n_head_kv * attention.head_dim;
  LayerWeights weights;
  weights.attn_norm = binder.vector(prefix + "attn_norm.weight", config.hidden);
  weights.attn_q = binder.matrix(prefix + "attn_q.weight", q_dim, config.hidden);
  if (use == LayerCacheUse::kHasItsOwn) {
    weights.attn_k = binder.matrix(prefix + "attn_k.weight", kv_dim, config.hidden);
    if (config.sliding_layer(layer) || binder.has(prefix + "attn_v.weight")) {
      weights.attn_v = binder.matrix(prefix + "attn_v.weight", kv_dim, config.hidden);
    }
    weights.attn_k_norm = binder.vector(prefix + "attn_k_norm.weight", attention.head_dim);
  }
  weights.attn_q_norm = binder.vector(prefix + "attn_q_norm.weight", attention.head_dim);
  weights.attn_output = binder.matrix(prefix + "attn_output.weight", config.hidden, q_dim);
  weights.post_attention_norm = binder.vector(prefix + "post_attention_norm.weight", config.hidden);
  weights.ffn_norm = binder.vector(prefix + "ffn_norm.weight", config.hidden);
  weights.ffn_gate = binder.matrix(prefix + "ffn_gate.weight", config.ffn_hidden, config.hidden);
  weights.ffn_up = binder.matrix(prefix + "ffn_up.weight", config.ffn_hidden, config.hidden);
  weights.ffn_down = binder.matrix(prefix + "ffn_down.weight", config.hidden, config.ffn_hidden);
  weights.post_ffw_norm = binder.vector(prefix + "post_ffw_norm.weight", config.hidden);
  weights.output_scale = binder.vector(prefix + "layer_output_scale.weight", 1)[0];
  return weights;
}

}  // namespace detail

/// @throws FormatError naming a tensor that is missing, has another shape or type, or is not known
[[nodiscard]] inline ModelWeights weights_from_gguf(const GgufFile& file) {
  ModelWeights weights;
  weights.config = config_from_gguf(file);
  detail::TensorBinder binder(file);
  const auto token_matrix = [&, rows = file.tensor("token_embd.weight").dims[1]](const char* name) {
    return binder.token_matrix(name, weights.config.vocab, rows, weights.config.hidden);
  };
  weights.token_embd = token_matrix("token_embd.weight");
  const bool is_tied = file.find_tensor("output.weight") == nullptr;
  weights.output = is_tied ? weights.token_embd : token_matrix("output.weight");
  weights.output_norm = binder.vector("output_norm.weight", weights.config.hidden);
  for (std::int64_t layer = 0; layer < weights.config.n_layer(); ++layer) {
    weights.layers.push_back(detail::bind_layer(binder, weights.config, layer));
  }
  binder.refuse_strangers();
  weights.converted = binder.converted();
  return weights;
}

}  // namespace gemma4

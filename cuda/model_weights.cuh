// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device/device_arena.cuh"
#include "cuda/fused_mlp.cuh"
#include "cuda/weights/layout.cuh"
#include "cuda/weights/upload.cuh"
#include "gemma4/config.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/model/assistant_weights.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/plan/drafter_plan.hpp"
#include "gemma4/plan/memory_plan.hpp"

/// The weights of a model, or of a drafter, in device memory: one allocation, every matrix once, in the layout of
/// cuda/weights/layout.cuh.
namespace gemma4::cuda {

/// One layer; pointers and matrices are borrowed from the PackedModel. Norms are f32.
struct PackedLayer {
  const float* attn_norm = nullptr;     ///< [hidden]
  PackedMatrix attn_q, attn_k, attn_v;  ///< one after another in memory; attn_v is empty where V is K's projection
  const float* attn_q_norm = nullptr;   ///< [head_dim]
  const float* attn_k_norm = nullptr;   ///< [head_dim]
  PackedMatrix attn_output;             ///< [hidden, n_head * head_dim]
  const float* post_attention_norm = nullptr;  ///< [hidden]
  const float* ffn_norm = nullptr;             ///< [hidden]
  GateUpWeights gate_up;                       ///< one matrix where both have one packed type
  PackedMatrix ffn_down;                       ///< [hidden, ffn_hidden]
  const float* post_ffw_norm = nullptr;        ///< [hidden]
  float output_scale = 1.0f;

  /// On a sliding layer; on a full one V is K's projection, as a rule.
  [[nodiscard]] bool has_own_v() const { return attn_v.rows > 0; }
};

struct LoadOptions {
  bool join_gate_up = true;  ///< false: gate and up stay apart, so that the MLP takes the unfused path
  UploadOptions upload = {};
};

namespace detail {

/// Places weights in a piece of device memory, one after another, and then brings them there.
class WeightLoader {
 public:
  WeightLoader(std::span<std::byte> memory, const LoadOptions& options) : carver_(memory), options_(options) {}

  /// Null where there are no values.
  [[nodiscard]] const float* vector(const std::string& name, std::span<const float> values) {
    if (values.empty()) return nullptr;
    const auto count = static_cast<std::int64_t>(values.size());
    float* const to = carver_.take<float>(count);
    const QuantizedMatrix row{TensorType::kF32, 1, count, std::as_bytes(values)};
    tasks_.push_back({.name = name, .from = row, .to = reinterpret_cast<std::byte*>(to), .is_mapped = false});
    return to;
  }

  [[nodiscard]] PackedMatrix matrix(const std::string& name, const QuantizedMatrix& from) {
    if (from.empty()) return {};
    std::byte* const to = carver_.take<std::byte>(from.rows * packed_row_bytes(from.type, from.cols));
    tasks_.push_back({name, from, to, 1});
    return {from.type, from.rows, from.cols, to};
  }

  [[nodiscard]] PackedLayer layer(const std::string& prefix, const gemma4::LayerWeights& from) {
    PackedLayer layer;
    layer.attn_q = matrix(prefix + "attn_q.weight", from.attn_q);
    layer.attn_k = matrix(prefix + "attn_k.weight", from.attn_k);
    layer.attn_v = matrix(prefix + "attn_v.weight", from.attn_v);
    layer.attn_output = matrix(prefix + "attn_output.weight", from.attn_output);
    layer.gate_up = gate_up(prefix, from);
    layer.ffn_down = matrix(prefix + "ffn_down.weight", from.ffn_down);
    layer.attn_norm = vector(prefix + "attn_norm.weight", from.attn_norm);
    layer.attn_q_norm = vector(prefix + "attn_q_norm.weight", from.attn_q_norm);
    layer.attn_k_norm = vector(prefix + "attn_k_norm.weight", from.attn_k_norm);
    layer.post_attention_norm = vector(prefix + "post_attention_norm.weight", from.post_attention_norm);
    layer.ffn_norm = vector(prefix + "ffn_norm.weight", from.ffn_norm);
    layer.post_ffw_norm = vector(prefix + "post_ffw_norm.weight", from.post_ffw_norm);
    layer.output_scale = from.output_scale;
    return layer;
  }

  /// Blocks until everything is on the device. @return seconds that it took
  [[nodiscard]] double load() { return upload(std::move(tasks_), options_.upload); }

 private:
  [[nodiscard]] GateUpWeights gate_up(const std::string& prefix, const gemma4::LayerWeights& from) {
    const QuantizedMatrix &gate = from.ffn_gate, &up = from.ffn_up;
    GateUpWeights weights;
    if (!options_.join_gate_up || !gate_up_is_fused(gate.type, up.type)) {
      weights.gate = matrix(prefix + "ffn_gate.weight", gate);
      weights.up = matrix(prefix + "ffn_up.weight", up);
      return weights;
    }
    const std::int64_t row_bytes = packed_row_bytes(gate.type, gate.cols);
    std::byte* const to = carver_.take<std::byte>(2 * gate.rows * row_bytes);
    tasks_.push_back({prefix + "ffn_gate.weight", gate, to, 2});
    tasks_.push_back({prefix + "ffn_up.weight", up, to + row_bytes, 2});
    weights.joined = {gate.type, 2 * gate.rows, gate.cols, to};
    return weights;
  }

  Carver carver_;
  LoadOptions options_;
  std::vector<UploadTask> tasks_;
};

}  // namespace detail

/// A loaded model. The file is not needed afterwards. Several backends may share one model.
class PackedModel {
 public:
  /// Loads a model whose tensors are bound and checked. Blocks until everything is on the device. While it loads, the
  /// staging buffers (upload.n_slot * upload.slot_bytes on either side) are in use beside the weights.
  /// @throws FormatError when a scale or a norm is not finite
  /// @throws Error when the device has not enough memory; nothing stays allocated
  PackedModel(const gemma4::ModelWeights& weights, std::vector<ModelTensor> tensors, const LoadOptions& options = {})
      : config_(weights.config), tensors_(std::move(tensors)) {
    arena_ = DeviceArena(plan_memory(config_, tensors_, {.context = 1, .chunk = 1, .cache = Bf16Format{}}),
                         is_weight_buffer);
    detail::WeightLoader loader(arena_.all(), options);
    token_embd_ = loader.matrix("token_embd.weight", weights.token_embd);
    output_ = weights.is_tied() ? token_embd_ : loader.matrix("output.weight", weights.output);
    place_layers(loader, weights.layers, weights.output_norm);
    load_seconds_ = loader.load();
  }

  [[nodiscard]] const ModelConfig& config() const { return config_; }
  [[nodiscard]] const std::vector<ModelTensor>& tensors() const { return tensors_; }
  [[nodiscard]] const PackedMatrix& token_embd() const { return token_embd_; }
  /// [vocab, hidden], of the logits; the embedding itself where the two are tied.
  [[nodiscard]] const PackedMatrix& output() const { return output_; }
  [[nodiscard]] const PackedLayer& layer(std::int64_t index) const { return layers_[static_cast<std::size_t>(index)]; }
  [[nodiscard]] const float* output_norm() const { return output_norm_; }  ///< [hidden]
  /// What is allocated on the device, as memory_plan has it.
  [[nodiscard]] std::int64_t bytes() const { return arena_.bytes(); }
  [[nodiscard]] double load_seconds() const { return load_seconds_; }

  [[nodiscard]] static bool is_weight_buffer(const std::string& name) { return name.starts_with("weights_"); }

 private:
  friend class PackedAssistant;
  PackedModel() = default;

  void place_layers(detail::WeightLoader& loader, const std::vector<gemma4::LayerWeights>& layers,
                    std::span<const float> output_norm) {
    for (std::size_t i = 0; i < layers.size(); ++i) {
      layers_.push_back(loader.layer("blk." + std::to_string(i) + ".", layers[i]));
    }
    output_norm_ = loader.vector("output_norm.weight", output_norm);
  }

  ModelConfig config_;
  std::vector<ModelTensor> tensors_;
  DeviceArena arena_;
  PackedMatrix token_embd_;
  PackedMatrix output_;
  std::vector<PackedLayer> layers_;
  const float* output_norm_ = nullptr;
  double load_seconds_ = 0;
};

/// A loaded drafter. Its layers are those of a small model without keys and values; its file is not needed afterwards.
/// Several backends over models of its target's shape may share it.
class PackedAssistant {
 public:
  /// Loads a drafter whose tensors are bound, and checked against its target.
  /// @throws as PackedModel
  PackedAssistant(const AssistantWeights& weights, std::vector<ModelTensor> tensors, const LoadOptions& options = {})
      : config_(weights.config), buffers_(drafter_buffers(weights.config, tensors, PlanTarget::kCuda)) {
    own_.config_ = weights.config.own;
    own_.tensors_ = std::move(tensors);
    own_.arena_ = DeviceArena(MemoryPlan{buffers_}, is_weight_buffer);
    detail::WeightLoader loader(own_.arena_.all(), options);
    own_.token_embd_ = own_.output_ = loader.matrix("token_embd.weight", weights.token_embd);
    pre_projection_ = loader.matrix("nextn.pre_projection.weight", weights.pre_projection);
    post_projection_ = loader.matrix("nextn.post_projection.weight", weights.post_projection);
    own_.place_layers(loader, weights.layers, weights.output_norm);
    own_.load_seconds_ = loader.load();
  }

  [[nodiscard]] const AssistantConfig& config() const { return config_; }
  /// Its layers, its output matrix and its last norm; K, V and the norm of K are empty.
  [[nodiscard]] const PackedModel& own() const { return own_; }
  [[nodiscard]] const PackedMatrix& pre_projection() const { return pre_projection_; }    ///< [hidden, 2 hidden_target]
  [[nodiscard]] const PackedMatrix& post_projection() const { return post_projection_; }  ///< [hidden_target, hidden]
  /// For MemoryPlanOptions::drafter: its weights, and what a backend that drafts with it allocates.
  [[nodiscard]] const std::vector<PlannedBuffer>& buffers() const { return buffers_; }
  /// What is allocated on the device, as the plan has it.
  [[nodiscard]] std::int64_t bytes() const { return own_.bytes(); }

  [[nodiscard]] static bool is_weight_buffer(const std::string& name) { return name == "drafter_weights"; }

 private:
  AssistantConfig config_;
  std::vector<PlannedBuffer> buffers_;
  PackedModel own_;
  PackedMatrix pre_projection_, post_projection_;
};

/// Binds, checks and loads the drafter of a file for a target of this shape.
/// @throws FormatError when the file is no drafter, one for another target, or a number in it is not finite
[[nodiscard]] inline PackedAssistant load_assistant(const GgufFile& file, const ModelConfig& target,
                                                    const LoadOptions& options = {}) {
  return PackedAssistant(assistant_weights_from_gguf(file, target), model_tensors(file), options);
}

/// Binds, checks and loads the model of a file.
/// @throws FormatError when the file is not a model that is implemented, or a number in it is not finite
[[nodiscard]] inline PackedModel load_model(const GgufFile& file, const LoadOptions& options = {}) {
  return PackedModel(weights_from_gguf(file), model_tensors(file), options);
}

}  // namespace gemma4::cuda

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
#include "gemma4/model/weights.hpp"
#include "gemma4/plan/memory_plan.hpp"

/// The weights of a model in device memory: one allocation, every matrix once, in the layout of
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
    Carver carver(arena_.all());
    std::vector<UploadTask> tasks;
    const auto vector = [&](const std::string& name, std::span<const float> values) {
      const auto count = static_cast<std::int64_t>(values.size());
      float* const to = carver.take<float>(count);
      const QuantizedMatrix row{TensorType::kF32, 1, count, std::as_bytes(values)};
      tasks.push_back({.name = name, .from = row, .to = reinterpret_cast<std::byte*>(to), .is_mapped = false});
      return static_cast<const float*>(to);
    };
    const auto matrix = [&](const std::string& name, const QuantizedMatrix& from) {
      if (from.empty()) return PackedMatrix{};
      std::byte* const to = carver.take<std::byte>(from.rows * packed_row_bytes(from.type, from.cols));
      tasks.push_back({name, from, to, 1});
      return PackedMatrix{from.type, from.rows, from.cols, to};
    };
    token_embd_ = matrix("token_embd.weight", weights.token_embd);
    output_ = weights.is_tied() ? token_embd_ : matrix("output.weight", weights.output);
    for (std::size_t i = 0; i < weights.layers.size(); ++i) {
      const gemma4::LayerWeights& from = weights.layers[i];
      const std::string prefix = "blk." + std::to_string(i) + ".";
      PackedLayer layer;
      layer.attn_q = matrix(prefix + "attn_q.weight", from.attn_q);
      layer.attn_k = matrix(prefix + "attn_k.weight", from.attn_k);
      layer.attn_v = matrix(prefix + "attn_v.weight", from.attn_v);
      layer.attn_output = matrix(prefix + "attn_output.weight", from.attn_output);
      if (options.join_gate_up && gate_up_is_fused(from.ffn_gate.type, from.ffn_up.type)) {
        const std::int64_t row_bytes = packed_row_bytes(from.ffn_gate.type, from.ffn_gate.cols);
        std::byte* const to = carver.take<std::byte>(2 * from.ffn_gate.rows * row_bytes);
        tasks.push_back({prefix + "ffn_gate.weight", from.ffn_gate, to, 2});
        tasks.push_back({prefix + "ffn_up.weight", from.ffn_up, to + row_bytes, 2});
        layer.gate_up.joined = {from.ffn_gate.type, 2 * from.ffn_gate.rows, from.ffn_gate.cols, to};
      } else {
        layer.gate_up.gate = matrix(prefix + "ffn_gate.weight", from.ffn_gate);
        layer.gate_up.up = matrix(prefix + "ffn_up.weight", from.ffn_up);
      }
      layer.ffn_down = matrix(prefix + "ffn_down.weight", from.ffn_down);
      layer.attn_norm = vector(prefix + "attn_norm.weight", from.attn_norm);
      layer.attn_q_norm = vector(prefix + "attn_q_norm.weight", from.attn_q_norm);
      layer.attn_k_norm = vector(prefix + "attn_k_norm.weight", from.attn_k_norm);
      layer.post_attention_norm = vector(prefix + "post_attention_norm.weight", from.post_attention_norm);
      layer.ffn_norm = vector(prefix + "ffn_norm.weight", from.ffn_norm);
      layer.post_ffw_norm = vector(prefix + "post_ffw_norm.weight", from.post_ffw_norm);
      layer.output_scale = from.output_scale;
      layers_.push_back(layer);
    }
    output_norm_ = vector("output_norm.weight", weights.output_norm);
    load_seconds_ = upload(std::move(tasks), options.upload);
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
  ModelConfig config_;
  std::vector<ModelTensor> tensors_;
  DeviceArena arena_;
  PackedMatrix token_embd_;
  PackedMatrix output_;
  std::vector<PackedLayer> layers_;
  const float* output_norm_ = nullptr;
  double load_seconds_ = 0;
};

/// Binds, checks and loads the model of a file.
/// @throws FormatError when the file is not a model that is implemented, or a number in it is not finite
[[nodiscard]] inline PackedModel load_model(const GgufFile& file, const LoadOptions& options = {}) {
  return PackedModel(weights_from_gguf(file), model_tensors(file), options);
}

}  // namespace gemma4::cuda

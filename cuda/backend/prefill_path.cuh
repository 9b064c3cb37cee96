// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/backend/path.cuh"
#include "cuda/device/device_arena.cuh"
#include "cuda/linear_prefill.cuh"
#include "gemma4/plan/step_plan.hpp"

/// The five steps of a layer for a chunk of more than kDecodeChunk tokens: weights dequantised to bf16, products by
/// cuBLASLt, activations in bf16.
namespace gemma4::cuda {

class PrefillPath {
 public:
  PrefillPath(const PathContext& context, std::int64_t max_chunk, DeviceArena& arena) : context_(context) {
    pending_ = arena.data<Bf16>("pending", max_chunk * context.config().hidden);
    const std::span<std::byte> activations = arena.buffer("activations");
    activations_ = reinterpret_cast<Bf16*>(activations.data());
    width_ = static_cast<std::int64_t>(activations.size() / sizeof(Bf16)) / max_chunk;
  }

  void project_qkv(std::int64_t layer, Pass& pass) const {
    const PackedLayer& weights = context_.model.layer(layer);
    const ProjectedHeads<Bf16> heads = this->heads(layer, pass);
    normalise(weights.attn_norm, pass);
    const auto multiply = [&](const PackedMatrix& weight, const View<Bf16, 3>& out) {
      context_.gemm.linear<Bf16>(normed(pass), weight, heads_as_rows(out), context_.stream);
    };
    multiply(weights.attn_q, heads.q);
    multiply(weights.attn_k, heads.k);
    if (weights.has_own_v()) multiply(weights.attn_v, heads.v);
    store_heads(context_, pass, layer, heads);
  }

  void attend(std::int64_t layer, Pass& pass) const { attend_heads(context_, pass, layer, heads(layer, pass)); }

  void project_output(std::int64_t layer, Pass& pass) const {
    const PackedLayer& weights = context_.model.layer(layer);
    project(heads_as_rows(heads(layer, pass).q_out), weights.attn_output, pass);
    pass.pending = {weights.post_attention_norm, 1.0f};
  }

  void gate_up(std::int64_t layer, Pass& pass) const {
    const PackedLayer& weights = context_.model.layer(layer);
    const std::int64_t width = context_.config().ffn_hidden;
    normalise(weights.ffn_norm, pass);
    context_.gemm.gate_up<Bf16>(normed(pass), weights.gate_up,
                                {activations_, static_cast<std::size_t>(2 * pass.n_token() * width)}, activation(pass),
                                context_.stream);
  }

  void down(std::int64_t layer, Pass& pass) const {
    const PackedLayer& weights = context_.model.layer(layer);
    project(activation(pass), weights.ffn_down, pass);
    pass.pending = {weights.post_ffw_norm, weights.output_scale};
  }

  void finish(std::int64_t first, std::int64_t count, const float* norm, Bf16* to, const Pass& pass) const {
    finish_rows<Bf16>(context_, pass, pending_, first, count, norm, to, {});
  }

  /// How the products run, for the eye.
  [[nodiscard]] std::vector<StepPlanRow> rows(const Pass& /*pass*/) const {
    return product_rows(context_.model, "dequantise + cuBLASLt", "");
  }

 private:
  [[nodiscard]] View<const Bf16, 2> normed(const Pass& pass) const {
    return make_view(static_cast<const Bf16*>(context_.normed), pass.n_token(), context_.config().hidden);
  }
  [[nodiscard]] View<Bf16, 2> activation(const Pass& pass) const {
    return make_view(activations_, pass.n_token(), context_.config().ffn_hidden);
  }
  void normalise(const float* norm, Pass& pass) const {
    finish(0, pass.n_token(), norm, context_.normed, pass);
    pass.pending = {};
  }
  /// A product whose output stays pending.
  void project(const View<const Bf16, 2>& x, const PackedMatrix& weight, const Pass& pass) const {
    context_.gemm.linear<Bf16>(x, weight, make_view(pending_, pass.n_token(), context_.config().hidden),
                               context_.stream);
  }

  [[nodiscard]] ProjectedHeads<Bf16> heads(std::int64_t layer, const Pass& pass) const {
    const ModelConfig& config = context_.config();
    const AttentionConfig& attention = config.attention(layer);
    const auto view = [&](Bf16* data, std::int64_t n_head) {
      return make_view(data, pass.n_token(), n_head, attention.head_dim);
    };
    const std::int64_t q_dim = pass.n_token() * config.n_head * attention.head_dim;
    const std::int64_t kv_dim = pass.n_token() * attention.n_head_kv * attention.head_dim;
    ProjectedHeads<Bf16> out;
    out.q = out.q_out = view(activations_, config.n_head);
    out.k = out.k_out = view(activations_ + q_dim, attention.n_head_kv);
    out.v_out = view(activations_ + q_dim + kv_dim, attention.n_head_kv);
    const bool has_own_v = context_.model.layer(layer).has_own_v();
    out.v = has_own_v ? out.v_out : out.k;
    // On most full layers v is k as projected: K has a place of its own where a cache asks for it, and so the plan for
    // room.
    const std::int64_t k_out = q_dim + 2 * kv_dim;
    if (!has_own_v && k_out + kv_dim <= width_ * pass.n_token()) {
      out.k_out = view(activations_ + k_out, attention.n_head_kv);
    }
    return out;
  }

  PathContext context_;
  Bf16 *pending_ = nullptr, *activations_ = nullptr;
  std::int64_t width_ = 0;  ///< values of a token in the activations
};

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cuda/backend/path.cuh"
#include "cuda/device/device_arena.cuh"
#include "cuda/fused_mlp.cuh"
#include "cuda/quantized_linear.cuh"
#include "gemma4/plan/memory_plan.hpp"
#include "gemma4/plan/step_plan.hpp"

/// The five steps of a layer for up to kDecodeChunk tokens, a decode step among them: products read the weights as they
/// are stored and take 8-bit integers; what is projected stays float32 until the next norm.
namespace gemma4::cuda {

class FewTokensPath {
 public:
  FewTokensPath(const PathContext& context, std::int64_t max_chunk, DeviceArena& arena)
      : FewTokensPath(context, max_chunk, Carver(arena.buffer("decode_activations")),
                      arena.data<LinearTickets>("linear_tickets", 1)) {}
  /// @param carver of the bytes of decode_activations() @param tickets one path at a time works with them
  FewTokensPath(const PathContext& context, std::int64_t max_chunk, Carver carver, LinearTickets* tickets)
      : context_(context), tickets_(tickets) {
    const DecodeActivations bytes = decode_activations(context.config(), max_chunk);
    pending_ = reinterpret_cast<float*>(carver.take<std::byte>(bytes.pending));
    qkv_ = reinterpret_cast<float*>(carver.take<std::byte>(bytes.qkv));
    attended_ = reinterpret_cast<Bf16*>(carver.take<std::byte>(bytes.attended));
    fresh_ = reinterpret_cast<Bf16*>(carver.take<std::byte>(bytes.fresh));
    activation_ = reinterpret_cast<Bf16*>(carver.take<std::byte>(bytes.activation));
    gate_up_ = reinterpret_cast<float*>(carver.take<std::byte>(bytes.gate_up));
    // Codes have the place of gate and up, which are there between two launches, if at all.
    const ModelConfig& config = context.config();
    const std::int64_t widest = std::max({config.hidden, config.ffn_hidden, gemma4::detail::qkv_widths(config).q});
    const LinearCodes room{reinterpret_cast<std::uint8_t*>(gate_up_), bytes.gate_up};
    if (room.n_bytes >= linear_codes_bytes(std::min(max_chunk, kDecodeChunk), widest)) codes_ = room;
  }

  void project_qkv(std::int64_t layer, Pass& pass) const {
    const PackedLayer& weights = context_.model.layer(layer);
    const ProjectedHeads<float> heads = this->heads(layer, pass);
    const std::array<PackedMatrix, 3> matrices{weights.attn_q, weights.attn_k, weights.attn_v};
    const std::array<View<float, 2>, 3> outs{heads_as_rows(heads.q), heads_as_rows(heads.k), heads_as_rows(heads.v)};
    const std::size_t count = weights.has_own_v() ? 3 : 2;
    const LinearOptions options = normalise(weights.attn_norm, pass, codes_);
    quantized_linear_decode(normed(pass), std::span<const PackedMatrix>(matrices).first(count),
                            std::span<const View<float, 2>>(outs).first(count), context_.device, context_.stream,
                            options);
    store_heads(context_, pass, layer, heads);
  }

  /// Of a layer without keys: q alone, as projected, and where its result goes.
  [[nodiscard]] ProjectedHeads<float> project_q(std::int64_t layer, Pass& pass) const {
    const PackedLayer& weights = context_.model.layer(layer);
    const ProjectedHeads<float> heads = this->heads(layer, pass);
    const LinearOptions options = normalise(weights.attn_norm, pass, codes_);
    quantized_linear_decode<Bf16, float>(normed(pass), weights.attn_q, heads_as_rows(heads.q), context_.device,
                                         context_.stream, options);
    return heads;
  }

  void attend(std::int64_t layer, Pass& pass) const { attend_heads(context_, pass, layer, heads(layer, pass)); }

  void project_output(std::int64_t layer, Pass& pass) const {
    const PackedLayer& weights = context_.model.layer(layer);
    project(heads_as_rows(heads(layer, pass).q_out), weights.attn_output, pass);
    pass.pending = {weights.post_attention_norm, 1.0f};
  }

  void gate_up(std::int64_t layer, Pass& pass) const {
    const PackedLayer& weights = context_.model.layer(layer);
    const std::span<float> scratch(gate_up_,
                                   static_cast<std::size_t>(2 * pass.n_token() * context_.config().ffn_hidden));
    // Apart, gate and up have the room of the codes.
    const LinearOptions options =
        normalise(weights.ffn_norm, pass, weights.gate_up.is_fused() ? codes_ : LinearCodes{});
    gate_up_decode(normed(pass), weights.gate_up, scratch, activation(pass), context_.device, context_.stream, options);
  }

  void down(std::int64_t layer, Pass& pass) const {
    const PackedLayer& weights = context_.model.layer(layer);
    project(activation(pass), weights.ffn_down, pass);
    pass.pending = {weights.post_ffw_norm, weights.output_scale};
  }

  /// The product in front does not write the residual stream.
  void finish(std::int64_t first, std::int64_t count, const float* norm, Bf16* to, const Pass& pass) const {
    finish_rows<float>(context_, pass, pending_, first, count, norm, to, {.x_at_rest = true});
  }

  [[nodiscard]] LinearOptions products(const Pass& pass) const {
    return {.tickets = pass.dynamic_rows ? tickets_ : nullptr, .overlap = pass.overlap, .codes = codes_};
  }

  /// How the products run, for the eye.
  [[nodiscard]] std::vector<StepPlanRow> rows(const Pass& pass) const {
    return product_rows(context_.model, "int8",
                        concat(pass.dynamic_rows ? "dynamic rows" : "equal rows", pass.overlap ? "" : ", no PDL"));
  }

 private:
  [[nodiscard]] View<const Bf16, 2> normed(const Pass& pass) const {
    return make_view(static_cast<const Bf16*>(context_.normed), pass.n_token(), context_.config().hidden);
  }
  [[nodiscard]] View<Bf16, 2> activation(const Pass& pass) const {
    return make_view(activation_, pass.n_token(), context_.config().ffn_hidden);
  }
  /// Of all rows, before a product. @param room for codes @return how that product runs
  [[nodiscard]] LinearOptions normalise(const float* norm, Pass& pass, const LinearCodes& room) const {
    const LinearCodes made = pass.n_token() >= kNormCodesFromTokens ? room : LinearCodes{};
    const bool has_codes = finish_rows<float>(context_, pass, pending_, 0, pass.n_token(), norm, context_.normed,
                                              {.x_at_rest = true, .codes = made});
    pass.pending = {};
    LinearOptions options = products(pass);
    options.codes = room;
    if (has_codes) options.made = made;
    return options;
  }
  /// A product whose output stays pending.
  void project(const View<const Bf16, 2>& x, const PackedMatrix& weight, const Pass& pass) const {
    quantized_linear_decode<Bf16, float>(x, weight, make_view(pending_, pass.n_token(), context_.config().hidden),
                                         context_.device, context_.stream, products(pass));
  }

  [[nodiscard]] ProjectedHeads<float> heads(std::int64_t layer, const Pass& pass) const {
    const ModelConfig& config = context_.config();
    const AttentionConfig& attention = config.attention(layer);
    const auto view = [&]<class T>(T* data, std::int64_t n_head) {
      return make_view(data, pass.n_token(), n_head, attention.head_dim);
    };
    const std::int64_t q_dim = pass.n_token() * config.n_head * attention.head_dim;
    const std::int64_t kv_dim = pass.n_token() * attention.n_head_kv * attention.head_dim;
    ProjectedHeads<float> out;
    out.q = view(qkv_, config.n_head);
    out.k = view(qkv_ + q_dim, attention.n_head_kv);
    out.v = context_.model.layer(layer).has_own_v() ? view(qkv_ + q_dim + kv_dim, attention.n_head_kv) : out.k;
    out.q_out = view(attended_, config.n_head);
    out.k_out = view(fresh_, attention.n_head_kv);
    out.v_out = view(fresh_ + kv_dim, attention.n_head_kv);
    return out;
  }

  PathContext context_;
  float *pending_ = nullptr, *qkv_ = nullptr, *gate_up_ = nullptr;
  Bf16 *attended_ = nullptr, *fresh_ = nullptr, *activation_ = nullptr;
  LinearTickets* tickets_ = nullptr;
  LinearCodes codes_ = {};
};

}  // namespace gemma4::cuda

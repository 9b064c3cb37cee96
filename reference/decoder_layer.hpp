// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "gemma4/model/weights.hpp"
#include "reference/fused_mlp.hpp"
#include "reference/quantized_linear.hpp"
#include "reference/rms_norm.hpp"
#include "reference/rope.hpp"

/// The steps of a decoder layer, composed from the components line by line as the formula reads; `attend`, the fifth,
/// belongs to the layer's cache (reference/layer_cache.hpp). On CUDA they are methods of cuda/backend.cuh.
namespace gemma4::reference {

/// The output of a step that has not yet been added to the residual stream x, and how it will be:
///   x = (x + rms_norm(value, post_norm)) * scale.
template <class Scalar>
struct Pending {
  Matrix<Scalar> value;  ///< [n_token, hidden]; empty: nothing is pending
  std::span<const float> post_norm;
  float scale = 1.0f;
};

/// Adds what is pending to x [n_token, hidden] and leaves nothing pending.
template <class Scalar>
void finish_residual(Matrix<Scalar>& x, Pending<Scalar>& pending, float epsilon) {
  if (pending.value.size() == 0) return;
  rms_norm<Scalar>(pending.value, pending.post_norm, epsilon, pending.value);
  x = (x + pending.value) * static_cast<Scalar>(pending.scale);
  pending.value.resize(0, 0);
}

/// Finishes the residual and normalises it: [n_token, hidden].
template <class Scalar>
[[nodiscard]] Matrix<Scalar> finish_and_normalise(Matrix<Scalar>& x, Pending<Scalar>& pending,
                                                  std::span<const float> norm, float epsilon) {
  finish_residual(x, pending, epsilon);
  Matrix<Scalar> normed(x.rows(), x.cols());
  rms_norm<Scalar>(x, norm, epsilon, normed);
  return normed;
}

/// [n_token, n_head * head_dim] and twice [n_token, n_head_kv * head_dim]
template <class Scalar>
struct Qkv {
  Matrix<Scalar> q, k, v;
  std::span<const float> k_norm = {};  ///< [head_dim], of a layer whose K is its V: k = rope(k_norm * v); else none
};

/// q and k: projected, normalised per head with weights, rotated by position. v: projected (on a full layer it is the
/// raw projection of k), normalised per head without weights.
template <class Scalar>
[[nodiscard]] Qkv<Scalar> project_qkv(const ModelConfig& config, const AttentionConfig& attention,
                                      const LayerWeights& weights, std::int64_t position, Matrix<Scalar>& x,
                                      Pending<Scalar>& pending) {
  const Matrix<Scalar> h = finish_and_normalise(x, pending, weights.attn_norm, config.rms_epsilon);
  Qkv<Scalar> out{.q = Matrix<Scalar>(h.rows(), weights.attn_q.rows),
                  .k = Matrix<Scalar>(h.rows(), weights.attn_k.rows),
                  .v = Matrix<Scalar>(h.rows(), weights.attn_k.rows)};
  quantized_linear<Scalar>(h, weights.attn_q, out.q);
  quantized_linear<Scalar>(h, weights.attn_k, out.k);
  if (weights.attn_v.empty()) {
    out.v = out.k;
    out.k_norm = weights.attn_k_norm;
  } else {
    quantized_linear<Scalar>(h, weights.attn_v, out.v);
  }
  const auto norm_heads = [&](Matrix<Scalar>& m, std::span<const float> weight) {
    MatrixMap<Scalar> heads = as_heads(m, attention.head_dim);
    rms_norm<Scalar>(heads, weight, config.rms_epsilon, heads);
  };
  norm_heads(out.q, weights.attn_q_norm);
  norm_heads(out.k, weights.attn_k_norm);
  norm_heads(out.v, {});
  rope<Scalar>(out.q, position, attention);
  rope<Scalar>(out.k, position, attention);
  return out;
}

/// W_o of the attention's output [n_token, n_head * head_dim], pending.
template <class Scalar>
[[nodiscard]] Pending<Scalar> project_output(const LayerWeights& weights, const Matrix<Scalar>& attended) {
  Pending<Scalar> pending{.value = Matrix<Scalar>(attended.rows(), weights.attn_output.rows),
                          .post_norm = weights.post_attention_norm,
                          .scale = 1.0f};
  quantized_linear<Scalar>(attended, weights.attn_output, pending.value);
  return pending;
}

/// gelu(W_gate h) * (W_up h) of the normalised residual: [n_token, ffn_hidden].
template <class Scalar>
[[nodiscard]] Matrix<Scalar> gate_up(const ModelConfig& config, const LayerWeights& weights, Matrix<Scalar>& x,
                                     Pending<Scalar>& pending) {
  const Matrix<Scalar> h = finish_and_normalise(x, pending, weights.ffn_norm, config.rms_epsilon);
  Matrix<Scalar> activation(h.rows(), weights.ffn_gate.rows);
  fused_gate_up<Scalar>(h, weights.ffn_gate, weights.ffn_up, activation);
  return activation;
}

/// W_down, pending with the layer's scale.
template <class Scalar>
[[nodiscard]] Pending<Scalar> down(const LayerWeights& weights, const Matrix<Scalar>& activation) {
  Pending<Scalar> pending{.value = Matrix<Scalar>(activation.rows(), weights.ffn_down.rows),
                          .post_norm = weights.post_ffw_norm,
                          .scale = weights.output_scale};
  quantized_linear<Scalar>(activation, weights.ffn_down, pending.value);
  return pending;
}

}  // namespace gemma4::reference

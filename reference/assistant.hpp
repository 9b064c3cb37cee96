// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/model/assistant_weights.hpp"
#include "reference/backend.hpp"
#include "reference/decoder_layer.hpp"
#include "reference/embedding.hpp"
#include "reference/quantized_linear.hpp"
#include "reference/rms_norm.hpp"
#include "reference/rope.hpp"

namespace gemma4::reference {

/// The likeliest token of logits [1, vocab]; of equals the first.
template <class Scalar>
[[nodiscard]] std::int32_t likeliest(const Matrix<Scalar>& logits) {
  Eigen::Index best = 0;
  logits.row(0).maxCoeff(&best);
  return static_cast<std::int32_t>(best);
}

/// The drafter of Gemma 4: a few layers that guess the tokens to come from the state of the target and from its caches.
/// A step takes a token t and the state h that was there when t was chosen:
///
///   x = W_pre [embed_target(t) * sqrt(hidden_target), h]
///   per layer:  x = x + norm(W_o attention(rope(norm(W_q norm(x)), p + 1)))     over the target's keys at <= p
///               x = (x + norm(W_down(gelu(W_gate u) * (W_up u)))) * scale,      u = norm(x)
///   y = norm(x);   logits = W_embed y, without softcap;   next h = W_post y
///
/// The first h is the target's residual stream after the final norm at p, the newest position in its caches, and the
/// first t the token chosen there; then t is the step's own choice and h its own next h. All steps of a draft stand at
/// p + 1 and see the same keys: its sliding layers the window - 1 newest of the target's last sliding layer, its full
/// layers all of the target's last full layer. It stores none, so that nothing of it has to be taken back.
/// Source: Gemma4AssistantForCausalLM of transformers 5.17.
///
/// @tparam TTarget what has the target's config(), weights() and attend_queries() as reference::Backend has them
template <class Scalar, class TTarget = Backend<Scalar>>
class Assistant {
 public:
  /// Both are borrowed. @throws std::invalid_argument when the target has no layer of a kind that the drafter has
  Assistant(const AssistantWeights& weights, const TTarget& target) : weights_(weights), target_(target) {
    for (std::int64_t layer = 0; layer < own().n_layer(); ++layer) {
      layer_read_.push_back(last_layer_of_kind(target.config(), own().sliding_layer(layer)));
    }
    const std::int64_t hidden = target.config().hidden;
    require(hidden == weights.config.hidden_target, "drafter: made for a target of hidden size ",
            weights.config.hidden_target, ", this one's is ", hidden);
  }

  [[nodiscard]] const ModelConfig& own() const { return weights_.config.own; }
  [[nodiscard]] const TTarget& target() const { return target_; }

  struct Step {
    Matrix<Scalar> logits;  ///< [1, vocab] of the token after `token`
    Matrix<Scalar> hidden;  ///< [1, hidden_target], the next step's h
  };

  /// @param token   in the target's vocabulary
  /// @param hidden  [1, hidden_target]
  /// @param kv_len  keys of the target that it sees, p + 1: the position of every step of a draft
  /// @throws std::invalid_argument naming what does not fit
  [[nodiscard]] Step step(std::int32_t token, const Matrix<Scalar>& hidden, std::int64_t kv_len) const {
    Matrix<Scalar> x = project_input(token, hidden);
    Pending<Scalar> pending;
    for (std::int64_t layer = 0; layer < own().n_layer(); ++layer) {
      const LayerWeights& weights = weights_.layers[static_cast<std::size_t>(layer)];
      const Matrix<Scalar> q = project_q(own().attention(layer), weights, kv_len, x, pending);
      pending =
          project_output(weights, target_.attend_queries(layer_read_[static_cast<std::size_t>(layer)], q, kv_len));
      pending = down(weights, gate_up(own(), weights, x, pending));
    }
    const Matrix<Scalar> y = finish_and_normalise(x, pending, weights_.output_norm, own().rms_epsilon);
    Step out{.logits = Matrix<Scalar>(1, own().vocab), .hidden = Matrix<Scalar>(1, weights_.config.hidden_target)};
    quantized_linear<Scalar>(y, weights_.token_embd, out.logits);
    quantized_linear<Scalar>(y, weights_.post_projection, out.hidden);
    return out;
  }

 private:
  /// W_pre of the target's embedding and the state, side by side.
  [[nodiscard]] Matrix<Scalar> project_input(std::int32_t token, const Matrix<Scalar>& hidden) const {
    const std::int64_t n_hidden = weights_.config.hidden_target;
    require(hidden.rows() == 1 && hidden.cols() == n_hidden, "drafter: hidden is ", hidden.rows(), " x ", hidden.cols(),
            ", need 1 x ", n_hidden);
    Matrix<Scalar> embedded(1, n_hidden), input(1, 2 * n_hidden), x(1, own().hidden);
    embedding<Scalar>(std::span(&token, 1), target_.weights().token_embd, target_.config().embedding_scale(), embedded);
    input << embedded, hidden;
    quantized_linear<Scalar>(input, weights_.pre_projection, x);
    return x;
  }

  [[nodiscard]] Matrix<Scalar> project_q(const AttentionConfig& attention, const LayerWeights& weights,
                                         std::int64_t position, Matrix<Scalar>& x, Pending<Scalar>& pending) const {
    const Matrix<Scalar> h = finish_and_normalise(x, pending, weights.attn_norm, own().rms_epsilon);
    Matrix<Scalar> q(1, weights.attn_q.rows);
    quantized_linear<Scalar>(h, weights.attn_q, q);
    MatrixMap<Scalar> heads = as_heads(q, attention.head_dim);
    rms_norm<Scalar>(heads, weights.attn_q_norm, own().rms_epsilon, heads);
    rope<Scalar>(q, position, attention);
    return q;
  }

  const AssistantWeights& weights_;
  const TTarget& target_;
  std::vector<std::int64_t> layer_read_;  ///< of the target, for each of the drafter's own
};

}  // namespace gemma4::reference

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include "gemma4/model/model.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/plan/cache_bytes.hpp"
#include "gemma4/plan/step_plan.hpp"
#include "gemma4/report/nvtx.hpp"
#include "gemma4/session/stored_part.hpp"
#include "gemma4/step_limits.hpp"
#include "reference/decoder_layer.hpp"
#include "reference/embedding.hpp"
#include "reference/layer_cache.hpp"
#include "reference/lm_head.hpp"

namespace gemma4::reference {

struct BackendOptions {
  CacheSpec cache;
  std::int64_t context = 8192;  ///< positions that the caches hold
  std::int64_t max_chunk = 512;
  RingSpec ring = {};  ///< of the sliding layers
};

/// The Eigen backend of the model graph: activations in `Scalar` (float is the specification), caches by
/// `options.cache`. The weights are borrowed: the file that they are bound to must outlive the backend.
/// Mirror: cuda/backend.cuh
template <class Scalar>
class Backend {
 public:
  /// @throws std::invalid_argument when the context, the chunk or the cache cannot be had
  Backend(const ModelWeights& weights, const BackendOptions& options) : weights_(weights), options_(options) {
    require(options.context >= 1 && options.context <= config().context, "backend: context ", options.context,
            ", need 1 to the model's ", config().context);
    require(options.max_chunk >= 1, "backend: max_chunk ", options.max_chunk, ", need at least 1");
    reset();
  }

  /// A forward pass of what is not finite throws, with the layer.
  static constexpr bool kNoticesAtOnce = true;

  [[nodiscard]] const ModelConfig& config() const { return weights_.config; }
  [[nodiscard]] std::int64_t context() const { return options_.context; }
  [[nodiscard]] std::int64_t max_chunk() const { return options_.max_chunk; }
  /// Tokens that a sequence can go back from the farthest that it has been, exactly.
  [[nodiscard]] std::int64_t max_rewind() const { return keeps_a_tail(options_.cache) ? 0 : kMaxRewind; }

  void embed(std::span<const std::int32_t> tokens, std::int64_t position) {
    position_ = position;
    x_.resize(static_cast<Eigen::Index>(tokens.size()), config().hidden);
    pending_ = {};
    embedding<Scalar>(tokens, weights_.token_embd, config().embedding_scale(), x_);
    note(x_, -1);
  }

  void project_qkv(std::int64_t layer) {
    qkv_ = reference::project_qkv(config(), config().attention(layer), weights(layer), position_, x_, pending_);
    note(x_, layer - 1);
  }

  void attend(std::int64_t layer) {
    std::visit(
        [&](auto& cache) {
          const std::int64_t n_token = qkv_.q.rows();
          if (n_token == 1 || n_token > kDecodeChunk || keeps_a_tail(options_.cache)) {
            attended_ = cache.attend(qkv_, position_);
            return;
          }
          // Token by token: the sums of a query must not depend on the keys that only later ones see.
          attended_.resize(n_token, qkv_.q.cols());
          for (std::int64_t t = 0; t < n_token; ++t) {
            const Qkv<Scalar> token{qkv_.q.row(t), qkv_.k.row(t), qkv_.v.row(t), qkv_.k_norm};
            attended_.row(t) = cache.attend(token, position_ + t);
          }
        },
        caches_[static_cast<std::size_t>(layer)]);
  }

  void project_output(std::int64_t layer) { pending_ = reference::project_output(weights(layer), attended_); }

  void gate_up(std::int64_t layer) {
    activation_ = reference::gate_up(config(), weights(layer), x_, pending_);
    note(x_, layer);
  }

  void down(std::int64_t layer) { pending_ = reference::down(weights(layer), activation_); }

  void lm_head(std::span<const std::int64_t> rows) {
    const Matrix<Scalar> h = finish_and_normalise(x_, pending_, weights_.output_norm, config().rms_epsilon);
    Matrix<Scalar> wanted(static_cast<Eigen::Index>(rows.size()), h.cols());
    for (std::size_t i = 0; i < rows.size(); ++i) wanted.row(static_cast<Eigen::Index>(i)) = h.row(rows[i]);
    logits_.resize(wanted.rows(), config().vocab);
    reference::lm_head<Scalar>(wanted, weights_.output, config().softcap, logits_);
    hidden_ = std::move(wanted);
    note(x_, config().n_layer() - 1);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      if (!logits_.row(static_cast<Eigen::Index>(i)).allFinite())
        note_position(position_ + rows[i], config().n_layer());
    }
  }

  /// What is pending on the last layer's output when no logits were asked for; the rest was looked at on the way.
  void watch(std::span<const std::int64_t> /*logit_rows*/) {
    if (pending_.value.size() == 0) return;
    note(finished_residual(), config().n_layer() - 1);
  }

  /// The first position since reset() whose residual stream or logits were not finite, and the layer behind which.
  [[nodiscard]] std::optional<NotFinite> first_not_finite() const { return not_finite_; }

  /// [n_rows, vocab] of the last lm_head.
  [[nodiscard]] const Matrix<Scalar>& logits() const { return logits_; }

  /// Row i of them as floats: what every backend can hand over.
  void copy_logits(std::int64_t row, std::span<float> out) const {
    require(row >= 0 && row < logits_.rows(), "backend: logits of row ", row, ", there are ", logits_.rows());
    require(static_cast<Eigen::Index>(out.size()) == logits_.cols(), "backend: room for ", out.size(), " logits, need ",
            logits_.cols());
    std::transform(logits_.row(row).begin(), logits_.row(row).end(), out.begin(),
                   [](Scalar logit) { return static_cast<float>(logit); });
  }

  /// [n_rows, hidden]: what the head took for them, the residual stream after the final norm.
  [[nodiscard]] const Matrix<Scalar>& hidden() const { return hidden_; }

  /// Attention of queries alone over a layer's cache as it stands, as a drafter asks for: q [1, n_head * head_dim],
  /// with any number of heads that the layer's KV heads divide, normalised and turned to position kv_len. On a full
  /// layer it sees the first kv_len keys, on a sliding one the window - 1 newest of them. Nothing is stored.
  [[nodiscard]] Matrix<Scalar> attend_queries(std::int64_t layer, const Matrix<Scalar>& q, std::int64_t kv_len) const {
    const LayerWeights& of = weights(layer);
    const std::span<const float> k_norm = of.attn_v.empty() ? of.attn_k_norm : std::span<const float>();
    return std::visit([&](const auto& cache) { return cache.attend_queries(q, k_norm, kv_len); },
                      caches_[static_cast<std::size_t>(layer)]);
  }

  [[nodiscard]] const ModelWeights& weights() const { return weights_; }

  /// Bytes of the caches as they are stored.
  [[nodiscard]] CacheBytes cache_bytes() const {
    return stored_bytes(config(), options_.cache, options_.context, ring_slots(config().window));
  }

  /// The residual stream [n_token, hidden] as it stands after the last step, with what is pending added; between two
  /// layers, for comparisons.
  void copy_residual(std::span<float> out) const {
    require(static_cast<Eigen::Index>(out.size()) == x_.size(), "backend: room for ", out.size(),
            " values of the residual stream, need ", x_.size());
    const Matrix<Scalar> x = finished_residual();
    std::transform(x.data(), x.data() + x.size(), out.begin(), [](Scalar value) { return static_cast<float>(value); });
  }

  /// Puts other values into the residual stream of the chunk, with nothing pending: a layer can then be held against
  /// one of another backend that began with the same numbers.
  void set_residual(std::span<const float> values) {
    require(static_cast<Eigen::Index>(values.size()) == x_.size(), "backend: ", values.size(),
            " values for the residual stream, need ", x_.size());
    std::transform(values.begin(), values.end(), x_.data(), [](float value) { return static_cast<Scalar>(value); });
    pending_ = {};
  }

  /// The reference has one path; a plan says so, so that every row of a table has one.
  [[nodiscard]] std::vector<StepPlan> step_plans() const {
    const auto plan = [&](const char* name, std::int64_t n_token) {
      StepPlan plan{.name = name, .n_token = n_token};
      for (const char* component :
           {"project_qkv", "project_output", "gate_up", "down", "lm_head", "attention_sliding"}) {
        plan.rows.push_back({.component = component, .path = "reference"});
      }
      plan.rows.push_back(
          {.component = "attention_full", .path = concat("reference over ", to_string(options_.cache))});
      if (options_.ring) plan.rows[5].path += concat(" over ", to_string(options_.ring));
      return plan;
    };
    return {plan("decode", 1), plan("prefill", options_.max_chunk)};
  }

  [[nodiscard]] const CacheSpec& cache() const { return options_.cache; }
  [[nodiscard]] const RingSpec& ring() const { return options_.ring; }

  /// Where the bytes of the caches are, layer by layer; until reset(). Of StoringBackend, as what follows.
  [[nodiscard]] std::vector<StoredLayer> stored_layers() {
    std::vector<StoredLayer> layers;
    for (LayerCache<Scalar>& cache : caches_) {
      layers.push_back(std::visit([](auto& of) { return of.stored(); }, cache));
    }
    return layers;
  }
  static void copy_stored(const std::byte* from, std::span<std::byte> to) { std::copy_n(from, to.size(), to.data()); }
  static void set_stored(std::byte* to, std::span<const std::byte> from) { std::ranges::copy(from, to); }

  /// The sequence is at `position`, and its rings are as if it had been at `farthest`.
  void set_position(std::int64_t position, std::int64_t farthest) {
    for (LayerCache<Scalar>& cache : caches_) {
      std::visit(
          [&](auto& of) {
            if constexpr (requires { of.resume(position, farthest); }) of.resume(position, farthest);
          },
          cache);
    }
  }
  /// What copy_logits(0, ...) gives, until the next pass. [vocab]
  void set_logits(std::span<const float> logits) {
    require(static_cast<std::int64_t>(logits.size()) == config().vocab, "backend: ", logits.size(), " logits, need ",
            config().vocab);
    logits_.resize(1, config().vocab);
    std::ranges::transform(logits, logits_.data(), [](float logit) { return static_cast<Scalar>(logit); });
  }

  void reset() {
    caches_.clear();  // before the new ones are made: there may not be room for both
    caches_ = make_layer_caches<Scalar>(weights_, options_.cache, options_.context, options_.ring);
    not_finite_.reset();
  }

  /// The reference is not profiled.
  [[nodiscard]] NvtxRange range(const char* name) const { return NvtxRange(name); }

 private:
  [[nodiscard]] const LayerWeights& weights(std::int64_t layer) const {
    return weights_.layers[static_cast<std::size_t>(layer)];
  }

  /// With what is pending added, which stays pending.
  [[nodiscard]] Matrix<Scalar> finished_residual() const {
    Matrix<Scalar> x = x_;
    Pending<Scalar> pending = pending_;
    finish_residual(x, pending, config().rms_epsilon);
    return x;
  }

  /// Notes the first row of x that is not finite behind a layer.
  void note(const Matrix<Scalar>& x, std::int64_t layer) {
    if (x.allFinite()) return;
    Eigen::Index row = 0;
    while (x.row(row).allFinite()) ++row;
    note_position(position_ + row, layer);
  }
  void note_position(std::int64_t position, std::int64_t layer) {
    if (!not_finite_ || position < not_finite_->position) not_finite_ = {position, layer};
  }

  const ModelWeights& weights_;
  BackendOptions options_;
  std::vector<LayerCache<Scalar>> caches_;
  std::int64_t position_ = 0;
  Matrix<Scalar> x_;
  Pending<Scalar> pending_;
  Qkv<Scalar> qkv_;
  Matrix<Scalar> attended_, activation_, logits_, hidden_;
  std::optional<NotFinite> not_finite_;
};

static_assert(WatchedBackend<Backend<float>> && StoringBackend<Backend<float>>);

}  // namespace gemma4::reference

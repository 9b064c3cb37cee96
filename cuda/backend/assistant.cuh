// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/backend/few_tokens_path.cuh"
#include "cuda/backend/fit.cuh"
#include "cuda/backend/path.cuh"
#include "cuda/device/device_arena.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/sequence_state.cuh"
#include "cuda/draft_step.cuh"
#include "cuda/embedding.cuh"
#include "cuda/model_weights.cuh"
#include "cuda/qkv_prologue.cuh"
#include "cuda/quantized_linear.cuh"
#include "cuda/rope.cuh"
#include "cuda/sampler.cuh"
#include "gemma4/assistant_config.hpp"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/plan/drafter_plan.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/view.hpp"

/// The drafter of Gemma 4 in a step on the device (reference/assistant.hpp says what it computes): its layers take the
/// path of few tokens, their queries go to the target's caches, and each draft is the likeliest token of its logits,
/// at a temperature too: drafts that are not drawn leave the text as it is. The host knows neither the tokens nor the
/// position. Mirror: reference/assistant_drafter.hpp
namespace gemma4::cuda {

namespace detail {

/// What a step of drafts begins with, of the target's.
struct AssistantBegin {
  const std::int32_t* newest;  ///< position of its newest key
  View<const Bf16, 3> k, v;    ///< a ring [n_head_kv, ring_len, head_dim]; of no extent where no layer reads one
  Bf16 *newest_k, *newest_v;   ///< [n_head_kv, head_dim]
  const Bf16* hidden;          ///< [n_hidden], behind the final norm at that position
  float* state;                ///< takes it
  std::int64_t n_hidden;
};

static __global__ void __launch_bounds__(256) assistant_begin_kernel(const __grid_constant__ AssistantBegin params) {
  const std::int64_t first = blockIdx.x * std::int64_t{256} + threadIdx.x, stride = gridDim.x * std::int64_t{256};
  for (std::int64_t i = first; i < params.n_hidden; i += stride) params.state[i] = to_float(params.hidden[i]);
  const std::int64_t head_dim = params.k.extent[2], n_value = params.k.extent[0] * head_dim;
  if (n_value == 0) return;
  const std::int64_t slot = ring_slot(std::int64_t{max(*params.newest, 0)}, params.k.extent[1]);
  for (std::int64_t i = first; i < n_value; i += stride) {
    params.newest_k[i] = params.k(i / head_dim, slot, i % head_dim);
    params.newest_v[i] = params.v(i / head_dim, slot, i % head_dim);
  }
}

}  // namespace detail

/// How a step runs that drafts: as the backend's others.
struct AssistantRun {
  const BackendOptions& options;
  bool overlap;  ///< programmatic dependent launch outside attention
  std::span<std::byte> sampler_workspace;
};

class Assistant {
 public:
  /// @param weights outlive it
  /// @param target  of the backend that verifies; its caches are read
  /// @param arena   of a memory plan with the drafter's buffers
  /// @param hidden  [target's hidden] row 0 of what its last lm_head took
  /// @throws FormatError where the drafter was made for another target
  Assistant(const PackedAssistant& weights, const PathContext& target, DeviceArena& arena, const Bf16* hidden)
      : weights_(weights), target_(target.model), hidden_(hidden), own_(target_of(weights, target)) {
    const AssistantConfig& config = weights.config();
    require_assistant_fits("backend", config, target_.config());
    const AssistantActivations bytes = assistant_activations(config);
    Carver carver(arena.buffer("drafter_activations"));
    input_ = reinterpret_cast<float*>(carver.take<std::byte>(bytes.input));
    own_.residual = reinterpret_cast<float*>(carver.take<std::byte>(bytes.stream));
    own_.normed = reinterpret_cast<Bf16*>(carver.take<std::byte>(bytes.normed));
    newest_k_ = reinterpret_cast<Bf16*>(carver.take<std::byte>(bytes.newest / 2));
    newest_v_ = reinterpret_cast<Bf16*>(carver.take<std::byte>(bytes.newest / 2));
    const std::span<std::byte> rest(carver.take<std::byte>(bytes.decode.total()),
                                    static_cast<std::size_t>(bytes.decode.total()));
    path_.emplace(own_, 1, Carver(rest), arena.data<LinearTickets>("linear_tickets", 1));
    logits_ = arena.data<float>("drafter_logits", draft::kMaxDrafts * config.own.vocab);
    for (const bool sliding : {false, true}) {
      const AttentionConfig& attention = sliding ? config.own.sliding : config.own.full;
      const std::int64_t n_full = config.own.n_full_layer(), n_layer = config.own.n_layer();
      if ((sliding ? n_layer - n_full : n_full) == 0) continue;
      rope_[sliding ? 1 : 0] = rope_params(attention);
      layer_read_[sliding ? 1 : 0] = last_layer_of_kind(target_.config(), sliding);
    }
  }
  // The path holds what points into it.
  Assistant(const Assistant&) = delete;
  Assistant& operator=(const Assistant&) = delete;

  /// What a proposed token costs, in plain steps of the target: the bytes that each reads of weights.
  [[nodiscard]] double cost() const {
    return static_cast<double>(weights_.bytes()) / static_cast<double>(target_.bytes());
  }
  /// [n_draft, vocab] of the last step.
  [[nodiscard]] const float* logits() const { return logits_; }

  /// How a query goes through the target's caches: without a mask, and not before the kernel in front has ended.
  /// @throws std::invalid_argument where no kernel takes the drafter's heads, or the memory plan has too little for one
  [[nodiscard]] LayerCachePlan plan(const BackendOptions& options) const {
    return own_.caches.plan(1, options.context, policy_of_rows(options.policy), own_.config().n_head);
  }

  /// The tokens behind state->tokens[0], of which draft_begin() has said where they stand.
  void propose(const SequenceState* sequence, DraftState* state, std::int64_t n_draft, const AssistantRun& run) const {
    const LayerCachePlan caches = plan(run.options);
    begin(state);
    for (std::int64_t i = 0; i < n_draft; ++i) {
      float* const logits = logits_ + i * weights_.config().own.vocab;
      Pass pass{.chunk = {.n_token = 1},
                .caches = caches,
                .overlap = run.overlap,
                .dynamic_rows = run.options.policy.dynamic_rows};
      step(sequence, state, i, logits, pass);
      sample(make_view(static_cast<const float*>(logits), std::int64_t{1}, weights_.config().own.vocab), {}, nullptr,
             {.token = &state->tokens[i + 1]}, run.sampler_workspace, own_.stream, run.overlap);
    }
  }

 private:
  [[nodiscard]] static PathContext target_of(const PackedAssistant& weights, const PathContext& target) {
    return {.model = weights.own(),
            .caches = target.caches,
            .gemm = target.gemm,
            .stream = target.stream,
            .device = target.device,
            .profile = target.profile,
            .residual = nullptr,
            .normed = nullptr};
  }

  [[nodiscard]] bool reads_a_ring() const { return layer_read_[1] >= 0; }

  /// The target's state, and the newest key of its ring, which every step of the draft sees.
  void begin(const DraftState* state) const {
    const std::int64_t n_hidden = weights_.config().hidden_target;
    detail::AssistantBegin params{.newest = &state->newest,
                                  .k = {},
                                  .v = {},
                                  .newest_k = newest_k_,
                                  .newest_v = newest_v_,
                                  .hidden = hidden_,
                                  .state = input_ + n_hidden,
                                  .n_hidden = n_hidden};
    if (reads_a_ring()) {
      const auto [k, v] = own_.caches.rings(layer_read_[1]);
      params.k = const_view(k), params.v = const_view(v);
    }
    detail::Launch{.what = "assistant_begin_kernel", .grid = 16, .block = 256, .stream = own_.stream}(
        detail::assistant_begin_kernel, params);
  }

  /// One token through the drafter: its logits, and the state of the next step.
  void step(const SequenceState* sequence, const DraftState* state, std::int64_t i, float* logits, Pass& pass) const {
    const AssistantConfig& config = weights_.config();
    embedding<float>({.device = &state->tokens[i], .count = 1}, target_.token_embd(),
                     target_.config().embedding_scale(), make_view(input_, std::int64_t{1}, config.hidden_target),
                     own_.stream, pass.overlap);
    quantized_linear_decode<float, float>(
        make_view(static_cast<const float*>(input_), std::int64_t{1}, config.n_input()), weights_.pre_projection(),
        make_view(own_.residual, std::int64_t{1}, config.own.hidden), own_.device, own_.stream, path_->products(pass));
    for (std::int64_t layer = 0; layer < config.own.n_layer(); ++layer) {
      attend(layer, sequence, state, pass);
      path_->project_output(layer, pass);
      path_->gate_up(layer, pass);
      path_->down(layer, pass);
    }
    path_->finish(0, 1, own_.model.output_norm(), own_.normed, pass);
    const std::array<PackedMatrix, 2> matrices{own_.model.output(), weights_.post_projection()};
    const std::array<View<float, 2>, 2> outs{
        make_view(logits, std::int64_t{1}, config.own.vocab),
        make_view(input_ + config.hidden_target, std::int64_t{1}, config.hidden_target)};
    quantized_linear_decode<Bf16, float>(
        make_view(static_cast<const Bf16*>(own_.normed), std::int64_t{1}, config.own.hidden),
        std::span<const PackedMatrix>(matrices), std::span<const View<float, 2>>(outs), own_.device, own_.stream,
        path_->products(pass));
  }

  /// A layer's queries, which stand behind the target's newest key, over what the target keeps.
  void attend(std::int64_t layer, const SequenceState* sequence, const DraftState* state, Pass& pass) const {
    const std::size_t kind = weights_.config().own.sliding_layer(layer) ? 1 : 0;
    const ProjectedHeads<float> heads = path_->project_q(layer, pass);
    const float* const q_norm = own_.model.layer(layer).attn_q_norm;
    // The prologue of a layer without KV heads; their places have no extent, and need addresses that differ.
    const auto none = []<class T>(View<T, 3> view) {
      view.extent[1] = 0;
      return view;
    };
    qkv_prologue<float>({heads.q,
                         none(heads.k),
                         none(heads.k),
                         {q_norm, q_norm, own_.config().rms_epsilon},
                         DeviceCount::on_device(&sequence->position),
                         rope_[kind],
                         heads.q_out},
                        FreshKv{none(heads.k_out), none(heads.v_out)}, own_.stream, pass.caches.overlap);
    const AttentionConfig& attention = own_.config().attention(layer);
    const auto newest = [&](const Bf16* data) {
      return make_view(data, std::int64_t{1}, attention.n_head_kv, attention.head_dim);
    };
    own_.caches.attend_query(layer_read_[kind],
                             {.q = heads.q_out,
                              .kv_len = &sequence->position,
                              .newest = &state->newest,
                              .newest_k = newest(newest_k_),
                              .newest_v = newest(newest_v_)},
                             target_.layer(layer_read_[kind]).attn_k_norm, pass.caches, own_.stream);
    if (own_.caches.borrows_scratch(layer_read_[kind], pass.caches)) own_.gemm.scratch_was_lent(own_.stream);
  }

  [[nodiscard]] static View<const Bf16, 3> const_view(const View<Bf16, 3>& view) { return view; }

  const PackedAssistant& weights_;
  const PackedModel& target_;
  const Bf16* hidden_;
  PathContext own_;
  std::optional<FewTokensPath> path_;
  RopeParams rope_[2];                     ///< of full, of sliding layers
  std::int64_t layer_read_[2] = {-1, -1};  ///< of the target, likewise
  float *input_ = nullptr, *logits_ = nullptr;
  Bf16 *newest_k_ = nullptr, *newest_v_ = nullptr;
};

}  // namespace gemma4::cuda

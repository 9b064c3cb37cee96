// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <span>
#include <vector>

#include "cuda/backend/describe.cuh"
#include "cuda/backend/drafting.cuh"
#include "cuda/backend/few_tokens_path.cuh"
#include "cuda/backend/finite.cuh"
#include "cuda/backend/fit.cuh"
#include "cuda/backend/path.cuh"
#include "cuda/backend/prefill_path.cuh"
#include "cuda/backend/readback.cuh"
#include "cuda/backend/stored_bytes.cuh"
#include "cuda/device/device_arena.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/device/pinned_buffer.cuh"
#include "cuda/device/profile.cuh"
#include "cuda/device/sequence_state.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/embedding.cuh"
#include "cuda/layer_cache.cuh"
#include "cuda/linear_prefill.cuh"
#include "cuda/lm_head.cuh"
#include "cuda/model_weights.cuh"
#include "cuda/sampler.cuh"
#include "gemma4/model/finite.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/plan/cache_bytes.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "gemma4/plan/step_plan.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/session/stored_part.hpp"

/// The CUDA backend of the model graph. Mirror: reference/backend.hpp
///
/// It owns the arena and the caches, and hands each step of a layer to the path that the length of the chunk asks for
/// (cuda/backend/). How a pass runs is planned before its first kernel. The residual stream is float32. All memory
/// comes from the memory plan, in one allocation beside that of the weights; nothing is allocated afterwards.
namespace gemma4::cuda {

static_assert(kMaxDecodeTokens >= kDecodeChunk, "a chunk that the plan lets decode must fit the decode kernels");

class Backend {
 public:
  /// @param model outlives the backend; several backends may share it
  /// @throws std::invalid_argument for a context, chunk or cache that cannot be had, with what would fit
  Backend(const PackedModel& model, const BackendOptions& options)
      : model_(model), options_(options), device_(current_device()), plan_(checked_plan(model, options, device_)) {
    options_.n_logit_row = std::max(options.n_logit_row, options.max_draft + 1);
    arena_ = DeviceArena(plan_, is_run_buffer);
    check(cudaMemsetAsync(arena_.all().data(), 0, arena_.all().size(), stream_), "fill of the arena");
    caches_.emplace(config(), options.cache, options.context, device_, arena_, options.ring);
    gemm_.emplace(arena_.buffer("scratch"), arena_.buffer("gemm_workspace"), true);
    history_ = PinnedBuffer<std::int32_t>(options.context + 1);
    place_buffers();
    if (options.max_draft > 0) drafting_.emplace(arena_, options.context);
    const PathContext context{.model = model_,
                              .caches = *caches_,
                              .gemm = *gemm_,
                              .stream = stream_,
                              .device = device_,
                              .profile = &profile_,
                              .residual = residual_,
                              .normed = arena_.data<Bf16>("normed", options.max_chunk * config().hidden)};
    few_tokens_.emplace(context, options.max_chunk, arena_);
    prefill_.emplace(context, options.max_chunk, arena_);
    if (options.assistant != nullptr) drafting_->set_assistant(options_, context, arena_, logit_rows_);
    set_policy(options.policy);
    clear_sampler(arena_.buffer("sampler_workspace"), stream_);
    stream_.synchronize();
  }
  // The paths hold pointers into it.
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  [[nodiscard]] const ModelConfig& config() const { return model_.config(); }
  [[nodiscard]] std::int64_t context() const { return options_.context; }
  [[nodiscard]] std::int64_t max_chunk() const { return options_.max_chunk; }
  [[nodiscard]] const BackendOptions& options() const { return options_; }
  [[nodiscard]] const PackedModel& model() const { return model_; }
  /// Weights, caches, activations and the context.
  [[nodiscard]] const MemoryPlan& plan() const { return plan_; }
  /// What this backend has allocated itself: the plan without the weights and the context.
  [[nodiscard]] std::int64_t device_bytes() const { return arena_.bytes(); }
  [[nodiscard]] const Stream& stream() const { return stream_; }

  /// From the next pass on; a step that was captured before keeps the policy it was captured with.
  /// @throws std::invalid_argument where a pass of the backend's could not run so
  void set_policy(const ExecutionPolicy& policy) {
    options_.policy = policy;
    decode_plan_ = caches_->plan(1, options_.context, policy);
    for (std::int64_t n = 1; n <= options_.max_draft; ++n) (void)plan_verify(n);
    const std::int64_t n_short = std::min(kDecodeChunk, options_.max_chunk);
    for (std::int64_t n = 2; n <= n_short; ++n) (void)caches_->plan(n, options_.context, policy);
    (void)caches_->plan(options_.max_chunk, options_.context, policy);
  }

  /// How a pass of so many tokens runs, with as many before it as the context has room for.
  [[nodiscard]] StepPlan step_plan(std::int64_t n_token) const {
    return describe_pass(plan_pass({.n_token = n_token}), *few_tokens_, *prefill_, *caches_, model_);
  }
  /// How a chunk of a token and n_draft drafts behind it is verified, each row with the bits of a step of its own.
  [[nodiscard]] StepPlan verify_plan(std::int64_t n_draft) const {
    return describe_pass(plan_verify(n_draft), *few_tokens_, *prefill_, *caches_, model_);
  }
  /// A decode step, the longest chunk, and where steps draft, the longest that is verified.
  [[nodiscard]] std::vector<StepPlan> step_plans() const {
    std::vector<StepPlan> plans{step_plan(1), step_plan(options_.max_chunk)};
    if (options_.max_draft > 0) plans.push_back(verify_plan(options_.max_draft));
    return plans;
  }

  // ---- the steps of the graph

  void embed(std::span<const std::int32_t> tokens, std::int64_t position) {
    const auto n_token = static_cast<std::int64_t>(tokens.size());
    const bool one = n_token == 1;
    first_position_ = position;
    begin_pass({.n_token = n_token,
                .position = one ? DeviceCount::on_device(&state_->position) : DeviceCount::on_host(position),
                .kv_len = one ? DeviceCount::on_device(&state_->kv_len) : DeviceCount::on_host(position + n_token),
                .positions = positions_});
    // From pageable memory: copied aside before the call returns.
    check(cudaMemcpyAsync(tokens_, tokens.data(), tokens.size_bytes(), cudaMemcpyHostToDevice, stream_),
          "copy of tokens to the device");
    set_sequence_state(state_, position + n_token - 1, stream_);
    if (drafting_) drafting_->set_text(tokens, position, stream_);
    show_mask();
    if (pass_.caches.needs_positions) list_positions(position, n_token, positions_, stream_);
    embedding<float>({.device = tokens_, .count = n_token, .host = tokens}, model_.token_embd(),
                     config().embedding_scale(), residual(), stream_);
  }

  /// The next token from the logits of row 0; it stays on the device, and is written to the host's memory.
  void sample(const SamplerSettings& settings) {
    cuda::sample(make_view(static_cast<const float*>(logits_), std::int64_t{1}, config().vocab), settings,
                 &state_->position,
                 {.token = &state_->token,
                  .history = history_.data(),
                  .history_len = drafting_ ? std::min(history_.size(), drafting_->n_text()) : history_.size(),
                  .text = drafting_ ? drafting_->text() : nullptr,
                  .next_position = &state_->position,
                  .kv_len = &state_->kv_len},
                 arena_.buffer("sampler_workspace"), stream_, overlaps());
  }

  void embed_sampled() {
    begin_pass({.n_token = 1,
                .position = DeviceCount::on_device(&state_->position),
                .kv_len = DeviceCount::on_device(&state_->kv_len),
                .positions = &state_->position});
    show_mask();
    embedding<float>({.device = &state_->token, .count = 1}, model_.token_embd(), config().embedding_scale(),
                     residual(), stream_, overlaps());
  }

  // A step that drafts. Its rows have the bits that each would have in a step of its own.
  void propose(std::int64_t n_draft) {
    require_drafts(n_draft, options_.max_draft);
    drafting_->propose(state_, n_draft, {options_, overlaps(), arena_.buffer("sampler_workspace")}, stream_);
  }
  void embed_proposed(std::int64_t n_draft) {
    pass_ = plan_verify(n_draft);
    embedding<float>({.device = drafting_->state()->tokens, .count = n_draft + 1}, model_.token_embd(),
                     config().embedding_scale(), residual(), stream_);
  }
  void accept(const SamplerSettings& settings, std::int64_t n_draft) {
    drafting_->accept({.sequence = state_,
                       .history = history_.data(),
                       .logits = make_view(logits_, n_draft + 1, config().vocab),
                       .hidden = make_view(logit_rows_, n_draft + 1, config().hidden)},
                      settings, arena_.buffer("sampler_workspace"), stream_, overlaps());
  }

  [[nodiscard]] Drafting& drafting() { return *drafting_; }  ///< where max_draft > 0

  void project_qkv(std::int64_t layer) {
    on_path([&](const auto& path) { path.project_qkv(layer, pass_); });
  }
  void attend(std::int64_t layer) {
    on_path([&](const auto& path) { path.attend(layer, pass_); });
  }
  void project_output(std::int64_t layer) {
    on_path([&](const auto& path) { path.project_output(layer, pass_); });
  }
  void gate_up(std::int64_t layer) {
    on_path([&](const auto& path) { path.gate_up(layer, pass_); });
  }
  void down(std::int64_t layer) {
    on_path([&](const auto& path) { path.down(layer, pass_); });
  }

  void lm_head(std::span<const std::int64_t> rows) {  // increasing
    const auto count = static_cast<std::int64_t>(rows.size());
    require(count <= options_.n_logit_row, "backend: logits of ", count, " rows, there is room for ",
            options_.n_logit_row, "; set BackendOptions::n_logit_row");
    for_each_run(rows, [&](std::int64_t first, std::int64_t row, std::int64_t n_row) {
      on_path([&](const auto& path) {
        path.finish(row, n_row, model_.output_norm(), logit_rows_ + first * config().hidden, pass_);
      });
    });
    if (count == n_token()) pass_.pending = {};
    for (std::int64_t first = 0; first < count; first += kMaxDecodeTokens) {
      const std::int64_t some = std::min(kMaxDecodeTokens, count - first);
      cuda::lm_head<Bf16>(
          make_view(static_cast<const Bf16*>(logit_rows_ + first * config().hidden), some, config().hidden),
          model_.output(), config().softcap, make_view(logits_ + first * config().vocab, some, config().vocab), device_,
          stream_, few_tokens_->products(pass_));
    }
    n_logit_ = count;
  }

  /// Notes, on the device, the first position of the chunk whose residual stream or logits are not finite. Finishes the
  /// stream, which nothing reads after this.
  void watch(std::span<const std::int64_t> logit_rows) {
    if (pass_.pending.post_norm != nullptr) {
      finish_all();
      pass_.pending = {};
    }
    const View<float, 2> x = residual();
    note_not_finite(make_view(static_cast<const float*>(x.data), x.extent[0], x.extent[1]), first_position_, state_,
                    stream_);
    note_not_finite_logits(logits_, config().vocab, first_position_, logit_rows, state_, stream_);
  }

  /// Of all chunks since reset(); waits for the device, which does not know the layer.
  [[nodiscard]] std::optional<NotFinite> first_not_finite() const { return noted_not_finite(state_, stream_); }

  /// Waits for the device.
  void copy_logits(std::int64_t row, std::span<float> out) const {
    require(row >= 0 && row < n_logit_, "backend: logits of row ", row, ", there are ", n_logit_);
    require(static_cast<std::int64_t>(out.size()) == config().vocab, "backend: room for ", out.size(), " logits, need ",
            config().vocab);
    copy_to_host(logits_ + row * config().vocab, out, stream_);
  }

  /// The first out.size() / vocab of them at once: a wait for each row of a chunk takes longer than the chunk.
  void copy_logit_rows(std::span<float> out) const {
    const auto size = static_cast<std::int64_t>(out.size());
    require(size % config().vocab == 0 && size <= n_logit_ * config().vocab, "backend: room for ", size,
            " logits, need whole rows of ", config().vocab, ", and there are ", n_logit_);
    copy_to_host(logits_, out, stream_);
  }

  /// Bytes of the caches as they were allocated.
  [[nodiscard]] CacheBytes cache_bytes() {
    return {.full = std::ssize(arena_.buffer("cache_full")), .sliding = std::ssize(arena_.buffer("cache_sliding"))};
  }

  /// The residual stream [n_token, hidden] as it stands after the last step, with what is pending added; between two
  /// layers, for comparisons. Waits for the device.
  void copy_residual(std::span<float> out) {
    const View<float, 2> x = residual();
    require(static_cast<std::int64_t>(out.size()) == n_token() * config().hidden, "backend: room for ", out.size(),
            " values of the residual stream, need ", n_token() * config().hidden);
    copy_as_if(x.data, out, stream_, [&] { finish_all(); });
  }

  // ---- of StoringBackend: the sequence, taken out and put back; each of these waits for the device

  [[nodiscard]] const CacheSpec& cache() const { return options_.cache; }
  [[nodiscard]] const RingSpec& ring() const { return options_.ring; }
  [[nodiscard]] std::vector<StoredLayer> stored_layers() const { return caches_->stored_layers(); }
  void copy_stored(const std::byte* from, std::span<std::byte> to) { stored_.copy(from, to, stream_); }
  void set_stored(std::byte* to, std::span<const std::byte> from) { stored_.set(to, from, stream_); }
  /// The caches hold `position` tokens; a step that is replayed goes on there. What rings hold the session knows.
  void set_position(std::int64_t position, std::int64_t /*farthest*/) {
    if (position > 0) set_sequence_state(state_, position - 1, stream_);
  }
  /// [vocab] of row 0.
  void set_logits(std::span<const float> logits) {
    require(static_cast<std::int64_t>(logits.size()) == config().vocab, "backend: ", logits.size(), " logits, need ",
            config().vocab);
    stored_.set(reinterpret_cast<std::byte*>(logits_), std::as_bytes(logits), stream_);
    n_logit_ = 1;
  }

  /// Forgets the sequence. What it leaves in the caches is beyond every later kv_len, and never read.
  void reset() {
    n_logit_ = 0;
    check(cudaMemsetAsync(&state_->not_finite, 0, sizeof(state_->not_finite), stream_), "fill of the state");
  }

  /// A scope for profilers: NVTX's, and events where set_profile() was given somewhere to keep them.
  [[nodiscard]] ProfiledRange range(const char* name) const { return {name, profile_, stream_}; }
  /// @param profile outlives its use; null: off. Not while a graph is captured.
  void set_profile(Profile* profile) { profile_ = profile; }

  // ---- beside the graph

  /// The token that sample() chose for `position`, once the device has come past it; -1 where the logits held no token.
  [[nodiscard]] std::int32_t sampled(std::int64_t position) const {
    return static_cast<const volatile std::int32_t*>(history_.data())[position];
  }

  /// A replayed step has left logits of one row.
  void note_replay() { n_logit_ = 1; }

  /// Every byte of what a sequence leaves on the device becomes `value`: what later sequences must not depend on.
  void poison(int value) {
    caches_->fill_bytes(value, stream_);
    arena_.fill_bytes({"residual", "normed", "pending", "activations", "scratch", "attention_partials", "logits",
                       "logit_rows", "decode_activations", "gemm_workspace"},
                      value, stream_);
    gemm_->scratch_was_lent(stream_);
  }

  /// @param count on the device: attention adds the records or key tiles that it visits; null: it does not. For tests.
  void set_work_count(unsigned long long* count) { caches_->set_work_count(count); }

 private:
  void place_buffers() {
    const std::int64_t chunk = options_.max_chunk;
    residual_ = arena_.data<float>("residual", chunk * config().hidden);
    logits_ = arena_.data<float>("logits", options_.n_logit_row * config().vocab);
    logit_rows_ = arena_.data<Bf16>("logit_rows", options_.n_logit_row * config().hidden);
    Carver tokens(arena_.buffer("tokens"));
    state_ = tokens.take<SequenceState>(1);
    tokens_ = tokens.take<std::int32_t>(chunk);
    positions_ = tokens.take<std::int32_t>(chunk);
    mask_ = tokens.take<std::uint8_t>(options_.context, 1);
    caches_->set_mask(mask_);
  }

  /// The switches of decode leave a long chunk as it is.
  [[nodiscard]] bool overlaps(std::int64_t n_token = 1) const {
    return device_.compute_capability >= 90 && (options_.policy.launch_overlap || n_token > kDecodeChunk);
  }
  [[nodiscard]] Pass plan_pass(const ChunkPlace& chunk) const {
    const std::int64_t max_kv_len = chunk.kv_len.known() ? chunk.kv_len.host : options_.context;
    return {.chunk = chunk,
            .caches = chunk.n_token == 1 ? decode_plan_ : caches_->plan(chunk.n_token, max_kv_len, options_.policy),
            .overlap = overlaps(chunk.n_token),
            .dynamic_rows = options_.policy.dynamic_rows || chunk.n_token > kDecodeChunk};
  }
  /// Of a chunk of a token and the drafts behind it.
  [[nodiscard]] Pass plan_verify(std::int64_t n_draft) const {
    require_drafts(n_draft, options_.max_draft);
    const LayerCachePlan rows =
        caches_->plan_rows(n_draft + 1, policy_of_rows(options_.policy), options_.policy, options_.sliding_rows);
    return drafting_->pass(n_draft, rows, overlaps(n_draft + 1), options_.policy.dynamic_rows);
  }
  /// Plans the pass: nothing behind this refuses.
  void begin_pass(const ChunkPlace& chunk) { pass_ = plan_pass(chunk); }
  void show_mask() {
    if (pass_.caches.masks) show_tokens(state_, {mask_, static_cast<std::size_t>(options_.context)}, stream_);
  }

  template <class TBody>
  void on_path(TBody&& body) {
    pass_is_short(pass_) ? body(*few_tokens_) : body(*prefill_);
  }
  [[nodiscard]] std::int64_t n_token() const { return pass_.n_token(); }
  [[nodiscard]] View<float, 2> residual() const { return make_view(residual_, n_token(), config().hidden); }
  /// Adds what is pending to all rows, which it stays.
  void finish_all() {
    on_path([&](const auto& path) {
      path.finish(0, n_token(), model_.output_norm(), arena_.data<Bf16>("normed", n_token() * config().hidden), pass_);
    });
  }

  const PackedModel& model_;
  BackendOptions options_;
  DeviceInfo device_;
  MemoryPlan plan_;
  Stream stream_;
  DeviceArena arena_;
  std::optional<LayerCaches> caches_;
  std::optional<LinearPrefill> gemm_;
  std::optional<FewTokensPath> few_tokens_;
  std::optional<PrefillPath> prefill_;
  std::optional<Drafting> drafting_;
  PinnedBuffer<std::int32_t> history_;  ///< tokens that were sampled, by position
  StoredBytes stored_;
  Profile* profile_ = nullptr;

  LayerCachePlan decode_plan_;  ///< of one token, at any position
  Pass pass_;
  std::int64_t n_logit_ = 0, first_position_ = 0;
  SequenceState* state_ = nullptr;
  std::int32_t *tokens_ = nullptr, *positions_ = nullptr;
  std::uint8_t* mask_ = nullptr;
  float *residual_ = nullptr, *logits_ = nullptr;
  Bf16* logit_rows_ = nullptr;
};

static_assert(DraftingBackend<Backend> && WatchedBackend<Backend> && StoringBackend<Backend>);

}  // namespace gemma4::cuda

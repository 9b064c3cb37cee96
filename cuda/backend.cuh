// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cuda/device/device_arena.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/device/pinned_buffer.cuh"
#include "cuda/device/profile.cuh"
#include "cuda/device/sequence_state.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/embedding.cuh"
#include "cuda/fused_mlp.cuh"
#include "cuda/layer_cache.cuh"
#include "cuda/linear_prefill.cuh"
#include "cuda/lm_head.cuh"
#include "cuda/model_weights.cuh"
#include "cuda/quantized_linear.cuh"
#include "cuda/residual_norm.cuh"
#include "cuda/sampler.cuh"
#include "gemma4/cache_spec.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "gemma4/sampler.hpp"

/// The CUDA backend of the model graph. Mirror: reference/backend.hpp
///
/// Numbers: the residual stream is float32. A chunk of more than kDecodeChunk tokens has bf16 activations and
/// multiplies by cuBLASLt with weights decoded to bf16; a shorter one keeps float32 from the products to the next norm,
/// and its products take 8-bit integers. All memory comes from the memory plan, in one allocation beside that of the
/// weights, before the first kernel; nothing is allocated afterwards.
namespace gemma4::cuda {

static_assert(kMaxDecodeTokens >= kDecodeChunk, "a chunk that the plan lets decode must fit the decode kernels");

struct BackendOptions {
  CacheSpec cache = {CacheKind::kTq4, {}};
  std::int64_t context = 131072;  ///< positions that the caches hold
  std::int64_t max_chunk = 2048;
  std::int64_t n_logit_row = 1;  ///< rows whose logits one forward pass may keep
  BackendSwitches switches = {};
  /// The whole plan must stay within it: weights, context and all. 0: what the device has free.
  std::int64_t memory_limit_bytes = 0;
};

/// The plan of a run with these options.
[[nodiscard]] inline MemoryPlan plan_backend(const ModelConfig& config, const std::vector<ModelTensor>& tensors,
                                             const BackendOptions& options) {
  return plan_memory(config, tensors,
                     {.target = PlanTarget::kCuda,
                      .context = options.context,
                      .chunk = options.max_chunk,
                      .cache = options.cache,
                      .n_logit_row = options.n_logit_row});
}

/// Refuses a run that does not fit into `limit_bytes`, before anything is loaded.
/// @throws std::invalid_argument that says which context or chunk would fit
inline void require_fits(const ModelConfig& config, const std::vector<ModelTensor>& tensors,
                         const BackendOptions& options, std::int64_t limit_bytes) {
  const MemoryPlan plan = plan_backend(config, tensors, options);
  if (plan.fits(limit_bytes)) return;
  const MemoryPlanOptions wanted{.target = PlanTarget::kCuda,
                                 .context = options.context,
                                 .chunk = options.max_chunk,
                                 .cache = options.cache,
                                 .n_logit_row = options.n_logit_row};
  const std::optional<std::int64_t> context = largest_context(config, tensors, wanted, limit_bytes);
  const std::optional<std::int64_t> chunk = largest_chunk(config, tensors, wanted, limit_bytes);
  std::string remedy;
  if (context) remedy += concat("; a context of ", *context, " would fit");
  if (chunk) remedy += concat(context ? ", or" : ";", " a chunk of ", *chunk);
  if (!context && !chunk) remedy = "; no context and no chunk would fit: a smaller model or cache format is needed";
  require(false, "backend: a context of ", options.context, " in chunks of ", options.max_chunk, " needs ",
          plan.total_bytes(), " B of device memory, there are ", limit_bytes, " B", remedy);
}

inline void require_fits(const GgufFile& file, const BackendOptions& options, std::int64_t limit_bytes) {
  require_fits(config_from_gguf(file), model_tensors(file), options, limit_bytes);
}

class Backend {
 public:
  /// @param model outlives the backend; several backends may share it
  /// @throws std::invalid_argument for a context, chunk or cache that cannot be had, with what would fit
  Backend(const PackedModel& model, const BackendOptions& options)
      : model_(model), options_(options), device_(current_device()), plan_(checked_plan()) {
    arena_ = DeviceArena(plan_, is_run_buffer);
    check(cudaMemsetAsync(arena_.all().data(), 0, arena_.all().size(), stream_), "fill of the arena");
    caches_.emplace(config(), options.cache, options.context, device_, arena_);
    set_switches(options.switches);
    gemm_.emplace(arena_.buffer("scratch"), arena_.buffer("gemm_workspace"), true);
    history_ = PinnedBuffer<std::int32_t>(options.context + 1);
    place_activations();
    clear_sampler(arena_.buffer("sampler_workspace"), stream_);
    stream_.synchronize();
  }

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

  /// From the next step on; a step that was captured before keeps those it was captured with.
  void set_switches(const BackendSwitches& switches) {
    options_.switches = switches;
    decode_device_ = device_;
    if (!switches.overlap) decode_device_.compute_capability = std::min(device_.compute_capability, 80);
    caches_->set_switches(switches);
  }

  // ---- the steps of the graph

  void embed(std::span<const std::int32_t> tokens, std::int64_t position) {
    const auto n_token = static_cast<std::int64_t>(tokens.size());
    // From pageable memory: copied aside before the call returns.
    check(cudaMemcpyAsync(tokens_, tokens.data(), tokens.size_bytes(), cudaMemcpyHostToDevice, stream_),
          "copy of tokens to the device");
    set_sequence_state(state_, position + n_token - 1, stream_);
    place_chunk(
        {.n_token = n_token,
         .position = n_token == 1 ? DeviceCount::on_device(&state_->position) : DeviceCount::on_host(position),
         .kv_len = n_token == 1 ? DeviceCount::on_device(&state_->kv_len) : DeviceCount::on_host(position + n_token),
         .positions = positions_});
    if (!options_.switches.fuse_qkv_prologue) list_positions(position, n_token, positions_, stream_);
    embedding<float>({.device = tokens_, .count = n_token, .host = tokens}, model_.token_embd(),
                     config().embedding_scale(), residual(), stream_);
  }

  /// The next token from the logits of row 0; it stays on the device, and is written to the host's memory.
  void sample(const SamplerSettings& settings) {
    cuda::sample(make_view(static_cast<const float*>(logits_), std::int64_t{1}, config().vocab), settings,
                 &state_->position,
                 {.token = &state_->token,
                  .history = history_.data(),
                  .history_len = history_.size(),
                  .next_position = &state_->position,
                  .kv_len = &state_->kv_len},
                 arena_.buffer("sampler_workspace"), stream_, overlap());
  }

  void embed_sampled() {
    place_chunk({.n_token = 1,
                 .position = DeviceCount::on_device(&state_->position),
                 .kv_len = DeviceCount::on_device(&state_->kv_len),
                 .positions = &state_->position});
    embedding<float>({.device = &state_->token, .count = 1}, model_.token_embd(), config().embedding_scale(),
                     residual(), stream_, overlap());
  }

  void project_qkv(std::int64_t layer) {
    const PackedLayer& weights = model_.layer(layer);
    if (decodes()) {
      const ProjectedHeads<float> heads = decode_heads(layer);
      const std::array<PackedMatrix, 3> matrices{weights.attn_q, weights.attn_k, weights.attn_v};
      const std::array<View<float, 2>, 3> outs{as_rows(heads.q), as_rows(heads.k), as_rows(heads.v)};
      const std::size_t count = config().sliding_layer(layer) ? 3 : 2;
      const std::span<const PackedMatrix> used = std::span(matrices).first(count);
      normalise(weights.attn_norm);
      quantized_linear_decode(normed(), used, std::span<const View<float, 2>>(outs).first(count), decode_device_,
                              stream_, products());
      store(layer, heads);
    } else {
      const ProjectedHeads<Bf16> heads = prefill_heads(layer);
      normalise(weights.attn_norm);
      gemm_->linear<Bf16>(normed(), weights.attn_q, as_rows(heads.q), stream_);
      gemm_->linear<Bf16>(normed(), weights.attn_k, as_rows(heads.k), stream_);
      if (config().sliding_layer(layer)) gemm_->linear<Bf16>(normed(), weights.attn_v, as_rows(heads.v), stream_);
      store(layer, heads);
    }
  }

  void attend(std::int64_t layer) {
    if (decodes()) {
      attend(layer, decode_heads(layer));
    } else {
      attend(layer, prefill_heads(layer));
    }
  }

  void project_output(std::int64_t layer) {
    const PackedLayer& weights = model_.layer(layer);
    const View<Bf16, 3> attended = decodes() ? decode_heads(layer).q_out : prefill_heads(layer).q_out;
    project(as_rows(attended), weights.attn_output);
    pending_ = {weights.post_attention_norm, 1.0f};
  }

  void gate_up(std::int64_t layer) {
    const PackedLayer& weights = model_.layer(layer);
    normalise(weights.ffn_norm);
    if (decodes()) {
      const std::span<float> scratch(gate_up_scratch_, static_cast<std::size_t>(2 * n_token() * config().ffn_hidden));
      gate_up_decode(normed(), weights.gate_up, scratch, activation(), decode_device_, stream_, products());
    } else {
      gemm_->gate_up<Bf16>(normed(), weights.gate_up,
                           {activations_, static_cast<std::size_t>(2 * n_token() * config().ffn_hidden)}, activation(),
                           stream_);
    }
  }

  void down(std::int64_t layer) {
    const PackedLayer& weights = model_.layer(layer);
    project(activation(), weights.ffn_down);
    pending_ = {weights.post_ffw_norm, weights.output_scale};
  }

  /// @param rows increasing
  void lm_head(std::span<const std::int64_t> rows) {
    const auto count = static_cast<std::int64_t>(rows.size());
    require(count <= options_.n_logit_row, "backend: logits of ", count, " rows, there is room for ",
            options_.n_logit_row, "; set BackendOptions::n_logit_row");
    for (std::int64_t first = 0; first < count;) {
      std::int64_t next = first + 1;
      const auto at = [&](std::int64_t i) { return rows[static_cast<std::size_t>(i)]; };
      while (next < count && at(next) == at(next - 1) + 1) ++next;
      require(next == count || at(next) > at(next - 1), "backend: logits of row ", at(next < count ? next : first),
              " after row ", at(next - 1), ", need them in increasing order");
      finish_rows(at(first), next - first, model_.output_norm(), logit_rows_ + first * config().hidden);
      first = next;
    }
    for (std::int64_t first = 0; first < count; first += kMaxDecodeTokens) {
      const std::int64_t some = std::min(kMaxDecodeTokens, count - first);
      cuda::lm_head<Bf16>(
          make_view(static_cast<const Bf16*>(logit_rows_ + first * config().hidden), some, config().hidden),
          model_.token_embd(), config().softcap, make_view(logits_ + first * config().vocab, some, config().vocab),
          decode_device_, stream_, products());
    }
    n_logit_ = count;
  }

  /// Waits for the device.
  void copy_logits(std::int64_t row, std::span<float> out) const {
    require(row >= 0 && row < n_logit_, "backend: logits of row ", row, ", there are ", n_logit_);
    require(static_cast<std::int64_t>(out.size()) == config().vocab, "backend: room for ", out.size(), " logits, need ",
            config().vocab);
    copy_to_host(logits_ + row * config().vocab, out);
  }

  /// The residual stream [n_token, hidden] as it stands after the last step, with what is pending added; between two
  /// layers, for comparisons. Waits for the device.
  void copy_residual(std::span<float> out) {
    const View<float, 2> x = residual();
    require(static_cast<std::int64_t>(out.size()) == n_token() * config().hidden, "backend: room for ", out.size(),
            " values of the residual stream, need ", n_token() * config().hidden);
    // Finished in a copy that then goes back: the next step begins by finishing the stream itself.
    std::vector<float> before(out.size());
    copy_to_host(x.data, std::span(before));
    const Pending pending = pending_;
    normalise(model_.output_norm());
    copy_to_host(x_, out);
    pending_ = pending;
    check(cudaMemcpyAsync(x.data, before.data(), before.size() * sizeof(float), cudaMemcpyHostToDevice, stream_),
          "copy to device");
    stream_.synchronize();
  }

  /// Forgets the sequence. What it leaves in the caches is beyond every later kv_len, and never read.
  void reset() { n_logit_ = 0; }

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
    for (const char* name : {"residual", "normed", "pending", "activations", "scratch", "attention_partials", "logits",
                             "logit_rows", "decode_activations", "gemm_workspace"}) {
      const std::span<std::byte> bytes = arena_.buffer(name);
      check(cudaMemsetAsync(bytes.data(), value, bytes.size(), stream_), "fill of a buffer");
    }
    gemm_->scratch_was_lent(stream_);
  }

 private:
  /// How the output of a step that is not yet added will be.
  struct Pending {
    const float* post_norm = nullptr;  ///< null: nothing is pending
    float scale = 1.0f;
  };

  [[nodiscard]] static bool is_run_buffer(const std::string& name) {
    return !PackedModel::is_weight_buffer(name) && name != "cuda_context" && name != "rotation";
  }

  [[nodiscard]] MemoryPlan checked_plan() const {
    require(options_.context >= 1 && options_.context <= config().context, "backend: context ", options_.context,
            ", need 1 to the model's ", config().context);
    require(options_.max_chunk >= 1 && options_.max_chunk <= 65535, "backend: max_chunk ", options_.max_chunk,
            ", need 1 to 65535");
    require(options_.n_logit_row >= 1, "backend: n_logit_row ", options_.n_logit_row, ", need at least 1");
    const MemoryPlan plan = plan_backend(config(), model_.tensors(), options_);
    // The weights and the context are there already, and no longer count as free.
    const std::int64_t there = model_.bytes() + plan.bytes("cuda_context");
    const std::int64_t limit = device_bytes_free() + there;
    require_fits(config(), model_.tensors(), options_,
                 options_.memory_limit_bytes > 0 ? std::min(options_.memory_limit_bytes, limit) : limit);
    return plan;
  }

  void place_activations() {
    const std::int64_t chunk = options_.max_chunk, hidden = config().hidden;
    x_ = arena_.data<float>("residual", chunk * hidden);
    normed_ = arena_.data<Bf16>("normed", chunk * hidden);
    prefill_pending_ = arena_.data<Bf16>("pending", chunk * hidden);
    activations_ = arena_.data<Bf16>("activations", 2 * chunk * config().ffn_hidden);
    logits_ = arena_.data<float>("logits", options_.n_logit_row * config().vocab);
    logit_rows_ = arena_.data<Bf16>("logit_rows", options_.n_logit_row * hidden);
    const DecodeActivations bytes = decode_activations(config(), chunk);
    Carver decode(arena_.buffer("decode_activations"));
    decode_pending_ = reinterpret_cast<float*>(decode.take<std::byte>(bytes.pending));
    decode_qkv_ = reinterpret_cast<float*>(decode.take<std::byte>(bytes.qkv));
    decode_attended_ = reinterpret_cast<Bf16*>(decode.take<std::byte>(bytes.attended));
    decode_fresh_ = reinterpret_cast<Bf16*>(decode.take<std::byte>(bytes.fresh));
    decode_activation_ = reinterpret_cast<Bf16*>(decode.take<std::byte>(bytes.activation));
    gate_up_scratch_ = reinterpret_cast<float*>(decode.take<std::byte>(bytes.gate_up));
    tickets_ = arena_.data<LinearTickets>("linear_tickets", 1);
    Carver tokens(arena_.buffer("tokens"));
    state_ = tokens.take<SequenceState>(1);
    tokens_ = tokens.take<std::int32_t>(chunk);
    positions_ = tokens.take<std::int32_t>(chunk);
    mask_ = tokens.take<std::uint8_t>(options_.context, 1);
    caches_->set_mask(mask_);
  }

  void place_chunk(const ChunkPlace& chunk) {
    chunk_ = chunk;
    pending_ = {};
    if (caches_->masks(chunk)) show_tokens(state_, {mask_, static_cast<std::size_t>(options_.context)}, stream_);
  }

  [[nodiscard]] std::int64_t n_token() const { return chunk_.n_token; }
  /// Whether the chunk takes the path of few tokens.
  [[nodiscard]] bool decodes() const { return n_token() <= kDecodeChunk; }
  /// How products of few tokens run: all are in one stream.
  [[nodiscard]] LinearOptions products() const { return {.tickets = options_.switches.deal_rows ? tickets_ : nullptr}; }
  [[nodiscard]] bool overlap() const { return decode_device_.compute_capability >= 90; }

  [[nodiscard]] View<float, 2> residual() const { return make_view(x_, n_token(), config().hidden); }
  [[nodiscard]] View<const Bf16, 2> normed() const {
    return make_view(static_cast<const Bf16*>(normed_), n_token(), config().hidden);
  }
  [[nodiscard]] View<Bf16, 2> activation() const {
    return make_view(decodes() ? decode_activation_ : activations_, n_token(), config().ffn_hidden);
  }
  template <class T>
  [[nodiscard]] static View<T, 2> as_rows(const View<T, 3>& heads) {
    return make_view(heads.data, heads.extent[0], heads.extent[1] * heads.extent[2]);
  }

  [[nodiscard]] ProjectedHeads<float> decode_heads(std::int64_t layer) const {
    const AttentionConfig& attention = config().attention(layer);
    const auto heads = [&]<class T>(T* data, std::int64_t n_head) {
      return make_view(data, n_token(), n_head, attention.head_dim);
    };
    const std::int64_t q_dim = n_token() * config().n_head * attention.head_dim;
    const std::int64_t kv_dim = n_token() * attention.n_head_kv * attention.head_dim;
    ProjectedHeads<float> out;
    out.q = heads(decode_qkv_, config().n_head);
    out.k = heads(decode_qkv_ + q_dim, attention.n_head_kv);
    out.v = config().sliding_layer(layer) ? heads(decode_qkv_ + q_dim + kv_dim, attention.n_head_kv) : out.k;
    out.q_out = heads(decode_attended_, config().n_head);
    out.k_out = heads(decode_fresh_, attention.n_head_kv);
    out.v_out = heads(decode_fresh_ + kv_dim, attention.n_head_kv);
    return out;
  }

  [[nodiscard]] ProjectedHeads<Bf16> prefill_heads(std::int64_t layer) const {
    const AttentionConfig& attention = config().attention(layer);
    const auto heads = [&](Bf16* data, std::int64_t n_head) {
      return make_view(data, n_token(), n_head, attention.head_dim);
    };
    const std::int64_t q_dim = n_token() * config().n_head * attention.head_dim;
    const std::int64_t kv_dim = n_token() * attention.n_head_kv * attention.head_dim;
    ProjectedHeads<Bf16> out;
    out.q = out.q_out = heads(activations_, config().n_head);
    out.k = out.k_out = heads(activations_ + q_dim, attention.n_head_kv);
    out.v_out = heads(activations_ + q_dim + kv_dim, attention.n_head_kv);
    out.v = config().sliding_layer(layer) ? out.v_out : out.k;
    return out;
  }

  /// Finishes the residual stream and normalises it into normed().
  void normalise(const float* norm) { finish_rows(0, n_token(), norm, normed_); }

  /// The same for some rows; nothing is pending on them afterwards.
  void finish_rows(std::int64_t first, std::int64_t count, const float* norm, Bf16* to) {
    const auto range = this->range("norm");
    const std::int64_t hidden = config().hidden;
    const View<float, 2> x = make_view(x_ + first * hidden, count, hidden);
    const View<Bf16, 2> h = make_view(to, count, hidden);
    const auto finish = [&]<class TPending>(const TPending* pending) {
      View<const TPending, 2> view = make_view(pending + first * hidden, count, hidden);
      if (pending_.post_norm == nullptr) view.data = nullptr;
      // In a step of decoding a product stands in front that does not write x, and one behind it that reads the result.
      residual_norm<TPending, Bf16>(x, view, pending_.post_norm, pending_.scale, norm, config().rms_epsilon, h, stream_,
                                    overlap(), decodes());
    };
    if (decodes()) {
      finish(static_cast<const float*>(decode_pending_));
    } else {
      finish(static_cast<const Bf16*>(prefill_pending_));
    }
    if (first == 0 && count == n_token()) pending_ = {};
  }

  /// A product whose output stays pending.
  void project(const View<const Bf16, 2>& x, const PackedMatrix& weight) {
    if (decodes()) {
      quantized_linear_decode<Bf16, float>(x, weight, make_view(decode_pending_, n_token(), config().hidden),
                                           decode_device_, stream_, products());
    } else {
      gemm_->linear<Bf16>(x, weight, make_view(prefill_pending_, n_token(), config().hidden), stream_);
    }
  }

  [[nodiscard]] QkNorms qk_norms(std::int64_t layer) const {
    const PackedLayer& weights = model_.layer(layer);
    return {weights.attn_q_norm, weights.attn_k_norm, config().rms_epsilon};
  }

  template <class TIn>
  void store(std::int64_t layer, const ProjectedHeads<TIn>& heads) {
    if (caches_->stores_in_attend(layer, chunk_)) return;
    const auto range = this->range("qkv_prologue");
    caches_->store(layer, heads, qk_norms(layer), chunk_, stream_);
  }

  template <class TIn>
  void attend(std::int64_t layer, const ProjectedHeads<TIn>& heads) {
    {
      const auto range = this->range(config().sliding_layer(layer) ? "attention_sliding" : "attention_full");
      caches_->attend(layer, heads, qk_norms(layer), chunk_, stream_);
    }
    if (caches_->borrows_scratch(layer, chunk_)) gemm_->scratch_was_lent(stream_);
    if (!caches_->commits_after(layer, chunk_)) return;
    const auto range = this->range("cache_commit");
    caches_->commit(layer, heads, chunk_, stream_);
  }

  void copy_to_host(const float* from, std::span<float> to) const {
    check(cudaMemcpyAsync(to.data(), from, to.size_bytes(), cudaMemcpyDeviceToHost, stream_), "copy to host");
    stream_.synchronize();
  }

  const PackedModel& model_;
  BackendOptions options_;
  DeviceInfo device_, decode_device_;
  MemoryPlan plan_;
  Stream stream_;
  DeviceArena arena_;
  std::optional<LayerCaches> caches_;
  std::optional<LinearPrefill> gemm_;
  PinnedBuffer<std::int32_t> history_;  ///< tokens that were sampled, by position
  Profile* profile_ = nullptr;

  ChunkPlace chunk_;
  Pending pending_;
  float* x_ = nullptr;  ///< [n_token, hidden], the residual stream
  std::int64_t n_logit_ = 0;
  SequenceState* state_ = nullptr;
  std::int32_t *tokens_ = nullptr, *positions_ = nullptr;
  std::uint8_t* mask_ = nullptr;
  Bf16 *normed_ = nullptr, *prefill_pending_ = nullptr, *activations_ = nullptr;
  float *decode_pending_ = nullptr, *decode_qkv_ = nullptr, *gate_up_scratch_ = nullptr;
  Bf16 *decode_attended_ = nullptr, *decode_fresh_ = nullptr, *decode_activation_ = nullptr;
  LinearTickets* tickets_ = nullptr;
  float* logits_ = nullptr;
  Bf16* logit_rows_ = nullptr;
};

static_assert(SelfFeedingBackend<Backend>);

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>
#include <variant>
#include <vector>

#include "cuda/cache/chunk.cuh"
#include "cuda/cache/flat_layer_cache.cuh"
#include "cuda/cache/full_layer_cache.cuh"
#include "cuda/cache/kv_layer_cache.cuh"
#include "cuda/cache/kvarn_layer_cache.cuh"
#include "cuda/cache/layer_cache_plan.cuh"
#include "cuda/cache/simulated_layer_cache.cuh"
#include "cuda/cache/sliding_layer_cache.cuh"
#include "cuda/cache/step_by_step.cuh"
#include "cuda/cache/tq4_layer_cache.cuh"
#include "cuda/device/device_arena.cuh"
#include "cuda/device/device_count.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/qkv_prologue.cuh"
#include "cuda/rope.cuh"
#include "gemma4/cache_formats.hpp"
#include "gemma4/config.hpp"
#include "gemma4/plan/execution.hpp"
#include "gemma4/plan/step_plan.hpp"
#include "gemma4/ring_format.hpp"
#include "gemma4/session/stored_part.hpp"

/// The caches of all layers of one sequence, and the step `attend` on each kind. Mirror: reference/layer_cache.hpp
namespace gemma4::cuda {

/// Rings on the sliding layers, of what `ring` says; on the full layers what `spec` says. All memory is the arena's.
class LayerCaches {
 public:
  /// @param arena of a memory plan of this config, spec and context
  /// @throws std::invalid_argument for a spec that the device has not
  LayerCaches(const ModelConfig& config, const CacheSpec& spec, std::int64_t context, const DeviceInfo& device,
              DeviceArena& arena, const RingSpec& ring = {})
      : config_(config), context_(context), device_(device) {
    full_bytes_ = arena.buffer("cache_full");
    ring_bytes_ = arena.buffer("cache_sliding");
    const std::int64_t n_sliding = config.n_layer() - config.n_full_layer();
    if (config.n_full_layer() > 0) {
      const FullCacheShape shape{config.n_full_layer(), config.n_head, config.full.n_head_kv, config.full.head_dim,
                                 context};
      std::visit(
          [&]<class TFormat>(const TFormat& format) {
            full_.emplace(std::in_place_type<FullLayerCaches<TFormat>>, format, shape, full_bytes_);
          },
          spec);
      full_rope_ = rope_params(config.full);
    }
    if (n_sliding > 0) {
      sliding_.emplace(config, n_sliding, ring_bytes_, ring);
      sliding_rope_ = rope_params(config.sliding);
    }
    std::int64_t count[2] = {};
    for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
      index_.push_back(count[config.sliding_layer(layer) ? 1 : 0]++);
    }
    // K and V of a long context as bf16, then what split keys leave: neighbours in the arena, one workspace here.
    const std::span<std::byte> scratch = arena.buffer("scratch");
    partials_ = arena.buffer("attention_partials");
    scratch_bytes_ = static_cast<std::int64_t>(scratch.size());
    workspace_ = {scratch.data(), scratch.size() + partials_.size()};
    require(scratch.data() + scratch.size() == partials_.data(), "backend: scratch and attention_partials are apart");
  }

  /// How a chunk of so many tokens goes through, once and for all layers: pure host code.
  /// @param max_kv_len no token of it sees more
  /// @param n_head     query heads; 0: the layers' own
  /// @throws std::invalid_argument where no kernel takes the shape, or the memory plan has too little for one
  [[nodiscard]] LayerCachePlan plan(std::int64_t n_token, std::int64_t max_kv_len, const ExecutionPolicy& policy,
                                    std::int64_t n_head = 0) const {
    LayerCachePlan plan{
        .n_token = n_token,
        .fuses_prologue = policy.qkv_prologue_fusion,
        .masks = !policy.kv_len_clamp && n_token == 1,
        .overlap = device_.compute_capability >= 90 && (policy.launch_overlap || n_token > kDecodeChunk),
        .causal_skip = policy.causal_skip};
    plan.needs_positions = !policy.qkv_prologue_fusion;
    if (sliding_) {
      plan.sliding = sliding_->plan(n_token, policy, device_, plan.overlap, n_head);
      require_partials("attention_sliding", plan.sliding.attention.workspace_bytes);
    }
    if (full_) {
      FullPlanWish wish = full_wish(plan, max_kv_len, policy);
      wish.n_head = n_head;
      std::visit(
          [&]<class TCaches>(const TCaches& caches) {
            const auto full = caches.plan(wish);
            require_partials("attention_full",
                             full.workspace_bytes - (TCaches::borrows_scratch(full) ? scratch_bytes_ : 0));
            plan.full = full;
            plan.needs_positions = plan.needs_positions || !TCaches::kSinkStores;
          },
          *full_);
    }
    return plan;
  }

  /// How n_row tokens behind each other go through that each must have the bits of a step of its own.
  /// @param of_one the policy of a step of one of them among others (policy_of_rows())
  /// @param policy of what takes all of them at once
  /// @param rings_at_once whether sliding layers do, where they can
  [[nodiscard]] LayerCachePlan plan_rows(std::int64_t n_row, const ExecutionPolicy& of_one,
                                         const ExecutionPolicy& policy, bool rings_at_once = false) const {
    LayerCachePlan plan = this->plan(1, context_, of_one);
    plan.rows = {.n_row = n_row, .overlap = device_.compute_capability >= 90 && policy.launch_overlap};
    plan.rows.sliding = plan_sliding_rows(plan.sliding.step, n_row, device_);
    if (!rings_at_once && plan.rows.sliding.fits()) plan.rows.sliding.misfit = "it is switched off";
    if (full_ && !plan.fuses_prologue) plan.rows.full = RowByRow{"norms, RoPE and storing are a launch each"};
    if (full_ && plan.fuses_prologue) {
      FullPlanWish wish = full_wish(plan, context_, policy);
      wish.n_query = n_row;
      wish.overlap = plan.rows.overlap;
      with_full([&]<class TCaches>(const TCaches& caches) {
        if constexpr (TakesRows<TCaches>) {
          plan.rows.full = caches.plan_rows(wish, std::get<typename TCaches::Plan>(plan.full), std::ssize(partials_));
        }
      });
    }
    return plan;
  }

  /// The same for the eye: the prologue, and attention of each kind of layer.
  [[nodiscard]] std::vector<StepPlanRow> rows(const LayerCachePlan& plan) const {
    if (plan.rows.n_row > 0) return rows_of_rows(plan);
    std::vector<StepPlanRow> rows;
    rows.push_back({.component = "qkv_prologue",
                    .path = plan.fuses_prologue ? "norms, RoPE and cache in one launch" : "a launch each",
                    .tile = plan.overlap ? "" : "no PDL",
                    .why = plan.fuses_prologue ? "" : "it is switched off"});
    if (sliding_) rows.push_back(sliding_->row(plan.sliding));
    if (full_) {
      with_full([&]<class TCaches>(const TCaches& caches) {
        StepPlanRow row = caches.row(std::get<typename TCaches::Plan>(plan.full));
        if (plan.masks) row.why = "kv_len_clamp is off: a mask over the whole context";
        rows.push_back(std::move(row));
      });
    }
    return rows;
  }

  /// Every byte of every cache becomes `value`, in stream order. Zeros to begin with; a test fills in garbage between
  /// two sequences.
  void fill_bytes(int value, cudaStream_t stream) {
    for (const std::span<std::byte>& bytes : {full_bytes_, ring_bytes_}) {
      if (bytes.empty()) continue;
      check(cudaMemsetAsync(bytes.data(), value, bytes.size(), stream), "fill of the caches");
    }
  }

  /// Where the bytes of each layer are.
  [[nodiscard]] std::vector<StoredLayer> stored_layers() const {
    std::vector<StoredLayer> layers;
    for (std::int64_t layer = 0; layer < config_.n_layer(); ++layer) {
      if (config_.sliding_layer(layer)) {
        layers.push_back(sliding_->stored(index(layer)));
      } else {
        with_full([&](const auto& caches) { layers.push_back(caches.stored(index(layer))); });
      }
    }
    return layers;
  }

  /// Whether attend() does all that store() would do.
  [[nodiscard]] bool stores_in_attend(std::int64_t layer, const LayerCachePlan& plan) const {
    return config_.sliding_layer(layer) && plan.sliding.is_one_launch();
  }

  /// Normalises and rotates q, k and v, and puts K and V where attend() looks for them.
  template <class TIn>
  void store(std::int64_t layer, const ProjectedHeads<TIn>& heads, const QkNorms& norms, const ChunkPlace& chunk,
             const LayerCachePlan& plan, cudaStream_t stream) const {
    if (stores_in_attend(layer, plan)) return;
    const FreshKv fresh{heads.k_out, heads.v_out};
    const auto prologue = [&](const auto& target) {
      qkv_prologue<TIn>({heads.q, heads.k, heads.v, norms, chunk.position, rope(layer), heads.q_out}, target, stream,
                        plan.overlap);
    };
    if (!plan.fuses_prologue) detail::prepare_step_by_step(heads, norms, chunk.position, rope(layer), stream);
    if (config_.sliding_layer(layer)) {  // commit() follows where the prologue did not store
      if (plan.fuses_prologue) sliding_->with_sink(index(layer), fresh, plan.sliding, prologue);
      return sliding_->quantise(fresh, stream);
    }
    with_full([&]<class TCaches>(const TCaches& caches) {
      if (plan.fuses_prologue) prologue(caches.sink(index(layer), fresh));
      if (plan.fuses_prologue && TCaches::kSinkStores) return;
      caches.store(index(layer), fresh.k, fresh.v, norms.k, {.device = chunk.positions, .count = chunk.n_token},
                   stream);
    });
  }

  /// Attention of the chunk that store() took, from q_out to q_out.
  template <class TIn>
  void attend(std::int64_t layer, const ProjectedHeads<TIn>& heads, const QkNorms& norms, const ChunkPlace& chunk,
              const LayerCachePlan& plan, cudaStream_t stream) const {
    const FreshKv fresh{heads.k_out, heads.v_out};
    if (config_.sliding_layer(layer)) {
      if constexpr (std::is_same_v<TIn, float>) {  // the type of few tokens
        if (plan.sliding.is_one_launch()) {
          return sliding_->step(index(layer), heads, norms, sliding_rope_, chunk, plan.sliding, stream);
        }
      }
      return sliding_->attend(index(layer), heads.q_out, fresh, chunk, plan.sliding, partials_, work_count_, stream);
    }
    const FullAttentionCall call =
        full_call(heads, norms, chunk, plan.masks ? DeviceCount{} : chunk.kv_len, full_options(plan));
    with_full([&]<class TCaches>(const TCaches& caches) {
      caches.attend(index(layer), call, std::get<typename TCaches::Plan>(plan.full), stream);
    });
  }

  /// Whether attend_rows() takes the rows of a pass at once, and each comes out with the bits of a step of its own.
  [[nodiscard]] bool attends_rows(std::int64_t layer, const LayerCachePlan& plan) const {
    if (plan.rows.n_row == 0) return false;
    return rows_misfit(config_.sliding_layer(layer), plan.rows) == nullptr;
  }
  /// As store(), of all rows of the chunk, which stand behind each other; where attends_rows().
  template <class TIn>
  void store_rows(std::int64_t layer, const ProjectedHeads<TIn>& heads, const QkNorms& norms, const ChunkPlace& chunk,
                  const LayerCachePlan& plan, cudaStream_t stream) const {
    LayerCachePlan together = plan;
    together.overlap = plan.rows.overlap;
    store(layer, heads, norms, chunk, together, stream);
  }
  /// Attention of each row of the chunk that store_rows() took, over the keys up to its own; where attends_rows().
  /// @param kv_lens [n_token] on the device, of each row: one more than that of the row before
  template <class TIn>
  void attend_rows(std::int64_t layer, const ProjectedHeads<TIn>& heads, const QkNorms& norms, const ChunkPlace& chunk,
                   const std::int32_t* kv_lens, const LayerCachePlan& plan, cudaStream_t stream) const {
    if (config_.sliding_layer(layer)) {
      if constexpr (std::is_same_v<TIn, float>) {  // the type of few tokens
        return sliding_->step_rows(index(layer), heads, norms, sliding_rope_, chunk, plan.rows.sliding, stream,
                                   plan.rows.overlap);
      }
      require(false, "backend: rows of a long chunk do not go through layer ", layer, " at once");
    }
    const FullAttentionCall call = full_call(heads, norms, chunk, DeviceCount::on_device(kv_lens), full_options(plan));
    with_full([&]<class TCaches>(const TCaches& caches) {
      if constexpr (TakesRows<TCaches>) {
        caches.attend_rows(index(layer), call, std::get<typename TCaches::RowsPlan>(plan.rows.full), stream);
      }
    });
  }
  /// Attention of a query alone, of a plan for one token that has no mask; nothing is stored.
  /// @param k_weight of the layer's norm of k
  void attend_query(std::int64_t layer, const LoneQuery& query, const float* k_weight, const LayerCachePlan& plan,
                    cudaStream_t stream) const {
    if (config_.sliding_layer(layer)) {
      return sliding_->attend_query(index(layer), query, plan.sliding, partials_, stream);
    }
    const FullAttentionCall call{.q = query.q,
                                 .options = full_options(plan),
                                 .kv_len = DeviceCount::on_device(query.kv_len),
                                 .partials = partials_,
                                 .scratch_and_partials = workspace_,
                                 .k_weight = k_weight,
                                 .work_count = work_count_};
    with_full([&]<class TCaches>(const TCaches& caches) {
      caches.attend(index(layer), call, std::get<typename TCaches::Plan>(plan.full), stream);
    });
  }
  /// K and V of a sliding layer, [n_head_kv, ring_len, head_dim] each.
  [[nodiscard]] std::array<View<Bf16, 3>, 2> rings(std::int64_t layer) const {
    return {sliding_->k(index(layer)), sliding_->v(index(layer))};
  }

  /// After attend(): the chunk's K and V into the ring, where they are not there yet.
  [[nodiscard]] bool commits(std::int64_t layer, const LayerCachePlan& plan) const {
    return config_.sliding_layer(layer) && plan.commits_after();
  }
  template <class TIn>
  void commit(std::int64_t layer, const ProjectedHeads<TIn>& heads, const ChunkPlace& chunk,
              cudaStream_t stream) const {
    sliding_->commit(index(layer), FreshKv{heads.k_out, heads.v_out}, chunk, stream);
  }

  /// Whether attend() unpacks K and V of the layer into the scratch that also takes dequantised weights.
  [[nodiscard]] bool borrows_scratch(std::int64_t layer, const LayerCachePlan& plan) const {
    bool borrows = false;
    if (config_.sliding_layer(layer)) return borrows;
    with_full([&]<class TCaches>(const TCaches& /*caches*/) {
      borrows = TCaches::borrows_scratch(std::get<typename TCaches::Plan>(plan.full));
    });
    return borrows;
  }

  /// @param mask [context] bytes on the device, nonzero where a token is; of plans that mask
  void set_mask(const std::uint8_t* mask) { mask_ = mask; }
  /// @param count on the device: every attention that is launched adds the records or key tiles that it visits; null:
  /// none does. For tests.
  void set_work_count(unsigned long long* count) { work_count_ = count; }

 private:
  template <class TBody>
  void with_full(TBody&& body) const {
    std::visit(body, *full_);
  }
  [[nodiscard]] std::int64_t index(std::int64_t layer) const { return index_[static_cast<std::size_t>(layer)]; }
  [[nodiscard]] const RopeParams& rope(std::int64_t layer) const {
    return config_.sliding_layer(layer) ? sliding_rope_ : full_rope_;
  }
  [[nodiscard]] FullPlanWish full_wish(const LayerCachePlan& plan, std::int64_t max_kv_len,
                                       const ExecutionPolicy& policy) const {
    return {.n_query = plan.n_token,
            .max_kv_len = plan.masks ? context_ : max_kv_len,
            .options = full_options(plan),
            .device = device_,
            .split_k = policy.split_k,
            .overlap = plan.overlap,
            .scratch_bytes = scratch_bytes_};
  }
  template <class TIn>
  [[nodiscard]] FullAttentionCall full_call(const ProjectedHeads<TIn>& heads, const QkNorms& norms,
                                            const ChunkPlace& chunk, const DeviceCount& kv_len,
                                            const AttentionOptions& options) const {
    return {.q = heads.q_out,
            .fresh_k = heads.k_out,
            .fresh_v = heads.v_out,
            .positions = chunk.positions,
            .options = options,
            .kv_len = kv_len,
            .partials = partials_,
            .scratch_and_partials = workspace_,
            .k_weight = norms.k,
            .work_count = work_count_};
  }

  /// Why the rows of a pass go one by one through a layer of a kind; null: they do not.
  [[nodiscard]] const char* rows_misfit(bool is_sliding, const LayerRowsPlan& rows) const {
    if (is_sliding) return rows.sliding.misfit;
    return std::visit([](const auto& plan) { return plan.misfit; }, rows.full);
  }
  /// Of attention, where a plan has rows that must have the bits of steps of one.
  [[nodiscard]] std::vector<StepPlanRow> rows_of_rows(const LayerCachePlan& plan) const {
    LayerCachePlan one = plan;
    one.rows = {};
    std::vector<StepPlanRow> rows = this->rows(one);
    for (StepPlanRow& row : rows) {
      const bool is_sliding = row.component == "attention_sliding";
      if (!is_sliding && row.component != "attention_full") continue;
      if (const char* const misfit = rows_misfit(is_sliding, plan.rows)) {
        row.path = concat(plan.rows.n_row, " rows one by one: ", row.path);
        row.why += concat(row.why.empty() ? "" : "; ", "not at once: ", misfit);
        continue;
      }
      if (is_sliding) {
        row = sliding_->row_of_rows(plan.rows.sliding, plan.rows.overlap);
        continue;
      }
      with_full([&]<class TCaches>(const TCaches& caches) {
        if constexpr (TakesRows<TCaches>) {
          row = caches.row_of_rows(std::get<typename TCaches::RowsPlan>(plan.rows.full));
        }
      });
    }
    return rows;
  }
  [[nodiscard]] AttentionOptions full_options(const LayerCachePlan& plan) const {
    AttentionOptions options{.scale = ModelConfig::kAttentionScale, .causal_skip = plan.causal_skip};
    if (plan.masks) {
      options.causal = false;
      options.mask = MaskView{.data = mask_, .type = ElementType::kBool, .shape = {1, 1, 1, context_}};
    }
    return options;
  }
  void require_partials(const char* who, std::int64_t bytes) const {
    require(bytes <= static_cast<std::int64_t>(partials_.size()), "backend: ", who, " leaves ", bytes,
            " B of split keys, the memory plan has ", partials_.size(), " B; attention_partials_bytes() is too small");
  }

  ModelConfig config_;
  std::int64_t context_;
  DeviceInfo device_;
  std::optional<AnyFullLayerCaches<>> full_;
  std::optional<SlidingLayerCaches> sliding_;
  RopeParams sliding_rope_, full_rope_;
  std::vector<std::int64_t> index_;  ///< of a layer among those of its kind
  std::span<std::byte> full_bytes_, ring_bytes_, workspace_, partials_;
  std::int64_t scratch_bytes_ = 0;
  const std::uint8_t* mask_ = nullptr;
  unsigned long long* work_count_ = nullptr;
};

}  // namespace gemma4::cuda

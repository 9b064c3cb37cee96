// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <variant>

#include "cuda/cache/chunk.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/flash/describe.cuh"
#include "cuda/qkv_prologue.cuh"
#include "cuda/ring_cache.cuh"
#include "cuda/simulated_cache.cuh"
#include "cuda/sliding_attention.cuh"
#include "cuda/sliding_decode.cuh"
#include "gemma4/config.hpp"
#include "gemma4/plan/execution.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "gemma4/plan/step_plan.hpp"
#include "gemma4/ring_format.hpp"
#include "gemma4/session/stored_part.hpp"

/// The bf16 rings of the sliding layers, or in them what a simulated format would read back. Mirror:
/// reference/cache/sliding_layer_cache.hpp
namespace gemma4::cuda {

/// How a chunk goes through the sliding layers.
struct SlidingPlan {
  SlidingDecodePlan step = {};     ///< one launch for a step; used where it fits
  FlashPlan attention = {};        ///< otherwise
  bool into_ring_at_once = false;  ///< the chunk is so short that the ring loses nothing that one of it sees
  bool overlap = true;
  [[nodiscard]] bool is_one_launch() const { return step.fits(); }
};

class SlidingLayerCaches {
 public:
  /// @param memory as many bytes as the memory plan has for cache_sliding
  SlidingLayerCaches(const ModelConfig& config, std::int64_t n_layer, std::span<std::byte> memory,
                     const RingSpec& ring = {})
      : window_(config.window), attention_(config.sliding), n_head_(config.n_head), memory_(memory) {
    if (ring) {
      ring_name_ = to_string(ring);
      std::visit(
          [&]<class TQuantiser>(const Simulated<TQuantiser>& format) {
            codec_.template emplace<SimulatedCodec<TQuantiser>>(attention_.head_dim, format);
          },
          *ring);
    }
    require(static_cast<std::int64_t>(memory.size()) >= 2 * n_layer * side_bytes(), "sliding cache: ", memory.size(),
            " B of memory, need ", 2 * n_layer * side_bytes());
  }

  /// @param n_head query heads; 0: the layers' own
  [[nodiscard]] SlidingPlan plan(std::int64_t n_token, const ExecutionPolicy& policy, const DeviceInfo& device,
                                 bool overlap, std::int64_t n_head = 0) const {
    AttentionShape shape{.batch = 1,
                         .n_query = n_token,
                         .n_head = n_head > 0 ? n_head : n_head_,
                         .n_head_kv = attention_.n_head_kv,
                         .head_dim = attention_.head_dim,
                         .buffer_len = ring_slots(window_)};
    SlidingPlan plan{.overlap = overlap};
    plan.into_ring_at_once = n_token <= kDecodeChunk && policy.qkv_prologue_fusion && !is_simulated();
    plan.step = plan_sliding_decode(shape, window_, device);
    // Its split of keys and its prologue are those that are switched off.
    for (const PolicyField field :
         {&ExecutionPolicy::sliding_decode_fusion, &ExecutionPolicy::qkv_prologue_fusion, &ExecutionPolicy::split_k}) {
      if (!(policy.*field)) plan.step.misfit = "it is switched off";
    }
    if (is_simulated()) plan.step.misfit = "the ring is simulated";
    FlashChoice choice{.overlap = overlap};
    if (!policy.split_k) choice.n_split = 1;
    plan.attention = plan_sliding_attention(shape, device, choice);
    return plan;
  }
  [[nodiscard]] StepPlanRow row(const SlidingPlan& plan) const {
    if (plan.is_one_launch()) {
      return {.component = "attention_sliding",
              .path = "prologue, ring and attention in one launch",
              .tile = concat("cluster of ", plan.step.n_split, plan.overlap ? "" : ", no PDL"),
              .n_split = plan.step.n_split};
    }
    StepPlanRow row = describe_flash("attention_sliding", plan.attention);
    if (is_simulated()) row.path += concat(" over ", ring_name_);
    if (plan.attention.shape.n_query == 1) row.why = concat("not in one launch: ", plan.step.misfit);
    return row;
  }

  [[nodiscard]] StepPlanRow row_of_rows(const SlidingRowsPlan& plan, bool overlap) const {
    return {.component = "attention_sliding",
            .path = concat("prologue, ring and attention, ", plan.n_row, " rows at once"),
            .tile = concat("cluster of ", plan.one.n_split, ", ", detail::kRowsOfLaunch, " rows a launch",
                           overlap ? "" : ", no PDL"),
            .n_split = plan.one.n_split};
  }

  /// Where the prologue writes: fresh K and V for the attention, and the ring where that loses nothing.
  template <class TLaunch>
  void with_sink(std::int64_t index, const FreshKv& fresh, const SlidingPlan& plan, TLaunch&& launch) const {
    if (plan.into_ring_at_once) {
      launch(RingKv{fresh, k(index), v(index), window_});
    } else {
      launch(fresh);
    }
  }

  /// The chunk's K and V become what a simulated ring would read back; else nothing. Before attend() and commit().
  void quantise(const FreshKv& fresh, cudaStream_t stream) const {
    std::visit(
        [&]<class TCodec>(const TCodec& codec) {
          if constexpr (!std::is_same_v<TCodec, std::monostate>) simulated_roundtrip(codec, fresh.k, fresh.v, stream);
        },
        codec_);
  }

  /// A step of one token with all that belongs to it; where plan.is_one_launch().
  void step(std::int64_t index, const ProjectedHeads<float>& heads, const QkNorms& norms, const RopeParams& rope,
            const ChunkPlace& chunk, const SlidingPlan& plan, cudaStream_t stream) const {
    // The kernel in front projects; the position was set before it, the rings in another step.
    sliding_decode({heads.q, heads.k, heads.v, norms, chunk.position, rope, k(index), v(index),
                    ModelConfig::kAttentionScale, heads.q_out},
                   plan.step, stream, plan.overlap);
  }

  /// Tokens behind each other, each as in a step of its own; where plan.fits().
  void step_rows(std::int64_t index, const ProjectedHeads<float>& heads, const QkNorms& norms, const RopeParams& rope,
                 const ChunkPlace& chunk, const SlidingRowsPlan& plan, cudaStream_t stream, bool overlap) const {
    sliding_decode_rows({heads.q, heads.k, heads.v, norms, chunk.position, rope, k(index), v(index),
                         ModelConfig::kAttentionScale, heads.q_out},
                        plan, stream, overlap);
  }

  /// @param q [n_token, n_head, head_dim], takes the result
  void attend(std::int64_t index, const View<Bf16, 3>& q, const FreshKv& fresh, const ChunkPlace& chunk,
              const SlidingPlan& plan, std::span<std::byte> partials, unsigned long long* work_count,
              cudaStream_t stream) const {
    // The kernel before stores at most slots outside the window, and the position was set before it.
    sliding_attention(
        {q, k(index), v(index), fresh.k, fresh.v, chunk.position, window_, ModelConfig::kAttentionScale, q},
        plan.attention, partials, stream, work_count, true);
  }

  /// Attention to the window - 1 newest keys: what a token at *query.newest sees whose window is one key shorter.
  void attend_query(std::int64_t index, const LoneQuery& query, const SlidingPlan& plan, std::span<std::byte> partials,
                    cudaStream_t stream) const {
    sliding_attention({query.q, k(index), v(index), query.newest_k, query.newest_v,
                       DeviceCount::on_device(query.newest), window_ - 1, ModelConfig::kAttentionScale, query.q},
                      plan.attention, partials, stream);
  }

  /// The chunk's K and V into the ring, where with_sink() did not put them there.
  void commit(std::int64_t index, const FreshKv& fresh, const ChunkPlace& chunk, cudaStream_t stream) const {
    ring_cache_commit(fresh.k, fresh.v, chunk.position, k(index), v(index), stream);
  }

  /// Where its bytes are.
  [[nodiscard]] StoredLayer stored(std::int64_t index) const {
    const auto part = [&](std::string_view name, const View<Bf16, 3>& ring) {
      return StoredPart{.name = name,
                        .data = reinterpret_cast<std::byte*>(ring.data),
                        .n_head = ring.extent[0],
                        .n_row = ring.extent[1],
                        .row_bytes = ring.extent[2] * static_cast<std::int64_t>(sizeof(Bf16))};
    };
    return {.is_ring = true, .parts = {part("k", k(index)), part("v", v(index))}};
  }

  [[nodiscard]] View<Bf16, 3> k(std::int64_t index) const { return side(2 * index); }
  [[nodiscard]] View<Bf16, 3> v(std::int64_t index) const { return side(2 * index + 1); }

 private:
  template <class TList>
  struct CodecOf;
  template <Quantiser... TQuantiser>
  struct CodecOf<SimulatedFormats<TQuantiser...>> {
    using Type = std::variant<std::monostate, SimulatedCodec<TQuantiser>...>;
  };

  [[nodiscard]] bool is_simulated() const { return codec_.index() != 0; }
  [[nodiscard]] std::int64_t side_bytes() const {
    return attention_.n_head_kv * ring_slots(window_) * attention_.head_dim * static_cast<std::int64_t>(sizeof(Bf16));
  }
  [[nodiscard]] View<Bf16, 3> side(std::int64_t i) const {
    return make_view(reinterpret_cast<Bf16*>(memory_.data() + i * side_bytes()), attention_.n_head_kv,
                     ring_slots(window_), attention_.head_dim);
  }

  std::int64_t window_;
  AttentionConfig attention_;
  std::int64_t n_head_;
  std::span<std::byte> memory_;
  typename CodecOf<ShippedSimulatedFormats>::Type codec_;  ///< of a simulated ring
  std::string ring_name_;
};

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

#include "cuda/bf16_attention.cuh"
#include "cuda/bf16_cache.cuh"
#include "cuda/device/device_arena.cuh"
#include "cuda/device/device_count.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/qkv_prologue.cuh"
#include "cuda/ring_cache.cuh"
#include "cuda/rms_norm.cuh"
#include "cuda/rope.cuh"
#include "cuda/sliding_attention.cuh"
#include "cuda/sliding_decode.cuh"
#include "cuda/tq4_attention.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/cache_spec.hpp"
#include "gemma4/config.hpp"
#include "gemma4/plan/memory_plan.hpp"

/// The caches of all layers of one sequence, and the step `attend` on each kind. Mirror: reference/layer_cache.hpp
namespace gemma4::cuda {

/// One thing off at a time, for a table that says what each is worth. Off is a slower path to the same result.
struct BackendSwitches {
  /// Off: a decode step of a full layer walks the whole cache, with a mask that hides what is not there yet.
  bool kv_len_clamp = true;
  bool causal_skip = true;        ///< off: a chunk visits the key tiles that none of its queries sees
  bool split_k = true;            ///< off: one block a KV head walks all keys of a decode step
  bool fuse_qkv_prologue = true;  ///< off: norms, RoPE and the cache's update are a launch each
  /// Off: in a decode step a sliding layer prepares q, k and v, attends, and merges split keys in a launch each. It is
  /// off where split_k or fuse_qkv_prologue is.
  bool fuse_sliding_decode = true;
  bool norm_launch = true;  ///< off: each block of a decode product finishes and normalises the residual for itself
  bool deal_rows = true;    ///< off: each block of a decode product has an equal share of the rows, and no more
  bool fetch_ahead = true;  ///< off: no decode product asks for weights of the next one
  bool overlap = true;      ///< off: a decode kernel begins when the one before it has ended
  bool operator==(const BackendSwitches&) const = default;
};

/// The tokens that a forward pass takes: how many, and where they stand.
struct ChunkPlace {
  std::int64_t n_token = 0;
  DeviceCount position;                     ///< of the first
  DeviceCount kv_len;                       ///< position + n_token
  const std::int32_t* positions = nullptr;  ///< [n_token] on the device; only without fuse_qkv_prologue
};

/// q, k and v of a chunk as projected, [n_token, heads, head_dim]; v may be k. `q_out` takes the normalised and rotated
/// q and then the result of attention, and may be q. `k_out` and `v_out` take K and V where they are needed beside the
/// cache; they may be k and v unless those are one.
template <class TIn>
struct ProjectedHeads {
  View<TIn, 3> q, k, v;
  View<Bf16, 3> q_out, k_out, v_out;
};

/// Rings on the sliding layers; on the full layers what `spec` says. All memory is the arena's.
class LayerCaches {
 public:
  /// @param arena of a memory plan of this config, spec and context
  /// @throws std::invalid_argument for a spec that the device has not
  LayerCaches(const ModelConfig& config, const CacheSpec& spec, std::int64_t context, const DeviceInfo& device,
              DeviceArena& arena)
      : config_(config), context_(context), device_(device), decode_device_(device) {
    require(spec.kind != CacheKind::kF32, "backend: an f32 cache exists in the reference alone; choose bf16 or tq4");
    if (config.n_full_layer() > 0) {
      if (spec.kind == CacheKind::kTq4) codec_.emplace(config.full.head_dim, spec.tq4);
      full_rope_ = rope_params(config.full);
    }
    if (config.n_full_layer() < config.n_layer()) sliding_rope_ = rope_params(config.sliding);
    full_bytes_ = arena.buffer("cache_full");
    ring_bytes_ = arena.buffer("cache_sliding");
    Carver full(full_bytes_), ring(ring_bytes_);
    for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
      Place place;
      const AttentionConfig& attention = config.attention(layer);
      if (config.sliding_layer(layer)) {
        const std::int64_t count = attention.n_head_kv * ring_slots(config.window) * attention.head_dim;
        place.k = ring.take<Bf16>(count, 16);
        place.v = ring.take<Bf16>(count, 16);
      } else if (codec_) {
        place.records = full.take<std::byte>(tq4_cache_bytes(1, attention.n_head_kv, context, attention.head_dim), 16);
      } else {
        const std::int64_t count = attention.n_head_kv * context * attention.head_dim;
        place.k = full.take<Bf16>(count, 16);
        place.v = full.take<Bf16>(count, 16);
      }
      places_.push_back(place);
    }
    // K and V of a long context as bf16, then what split keys leave: neighbours in the arena, one workspace here.
    const std::span<std::byte> scratch = arena.buffer("scratch"), partials = arena.buffer("attention_partials");
    scratch_bytes_ = static_cast<std::int64_t>(scratch.size());
    workspace_ = {scratch.data(), scratch.size() + partials.size()};
    require(scratch.data() + scratch.size() == partials.data(), "backend: scratch and attention_partials are apart");
    partials_ = partials;
  }

  void set_switches(const BackendSwitches& switches) {
    switches_ = switches;
    sliding_decode_ = {};
    if (config_.n_full_layer() < config_.n_layer()) {
      AttentionShape step = shape(config_.sliding, 1);
      step.buffer_len = ring_slots(config_.window);
      sliding_decode_ = plan_sliding_decode(step, config_.window, device_);
    }
    if (!switches.fuse_sliding_decode || !switches.fuse_qkv_prologue || !switches.split_k) {
      sliding_decode_.misfit = "it is switched off";
    }
    decode_device_ = device_;
    if (!switches.overlap) decode_device_.compute_capability = std::min(device_.compute_capability, 80);
  }

  /// Every byte of every cache becomes `value`, in stream order. Zeros to begin with; a test fills in garbage between
  /// two sequences.
  void fill_bytes(int value, cudaStream_t stream) {
    for (const std::span<std::byte>& bytes : {full_bytes_, ring_bytes_}) {
      if (bytes.empty()) continue;
      check(cudaMemsetAsync(bytes.data(), value, bytes.size(), stream), "fill of the caches");
    }
  }

  [[nodiscard]] View<Bf16, 3> ring_k(std::int64_t layer) const { return ring_view(layer, place(layer).k); }
  [[nodiscard]] View<Bf16, 3> ring_v(std::int64_t layer) const { return ring_view(layer, place(layer).v); }
  [[nodiscard]] View<Bf16, 4> flat_k(std::int64_t layer) const { return flat_view(layer, place(layer).k); }
  [[nodiscard]] View<Bf16, 4> flat_v(std::int64_t layer) const { return flat_view(layer, place(layer).v); }
  [[nodiscard]] Tq4Records records(std::int64_t layer) const {
    const AttentionConfig& attention = config_.attention(layer);
    return {place(layer).records, 1, attention.n_head_kv, context_, attention.head_dim};
  }

  /// Whether attend() does all that store() would do.
  [[nodiscard]] bool stores_in_attend(std::int64_t layer, const ChunkPlace& chunk) const {
    return config_.sliding_layer(layer) && chunk.n_token == 1 && sliding_decode_.fits();
  }

  /// Normalises and rotates q, k and v, and puts K and V where attend() looks for them.
  template <class TIn>
  void store(std::int64_t layer, const ProjectedHeads<TIn>& heads, const QkNorms& norms, const ChunkPlace& chunk,
             cudaStream_t stream) const {
    if (stores_in_attend(layer, chunk)) return;
    if (!switches_.fuse_qkv_prologue) return store_step_by_step(layer, heads, norms, chunk, stream);
    const auto launch = [&](const auto& target) {
      qkv_prologue<TIn>(heads.q, heads.k, heads.v, norms, chunk.position, rope(layer), heads.q_out, target, stream,
                        overlaps(chunk));
    };
    if (config_.sliding_layer(layer)) {
      const FreshKv fresh{heads.k_out, heads.v_out};
      if (into_ring_at_once(chunk)) {
        launch(RingKv{fresh, ring_k(layer), ring_v(layer), config_.window});
      } else {
        launch(fresh);
      }
    } else if (codec_) {
      launch(Tq4Kv{*codec_, records(layer)});
    } else {
      launch(FlatKv{flat_k(layer), flat_v(layer)});
    }
  }

  /// Attention of the chunk that store() took, from q_out to q_out.
  template <class TIn>
  void attend(std::int64_t layer, const ProjectedHeads<TIn>& heads, const QkNorms& norms, const ChunkPlace& chunk,
              cudaStream_t stream) const {
    if constexpr (std::is_same_v<TIn, float>) {  // the type of few tokens
      if (stores_in_attend(layer, chunk)) {
        // The kernel in front projects; the position was set before it, the rings in another step.
        return sliding_decode(heads.q, heads.k, heads.v, norms, chunk.position, sliding_rope_, ring_k(layer),
                              ring_v(layer), ModelConfig::kAttentionScale, heads.q_out, sliding_decode_, stream,
                              overlaps(chunk));
      }
    }
    const AttentionConfig& attention = config_.attention(layer);
    AttentionShape shape = this->shape(attention, chunk.n_token);
    FlashChoice choice;
    if (!switches_.split_k) choice.n_split = 1;
    const DeviceInfo& device = overlaps(chunk) ? device_ : decode_device_;
    const View<Bf16, 3>& q = heads.q_out;
    if (config_.sliding_layer(layer)) {
      shape.buffer_len = ring_slots(config_.window);
      // The kernel before stores at most slots outside the window, and the position was set before it.
      sliding_attention(q, ring_k(layer), ring_v(layer), heads.k_out, heads.v_out, chunk.position, config_.window,
                        ModelConfig::kAttentionScale, q, plan_sliding_attention(shape, device, choice), partials_,
                        stream, nullptr, true);
      return;
    }
    AttentionOptions options{.scale = ModelConfig::kAttentionScale, .causal_skip = switches_.causal_skip};
    DeviceCount kv_len = chunk.kv_len;
    if (masks(chunk)) {
      options.causal = false;
      options.mask = MaskView{.data = mask_, .type = ElementType::kBool, .shape = {1, 1, 1, context_}};
      kv_len = {};
    }
    if (codec_) {
      Tq4AttentionChoice tq4;
      tq4.prefill = choice;
      tq4.scratch_limit = scratch_bytes_;
      if (!switches_.split_k) tq4.decode.n_split = 1;
      if (kv_len.known()) tq4.max_kv_len = kv_len.host;
      tq4_attention(with_batch(q), records(layer), *codec_, options, kv_len, with_batch(q),
                    plan_tq4_attention(shape, options, device, tq4), workspace_of(chunk), stream);
    } else {
      bf16_attention(with_batch(q), flat_k(layer), flat_v(layer), options, kv_len, with_batch(q),
                     plan_bf16_attention(shape, options, device, choice), partials_, stream);
    }
  }

  /// After attend(): the chunk's K and V into the ring, where they are not there yet. Does nothing on a full layer.
  template <class TIn>
  void commit(std::int64_t layer, const ProjectedHeads<TIn>& heads, const ChunkPlace& chunk,
              cudaStream_t stream) const {
    if (!commits_after(layer, chunk)) return;
    ring_cache_commit(heads.k_out, heads.v_out, chunk.position, ring_k(layer), ring_v(layer), stream);
  }
  [[nodiscard]] bool commits_after(std::int64_t layer, const ChunkPlace& chunk) const {
    return config_.sliding_layer(layer) && !(switches_.fuse_qkv_prologue && into_ring_at_once(chunk));
  }

  /// Whether attend() decodes K and V of the layer into the scratch that also takes decoded weights.
  [[nodiscard]] bool borrows_scratch(std::int64_t layer, const ChunkPlace& chunk) const {
    return codec_ && !config_.sliding_layer(layer) && chunk.n_token > kTq4DecodeQueries;
  }

  /// Whether a chunk runs with the mask of set_mask() instead of kv_len.
  [[nodiscard]] bool masks(const ChunkPlace& chunk) const { return !switches_.kv_len_clamp && chunk.n_token == 1; }
  /// @param mask [context] bytes on the device, nonzero where a token is
  void set_mask(const std::uint8_t* mask) { mask_ = mask; }

 private:
  struct Place {
    Bf16* k = nullptr;
    Bf16* v = nullptr;
    std::byte* records = nullptr;
  };

  [[nodiscard]] const Place& place(std::int64_t layer) const { return places_[static_cast<std::size_t>(layer)]; }
  [[nodiscard]] const RopeParams& rope(std::int64_t layer) const {
    return config_.sliding_layer(layer) ? sliding_rope_ : full_rope_;
  }
  [[nodiscard]] AttentionShape shape(const AttentionConfig& attention, std::int64_t n_query) const {
    return {.batch = 1,
            .n_query = n_query,
            .n_head = config_.n_head,
            .n_head_kv = attention.n_head_kv,
            .head_dim = attention.head_dim,
            .buffer_len = context_};
  }
  [[nodiscard]] View<Bf16, 3> ring_view(std::int64_t layer, Bf16* data) const {
    const AttentionConfig& attention = config_.attention(layer);
    return make_view(data, attention.n_head_kv, ring_slots(config_.window), attention.head_dim);
  }
  [[nodiscard]] View<Bf16, 4> flat_view(std::int64_t layer, Bf16* data) const {
    const AttentionConfig& attention = config_.attention(layer);
    return make_view(data, std::int64_t{1}, attention.n_head_kv, context_, attention.head_dim);
  }
  /// Few enough tokens that the ring loses nothing that one of them sees.
  [[nodiscard]] static bool into_ring_at_once(const ChunkPlace& chunk) { return chunk.n_token <= kDecodeChunk; }
  [[nodiscard]] bool overlaps(const ChunkPlace& chunk) const {
    return device_.compute_capability >= 90 && (switches_.overlap || chunk.n_token > kDecodeChunk);
  }
  [[nodiscard]] std::span<std::byte> workspace_of(const ChunkPlace& chunk) const {
    return chunk.n_token <= kTq4DecodeQueries ? partials_ : workspace_;
  }

  /// The same as qkv_prologue(), a launch for each thing it does; what is handed on is rounded to bf16.
  template <class TIn>
  void store_step_by_step(std::int64_t layer, const ProjectedHeads<TIn>& heads, const QkNorms& norms,
                          const ChunkPlace& chunk, cudaStream_t stream) const {
    const auto rows = [](const auto& view) {
      return make_view(view.data, view.extent[0] * view.extent[1], view.extent[2]);
    };
    const auto norm = [&](const View<TIn, 3>& from, const float* weight, const View<Bf16, 3>& to) {
      rms_norm<TIn, Bf16>(rows(from), weight, norms.epsilon, rows(to), stream);
    };
    norm(heads.v, nullptr, heads.v_out);  // first: where v is k, k_out may be k
    norm(heads.k, norms.k, heads.k_out);
    norm(heads.q, norms.q, heads.q_out);
    gemma4::cuda::rope<Bf16>(heads.k_out, chunk.position, rope(layer), stream);
    gemma4::cuda::rope<Bf16>(heads.q_out, chunk.position, rope(layer), stream);
    if (config_.sliding_layer(layer)) return;  // commit() follows
    const DevicePositions positions{.device = chunk.positions, .count = chunk.n_token};
    const View<const Bf16, 4> k = with_batch(heads.k_out), v = with_batch(heads.v_out);
    if (codec_) {
      tq4_cache_update<Bf16>(*codec_, k, v, positions, records(layer), stream);
    } else {
      bf16_cache_update<Bf16>(k, v, positions, flat_k(layer), flat_v(layer), stream);
    }
  }

  ModelConfig config_;
  std::int64_t context_;
  DeviceInfo device_, decode_device_;
  BackendSwitches switches_;
  SlidingDecodePlan sliding_decode_;  ///< of a step of one token
  std::optional<Tq4Codec> codec_;
  RopeParams sliding_rope_, full_rope_;
  std::vector<Place> places_;
  std::span<std::byte> full_bytes_, ring_bytes_, workspace_, partials_;
  std::int64_t scratch_bytes_ = 0;
  const std::uint8_t* mask_ = nullptr;
};

}  // namespace gemma4::cuda

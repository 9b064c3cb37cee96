// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <variant>

#include "cuda/bf16_attention.cuh"
#include "cuda/cache/full_layer_cache.cuh"
#include "cuda/cache/sliding_layer_cache.cuh"
#include "cuda/kv_attention.cuh"
#include "cuda/tq4_attention.cuh"
#include "gemma4/cache_formats.hpp"

/// How a chunk goes through the caches of all layers (cuda/layer_cache.cuh).
namespace gemma4::cuda {

namespace detail {

template <class TList>
struct FullPlanOfList;

template <class... TFormats>
struct FullPlanOfList<CacheFormatList<TFormats...>> {
  using Caches = std::variant<FullLayerCaches<TFormats>...>;
};

}  // namespace detail

/// The full layers' caches in whatever format: one of every format in the list.
template <class TList = CacheFormats>
using AnyFullLayerCaches = typename detail::FullPlanOfList<TList>::Caches;

/// Whether the full layers of a format take several rows at once, each with the bits of a step of its own.
template <class TCaches>
concept TakesRows = requires {
  typename TCaches::RowsPlan;
};

/// How several rows go through attention that each must have the bits of a step of their own: at once in the layers of
/// a kind that can (no misfit), else one after another by the plan of one.
struct LayerRowsPlan {
  std::int64_t n_row = 0;  ///< 0: the pass has none
  bool overlap = false;    ///< programmatic dependent launch of what takes all of them
  std::variant<RowByRow, KvRowsPlan, Tq4RowsPlan, Bf16RowsPlan> full = {};
  SlidingRowsPlan sliding = {};
};

/// How a chunk goes through the caches, for all layers alike; made before the first kernel of a pass.
struct LayerCachePlan {
  std::int64_t n_token = 0;
  bool fuses_prologue = true;  ///< norms, RoPE and storing in one launch
  bool masks = false;          ///< a mask over the whole context stands for kv_len
  bool overlap = true;         ///< programmatic dependent launch
  bool causal_skip = true;
  bool needs_positions = false;  ///< ChunkPlace::positions is read
  SlidingPlan sliding = {};
  std::variant<std::monostate, FlashPlan, Tq4AttentionPlan, KvAttentionPlan> full =
      {};  ///< of the type that the format's caches take
  LayerRowsPlan rows = {};

  [[nodiscard]] bool commits_after() const { return !sliding.into_ring_at_once; }
};

}  // namespace gemma4::cuda

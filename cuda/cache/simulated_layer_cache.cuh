// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/bf16_cache.cuh"
#include "cuda/cache/chunk.cuh"
#include "cuda/cache/flat_layer_cache.cuh"
#include "cuda/cache/full_layer_cache.cuh"
#include "cuda/qkv_prologue.cuh"
#include "cuda/simulated_cache.cuh"
#include "gemma4/quantisers/quantiser.hpp"

/// The full layers' cache in a simulated format: what a quantiser would read back, in the uncompressed flat cache. The
/// prologue leaves K and V beside the cache, as bf16, and a launch behind it quantises them. Where the format has a
/// tail a chunk goes in pieces (gemma4/quantisers/quantiser.hpp): stored exactly, what leaves the tail quantised,
/// attended. Mirror: reference/cache/simulated_layer_cache.hpp
namespace gemma4::cuda {

template <Quantiser TQuantiser>
class FullLayerCaches<Simulated<TQuantiser>> : public FlatFullLayers {
 public:
  static constexpr bool kSinkStores = Simulated<TQuantiser>::kStoredByPrologue;
  FullLayerCaches(const Simulated<TQuantiser>& format, const FullCacheShape& shape, std::span<std::byte> memory)
      : FlatFullLayers(shape, memory), codec_(shape.head_dim, format) {}

  /// Of a whole chunk; with a tail, of each of its pieces.
  [[nodiscard]] Plan plan(FullPlanWish wish) const {
    if (tail() > 0) wish.n_query = tail_piece(wish.n_query, tail());
    return FlatFullLayers::plan(wish);
  }
  [[nodiscard]] StepPlanRow row(const Plan& plan) const {
    StepPlanRow row = FlatFullLayers::row(plan);
    row.path += concat(" over ", codec_.format().name());
    return row;
  }
  [[nodiscard]] FreshKv sink(std::int64_t /*index*/, const FreshKv& fresh) const { return fresh; }
  /// Nothing where there is a tail: attend() stores piece by piece.
  void store(std::int64_t index, const View<const Bf16, 3>& new_k, const View<const Bf16, 3>& new_v,
             const float* /*k_weight*/, const DevicePositions& positions, cudaStream_t stream) const {
    if (tail() > 0) return;
    simulated_cache_update<Bf16>(codec_, with_batch(new_k), with_batch(new_v), positions, k(index), v(index), stream);
  }

  void attend(std::int64_t index, const FullAttentionCall& call, const Plan& plan, cudaStream_t stream) const {
    if (tail() == 0) return FlatFullLayers::attend(index, call, plan, stream);
    const std::int64_t n_token = call.q.extent[0], piece = plan.shape.n_query;
    require(piece == n_token || call.kv_len.known(), "simulated cache: a chunk in pieces needs kv_len on the host");
    for (std::int64_t first = 0; first < n_token; first += piece) {
      const DevicePositions positions{.device = call.positions + first, .count = piece};
      bf16_cache_update<Bf16>(with_batch(rows(call.fresh_k, first, piece)),
                              with_batch(rows(call.fresh_v, first, piece)), positions, k(index), v(index), stream);
      simulated_cache_age(codec_, positions, k(index), v(index), stream);
      FullAttentionCall part = call;
      part.q = rows(call.q, first, piece);
      if (piece < n_token) part.kv_len = DeviceCount::on_host(call.kv_len.host - n_token + first + piece);
      FlatFullLayers::attend(index, part, plan, stream);
    }
  }

  [[nodiscard]] StoredLayer stored(std::int64_t index) const {
    StoredLayer layer = FlatFullLayers::stored(index);
    layer.tail = tail();
    return layer;
  }

 private:
  [[nodiscard]] std::int64_t tail() const { return codec_.format().tail; }
  template <class T>
  [[nodiscard]] static View<T, 3> rows(View<T, 3> view, std::int64_t first, std::int64_t count) {
    view.data += first * view.stride[0];
    view.extent[0] = count;
    return view;
  }

  SimulatedCodec<TQuantiser> codec_;
};

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/cache/flat_layer_cache.cuh"
#include "cuda/cache/full_layer_cache.cuh"
#include "cuda/qkv_prologue.cuh"
#include "cuda/simulated_cache.cuh"
#include "gemma4/quantisers/quantiser.hpp"

/// The full layers' cache in a simulated format: what a quantiser would read back, in the uncompressed flat cache. The
/// prologue leaves K and V beside the cache, as bf16, and a launch behind it quantises them.
/// Mirror: reference/cache/simulated_layer_cache.hpp
namespace gemma4::cuda {

template <Quantiser TQuantiser>
class FullLayerCaches<Simulated<TQuantiser>> : public FlatFullLayers {
 public:
  static constexpr bool kSinkStores = Simulated<TQuantiser>::kStoredByPrologue;
  FullLayerCaches(const Simulated<TQuantiser>& format, const FullCacheShape& shape, std::span<std::byte> memory)
      : FlatFullLayers(shape, memory), codec_(shape.head_dim, format) {}

  [[nodiscard]] StepPlanRow row(const Plan& plan) const {
    StepPlanRow row = FlatFullLayers::row(plan);
    row.path += concat(" over ", codec_.format().name());
    return row;
  }
  [[nodiscard]] FreshKv sink(std::int64_t /*index*/, const FreshKv& fresh) const { return fresh; }
  void store(std::int64_t index, const View<const Bf16, 3>& new_k, const View<const Bf16, 3>& new_v,
             const float* /*k_weight*/, const DevicePositions& positions, cudaStream_t stream) const {
    simulated_cache_update<Bf16>(codec_, with_batch(new_k), with_batch(new_v), positions, k(index), v(index), stream);
  }

 private:
  SimulatedCodec<TQuantiser> codec_;
};

}  // namespace gemma4::cuda

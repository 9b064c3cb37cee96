// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include "cuda/cache/flat_layer_cache.cuh"
#include "cuda/cache/full_layer_cache.cuh"
#include "gemma4/kvarn_format.hpp"

/// KVarN's tiles are simulated in the reference alone. Mirror: reference/cache/kvarn_layer_cache.hpp
namespace gemma4::cuda {

template <>
class FullLayerCaches<KvarnFormat> : public FullLayerCaches<Bf16Format> {
 public:
  FullLayerCaches(const KvarnFormat& format, const FullCacheShape& shape, std::span<std::byte> memory)
      : FullLayerCaches<Bf16Format>(Bf16Format{}, shape, memory) {
    require(false, "backend: ", format.name(), " exists in the reference alone; choose a sim-k<bits>v<bits>-had");
  }
};

}  // namespace gemma4::cuda

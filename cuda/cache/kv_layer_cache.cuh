// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/cache/flat_layer_cache.cuh"
#include "gemma4/kv_format.hpp"

/// The cache of the full layers that stores one vector for K and V. Mirror: reference/cache/kv_layer_cache.hpp
namespace gemma4::cuda {

/// The reference alone has it.
template <>
class FullLayerCaches<KvFormat> : public FullLayerCaches<Bf16Format> {
 public:
  FullLayerCaches(const KvFormat& format, const FullCacheShape& shape, std::span<std::byte> memory)
      : FullLayerCaches<Bf16Format>(Bf16Format{}, shape, memory) {
    require(false, "backend: a ", format.name(), " cache exists in the reference alone; choose bf16 or tq4");
  }
};

}  // namespace gemma4::cuda

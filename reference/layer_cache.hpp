// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "gemma4/cache_formats.hpp"
#include "gemma4/config.hpp"
#include "gemma4/error.hpp"
#include "gemma4/host_memory.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/plan/cache_fit.hpp"
#include "gemma4/ring_format.hpp"
#include "reference/cache/flat_layer_cache.hpp"
#include "reference/cache/full_layer_cache.hpp"
#include "reference/cache/kv_layer_cache.hpp"
#include "reference/cache/kvarn_layer_cache.hpp"
#include "reference/cache/simulated_layer_cache.hpp"
#include "reference/cache/sliding_layer_cache.hpp"
#include "reference/cache/tq4_layer_cache.hpp"

/// The caches of a model's layers, of whatever format. Mirror: cuda/layer_cache.cuh
namespace gemma4::reference {

namespace detail {

template <class TList, class Scalar>
struct LayerCacheOfList;

template <class... TFormats, class Scalar>
struct LayerCacheOfList<CacheFormatList<TFormats...>, Scalar> {
  using Type = std::variant<SlidingLayerCache<float>, SlidingLayerCache<Bf16>,
                            typename FullLayerCaches<TFormats, Scalar>::Cache...>;
};

}  // namespace detail

/// One of them: rings of both types, and the full layers' cache of every format in the list.
template <class Scalar, class TList = CacheFormats>
using LayerCache = typename detail::LayerCacheOfList<TList, Scalar>::Type;

namespace detail {

/// Bytes of K and V of the full layers; the largest number where 64 bits do not hold it.
template <class TFormat>
[[nodiscard]] std::int64_t full_cache_bytes(const ModelConfig& config, const TFormat& format, std::int64_t context) {
  const std::int64_t row = format.allocated_row_bytes(CacheSide::kKey, config.full.head_dim) +
                           format.allocated_row_bytes(CacheSide::kValue, config.full.head_dim);
  std::int64_t bytes = 0;
  const bool is_too_large =
      __builtin_mul_overflow(row * config.full.n_head_kv * config.n_full_layer(), context, &bytes);
  return is_too_large ? std::numeric_limits<std::int64_t>::max() : bytes;
}

}  // namespace detail

/// The caches of a model: rings on the sliding layers (float32 beside an f32 cache, bf16 otherwise) that hold what
/// `ring` reads back, and on the full layers what `spec` says.
/// @throws HostMemoryError with the bytes asked for when the host has not got them
template <class Scalar>
[[nodiscard]] std::vector<LayerCache<Scalar>> make_layer_caches(const ModelConfig& config, const CacheSpec& spec,
                                                                std::int64_t context, const RingSpec& ring = {}) {
  const bool has_ring = config.n_full_layer() < config.n_layer();
  const RingCodec ring_codec = has_ring ? RingCodec(ring, config.sliding.head_dim) : RingCodec();
  std::vector<LayerCache<Scalar>> caches;
  caches.reserve(static_cast<std::size_t>(config.n_layer()));
  std::visit(
      [&]<class TFormat>(const TFormat& format) {
        using Ring = SlidingLayerCache<std::conditional_t<TFormat::kRingValueBytes == sizeof(float), float, Bf16>>;
        std::optional<FullLayerCaches<TFormat, Scalar>> full;
        if (config.n_full_layer() > 0) full.emplace(format, config.full);
        const std::string what = concat("caches of ", config.n_full_layer(), " full layers as ", format.name(),
                                        " for a context of ", context);
        allocate_for(what, detail::full_cache_bytes(config, format, context), [&] {
          for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
            if (config.sliding_layer(layer)) {
              caches.emplace_back(Ring(config, config.sliding, ring_codec));
            } else {
              caches.emplace_back(full->make(context));
            }
          }
        });
      },
      spec);
  return caches;
}

/// The same for a model at hand. @throws std::invalid_argument naming the layer that cannot have the format
template <class Scalar>
[[nodiscard]] std::vector<LayerCache<Scalar>> make_layer_caches(const ModelWeights& weights, const CacheSpec& spec,
                                                                std::int64_t context, const RingSpec& ring = {}) {
  require_cache_suits(spec, weights.config, [&](std::int64_t layer) {
    return !weights.layers[static_cast<std::size_t>(layer)].attn_v.empty();
  });
  return make_layer_caches<Scalar>(weights.config, spec, context, ring);
}

}  // namespace gemma4::reference

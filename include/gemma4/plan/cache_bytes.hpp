// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <variant>

#include "gemma4/cache_formats.hpp"
#include "gemma4/config.hpp"
#include "gemma4/error.hpp"
#include "gemma4/ring_format.hpp"
#include "gemma4/session/checkpoint_policy.hpp"

/// Bytes of the caches of a model: as stored, and as the idea behind a simulated format would take.
namespace gemma4 {

/// Bytes of the caches of a model.
struct CacheBytes {
  std::int64_t full = 0;     ///< of the full layers
  std::int64_t sliding = 0;  ///< of the rings
};

namespace detail {

/// Bytes of K and V of one head, for `n_token` tokens of which a format keeps some as bf16.
template <class TFormat>
[[nodiscard]] std::int64_t idea_head_bytes(const TFormat& format, std::int64_t n_token, std::int64_t head_dim) {
  std::int64_t exact = 0;
  if constexpr (requires { format.exact_tokens(); }) exact = std::min(n_token, format.exact_tokens());
  return (n_token - exact) *
             (format.row_bytes(CacheSide::kKey, head_dim) + format.row_bytes(CacheSide::kValue, head_dim)) +
         exact * 2 * 2 * head_dim;
}

}  // namespace detail

/// What the formats would take: norms and scales in, exact tokens as bf16. Rings of `window` slots.
[[nodiscard]] inline CacheBytes idea_bytes(const ModelConfig& config, const CacheSpec& cache, const RingSpec& ring,
                                           std::int64_t context) {
  const std::int64_t n_sliding = config.n_layer() - config.n_full_layer();
  CacheBytes bytes;
  std::visit(
      [&]<class TFormat>(const TFormat& format) {
        bytes.full = config.n_full_layer() * config.full.n_head_kv *
                     detail::idea_head_bytes(format, context, config.full.head_dim);
        const std::int64_t plain = config.window * 2 * TFormat::kRingValueBytes * config.sliding.head_dim;
        const auto of_ring = [&](const auto& of) {
          return detail::idea_head_bytes(of, config.window, config.sliding.head_dim);
        };
        bytes.sliding = n_sliding * config.sliding.n_head_kv * (ring ? std::visit(of_ring, *ring) : plain);
      },
      cache);
  return bytes;
}

/// What is allocated for the same: rings of `n_slot` slots in the storage type that goes with the cache.
[[nodiscard]] inline CacheBytes stored_bytes(const ModelConfig& config, const CacheSpec& cache, std::int64_t context,
                                             std::int64_t n_slot) {
  const std::int64_t n_sliding = config.n_layer() - config.n_full_layer();
  return std::visit(
      [&]<class TFormat>(const TFormat& format) {
        const std::int64_t row = format.allocated_row_bytes(CacheSide::kKey, config.full.head_dim) +
                                 format.allocated_row_bytes(CacheSide::kValue, config.full.head_dim);
        return CacheBytes{.full = config.n_full_layer() * config.full.n_head_kv * context * row,
                          .sliding = n_sliding * config.sliding.n_head_kv * n_slot * config.sliding.head_dim * 2 *
                                     TFormat::kRingValueBytes};
      },
      cache);
}

/// Bytes of one checkpoint of the rings (gemma4/session/ring_checkpoints.hpp), on the host: a window of K and V of
/// every sliding layer; of a context that is shorter, that. A format that keeps its newest tokens exact adds those.
[[nodiscard]] inline std::int64_t ring_checkpoint_bytes(const ModelConfig& config, const CacheSpec& cache,
                                                        std::int64_t context) {
  return stored_bytes(config, cache, 0, std::min(config.window, context)).sliding;
}

/// Of all that a sequence of up to `context` tokens has at any time, at most.
[[nodiscard]] inline std::int64_t ring_checkpoint_bytes(const ModelConfig& config, const CacheSpec& cache,
                                                        std::int64_t context, const CheckpointPolicy& policy) {
  return n_checkpoint(context, policy) * ring_checkpoint_bytes(config, cache, context);
}

/// The same in words: how many, where, and the bytes of one.
[[nodiscard]] inline std::string ring_checkpoint_formula(const ModelConfig& config, const CacheSpec& cache,
                                                         std::int64_t context, const CheckpointPolicy& policy) {
  const std::string near = policy.near_interval == 0
                               ? ""
                               : concat(", every ", policy.near_interval, " within the newest ", policy.near_tokens);
  return concat(n_checkpoint(context, policy), " checkpoints (every ", policy.interval, " tokens", near,
                ") x a window of the rings, ", ring_checkpoint_bytes(config, cache, context), " B");
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/quantisers/quantiser.hpp"
#include "gemma4/view.hpp"
#include "reference/bf16_cache.hpp"
#include "reference/cache/flat_layer_cache.hpp"
#include "reference/cache/full_layer_cache.hpp"
#include "reference/cache/heads.hpp"
#include "reference/decoder_layer.hpp"
#include "reference/simulated_cache.hpp"

/// The cache of a full layer in a simulated format. Mirror: cuda/cache/simulated_layer_cache.cuh
namespace gemma4::reference {

/// Full attention over a flat bf16 cache that holds what a simulated format would read back. The chunk attends to its
/// own quantised K and V, as later tokens will; where the format has a tail, piece by piece to exact ones.
template <Quantiser TQuantiser>
class SimulatedLayerCache {
 public:
  SimulatedLayerCache(const AttentionConfig& attention, std::int64_t context,
                      std::shared_ptr<const SimulatedCodec<TQuantiser>> codec)
      : head_dim_(attention.head_dim),
        codec_(std::move(codec)),
        cache_(1, attention.n_head_kv, context, attention.head_dim) {}

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend(const Qkv<Scalar>& qkv, std::int64_t position) {
    const std::int64_t n_token = qkv.q.rows(), tail = codec_->format().tail;
    if (tail == 0) return attend_piece(qkv, position);
    const std::int64_t piece = tail_piece(n_token, tail);
    Matrix<Scalar> out(n_token, qkv.q.cols());
    for (std::int64_t first = 0; first < n_token; first += piece) {
      const Qkv<Scalar> part{qkv.q.middleRows(first, piece), qkv.k.middleRows(first, piece),
                             qkv.v.middleRows(first, piece)};
      out.middleRows(first, piece) = attend_piece(part, position + first);
    }
    return out;
  }

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend_queries(const Matrix<Scalar>& q, std::span<const float> /*k_norm*/,
                                              std::int64_t kv_len) const {
    return detail::attend_flat_cache(q, head_dim_, cache_, kv_len);
  }

  [[nodiscard]] StoredLayer stored() {
    StoredLayer layer = detail::stored_flat_cache(cache_);
    layer.tail = codec_->format().tail;
    return layer;
  }

 private:
  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend_piece(const Qkv<Scalar>& qkv, std::int64_t position) {
    const std::vector<std::int32_t> positions = detail::consecutive(position, qkv.q.rows());
    const auto k = detail::heads_view(qkv.k, head_dim_), v = detail::heads_view(qkv.v, head_dim_);
    if (codec_->format().tail > 0) {
      bf16_cache_update<Scalar, Bf16>(k, v, positions, cache_);
      simulated_cache_age(*codec_, positions, cache_);
    } else {
      simulated_cache_update<Scalar>(*codec_, k, v, positions, cache_);
    }
    return attend_queries(qkv.q, qkv.k_norm, position + qkv.q.rows());
  }

  std::int64_t head_dim_;
  std::shared_ptr<const SimulatedCodec<TQuantiser>> codec_;
  FlatCache<Bf16> cache_;
};

/// All layers share one codec.
template <Quantiser TQuantiser, class Scalar>
struct FullLayerCaches<Simulated<TQuantiser>, Scalar> {
  using Cache = SimulatedLayerCache<TQuantiser>;
  FullLayerCaches(const Simulated<TQuantiser>& format, const AttentionConfig& attention)
      : attention(attention), codec(std::make_shared<const SimulatedCodec<TQuantiser>>(attention.head_dim, format)) {}
  [[nodiscard]] Cache make(std::int64_t context) const { return {attention, context, codec}; }
  AttentionConfig attention;
  std::shared_ptr<const SimulatedCodec<TQuantiser>> codec;
};

}  // namespace gemma4::reference

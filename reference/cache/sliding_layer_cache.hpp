// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "gemma4/config.hpp"
#include "reference/cache/heads.hpp"
#include "reference/decoder_layer.hpp"
#include "reference/ring_cache.hpp"
#include "reference/sliding_attention.hpp"

/// The cache of a sliding layer. Mirror: cuda/cache/sliding_layer_cache.cuh
namespace gemma4::reference {

/// Sliding window over a ring: the chunk attends to the old ring and to its own fresh K and V, and then is committed.
template <class TStorage>
class SlidingLayerCache {
 public:
  SlidingLayerCache(const ModelConfig& config, const AttentionConfig& attention)
      : window_(config.window),
        head_dim_(attention.head_dim),
        ring_(attention.n_head_kv, config.window, attention.head_dim) {}

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend(const Qkv<Scalar>& qkv, std::int64_t position) {
    const std::int64_t n_token = qkv.q.rows();
    const std::vector<TStorage> k = detail::to_storage<TStorage>(qkv.k);
    const std::vector<TStorage> v = detail::to_storage<TStorage>(qkv.v);
    const std::int64_t n_head_kv = qkv.k.cols() / head_dim_;
    const std::int64_t n_head = qkv.q.cols() / head_dim_;
    const View<const TStorage, 3> k_new = make_view(k.data(), n_token, n_head_kv, head_dim_);
    const View<const TStorage, 3> v_new = make_view(v.data(), n_token, n_head_kv, head_dim_);
    Matrix<Scalar> out(n_token, qkv.q.cols());
    sliding_attention<Scalar, TStorage>(make_view(qkv.q.data(), n_token, n_head, head_dim_), ring_.k(), ring_.v(),
                                        k_new, v_new, position, window_, ModelConfig::kAttentionScale,
                                        make_view(out.data(), n_token, n_head, head_dim_));
    ring_.commit(k_new, v_new, position);
    return out;
  }

 private:
  std::int64_t window_;
  std::int64_t head_dim_;
  RingCache<TStorage> ring_;
};

}  // namespace gemma4::reference

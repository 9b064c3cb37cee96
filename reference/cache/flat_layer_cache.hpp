// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gemma4/cache_format.hpp"
#include "gemma4/config.hpp"
#include "reference/bf16_attention.hpp"
#include "reference/bf16_cache.hpp"
#include "reference/cache/full_layer_cache.hpp"
#include "reference/cache/heads.hpp"
#include "reference/decoder_layer.hpp"

/// The uncompressed cache of a full layer. Mirror: cuda/cache/flat_layer_cache.cuh
namespace gemma4::reference {

namespace detail {

/// Attention of the last q.rows() tokens of kv_len over a flat cache: [n_query, n_head * head_dim].
template <class Scalar, class TStorage>
[[nodiscard]] Matrix<Scalar> attend_flat_cache(const Matrix<Scalar>& q, std::int64_t head_dim,
                                               const FlatCache<TStorage>& cache, std::int64_t kv_len) {
  Matrix<Scalar> out(q.rows(), q.cols());
  bf16_attention<Scalar, TStorage>(heads_view(q, head_dim), cache.k(), cache.v(),
                                   {.scale = ModelConfig::kAttentionScale}, kv_len,
                                   make_view(out.data(), 1, out.rows(), out.cols() / head_dim, head_dim));
  return out;
}

/// Where its K and V are.
template <class TStorage>
[[nodiscard]] StoredLayer stored_flat_cache(FlatCache<TStorage>& cache) {
  const CacheShape& shape = cache.shape();
  return {.parts = {stored_part("k", cache.k_storage(), shape.n_head_kv, shape.buffer_len),
                    stored_part("v", cache.v_storage(), shape.n_head_kv, shape.buffer_len)}};
}

}  // namespace detail

/// Full attention over an uncompressed flat cache.
template <class TStorage>
class FlatLayerCache {
 public:
  FlatLayerCache(const AttentionConfig& attention, std::int64_t context)
      : head_dim_(attention.head_dim), cache_(1, attention.n_head_kv, context, attention.head_dim) {}

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend(const Qkv<Scalar>& qkv, std::int64_t position) {
    const std::vector<std::int32_t> positions = detail::consecutive(position, qkv.q.rows());
    bf16_cache_update<Scalar, TStorage>(detail::heads_view(qkv.k, head_dim_), detail::heads_view(qkv.v, head_dim_),
                                        positions, cache_);
    return attend_queries(qkv.q, qkv.k_norm, position + qkv.q.rows());
  }

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend_queries(const Matrix<Scalar>& q, std::span<const float> /*k_norm*/,
                                              std::int64_t kv_len) const {
    return detail::attend_flat_cache(q, head_dim_, cache_, kv_len);
  }

  [[nodiscard]] StoredLayer stored() { return detail::stored_flat_cache(cache_); }

 private:
  std::int64_t head_dim_;
  FlatCache<TStorage> cache_;
};

template <class Scalar>
struct FullLayerCaches<F32Format, Scalar> {
  using Cache = FlatLayerCache<float>;
  FullLayerCaches(const F32Format& /*format*/, const AttentionConfig& attention) : attention(attention) {}
  [[nodiscard]] Cache make(std::int64_t context) const { return {attention, context}; }
  AttentionConfig attention;
};

template <class Scalar>
struct FullLayerCaches<Bf16Format, Scalar> {
  using Cache = FlatLayerCache<Bf16>;
  FullLayerCaches(const Bf16Format& /*format*/, const AttentionConfig& attention) : attention(attention) {}
  [[nodiscard]] Cache make(std::int64_t context) const { return {attention, context}; }
  AttentionConfig attention;
};

}  // namespace gemma4::reference

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <variant>
#include <vector>

#include "gemma4/cache_spec.hpp"
#include "gemma4/config.hpp"
#include "reference/bf16_attention.hpp"
#include "reference/bf16_cache.hpp"
#include "reference/decoder_layer.hpp"
#include "reference/ring_cache.hpp"
#include "reference/sliding_attention.hpp"
#include "reference/tq4_attention.hpp"
#include "reference/tq4_cache.hpp"

/// The caches of a layer and the step `attend` on each: put the chunk's K and V where they belong, attend, and return
/// [n_token, n_head * head_dim]. Mirror: cuda/layer_cache.cuh
namespace gemma4::reference {

namespace detail {

/// A matrix of heads as the view [1, n_token, n_heads, head_dim].
template <class Scalar>
[[nodiscard]] View<const Scalar, 4> heads_view(const Matrix<Scalar>& m, std::int64_t head_dim) {
  return make_view(m.data(), 1, m.rows(), m.cols() / head_dim, head_dim);
}

/// Each element rounded to the storage type.
template <class TStorage, class Scalar>
[[nodiscard]] std::vector<TStorage> to_storage(const Matrix<Scalar>& m) {
  std::vector<TStorage> out(static_cast<std::size_t>(m.size()));
  std::transform(m.data(), m.data() + m.size(), out.begin(),
                 [](Scalar value) { return from_float<TStorage>(static_cast<float>(value)); });
  return out;
}

[[nodiscard]] inline std::vector<std::int32_t> consecutive(std::int64_t first, std::int64_t count) {
  std::vector<std::int32_t> positions(static_cast<std::size_t>(count));
  std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(first));
  return positions;
}

}  // namespace detail

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

/// Full attention over an uncompressed flat cache.
template <class TStorage>
class FlatLayerCache {
 public:
  FlatLayerCache(const AttentionConfig& attention, std::int64_t context)
      : head_dim_(attention.head_dim), cache_(1, attention.n_head_kv, context, attention.head_dim) {}

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend(const Qkv<Scalar>& qkv, std::int64_t position) {
    const std::int64_t n_token = qkv.q.rows();
    const std::vector<std::int32_t> positions = detail::consecutive(position, n_token);
    bf16_cache_update<Scalar, TStorage>(detail::heads_view(qkv.k, head_dim_), detail::heads_view(qkv.v, head_dim_),
                                        positions, cache_);
    const auto& stored = cache_;
    Matrix<Scalar> out(n_token, qkv.q.cols());
    bf16_attention<Scalar, TStorage>(detail::heads_view(qkv.q, head_dim_), stored.k(), stored.v(),
                                     {.scale = ModelConfig::kAttentionScale}, position + n_token,
                                     make_view(out.data(), 1, n_token, out.cols() / head_dim_, head_dim_));
    return out;
  }

 private:
  std::int64_t head_dim_;
  FlatCache<TStorage> cache_;
};

/// Full attention over a TQ4 cache. The chunk attends to its own compressed K and V, as later tokens will.
template <class CodecScalar>
class Tq4LayerCache {
 public:
  Tq4LayerCache(const AttentionConfig& attention, std::int64_t context,
                std::shared_ptr<const Tq4Codec<CodecScalar>> codec)
      : head_dim_(attention.head_dim),
        codec_(std::move(codec)),
        cache_(1, attention.n_head_kv, context, attention.head_dim) {}

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend(const Qkv<Scalar>& qkv, std::int64_t position) {
    const std::int64_t n_token = qkv.q.rows();
    const std::vector<std::int32_t> positions = detail::consecutive(position, n_token);
    tq4_cache_update<Scalar>(*codec_, detail::heads_view(qkv.k, head_dim_), detail::heads_view(qkv.v, head_dim_),
                             positions, cache_.view());
    Matrix<Scalar> out(n_token, qkv.q.cols());
    tq4_attention<Scalar>(detail::heads_view(qkv.q, head_dim_), std::as_const(cache_).view(), *codec_,
                          {.scale = ModelConfig::kAttentionScale}, position + n_token,
                          make_view(out.data(), 1, n_token, out.cols() / head_dim_, head_dim_));
    return out;
  }

 private:
  std::int64_t head_dim_;
  std::shared_ptr<const Tq4Codec<CodecScalar>> codec_;
  Tq4CacheBuffer cache_;
};

template <class Scalar>
using LayerCache = std::variant<SlidingLayerCache<float>, SlidingLayerCache<Bf16>, FlatLayerCache<float>,
                                FlatLayerCache<Bf16>, Tq4LayerCache<Scalar>>;

/// The caches of a model: rings on the sliding layers (float32 with an f32 cache, bf16 otherwise), and on the full
/// layers what `spec` says.
template <class Scalar>
[[nodiscard]] std::vector<LayerCache<Scalar>> make_layer_caches(const ModelConfig& config, const CacheSpec& spec,
                                                                std::int64_t context) {
  std::shared_ptr<const Tq4Codec<Scalar>> codec;
  if (spec.kind == CacheKind::kTq4 && config.n_full_layer() > 0) {
    codec = std::make_shared<const Tq4Codec<Scalar>>(config.full.head_dim, spec.tq4);
  }
  std::vector<LayerCache<Scalar>> caches;
  caches.reserve(static_cast<std::size_t>(config.n_layer()));
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    if (config.sliding_layer(layer)) {
      if (spec.kind == CacheKind::kF32) {
        caches.emplace_back(SlidingLayerCache<float>(config, config.sliding));
      } else {
        caches.emplace_back(SlidingLayerCache<Bf16>(config, config.sliding));
      }
    } else if (spec.kind == CacheKind::kF32) {
      caches.emplace_back(FlatLayerCache<float>(config.full, context));
    } else if (spec.kind == CacheKind::kBf16) {
      caches.emplace_back(FlatLayerCache<Bf16>(config.full, context));
    } else {
      caches.emplace_back(Tq4LayerCache<Scalar>(config.full, context, codec));
    }
  }
  return caches;
}

}  // namespace gemma4::reference

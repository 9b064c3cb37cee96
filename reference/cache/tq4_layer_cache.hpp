// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "gemma4/cache_format.hpp"
#include "gemma4/config.hpp"
#include "reference/cache/full_layer_cache.hpp"
#include "reference/cache/heads.hpp"
#include "reference/decoder_layer.hpp"
#include "reference/tq4_attention.hpp"
#include "reference/tq4_cache.hpp"

/// The TQ4 cache of a full layer. Mirror: cuda/cache/tq4_layer_cache.cuh
namespace gemma4::reference {

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
    const std::vector<std::int32_t> positions = detail::consecutive(position, qkv.q.rows());
    tq4_cache_update<Scalar>(*codec_, detail::heads_view(qkv.k, head_dim_), detail::heads_view(qkv.v, head_dim_),
                             positions, cache_.view());
    return attend_queries(qkv.q, qkv.k_norm, position + qkv.q.rows());
  }

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend_queries(const Matrix<Scalar>& q, std::span<const float> /*k_norm*/,
                                              std::int64_t kv_len) const {
    Matrix<Scalar> out(q.rows(), q.cols());
    tq4_attention<Scalar>(detail::heads_view(q, head_dim_), cache_.view(), *codec_,
                          {.scale = ModelConfig::kAttentionScale}, kv_len,
                          make_view(out.data(), 1, out.rows(), out.cols() / head_dim_, head_dim_));
    return out;
  }

  [[nodiscard]] StoredLayer stored() {
    const auto part = [&](std::string_view name, auto values) {
      return detail::stored_part(name, values, cache_.shape().n_head_kv, cache_.shape().buffer_len);
    };
    return {.parts = {part("k_codes", cache_.k_codes()), part("k_norm", cache_.k_norm()),
                      part("v_codes", cache_.v_codes()), part("v_norm", cache_.v_norm())}};
  }

 private:
  std::int64_t head_dim_;
  std::shared_ptr<const Tq4Codec<CodecScalar>> codec_;
  Tq4CacheBuffer cache_;
};

/// All layers share one codec.
template <class Scalar>
struct FullLayerCaches<Tq4Format, Scalar> {
  using Cache = Tq4LayerCache<Scalar>;
  FullLayerCaches(const Tq4Format& format, const AttentionConfig& attention)
      : attention(attention), codec(std::make_shared<const Tq4Codec<Scalar>>(attention.head_dim, format.options)) {}
  [[nodiscard]] Cache make(std::int64_t context) const { return {attention, context, codec}; }
  AttentionConfig attention;
  std::shared_ptr<const Tq4Codec<Scalar>> codec;
};

}  // namespace gemma4::reference

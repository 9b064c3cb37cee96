// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include "gemma4/cache_format.hpp"
#include "gemma4/config.hpp"
#include "gemma4/kv_format.hpp"
#include "reference/cache/full_layer_cache.hpp"
#include "reference/cache/heads.hpp"
#include "reference/decoder_layer.hpp"
#include "reference/kv_attention.hpp"
#include "reference/kv_cache.hpp"

/// The cache of a full layer that stores one vector for K and V. Mirror: cuda/cache/kv_layer_cache.cuh
namespace gemma4::reference {

/// Full attention over a cache of V and the rotated quarter of K. The chunk attends to its own compressed vectors, as
/// later tokens will.
template <class CodecScalar>
class KvLayerCache {
 public:
  /// @param codec none: bf16
  KvLayerCache(const AttentionConfig& attention, std::int64_t context,
               std::shared_ptr<const KvCodec<CodecScalar>> codec)
      : head_dim_(attention.head_dim),
        n_head_kv_(attention.n_head_kv),
        context_(context),
        codec_(std::move(codec)),
        cache_(make(attention, context, codec_.get())) {}

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend(const Qkv<Scalar>& qkv, std::int64_t position) {
    require(!qkv.k_norm.empty(), "kv cache: K of this layer is not its V");
    const std::vector<std::int32_t> positions = detail::consecutive(position, qkv.q.rows());
    const auto k = detail::heads_view(qkv.k, head_dim_), v = detail::heads_view(qkv.v, head_dim_);
    if (auto* const codes = std::get_if<KvCacheBuffer>(&cache_)) {
      kv_cache_update<Scalar>(*codec_, k, v, qkv.k_norm, positions, codes->view());
    } else {
      kv_cache_update<Scalar, Bf16>(k, v, qkv.k_norm, positions, std::get<KvPlainBuffer<Bf16>>(cache_).view());
    }
    return attend_queries(qkv.q, qkv.k_norm, position + qkv.q.rows());
  }

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend_queries(const Matrix<Scalar>& q, std::span<const float> k_norm,
                                              std::int64_t kv_len) const {
    Matrix<Scalar> out(q.rows(), q.cols());
    const auto from = detail::heads_view(q, head_dim_);
    const auto to = make_view(out.data(), 1, out.rows(), out.cols() / head_dim_, head_dim_);
    const AttentionOptions options{.scale = ModelConfig::kAttentionScale};
    if (const auto* const codes = std::get_if<KvCacheBuffer>(&cache_)) {
      kv_attention<Scalar>(from, k_norm, codes->view(), *codec_, options, kv_len, to);
    } else {
      kv_attention<Scalar, Bf16>(from, k_norm, std::get<KvPlainBuffer<Bf16>>(cache_).view(), options, kv_len, to);
    }
    return out;
  }

  [[nodiscard]] StoredLayer stored() {
    const auto part = [&](std::string_view name, auto values) {
      return detail::stored_part(name, values, n_head_kv_, context_);
    };
    if (auto* const codes = std::get_if<KvCacheBuffer>(&cache_)) {
      return {.parts = {part("v_codes", codes->v_codes()), part("v_norm", codes->v_norm()),
                        part("r_codes", codes->r_codes()), part("r_norm", codes->r_norm())}};
    }
    auto& plain = std::get<KvPlainBuffer<Bf16>>(cache_);
    return {.parts = {part("v", plain.v_storage()), part("r", plain.r_storage())}};
  }

  [[nodiscard]] std::int64_t bytes() const {
    return std::visit([](const auto& buffer) { return buffer.bytes(); }, cache_);
  }

 private:
  using Buffer = std::variant<KvCacheBuffer, KvPlainBuffer<Bf16>>;

  [[nodiscard]] static Buffer make(const AttentionConfig& attention, std::int64_t context,
                                   const KvCodec<CodecScalar>* codec) {
    if (codec != nullptr) return KvCacheBuffer(1, attention.n_head_kv, context, *codec);
    return KvPlainBuffer<Bf16>(1, attention.n_head_kv, context, attention.head_dim);
  }

  std::int64_t head_dim_, n_head_kv_, context_;
  std::shared_ptr<const KvCodec<CodecScalar>> codec_;
  Buffer cache_;
};

/// All layers share one codec.
template <class Scalar>
struct FullLayerCaches<KvFormat, Scalar> {
  using Cache = KvLayerCache<Scalar>;
  FullLayerCaches(const KvFormat& format, const AttentionConfig& attention) : attention(attention) {
    if (format.options.has_codes()) {
      codec = std::make_shared<const KvCodec<Scalar>>(attention.head_dim, format.options);
    }
  }
  [[nodiscard]] Cache make(std::int64_t context) const { return {attention, context, codec}; }
  AttentionConfig attention;
  std::shared_ptr<const KvCodec<Scalar>> codec;
};

}  // namespace gemma4::reference

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/ring_format.hpp"
#include "gemma4/step_limits.hpp"
#include "reference/cache/heads.hpp"
#include "reference/decoder_layer.hpp"
#include "reference/ring_cache.hpp"
#include "reference/simulated_cache.hpp"
#include "reference/sliding_attention.hpp"

/// The cache of a sliding layer. Mirror: cuda/cache/sliding_layer_cache.cuh
namespace gemma4::reference {

/// What the rings of all layers share: the codec of a simulated format, or nothing.
class RingCodec {
 public:
  RingCodec() = default;
  RingCodec(const RingSpec& ring, std::int64_t head_dim) {
    if (!ring) return;
    std::visit(
        [&]<class TQuantiser>(const Simulated<TQuantiser>& format) {
          codec_.template emplace<Codec<TQuantiser>>(
              std::make_shared<const SimulatedCodec<TQuantiser>>(head_dim, format));
        },
        *ring);
  }

  /// The heads of `rows` [n_token, n_head * head_dim] become what the format reads back.
  template <class Scalar>
  void roundtrip(CacheSide side, Matrix<Scalar>& rows) const {
    std::visit(
        [&]<class TCodec>(const TCodec& codec) {
          if constexpr (!std::is_same_v<TCodec, std::monostate>) {
            Matrix<float> heads = rows.template cast<float>();
            heads.resize(rows.size() / codec->head_dim(), codec->head_dim());
            codec->roundtrip(side, heads);
            heads.resize(rows.rows(), rows.cols());
            rows = heads.template cast<Scalar>();
          }
        },
        codec_);
  }

 private:
  template <class TQuantiser>
  using Codec = std::shared_ptr<const SimulatedCodec<TQuantiser>>;
  template <class TList>
  struct CodecOf;
  template <Quantiser... TQuantiser>
  struct CodecOf<SimulatedFormats<TQuantiser...>> {
    using Type = std::variant<std::monostate, Codec<TQuantiser>...>;
  };
  typename CodecOf<ShippedSimulatedFormats>::Type codec_;
};

/// Sliding window over a ring: the chunk attends to the old ring and to its own fresh K and V, and then is committed.
/// The slots beyond the window let a sequence go back by up to kMaxRewind tokens from the farthest that it has been:
/// the first query then sees keys back to position - window + 1, whose slots were not overwritten.
template <class TStorage>
class SlidingLayerCache {
 public:
  SlidingLayerCache(const ModelConfig& config, const AttentionConfig& attention, RingCodec codec = {})
      : codec_(std::move(codec)),
        window_(config.window),
        head_dim_(attention.head_dim),
        ring_(attention.n_head_kv, ring_slots(config.window), attention.head_dim, kMaxRewind) {}

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend(const Qkv<Scalar>& qkv, std::int64_t position) {
    const std::int64_t n_token = qkv.q.rows();
    ring_.require_position(position);
    Matrix<Scalar> k_read = qkv.k, v_read = qkv.v;
    codec_.roundtrip(CacheSide::kKey, k_read);
    codec_.roundtrip(CacheSide::kValue, v_read);
    const std::vector<TStorage> k = detail::to_storage<TStorage>(k_read);
    const std::vector<TStorage> v = detail::to_storage<TStorage>(v_read);
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

  /// Attention of one query at position kv_len, of which no key is stored: to the window - 1 newest of the first kv_len
  /// keys. That is what a token at kv_len - 1 sees whose window is one key shorter.
  /// @param q [1, n_head * head_dim]
  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend_queries(const Matrix<Scalar>& q, std::span<const float> /*k_norm*/,
                                              std::int64_t kv_len) const {
    require(q.rows() == 1, "sliding cache: ", q.rows(), " queries without keys, need 1");
    require(kv_len >= 1, "sliding cache: kv_len ", kv_len, ", need at least 1");
    ring_.require_position(kv_len);
    require(window_ >= 2, "sliding cache: window ", window_, " without the query's own key is empty");
    const std::int64_t newest = kv_len - 1, n_head = q.cols() / head_dim_;
    const auto row_of = [&](const View<const TStorage, 3>& ring) {
      auto row = make_view(&ring(0, ring_slot(newest, ring_.ring_len()), 0), 1, ring.extent[0], head_dim_);
      row.stride[1] = ring.stride[0];
      return row;
    };
    Matrix<Scalar> out(1, q.cols());
    sliding_attention<Scalar, TStorage>(make_view(q.data(), 1, n_head, head_dim_), ring_.k(), ring_.v(),
                                        row_of(ring_.k()), row_of(ring_.v()), newest, window_ - 1,
                                        ModelConfig::kAttentionScale, make_view(out.data(), 1, n_head, head_dim_));
    return out;
  }

  [[nodiscard]] StoredLayer stored() {
    const std::int64_t n_head_kv = ring_.k().extent[0];
    return {.is_ring = true,
            .parts = {detail::stored_part("k", ring_.k_storage(), n_head_kv, ring_.ring_len()),
                      detail::stored_part("v", ring_.v_storage(), n_head_kv, ring_.ring_len())}};
  }
  /// The ring holds the tokens before `position`, put there by way of stored().
  void resume(std::int64_t position, std::int64_t farthest) { ring_.resume(position, farthest); }

 private:
  RingCodec codec_;
  std::int64_t window_;
  std::int64_t head_dim_;
  RingCache<TStorage> ring_;
};

}  // namespace gemma4::reference

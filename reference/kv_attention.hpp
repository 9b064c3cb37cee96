// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/kv_format.hpp"
#include "gemma4/view.hpp"
#include "reference/attention_tile.hpp"
#include "reference/kv_cache.hpp"
#include "reference/matrix.hpp"

namespace gemma4::reference {

namespace detail {

/// Rows q [n, D] as [n, D + D/4]: w * q with zeros at the rotated places, then c * q at the rotated places, c being
/// their scales. A product with [V, R] is then <q, K>.
template <class Scalar>
[[nodiscard]] Matrix<Scalar> fold_queries(const Matrix<Scalar>& q, std::span<const float> k_weight) {
  const Eigen::Index head_dim = q.cols(), n_rotated = kv_rotated_size(head_dim);
  Matrix<Scalar> folded(q.rows(), head_dim + n_rotated);
  folded.leftCols(head_dim) = q * as_row<Scalar>(k_weight).asDiagonal();
  for (Eigen::Index j = 0; j < n_rotated; ++j) {
    const Eigen::Index place = kv_rotated_place(head_dim, j);
    folded.col(place).setZero();
    folded.col(head_dim + j) = q.col(place) * static_cast<Scalar>(kv_rotated_scale(k_weight.data(), head_dim, j));
  }
  return folded;
}

/// The shape of a call, from q and what the cache says of itself.
template <class Scalar>
[[nodiscard]] AttentionShape kv_attention_shape(const char* who, const View<const Scalar, 4>& q,
                                                std::span<const float> k_weight, const CacheShape& cache,
                                                const View<Scalar, 4>& out) {
  const AttentionShape shape{.batch = q.extent[0],
                             .n_query = q.extent[1],
                             .n_head = q.extent[2],
                             .n_head_kv = cache.n_head_kv,
                             .head_dim = q.extent[3],
                             .buffer_len = cache.buffer_len};
  require(cache.batch == shape.batch, who, ": the cache has batch ", cache.batch, ", q has ", shape.batch);
  require(cache.head_dim == shape.head_dim, who, ": the cache has head_dim ", cache.head_dim, ", q has ",
          shape.head_dim);
  require_k_weight(who, k_weight, shape.head_dim);
  require_extents(who, "out", out, {shape.batch, shape.n_query, shape.n_head, shape.head_dim});
  return shape;
}

/// Attention of folded queries.
/// @param folded [batch * n_query * n_head, D + D/4]
/// @param load   load(batch, head_kv, KeyRange, v, r) fills v [n_key, D] and r [n_key, D/4]
/// @return [batch * n_query * n_head, D]
template <class Scalar, class TLoad>
[[nodiscard]] Matrix<Scalar> attend_folded(const Matrix<Scalar>& folded, const AttentionShape& shape,
                                           const AttentionOptions& options, std::int64_t kv_len, const TLoad& load) {
  const auto load_block = [&](std::int64_t batch, std::int64_t head_kv, KeyRange keys, MatrixRef<Scalar> k,
                              MatrixRef<Scalar> v) {
    load(batch, head_kv, keys, v, MatrixRef<Scalar>(k.rightCols(kv_rotated_size(shape.head_dim))));
    k.leftCols(shape.head_dim) = v;
  };
  Matrix<Scalar> out(folded.rows(), shape.head_dim);
  const auto view = [&](auto* data, std::int64_t columns) {
    return make_view(data, shape.batch, shape.n_query, shape.n_head, columns);
  };
  attend_flat<Scalar>(view(folded.data(), folded.cols()), shape, options, kv_len, load_block,
                      view(out.data(), shape.head_dim));
  return out;
}

}  // namespace detail

/// Attention of the last n_query tokens over a cache of one vector for K and V: the contract of gemma4/attention.hpp
/// with V and R as read, and
///   <q, K[t]> = <w * q with zeros at the rotated places, V[t]> + <c * (q at the rotated places), R[t]>.
/// It attends in the rotated spaces, H and H' being the codec's rotations of V and R:
///   <x, V> = <H x, H V>,  <x, R> = <H' x, H' R>  and  sum_t p[t] V[t] = H^T sum_t p[t] H V[t].
/// @param q        [batch, n_query, n_head, head_dim], normalised and turned by RoPE
/// @param k_weight [head_dim] the weight w of the layer's k norm
/// @param cache    codes and norms as gemma4/kv_format.hpp has them; rows >= kv_len unread
/// @param codec    the one that compressed the cache
/// @param kv_len   valid rows of the cache; absent: all of the buffer
/// @param out      [batch, n_query, n_head, head_dim]; may be q itself
/// @throws std::invalid_argument naming the argument and both values
/// Mirror: cuda/kv_attention.cuh
template <class Scalar>
void kv_attention(View<const Scalar, 4> q, std::span<const float> k_weight, ConstKvCacheView cache,
                  const KvCodec<Scalar>& codec, const AttentionOptions& options, std::optional<std::int64_t> kv_len,
                  View<Scalar, 4> out) {
  constexpr const char* kWho = "kv_attention";
  const AttentionShape shape =
      detail::kv_attention_shape(kWho, q, k_weight, detail::require_kv_cache(kWho, codec, cache), out);
  require_attention(kWho, shape, options, kv_len);
  const auto load = [&](std::int64_t batch, std::int64_t head_kv, detail::KeyRange keys, MatrixRef<Scalar> v,
                        MatrixRef<Scalar> r) {
    const auto [v_codes, v_norm] = kv_rows(cache.v_codes, cache.v_norm, batch, head_kv, keys.first, keys.size());
    const auto [r_codes, r_norm] = kv_rows(cache.r_codes, cache.r_norm, batch, head_kv, keys.first, keys.size());
    codec.v().decompress_rotated(v_codes, v_norm, v);
    codec.r().decompress_rotated(r_codes, r_norm, r);
  };
  Matrix<Scalar> folded = detail::fold_queries(detail::flatten_rows(q), k_weight);
  codec.v().rotation().forward(folded.leftCols(shape.head_dim));
  codec.r().rotation().forward(folded.rightCols(kv_rotated_size(shape.head_dim)));
  Matrix<Scalar> attended = detail::attend_folded(folded, shape, options, kv_len.value_or(shape.buffer_len), load);
  codec.v().rotation().inverse(attended);
  detail::unflatten_rows<Scalar>(attended, out);
}

/// The same over V and R as they are.
template <class Scalar, class TStorage>
void kv_attention(View<const Scalar, 4> q, std::span<const float> k_weight, KvPlainView<const TStorage> cache,
                  const AttentionOptions& options, std::optional<std::int64_t> kv_len, View<Scalar, 4> out) {
  constexpr const char* kWho = "kv_attention";
  const AttentionShape shape =
      detail::kv_attention_shape(kWho, q, k_weight, detail::require_kv_plain(kWho, cache), out);
  require_attention(kWho, shape, options, kv_len);
  const auto load = [&](std::int64_t batch, std::int64_t head_kv, detail::KeyRange keys, MatrixRef<Scalar> v,
                        MatrixRef<Scalar> r) {
    for (std::int64_t t = 0; t < keys.size(); ++t) {
      detail::widen(&cache.v(batch, head_kv, keys.first + t, 0), v.cols(), v.row(t).data());
      detail::widen(&cache.r(batch, head_kv, keys.first + t, 0), r.cols(), r.row(t).data());
    }
  };
  const Matrix<Scalar> folded = detail::fold_queries(detail::flatten_rows(q), k_weight);
  detail::unflatten_rows<Scalar>(detail::attend_folded(folded, shape, options, kv_len.value_or(shape.buffer_len), load),
                                 out);
}

}  // namespace gemma4::reference

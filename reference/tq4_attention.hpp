// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>

#include "gemma4/attention.hpp"
#include "gemma4/tq4_format.hpp"
#include "gemma4/view.hpp"
#include "reference/attention_tile.hpp"
#include "reference/tq4_cache.hpp"

namespace gemma4::reference {

/// Attention of the last n_query tokens over a TQ4 cache: the contract of gemma4/attention.hpp with K and V as decoded.
/// It attends in the rotated space, R being the codec's rotation:
///   <q, K[j]> = <R q, R K[j]>  and  sum_j p[j] V[j] = R^T sum_j p[j] R V[j],
/// where R K[j] and R V[j] are norm * centroid[code], so that no row of the cache is ever rotated back.
/// @param q       [batch, n_query, n_head, head_dim], not rotated
/// @param cache   codes [batch, n_head_kv, buffer_len, head_dim/2], norms [batch, n_head_kv, buffer_len]; rows >=
/// kv_len
///                unread
/// @param codec   the one that compressed the cache
/// @param kv_len  valid rows of the cache; absent: all of the buffer
/// @param out     [batch, n_query, n_head, head_dim]; may be q itself
/// @throws std::invalid_argument naming the argument and both values
/// Source: arXiv:2504.19874. Mirror: cuda/tq4_attention.cuh
template <class Scalar>
void tq4_attention(View<const Scalar, 4> q, ConstTq4CacheView cache, const Tq4Codec<Scalar>& codec,
                   const AttentionOptions& options, std::optional<std::int64_t> kv_len, View<Scalar, 4> out) {
  const AttentionShape shape = tq4_attention_shape("tq4_attention", q, cache, out);
  require_attention("tq4_attention", shape, options, kv_len);
  require(codec.head_dim() == shape.head_dim, "tq4_attention: codec of head_dim ", codec.head_dim(), ", q has ",
          shape.head_dim);
  const auto load = [&](std::int64_t batch, std::int64_t head_kv, detail::KeyRange keys, MatrixRef<Scalar> k,
                        MatrixRef<Scalar> v) {
    const auto [k_codes, k_norm] = tq4_rows(cache.k_codes, cache.k_norm, batch, head_kv, keys.first, keys.size());
    const auto [v_codes, v_norm] = tq4_rows(cache.v_codes, cache.v_norm, batch, head_kv, keys.first, keys.size());
    codec.decompress_rotated(CacheSide::kKey, k_codes, k_norm, k);
    codec.decompress_rotated(CacheSide::kValue, v_codes, v_norm, v);
  };
  Matrix<Scalar> rows = detail::flatten_rows(q);
  codec.rotation().forward(rows);
  const auto rotated = make_view(rows.data(), shape.batch, shape.n_query, shape.n_head, shape.head_dim);
  Matrix<Scalar> attended(rows.rows(), rows.cols());
  const auto result = make_view(attended.data(), shape.batch, shape.n_query, shape.n_head, shape.head_dim);
  detail::attend_flat<Scalar>(rotated, shape, options, kv_len.value_or(shape.buffer_len), load, result);
  codec.rotation().inverse(attended);
  detail::unflatten_rows<Scalar>(attended, out);
}

}  // namespace gemma4::reference

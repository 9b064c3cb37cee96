// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemma4/attention.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"
#include "reference/attention_tile.hpp"

namespace gemma4::reference {

/// Sliding-window attention of a chunk of tokens at positions position, position + 1, ...: the query at p sees the keys
/// at (p - window, p]. Keys of the chunk come from k_new and v_new, older ones from the ring as it was before the chunk
/// (slot ring_slot(p, ring_len)); committing the chunk to the ring is the caller's next step. Any chunk length is
/// exact.
/// @param q            [n_query, n_head, head_dim]
/// @param ring_k, ring_v [n_head_kv, ring_len, head_dim], ring_len >= window - 1; slots outside the window are unread
/// @param k_new, v_new [n_query, n_head_kv, head_dim], in the storage type of the ring
/// @param out          [n_query, n_head, head_dim]; must not overlap q
/// @throws std::invalid_argument naming the argument and both values
/// Cost: at most 4 * n_query * n_head * (window + tile) * head_dim flop. Mirror: cuda/sliding_attention.cuh
template <class Scalar, class TStorage>
void sliding_attention(View<const Scalar, 3> q, View<const TStorage, 3> ring_k, View<const TStorage, 3> ring_v,
                       View<const TStorage, 3> k_new, View<const TStorage, 3> v_new, std::int64_t position,
                       std::int64_t window, float scale, View<Scalar, 3> out) {
  const AttentionShape shape = sliding_attention_shape("sliding_attention", q, ring_k, ring_v, k_new, v_new, out);
  require_sliding_attention("sliding_attention", shape, position, window);
  const std::int64_t ring_len = shape.buffer_len;
  detail::for_each_tile(shape, [&](const detail::QueryTile& tile) {
    const auto visible = [&](std::int64_t token) {
      const std::int64_t p = position + tile.first + token;
      return detail::VisibleKeys{.range = {std::max<std::int64_t>(0, p - window + 1), p + 1}};
    };
    const auto load = [&](detail::KeyRange keys, MatrixRef<Scalar> k, MatrixRef<Scalar> v) {
      for (std::int64_t j = 0; j < keys.size(); ++j) {
        const std::int64_t p = keys.first + j, head = tile.head_kv;
        const bool fresh = p >= position;
        const std::int64_t slot = ring_slot(p, ring_len);
        detail::widen(fresh ? &k_new(p - position, head, 0) : &ring_k(head, slot, 0), shape.head_dim, &k(j, 0));
        detail::widen(fresh ? &v_new(p - position, head, 0) : &ring_v(head, slot, 0), shape.head_dim, &v(j, 0));
      }
    };
    const detail::KeyRange keys{visible(0).range.first, visible(tile.n_token - 1).range.last};
    const Matrix<Scalar> rows = detail::gather_queries(with_batch(q), tile, scale);
    detail::scatter_rows<Scalar>(
        detail::attend_tile<Scalar>(rows, shape.head_dim, tile.group, keys, keys.last, load, visible), tile,
        with_batch(out));
  });
}

}  // namespace gemma4::reference

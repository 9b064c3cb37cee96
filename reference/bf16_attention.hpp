// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>

#include "gemma4/attention.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"
#include "reference/attention_tile.hpp"

namespace gemma4::reference {

/// Attention of the last n_query tokens over an uncompressed flat cache: the contract of gemma4/attention.hpp.
///   out[b,t,h] = sum_j softmax_j(scale * <q[b,t,h], K[b,g(h),j]>) V[b,g(h),j]
/// @param q       [batch, n_query, n_head, head_dim]
/// @param k, v    [batch, n_head_kv, buffer_len, head_dim] in the storage type (float or Bf16); rows >= kv_len unread
/// @param kv_len  valid rows of the cache; absent: all of the buffer
/// @param out     [batch, n_query, n_head, head_dim]; must not overlap q
/// @throws std::invalid_argument naming the argument and both values
/// Cost: 4 * n_query * n_head * kv_len * head_dim flop without causality. Mirror: cuda/bf16_attention.cuh
template <class Scalar, class TStorage>
void bf16_attention(View<const Scalar, 4> q, View<const TStorage, 4> k, View<const TStorage, 4> v,
                    const AttentionOptions& options, std::optional<std::int64_t> kv_len, View<Scalar, 4> out) {
  constexpr const char* kWho = "bf16_attention";
  const AttentionShape shape = flat_attention_shape(kWho, q, k, v, out);
  require_attention(kWho, shape, options, kv_len);
  const auto load = [&](std::int64_t batch, std::int64_t head_kv, detail::KeyRange keys, MatrixRef<Scalar> k_block,
                        MatrixRef<Scalar> v_block) {
    for (std::int64_t j = 0; j < keys.size(); ++j) {
      detail::widen(&k(batch, head_kv, keys.first + j, 0), shape.head_dim, &k_block(j, 0));
      detail::widen(&v(batch, head_kv, keys.first + j, 0), shape.head_dim, &v_block(j, 0));
    }
  };
  detail::attend_flat<Scalar>(q, shape, options, kv_len.value_or(shape.buffer_len), load, out);
}

}  // namespace gemma4::reference

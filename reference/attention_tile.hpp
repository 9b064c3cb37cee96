// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "gemma4/attention.hpp"
#include "gemma4/view.hpp"
#include "reference/matrix.hpp"
#include "reference/softmax_state.hpp"

/// What the attentions of the reference share: a tile of queries against blocks of keys, as two matrix products with a
/// softmax between them. The rows of a tile are the query heads of one KV head for a few tokens: [n_token * group, D].
///
/// A result never depends on how the work is cut for speed. Key blocks have fixed boundaries (multiples of kKeyBlock)
/// and end at the number of valid keys, never at the causal limit of a tile; so the sums are the same with the causal
/// skip on and off, in a buffer of any length and with any number of threads.
namespace gemma4::reference::detail {

inline constexpr std::int64_t kKeyBlock = 256;  ///< keys a block
inline constexpr std::int64_t kTileRows = 256;  ///< about as many rows a tile; at least one token

/// Key indices [first, last).
struct KeyRange {
  std::int64_t first = 0;
  std::int64_t last = 0;
  [[nodiscard]] std::int64_t size() const { return last - first; }
};

/// The keys that one query sees: those of `range` whose byte in `mask` (indexed by key; null: all) is not zero.
struct VisibleKeys {
  KeyRange range;
  const std::uint8_t* mask = nullptr;
};

/// Tokens [first, first + n_token) of head_kv in batch.
struct QueryTile {
  std::int64_t batch = 0;
  std::int64_t head_kv = 0;
  std::int64_t group = 1;
  std::int64_t first = 0;
  std::int64_t n_token = 1;
};

/// Gives kNoKey to the scores of keys that the row's query does not see.
/// @param row_scores the row of the block of scores; column j is key block.first + j
template <class TRow>
void hide_keys(TRow&& row_scores, KeyRange block, const VisibleKeys& visible) {
  using Scalar = typename std::remove_cvref_t<TRow>::Scalar;
  constexpr Scalar kNoKey = SoftmaxState<Scalar>::kNoKey;
  const std::int64_t first = std::clamp<std::int64_t>(visible.range.first - block.first, 0, block.size());
  const std::int64_t last = std::clamp<std::int64_t>(visible.range.last - block.first, first, block.size());
  row_scores.head(first).setConstant(kNoKey);
  row_scores.tail(block.size() - last).setConstant(kNoKey);
  if (visible.mask == nullptr) return;
  for (std::int64_t key = first; key < last; ++key) {
    if (visible.mask[block.first + key] == 0) row_scores[key] = kNoKey;
  }
}

/// Attention of a tile's rows over the blocks of `keys` that begin below `stop`.
/// @param q       [n_token * group, k_dim], scaled
/// @param v_dim   values of a row of V: head_dim; k_dim may be another
/// @param load    load(KeyRange, k, v) fills k [n_key, k_dim] and v [n_key, v_dim]
/// @param visible visible(token) -> VisibleKeys, token counted from the first of the tile
/// @return [n_token * group, v_dim]
template <class Scalar, class TLoad, class TVisible>
[[nodiscard]] Matrix<Scalar> attend_tile(const Matrix<Scalar>& q, std::int64_t v_dim, std::int64_t group, KeyRange keys,
                                         std::int64_t stop, const TLoad& load, const TVisible& visible) {
  SoftmaxState<Scalar> state(q.rows(), v_dim);
  Matrix<Scalar> k(kKeyBlock, q.cols()), v(kKeyBlock, v_dim), scores(q.rows(), kKeyBlock);
  for (std::int64_t start = keys.first - keys.first % kKeyBlock; start < stop; start += kKeyBlock) {
    const KeyRange block{std::max(start, keys.first), std::min(start + kKeyBlock, keys.last)};
    load(block, MatrixRef<Scalar>(k.topRows(block.size())), MatrixRef<Scalar>(v.topRows(block.size())));
    auto s = scores.leftCols(block.size());
    s.noalias() = q * k.topRows(block.size()).transpose();
    for (Eigen::Index row = 0; row < s.rows(); ++row) hide_keys(s.row(row), block, visible(row / group));
    state.absorb(s, v.topRows(block.size()));
  }
  return state.finish();
}

/// Copies `count` stored values into a row of Scalar.
template <class Scalar, class TStorage>
void widen(const TStorage* source, std::int64_t count, Scalar* target) {
  for (std::int64_t i = 0; i < count; ++i) target[i] = static_cast<Scalar>(to_float(source[i]));
}

/// The tile's rows of q [batch, n_query, n_head, head_dim], times scale.
template <class Scalar>
[[nodiscard]] Matrix<Scalar> gather_queries(View<const Scalar, 4> q, const QueryTile& tile, float scale) {
  Matrix<Scalar> rows(tile.n_token * tile.group, q.extent[3]);
  for (std::int64_t row = 0; row < rows.rows(); ++row) {
    const std::int64_t token = tile.first + row / tile.group, head = tile.head_kv * tile.group + row % tile.group;
    for (std::int64_t i = 0; i < rows.cols(); ++i) rows(row, i) = q(tile.batch, token, head, i) * Scalar(scale);
  }
  return rows;
}

/// The inverse of gather_queries, without a scale.
template <class Scalar>
void scatter_rows(const Matrix<Scalar>& rows, const QueryTile& tile, View<Scalar, 4> out) {
  for (std::int64_t row = 0; row < rows.rows(); ++row) {
    const std::int64_t token = tile.first + row / tile.group, head = tile.head_kv * tile.group + row % tile.group;
    for (std::int64_t i = 0; i < rows.cols(); ++i) out(tile.batch, token, head, i) = rows(row, i);
  }
}

/// The rows of q [batch, n_query, n_head, head_dim] below one another.
template <class Scalar>
[[nodiscard]] Matrix<Scalar> flatten_rows(View<const Scalar, 4> q) {
  Matrix<Scalar> rows(q.size() / q.extent[3], q.extent[3]);
  std::int64_t row = 0;
  for (std::int64_t b = 0; b < q.extent[0]; ++b) {
    for (std::int64_t t = 0; t < q.extent[1]; ++t) {
      for (std::int64_t h = 0; h < q.extent[2]; ++h, ++row) {
        for (std::int64_t i = 0; i < q.extent[3]; ++i) rows(row, i) = q(b, t, h, i);
      }
    }
  }
  return rows;
}

/// The inverse of flatten_rows.
template <class Scalar>
void unflatten_rows(const Matrix<Scalar>& rows, View<Scalar, 4> out) {
  std::int64_t row = 0;
  for (std::int64_t b = 0; b < out.extent[0]; ++b) {
    for (std::int64_t t = 0; t < out.extent[1]; ++t) {
      for (std::int64_t h = 0; h < out.extent[2]; ++h, ++row) {
        for (std::int64_t i = 0; i < out.extent[3]; ++i) out(b, t, h, i) = rows(row, i);
      }
    }
  }
}

/// Calls attend(tile) for every tile of a call, in parallel; each writes its own part of the output.
template <class TAttend>
void for_each_tile(const AttentionShape& shape, const TAttend& attend) {
  const std::int64_t tile_tokens = std::max<std::int64_t>(1, kTileRows / shape.group());
  const std::int64_t n_tile = (shape.n_query + tile_tokens - 1) / tile_tokens;
  const std::int64_t n_item = shape.batch * shape.n_head_kv * n_tile;
#pragma omp parallel for schedule(dynamic)
  for (std::int64_t item = 0; item < n_item; ++item) {
    const std::int64_t first = item % n_tile * tile_tokens;
    attend(QueryTile{.batch = item / n_tile / shape.n_head_kv,
                     .head_kv = item / n_tile % shape.n_head_kv,
                     .group = shape.group(),
                     .first = first,
                     .n_token = std::min(tile_tokens, shape.n_query - first)});
  }
}

/// Attention over a flat cache: the contract of gemma4/attention.hpp, for arguments that have been checked.
/// @param q    [batch, n_query, n_head, k_dim], k_dim being head_dim wherever K and V are stored alike
/// @param load load(batch, head_kv, KeyRange, k, v) fills k [n_key, k_dim] and v [n_key, head_dim]
template <class Scalar, class TLoad>
void attend_flat(View<const Scalar, 4> q, const AttentionShape& shape, const AttentionOptions& options,
                 std::int64_t kv_len, const TLoad& load, View<Scalar, 4> out) {
  for_each_tile(shape, [&](const QueryTile& tile) {
    const auto visible = [&](std::int64_t token) {
      const std::int64_t query = tile.first + token;
      const std::int64_t last =
          options.causal ? std::clamp<std::int64_t>(kv_len - shape.n_query + query + 1, 0, kv_len) : kv_len;
      VisibleKeys keys{.range = {0, last}};
      if (options.mask) {
        keys.mask = static_cast<const std::uint8_t*>(options.mask->data) +
                    (tile.batch * shape.n_query + query) * options.mask->shape[3];
      }
      return keys;
    };
    const std::int64_t stop = options.causal_skip ? visible(tile.n_token - 1).range.last : kv_len;
    const auto load_block = [&](KeyRange block, MatrixRef<Scalar> k, MatrixRef<Scalar> v) {
      load(tile.batch, tile.head_kv, block, k, v);
    };
    scatter_rows<Scalar>(attend_tile<Scalar>(gather_queries(q, tile, options.scale), shape.head_dim, tile.group,
                                             {0, kv_len}, stop, load_block, visible),
                         tile, out);
  });
}

}  // namespace gemma4::reference::detail

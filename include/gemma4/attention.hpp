// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/platform.hpp"
#include "gemma4/tq4_format.hpp"
#include "gemma4/view.hpp"

/// The contract that every attention of the project shares: shapes, kv_len, causality, mask, and what is refused.
///
///   out[b,t,h] = sum_j p[j] V[b,g(h),j],   p = softmax_j(scale * <q[b,t,h], K[b,g(h),j]>),   g(h) = h / (n_head /
///   n_head_kv)
///
/// over the keys j that are visible to query t: j < kv_len; with `causal` also j <= kv_len - n_query + t (aligned
/// bottom right: the queries are the last n_query positions); with a mask also mask[b,0,t,j]. A query that sees no
/// key gives zeros. Rows of the cache at kv_len and beyond are never read into the result, whatever they hold.
namespace gemma4 {

/// Extents of one attention call.
/// q, out [batch, n_query, n_head, head_dim]; K, V [batch, n_head_kv, buffer_len, head_dim] in the cache's format.
struct AttentionShape {
  std::int64_t batch = 1;
  std::int64_t n_query = 1;
  std::int64_t n_head = 1;
  std::int64_t n_head_kv = 1;
  std::int64_t head_dim = 64;
  std::int64_t buffer_len = 1;
  bool operator==(const AttentionShape&) const = default;

  [[nodiscard]] constexpr std::int64_t group() const { return n_head / n_head_kv; }
};

enum class ElementType { kBool, kF32, kBf16, kF16 };

/// A mask as a caller hands it over, described at run time so that a wrong one can be refused by name.
/// Accepted: kBool (one byte a value, nonzero = visible), shape [batch, 1, n_query, kv_extent], kv_extent >= kv_len.
struct MaskView {
  const void* data = nullptr;
  ElementType type = ElementType::kBool;
  std::array<std::int64_t, 4> shape = {};
};

struct AttentionOptions {
  float scale = 1.0f;  ///< Gemma 4 uses 1: its q and k are RMS-normalised
  bool causal = true;
  bool causal_skip = true;  ///< skip key blocks that no query of a tile can see; the result is bit-identical without
  std::optional<MaskView> mask = std::nullopt;
};

/// Refuses what no attention here accepts. `kv_len` is the host's knowledge of it, absent when only the device has it
/// or when the whole buffer counts. @throws std::invalid_argument naming the argument and both values.
inline void require_attention(const char* who, const AttentionShape& shape, const AttentionOptions& options,
                              std::optional<std::int64_t> kv_len) {
  require(shape.batch >= 1, who, ": batch ", shape.batch, ", need at least 1");
  require(shape.n_query >= 1, who, ": n_query ", shape.n_query, ", need at least 1");
  require(shape.n_head_kv >= 1, who, ": n_head_kv ", shape.n_head_kv, ", need at least 1");
  require(shape.n_head >= 1 && shape.n_head % shape.n_head_kv == 0, who, ": n_head ", shape.n_head,
          " is not a multiple of n_head_kv ", shape.n_head_kv);
  require(is_power_of_two(shape.head_dim) && shape.head_dim >= 64 && shape.head_dim <= 512, who, ": head_dim ",
          shape.head_dim, ", need a power of two from 64 to 512");
  require(shape.buffer_len >= 1, who, ": buffer_len ", shape.buffer_len, ", need at least 1");
  const std::int64_t length = kv_len.value_or(shape.buffer_len);
  require(length >= 0 && length <= shape.buffer_len, who, ": kv_len ", length,
          " is outside [0, buffer_len = ", shape.buffer_len, "]");
  require(!options.causal || !kv_len || length >= shape.n_query, who, ": kv_len ", length, " is below n_query ",
          shape.n_query, "; the queries of a causal call are the last positions of the cache");
  if (!options.mask) return;
  const MaskView& mask = *options.mask;
  require(mask.data != nullptr, who, ": mask data is null");
  require(mask.type == ElementType::kBool, who,
          ": mask has a floating-point type, need bool (one byte, nonzero = visible)");
  require(mask.shape[1] == 1, who, ": mask has ", mask.shape[1], " heads, need 1: a mask is shared by all heads");
  require(mask.shape[0] == shape.batch, who, ": mask batch ", mask.shape[0], ", need ", shape.batch);
  require(mask.shape[2] == shape.n_query, who, ": mask n_query ", mask.shape[2], ", need ", shape.n_query);
  require(mask.shape[3] >= length, who, ": mask covers ", mask.shape[3], " keys, need at least kv_len ", length);
}

/// The shape of a call over a flat cache, from q [batch, n_query, n_head, head_dim] and k [batch, n_head_kv,
/// buffer_len, head_dim]. @throws std::invalid_argument when v, out or the common extents do not fit
template <class Scalar, class TStorage>
[[nodiscard]] AttentionShape flat_attention_shape(const char* who, const View<const Scalar, 4>& q,
                                                  const View<const TStorage, 4>& k, const View<const TStorage, 4>& v,
                                                  const View<Scalar, 4>& out) {
  const AttentionShape shape{.batch = q.extent[0],
                             .n_query = q.extent[1],
                             .n_head = q.extent[2],
                             .n_head_kv = k.extent[1],
                             .head_dim = q.extent[3],
                             .buffer_len = k.extent[2]};
  require_extents(who, "k", k, {shape.batch, shape.n_head_kv, shape.buffer_len, shape.head_dim});
  require_extents(who, "v", v, {shape.batch, shape.n_head_kv, shape.buffer_len, shape.head_dim});
  require_extents(who, "out", out, {shape.batch, shape.n_query, shape.n_head, shape.head_dim});
  require_contiguous_rows(who, "k", k);
  require_contiguous_rows(who, "v", v);
  return shape;
}

/// The shape of a call over a TQ4 cache, from q and the codes of k. @throws std::invalid_argument when the rest does
/// not fit
template <class Scalar>
[[nodiscard]] AttentionShape tq4_attention_shape(const char* who, const View<const Scalar, 4>& q,
                                                 const ConstTq4CacheView& cache, const View<Scalar, 4>& out) {
  const AttentionShape shape{.batch = q.extent[0],
                             .n_query = q.extent[1],
                             .n_head = q.extent[2],
                             .n_head_kv = cache.k_codes.extent[1],
                             .head_dim = q.extent[3],
                             .buffer_len = cache.k_codes.extent[2]};
  const std::int64_t row_bytes = shape.head_dim / 2;
  require_extents(who, "k_codes", cache.k_codes, {shape.batch, shape.n_head_kv, shape.buffer_len, row_bytes});
  require_extents(who, "v_codes", cache.v_codes, {shape.batch, shape.n_head_kv, shape.buffer_len, row_bytes});
  require_extents(who, "k_norm", cache.k_norm, {shape.batch, shape.n_head_kv, shape.buffer_len});
  require_extents(who, "v_norm", cache.v_norm, {shape.batch, shape.n_head_kv, shape.buffer_len});
  require_extents(who, "out", out, {shape.batch, shape.n_query, shape.n_head, shape.head_dim});
  require_contiguous_rows(who, "k_codes", cache.k_codes);
  require_contiguous_rows(who, "v_codes", cache.v_codes);
  return shape;
}

/// The shape of a sliding call, buffer_len being the ring's, from q [n_query, n_head, head_dim] and ring_k [n_head_kv,
/// ring_len, head_dim]. @throws std::invalid_argument when the other views do not fit
template <class Scalar, class TStorage>
[[nodiscard]] AttentionShape sliding_attention_shape(const char* who, const View<const Scalar, 3>& q,
                                                     const View<const TStorage, 3>& ring_k,
                                                     const View<const TStorage, 3>& ring_v,
                                                     const View<const TStorage, 3>& k_new,
                                                     const View<const TStorage, 3>& v_new, const View<Scalar, 3>& out) {
  const AttentionShape shape{.batch = 1,
                             .n_query = q.extent[0],
                             .n_head = q.extent[1],
                             .n_head_kv = ring_k.extent[0],
                             .head_dim = q.extent[2],
                             .buffer_len = ring_k.extent[1]};
  require_extents(who, "ring_k", ring_k, {shape.n_head_kv, shape.buffer_len, shape.head_dim});
  require_extents(who, "ring_v", ring_v, {shape.n_head_kv, shape.buffer_len, shape.head_dim});
  require_extents(who, "k_new", k_new, {shape.n_query, shape.n_head_kv, shape.head_dim});
  require_extents(who, "v_new", v_new, {shape.n_query, shape.n_head_kv, shape.head_dim});
  require_extents(who, "out", out, {shape.n_query, shape.n_head, shape.head_dim});
  require_contiguous_rows(who, "ring_k", ring_k);
  require_contiguous_rows(who, "ring_v", ring_v);
  require_contiguous_rows(who, "k_new", k_new);
  require_contiguous_rows(who, "v_new", v_new);
  return shape;
}

/// Refuses what no sliding attention accepts; `shape.buffer_len` is the ring's length.
inline void require_sliding_attention(const char* who, const AttentionShape& shape, std::int64_t position,
                                      std::int64_t window) {
  require_attention(who, shape, {.causal = false}, std::nullopt);
  require(position >= 0, who, ": position ", position, ", need at least 0");
  require(window >= 1, who, ": window ", window, ", need at least 1");
  require(shape.buffer_len >= window - 1, who, ": ring_len ", shape.buffer_len, " is below window - 1 = ", window - 1,
          ", the old keys that the first query of a chunk sees");
}

/// Slot of an absolute position in a ring of `ring_len` slots, in the arithmetic of the position's type.
template <class TInt>
[[nodiscard]] GEMMA4_HD constexpr TInt ring_slot(TInt position, std::type_identity_t<TInt> ring_len) {
  return position % ring_len;
}

}  // namespace gemma4

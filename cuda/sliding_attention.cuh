// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/device/device_count.cuh"
#include "cuda/flash/launch.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"

namespace gemma4::cuda {

/// How a call of sliding_attention will run; shape.buffer_len is the ring's length.
[[nodiscard]] inline FlashPlan plan_sliding_attention(const AttentionShape& shape, const DeviceInfo& device,
                                                      const FlashChoice& choice = {}) {
  require_sliding_attention("sliding_attention", shape, 0, 1);
  require(shape.batch == 1, "sliding_attention: batch ", shape.batch, ", need 1");
  return detail::plan_flash("sliding_attention", shape, {}, shape.buffer_len, device, choice);
}

/// What a call of sliding_attention attends with, to and into; bf16.
struct SlidingAttentionCall {
  View<const Bf16, 3> q;               ///< [n_query, n_head, head_dim]; may be `out` itself
  View<const Bf16, 3> ring_k, ring_v;  ///< [n_head_kv, ring_len, head_dim], ring_len >= window - 1; slots outside the
                                       ///< window never reach the result
  View<const Bf16, 3> k_new, v_new;    ///< [n_query, n_head_kv, head_dim]
  DeviceCount position;                ///< of the first query, read by the kernel from the device or given by the host
  std::int64_t window = 1;
  float scale = 1.0f;
  View<Bf16, 3> out;  ///< [n_query, n_head, head_dim]
};

/// Sliding-window attention of a chunk of tokens at positions position, position + 1, ...: the query at p sees the keys
/// at (p - window, p]. Keys of the chunk come from k_new and v_new, older ones from the ring as it was before the chunk
/// (slot ring_slot(p, ring_len)); committing the chunk to the ring is the caller's next step. Any chunk length is
/// exact.
/// @param plan         of plan_sliding_attention() for this shape
/// @param workspace    at least plan.workspace_bytes, 16-byte aligned
/// @param old_at_rest  the caller's word that the kernel before this call in the stream writes neither a ring row that
///                     the queries see nor `position`: decode then reads them while that kernel still runs (sm_90)
/// @throws std::invalid_argument naming the argument and both values, before any launch
/// Mirror: reference/sliding_attention.hpp
inline void sliding_attention(const SlidingAttentionCall& call, const FlashPlan& plan, std::span<std::byte> workspace,
                              cudaStream_t stream, unsigned long long* tile_count = nullptr, bool old_at_rest = false) {
  constexpr const char* kWho = "sliding_attention";
  const auto& [q, ring_k, ring_v, k_new, v_new, position, window, scale, out] = call;
  const AttentionShape shape = sliding_attention_shape(kWho, q, ring_k, ring_v, k_new, v_new, out);
  require(position.device != nullptr || position.known(), kWho, ": position is neither on the device nor on the host");
  require_sliding_attention(kWho, shape, position.known() ? position.host : 0, window);
  require(scale > 0, kWho, ": scale ", scale, ", need a positive one");
  require(window < detail::kNoWindow, kWho, ": window ", window, ", need below ", detail::kNoWindow);
  require(shape == plan.shape, kWho, ": the plan is of another shape; make it with plan_sliding_attention()");
  require_contiguous_rows(kWho, "q", q);
  require_contiguous_rows(kWho, "out", out);
  detail::require_aligned(kWho, "q", q);
  detail::require_aligned(kWho, "ring_k", ring_k);
  detail::require_aligned(kWho, "ring_v", ring_v);
  detail::require_aligned(kWho, "k_new", k_new);
  detail::require_aligned(kWho, "v_new", v_new);
  detail::require_aligned(kWho, "out", out);
  detail::FlashParams params{.q = q.data,
                             .out = out.data,
                             .q_stride = {q.stride[0] * shape.n_query, q.stride[0], q.stride[1]},
                             .out_stride = {out.stride[0] * shape.n_query, out.stride[0], out.stride[1]}};
  const std::int64_t chunk = k_new.stride[0] * shape.n_query, chunk_v = v_new.stride[0] * shape.n_query;
  params.fresh = {.k = k_new.data,
                  .v = v_new.data,
                  .k_stride = {chunk, k_new.stride[1], k_new.stride[0]},
                  .v_stride = {chunk_v, v_new.stride[1], v_new.stride[0]}};
  const std::int64_t ring = ring_k.stride[0] * shape.n_head_kv, ring_of_v = ring_v.stride[0] * shape.n_head_kv;
  params.old = {.k = ring_k.data,
                .v = ring_v.data,
                .k_stride = {ring, ring_k.stride[0], ring_k.stride[1]},
                .v_stride = {ring_of_v, ring_v.stride[0], ring_v.stride[1]}};
  params.ring_len = static_cast<int>(shape.buffer_len);
  params.count = position.device;
  params.count_host = static_cast<int>(position.known() ? position.host : 0);
  params.window = static_cast<int>(window);
  params.tile_count = tile_count;
  params.old_at_rest = old_at_rest;
  detail::launch_flash(kWho, plan, params, {.scale = scale}, workspace, stream);
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/flash_launch.cuh"
#include "gemma4/attention.hpp"

namespace gemma4::cuda {

/// How a call of bf16_attention will run: pure host code.
/// @param choice what to fix instead of leaving it to the plan
/// @throws std::invalid_argument on a shape or mask that no kernel takes
[[nodiscard]] inline FlashPlan plan_bf16_attention(const AttentionShape& shape, const AttentionOptions& options,
                                                   const DeviceInfo& device, const FlashChoice& choice = {}) {
  detail::require_plannable("bf16_attention", shape, options);
  return detail::plan_flash("bf16_attention", shape, options, 0, device, choice);
}

/// Attention of the last n_query tokens over an uncompressed flat cache: the contract of gemma4/attention.hpp.
///   out[b,t,h] = sum_j softmax_j(scale * <q[b,t,h], K[b,g(h),j]>) V[b,g(h),j]
/// @param q         [batch, n_query, n_head, head_dim] bf16; may be `out` itself
/// @param k, v      [batch, n_head_kv, buffer_len, head_dim] bf16; rows >= kv_len never reach the result
/// @param kv_len    valid rows, read by the kernel from the device or given by the host; absent (default): all rows
/// @param out       [batch, n_query, n_head, head_dim] bf16
/// @param plan      of plan_bf16_attention() for this shape
/// @param workspace at least plan.workspace_bytes, 16-byte aligned; holds the partial results of split keys
/// @param tile_count counts the key tiles that blocks visit when given; for tests
/// @throws std::invalid_argument naming the argument and both values, before any launch
/// Probabilities are rounded to bf16 before the product with V; sums are float32. Mirror: reference/bf16_attention.hpp
inline void bf16_attention(View<const Bf16, 4> q, View<const Bf16, 4> k, View<const Bf16, 4> v,
                           const AttentionOptions& options, DeviceCount kv_len, View<Bf16, 4> out,
                           const FlashPlan& plan, std::span<std::byte> workspace, cudaStream_t stream,
                           unsigned long long* tile_count = nullptr) {
  constexpr const char* kWho = "bf16_attention";
  const AttentionShape shape = flat_attention_shape(kWho, q, k, v, out);
  require_attention(kWho, shape, options, kv_len.known() ? std::optional<std::int64_t>(kv_len.host) : std::nullopt);
  require(shape == plan.shape, kWho, ": the plan is of another shape; make it with plan_bf16_attention()");
  require_contiguous_rows(kWho, "q", q);
  require_contiguous_rows(kWho, "out", out);
  detail::require_aligned(kWho, "q", q);
  detail::require_aligned(kWho, "k", k);
  detail::require_aligned(kWho, "v", v);
  detail::require_aligned(kWho, "out", out);
  detail::FlashParams params{.q = q.data, .out = out.data};
  detail::copy_strides(q, params.q_stride);
  detail::copy_strides(out, params.out_stride);
  params.fresh = {.k = k.data, .v = v.data};
  detail::copy_strides(k, params.fresh.k_stride);
  detail::copy_strides(v, params.fresh.v_stride);
  params.count = kv_len.device;
  params.count_host = static_cast<int>(kv_len.known() ? kv_len.host : shape.buffer_len);
  params.max_kv_end = static_cast<int>(shape.buffer_len);
  params.tile_count = tile_count;
  detail::launch_flash(kWho, plan, params, options, workspace, stream);
}

}  // namespace gemma4::cuda

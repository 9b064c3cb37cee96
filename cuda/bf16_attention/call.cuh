// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/device/device_count.cuh"
#include "cuda/flash/launch.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"

/// A call over bf16 keys and values, and its launch: by bf16_attention(), by its rows, and by the prefill of what is
/// unpacked to bf16.
namespace gemma4::cuda {

/// What a call of bf16_attention attends with, to and into.
struct FlatAttentionCall {
  View<const Bf16, 4> q;     ///< [batch, n_query, n_head, head_dim]; may be `out` itself
  View<const Bf16, 4> k, v;  ///< [batch, n_head_kv, buffer_len, head_dim]; rows >= kv_len never reach the result
  AttentionOptions options;
  DeviceCount kv_len;  ///< valid rows, read by the kernel from the device or given by the host; absent: all rows
  View<Bf16, 4> out;   ///< [batch, n_query, n_head, head_dim]
  bool kv_len_of_each = false;  ///< on the device kv_len has an entry of each sequence; on the host each has one more
};

namespace detail {

/// bf16_attention on behalf of `who`; with a transform of the queries and results where the plan transforms_inside().
template <class TTransform = NoTransform>
void attend_flat(const char* who, const FlatAttentionCall& call, const FlashPlan& plan, std::span<std::byte> workspace,
                 cudaStream_t stream, unsigned long long* tile_count, const TTransform& transform = {}) {
  const View<const Bf16, 4>&q = call.q, &k = call.k, &v = call.v;
  const View<Bf16, 4>& out = call.out;
  const DeviceCount kv_len = call.kv_len;
  const AttentionOptions& options = call.options;
  const AttentionShape shape = flat_attention_shape(who, q, k, v, out);
  require_attention(who, shape, options, kv_len.known() ? std::optional<std::int64_t>(kv_len.host) : std::nullopt);
  require(shape == plan.shape, who, ": the plan is of another shape; make it with plan_bf16_attention()");
  require_contiguous_rows(who, "q", q);
  require_contiguous_rows(who, "out", out);
  require_aligned(who, "q", q);
  require_aligned(who, "k", k);
  require_aligned(who, "v", v);
  require_aligned(who, "out", out);
  FlashParams params{.q = q.data, .out = out.data};
  copy_strides(q, params.q_stride);
  copy_strides(out, params.out_stride);
  params.fresh = {.k = k.data, .v = v.data};
  copy_strides(k, params.fresh.k_stride);
  copy_strides(v, params.fresh.v_stride);
  params.count = kv_len.device;
  params.count_host = static_cast<int>(kv_len.known() ? kv_len.host : shape.buffer_len);
  params.count_step = call.kv_len_of_each ? 1 : 0;
  params.max_kv_end = static_cast<int>(shape.buffer_len);
  params.tile_count = tile_count;
  launch_flash(who, plan, params, options, workspace, stream, transform);
}

}  // namespace detail

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/bf16_attention.cuh"
#include "cuda/device/device_count.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/tq4_attention.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"

/// Attention of many queries over one vector for K and V: K and V of a few heads are rebuilt as bf16 in a scratch
/// buffer, and the bf16 flash kernels read them as they read any cache. The cost of rebuilding grows with the context,
/// that of attention with the context and the queries.
///
///   V[j] = bf16(H^T code),  K[j] = bf16(w * V[j] with c * R[j] at the rotated places);  out = attention(q, K, V)
///
/// Heads go through the scratch in groups that fit it. Roundings to bf16: K, V, the probabilities and the result.
namespace gemma4::cuda {

/// What a call of attention over a cache of one vector for K and V attends with, to and into.
struct KvAttentionCall {
  View<const Bf16, 4> q;  ///< [batch, n_query, n_head, head_dim], normalised and turned by RoPE; may be `out` itself
  const float* k_weight;  ///< [head_dim] on the device, 16-byte aligned: w, the weight of k's norm
  ConstKvRecords cache;   ///< of [batch, n_head_kv, buffer_len]; tokens >= kv_len never reach the result
  const KvCodec& codec;   ///< the one that compressed the cache
  AttentionOptions options;
  /// Valid tokens, read by the kernel from the device or given by the host; absent: all. A number on the device outside
  /// [0, buffer_len] counts as the nearer end. A mask must cover what the host knows: kv_len keys, or the buffer where
  /// only the device has kv_len.
  DeviceCount kv_len;
  View<Bf16, 4> out;  ///< [batch, n_query, n_head, head_dim]
};

namespace detail {

/// All passes of a call, `plan` being one of the TQ4 cache: the same scratch for the same rows.
inline void attend_kv_unpacked(const KvAttentionCall& call, const Tq4PrefillPlan& plan, std::span<std::byte> workspace,
                               cudaStream_t stream, unsigned long long* tile_count) {
  const char* const who = "kv_attention";
  const AttentionShape& shape = plan.shape;
  const std::int64_t rows = tq4_record_count(plan.max_kv_len) * kKvRecordTokens;
  KvUnpacked<Bf16> unpacked{.k = reinterpret_cast<Bf16*>(workspace.data()), .rows = rows};
  unpacked.v = unpacked.k + plan.heads_per_pass * rows * shape.head_dim;
  for (std::int64_t item = 0; item < shape.batch * shape.n_head_kv;) {
    const std::int64_t batch = item / shape.n_head_kv, head0 = item % shape.n_head_kv;
    const std::int64_t n_head = std::min(plan.heads_per_pass, shape.n_head_kv - head0);
    kv_unpack(call.codec, call.cache, batch, head0, n_head, call.k_weight, call.kv_len, unpacked, stream);
    const UnpackedHeads heads{.k = unpacked.k,
                              .v = unpacked.v,
                              .rows = rows,
                              .max_kv_len = plan.max_kv_len,
                              .batch = batch,
                              .head0 = head0,
                              .n_head = n_head};
    attend_flat(who, attention_of_pass(call, call.q, heads), plan_tq4_pass(plan, call.options, n_head),
                workspace.subspan(static_cast<std::size_t>(plan.scratch_bytes)), stream, tile_count);
    item += n_head;
  }
}

}  // namespace detail
}  // namespace gemma4::cuda

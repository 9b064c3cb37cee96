// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/bf16_attention/call.cuh"
#include "cuda/bf16_attention/rows.cuh"
#include "cuda/flash/launch.cuh"
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
/// @param plan      of plan_bf16_attention() for this shape
/// @param workspace at least plan.workspace_bytes, 16-byte aligned; holds the partial results of split keys
/// @param tile_count counts the key tiles that blocks visit when given; for tests
/// @throws std::invalid_argument naming the argument and both values, before any launch
/// Probabilities are rounded to bf16 before the product with V; sums are float32. Mirror: reference/bf16_attention.hpp
inline void bf16_attention(const FlatAttentionCall& call, const FlashPlan& plan, std::span<std::byte> workspace,
                           cudaStream_t stream, unsigned long long* tile_count = nullptr) {
  detail::attend_flat("bf16_attention", call, plan, workspace, stream, tile_count);
}

}  // namespace gemma4::cuda

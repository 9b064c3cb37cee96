// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/device/device_count.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/tq4_attention/decode_launch.cuh"
#include "cuda/tq4_attention/prefill.cuh"
#include "cuda/tq4_attention/record_call.cuh"
#include "cuda/tq4_attention/rows.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// Attention over a TQ4 cache in the rotated space, for any number of queries: up to kTq4DecodeQueries of them read the
/// packed records directly (cuda/tq4_attention/decode.cuh), more go through the flash kernels
/// (cuda/tq4_attention/prefill.cuh). Mirror: reference/tq4_attention.hpp
namespace gemma4::cuda {

inline constexpr std::int64_t kTq4DecodeQueries = 4;  ///< the records are read once per eight query rows of a KV head

enum class Tq4Path { kDecode, kPrefill };

[[nodiscard]] constexpr const char* to_string(Tq4Path path) {
  return path == Tq4Path::kDecode ? "decode" : "prefill";
}

/// What a caller may fix instead of leaving it to the plan.
struct Tq4AttentionChoice {
  std::optional<Tq4Path> path;
  Tq4DecodeChoice decode = {};
  FlashChoice prefill = {};
  std::optional<std::int64_t> max_kv_len =
      std::nullopt;  ///< prefill: no call will have more valid rows; default buffer_len
  std::int64_t scratch_limit = kTq4PrefillScratch;
};

/// How a call will run. Depends on the shape, the options' kind and the device, never on kv_len.
struct Tq4AttentionPlan {
  AttentionShape shape;
  Tq4Path path = Tq4Path::kDecode;
  Tq4DecodePlan decode = {};    ///< with path kDecode
  Tq4PrefillPlan prefill = {};  ///< with path kPrefill
  std::int64_t workspace_bytes = 0;
};

/// Pure host code.
/// @throws std::invalid_argument on a shape or mask that no kernel takes
[[nodiscard]] inline Tq4AttentionPlan plan_tq4_attention(const AttentionShape& shape, const AttentionOptions& options,
                                                         const DeviceInfo& device,
                                                         const Tq4AttentionChoice& choice = {}) {
  const char* const who = "tq4_attention";
  detail::require_record_shape(who, shape, options);
  Tq4AttentionPlan plan{.shape = shape};
  plan.path = choice.path.value_or(shape.n_query <= kTq4DecodeQueries ? Tq4Path::kDecode : Tq4Path::kPrefill);
  if (plan.path == Tq4Path::kDecode) {
    plan.decode = plan_tq4_decode(who, shape, device, choice.decode);
    plan.workspace_bytes = plan.decode.workspace_bytes;
  } else {
    plan.prefill = plan_tq4_attention_prefill(shape, options, device, choice.max_kv_len.value_or(shape.buffer_len),
                                              choice.scratch_limit, choice.prefill);
    plan.workspace_bytes = plan.prefill.workspace_bytes;
  }
  return plan;
}

/// Attention of the last n_query tokens over a TQ4 cache: the contract of gemma4/attention.hpp with K and V as decoded.
/// @param plan      of plan_tq4_attention() for this shape
/// @param workspace at least plan.workspace_bytes, 16-byte aligned; one call at a time may use it
/// @param work_count counts the records (decode) or key tiles (prefill) that are visited, when given; for tests
/// @throws std::invalid_argument naming the argument and both values, before any launch
/// Decode roundings: q to fp16, levels within 2^-8, weights times norm_v and the result to bf16; float32 sums. Norms of
/// V are below 2^59.
inline void tq4_attention(const Tq4AttentionCall& call, const Tq4AttentionPlan& plan, std::span<std::byte> workspace,
                          cudaStream_t stream, unsigned long long* work_count = nullptr) {
  const char* const who = "tq4_attention";
  require_tq4_records(who, call.cache);
  require(call.codec.head_dim() == call.cache.head_dim, who, ": codec of head_dim ", call.codec.head_dim(),
          ", the cache has ", call.cache.head_dim);
  detail::require_record_call(who, "plan_tq4_attention()", call, plan, static_cast<std::int64_t>(workspace.size()));
  if (plan.path == Tq4Path::kPrefill) {
    return tq4_attention_prefill(call, plan.prefill, workspace, stream, work_count);
  }
  detail::launch_tq4_decode(plan.decode,
                            detail::tq4_decode_params(call, plan.shape, plan.decode, workspace, work_count),
                            call.codec.k_bytes() && call.codec.v_bytes(), stream);
}

}  // namespace gemma4::cuda

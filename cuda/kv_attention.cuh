// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/device/device_count.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/kv_attention/decode_launch.cuh"
#include "cuda/kv_attention/prefill.cuh"
#include "cuda/kv_attention/rows.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/tq4_attention.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// Attention over one vector for K and V, for any number of queries: up to kKvDecodeQueries of them read the records
/// directly (cuda/kv_attention/decode.cuh), more go through the flash kernels (cuda/kv_attention/prefill.cuh), and so
/// does everything over kv16r16, which has no codes. Mirror: reference/kv_attention.hpp
namespace gemma4::cuda {

inline constexpr std::int64_t kKvDecodeQueries = 8;

enum class KvPath { kDecode, kPrefill };

[[nodiscard]] constexpr const char* to_string(KvPath path) {
  return path == KvPath::kDecode ? "decode" : "prefill";
}

/// What a caller may fix instead of leaving it to the plan.
struct KvAttentionChoice {
  std::optional<KvPath> path;
  KvDecodeChoice decode = {};
  FlashChoice prefill = {};
  std::optional<std::int64_t> max_kv_len =
      std::nullopt;  ///< prefill: no call will have more valid rows; default buffer_len
  std::int64_t scratch_limit = kTq4PrefillScratch;
};

/// How a call will run. Depends on the shape, the format and the device, never on kv_len.
struct KvAttentionPlan {
  AttentionShape shape;
  KvPath path = KvPath::kDecode;
  KvDecodePlan decode = {};     ///< with path kDecode
  Tq4PrefillPlan prefill = {};  ///< with path kPrefill: the scratch is TQ4's
  std::int64_t workspace_bytes = 0;
};

/// Pure host code.
/// @throws std::invalid_argument on a shape or mask that no kernel takes
[[nodiscard]] inline KvAttentionPlan plan_kv_attention(const AttentionShape& shape, const KvOptions& format,
                                                       const AttentionOptions& options, const DeviceInfo& device,
                                                       const KvAttentionChoice& choice = {}) {
  const char* const who = "kv_attention";
  detail::require_record_shape(who, shape, options);
  KvAttentionPlan plan{.shape = shape};
  const bool decodes = format.has_codes() && shape.n_query <= kKvDecodeQueries;
  plan.path = choice.path.value_or(decodes ? KvPath::kDecode : KvPath::kPrefill);
  if (plan.path == KvPath::kDecode) {
    plan.decode = plan_kv_decode(who, shape, format, device, choice.decode);
    plan.workspace_bytes = plan.decode.workspace_bytes;
  } else {
    plan.prefill = plan_tq4_attention_prefill(shape, options, device, choice.max_kv_len.value_or(shape.buffer_len),
                                              choice.scratch_limit, choice.prefill);
    plan.workspace_bytes = plan.prefill.workspace_bytes;
  }
  return plan;
}

namespace detail {

/// Refuses a call that its plan was not made for.
inline void require_kv_call(const KvAttentionCall& call, const KvAttentionPlan& plan, std::int64_t workspace_bytes) {
  const char* const who = "kv_attention";
  call.codec.require_fits(who, call.cache);
  require_record_call(who, "plan_kv_attention()", call, plan, workspace_bytes);
  require(call.k_weight != nullptr && reinterpret_cast<std::uintptr_t>(call.k_weight) % 16 == 0, who,
          ": k_weight is null or not aligned to 16 bytes");
  if (plan.path == KvPath::kPrefill) {
    return require_planned_rows(who, call.kv_len, plan.prefill.max_kv_len, call.cache.buffer_len);
  }
  require(plan.decode.tile.takes(call.cache.v_bits, call.cache.r_bits), who, ": the plan is for ",
          plan.decode.tile.v_bits, " and ", plan.decode.tile.r_bits, " bits, the cache has ", call.cache.v_bits,
          " and ", call.cache.r_bits);
}

}  // namespace detail

/// Attention of the last n_query tokens over a cache of one vector for K and V: the contract of gemma4/attention.hpp
/// with V as decoded and K = w * V with c * R at the rotated places.
/// @param plan      of plan_kv_attention() for this shape and format
/// @param workspace at least plan.workspace_bytes, 16-byte aligned; one call at a time may use it
/// @param work_count counts the records (decode) or key tiles (prefill) that are visited, when given; for tests
/// @throws std::invalid_argument naming the argument and both values, before any launch
/// Decode roundings: q to fp16, levels within half a step of 1/160 of the largest or less, weights times norm_v and the
/// result to bf16; float32 sums.
inline void kv_attention(const KvAttentionCall& call, const KvAttentionPlan& plan, std::span<std::byte> workspace,
                         cudaStream_t stream, unsigned long long* work_count = nullptr) {
  detail::require_kv_call(call, plan, static_cast<std::int64_t>(workspace.size()));
  if (plan.path == KvPath::kPrefill) {
    return detail::attend_kv_unpacked(call, plan.prefill, workspace, stream, work_count);
  }
  detail::launch_kv_decode(plan.decode, detail::kv_decode_params(call, plan.shape, plan.decode, workspace, work_count),
                           stream);
}

}  // namespace gemma4::cuda

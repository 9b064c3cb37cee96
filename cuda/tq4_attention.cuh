// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <optional>
#include <span>

#include "cuda/device/device_count.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/tq4_attention/decode_launch.cuh"
#include "cuda/tq4_attention/prefill.cuh"
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
  AttentionOptions checked = options;  // how much of the cache a mask must cover is known at the call
  if (checked.mask) checked.mask->shape[3] = std::max(checked.mask->shape[3], shape.buffer_len);
  require_attention(who, shape, checked, std::nullopt);
  require(shape.buffer_len < (std::int64_t{1} << 30), who, ": buffer_len ", shape.buffer_len, ", need below 2^30");
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
  const auto& [q, cache, codec, options, kv_len, out] = call;
  const AttentionShape& shape = plan.shape;
  require_tq4_records(who, cache);
  require(codec.head_dim() == cache.head_dim, who, ": codec of head_dim ", codec.head_dim(), ", the cache has ",
          cache.head_dim);
  const AttentionShape found{.batch = q.extent[0],
                             .n_query = q.extent[1],
                             .n_head = q.extent[2],
                             .n_head_kv = cache.n_head_kv,
                             .head_dim = q.extent[3],
                             .buffer_len = cache.buffer_len};
  require_attention(who, found, options, kv_len.known() ? std::optional<std::int64_t>(kv_len.host) : std::nullopt);
  require_extents(who, "out", out, {found.batch, found.n_query, found.n_head, found.head_dim});
  require(cache.batch == found.batch && cache.head_dim == found.head_dim, who, ": the cache has batch ", cache.batch,
          " and head_dim ", cache.head_dim, ", q has ", found.batch, " and ", found.head_dim);
  require(found == shape, who, ": the plan is of another shape; make it with plan_tq4_attention()");
  require_contiguous_rows(who, "q", q);
  require_contiguous_rows(who, "out", out);
  detail::require_aligned(who, "q", q);
  detail::require_aligned(who, "out", out);
  require(static_cast<std::int64_t>(workspace.size()) >= plan.workspace_bytes, who, ": workspace ", workspace.size(),
          " B, need ", plan.workspace_bytes, " B; size it with plan_tq4_attention()");
  if (plan.path == Tq4Path::kPrefill) {
    return tq4_attention_prefill(call, plan.prefill, workspace, stream, work_count);
  }
  detail::Tq4DecodeParams params;
  params.q = q.data;
  params.out = out.data;
  detail::copy_strides(q, params.q_stride);
  detail::copy_strides(out, params.out_stride);
  params.cache = cache;
  params.rotation = codec.rotation().params();
  params.levels = detail::decode_levels_of(codec);
  params.kv_len = kv_len.device;
  params.kv_len_host = static_cast<int>(kv_len.known() ? kv_len.host : shape.buffer_len);
  if (options.mask) {
    params.mask = static_cast<const std::uint8_t*>(options.mask->data);
    params.mask_extent = options.mask->shape[3];
  }
  params.n_query = static_cast<int>(shape.n_query);
  params.n_head_kv = static_cast<int>(shape.n_head_kv);
  params.group = static_cast<int>(shape.group());
  params.causal = options.causal;
  params.causal_skip = options.causal_skip;
  params.scale_log2 = options.scale * std::numbers::log2e_v<float>;
  params.n_split = plan.decode.n_split;
  params.n_row_tile = plan.decode.n_row_tile;
  params.partial_o = reinterpret_cast<float*>(workspace.data());
  params.partial_ml =
      reinterpret_cast<float2*>(params.partial_o + std::int64_t{plan.decode.grid.x} * plan.decode.grid.y *
                                                       plan.decode.grid.z * detail::kRowTile * shape.head_dim);
  params.record_count = work_count;
  detail::launch_tq4_decode(plan.decode, params, codec.k_bytes() && codec.v_bytes(), stream);
}

}  // namespace gemma4::cuda

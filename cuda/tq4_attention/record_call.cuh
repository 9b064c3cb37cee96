// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <optional>
#include <span>

#include "cuda/bf16_attention.cuh"
#include "cuda/device/device_count.cuh"
#include "cuda/flash/launch.cuh"
#include "cuda/flash/record_decode.cuh"
#include "cuda/tq4_attention/decode_params.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// What calls of attention over records have in common whatever the records hold (tq4_attention, kv_attention): a TCall
/// has q, cache, options, kv_len and out. Checks of a call against its plan, what decode is told, a pass of prefill.
namespace gemma4::cuda::detail {

/// Refuses a shape or a mask that no call over records takes.
inline void require_record_shape(const char* who, const AttentionShape& shape, AttentionOptions options) {
  // How much of the cache a mask must cover is known at the call.
  if (options.mask) options.mask->shape[3] = std::max(options.mask->shape[3], shape.buffer_len);
  require_attention(who, shape, options, std::nullopt);
  require(shape.buffer_len < (std::int64_t{1} << 30), who, ": buffer_len ", shape.buffer_len, ", need below 2^30");
}

/// Refuses a call that `plan` (with shape and workspace_bytes), which `planner` makes, was not made for.
template <class TCall, class TPlan>
void require_record_call(const char* who, const char* planner, const TCall& call, const TPlan& plan,
                         std::int64_t workspace_bytes) {
  const AttentionShape found{.batch = call.q.extent[0],
                             .n_query = call.q.extent[1],
                             .n_head = call.q.extent[2],
                             .n_head_kv = call.cache.n_head_kv,
                             .head_dim = call.q.extent[3],
                             .buffer_len = call.cache.buffer_len};
  const DeviceCount& kv_len = call.kv_len;
  require_attention(who, found, call.options, kv_len.known() ? std::optional<std::int64_t>(kv_len.host) : std::nullopt);
  require_extents(who, "out", call.out, {found.batch, found.n_query, found.n_head, found.head_dim});
  require(call.cache.batch == found.batch && call.cache.head_dim == found.head_dim, who, ": the cache has batch ",
          call.cache.batch, " and head_dim ", call.cache.head_dim, ", q has ", found.batch, " and ", found.head_dim);
  require(found == plan.shape, who, ": the plan is of another shape; make it with ", planner);
  require_contiguous_rows(who, "q", call.q);
  require_contiguous_rows(who, "out", call.out);
  require_aligned(who, "q", call.q);
  require_aligned(who, "out", call.out);
  require(workspace_bytes >= plan.workspace_bytes, who, ": workspace ", workspace_bytes, " B, need ",
          plan.workspace_bytes, " B; size it with ", planner);
}

/// Refuses more valid rows than the scratch of a prefill holds.
inline void require_planned_rows(const char* who, const DeviceCount& kv_len, std::int64_t max_kv_len,
                                 std::int64_t buffer_len) {
  require(!kv_len.known() || kv_len.host <= max_kv_len, who, ": kv_len ", kv_len.host,
          " is above the plan's max_kv_len ", max_kv_len);
  require(kv_len.known() || kv_len.device != nullptr || max_kv_len == buffer_len, who, ": without kv_len all ",
          buffer_len, " rows count, the plan holds ", max_kv_len);
}

/// What decode is told whatever the records hold: all but the cache, the rotation and the levels.
template <class TCall, class TTile>
[[nodiscard]] Tq4DecodeParams record_decode_params(const TCall& call, const AttentionShape& shape,
                                                   const RecordDecodePlan<TTile>& plan, std::span<std::byte> workspace,
                                                   unsigned long long* work_count) {
  Tq4DecodeParams params;
  params.q = call.q.data;
  params.out = call.out.data;
  copy_strides(call.q, params.q_stride);
  copy_strides(call.out, params.out_stride);
  params.kv_len = call.kv_len.device;
  params.kv_len_host = static_cast<int>(call.kv_len.known() ? call.kv_len.host : shape.buffer_len);
  if (call.options.mask) {
    params.mask = static_cast<const std::uint8_t*>(call.options.mask->data);
    params.mask_extent = call.options.mask->shape[3];
  }
  params.n_query = static_cast<int>(shape.n_query);
  params.n_head_kv = static_cast<int>(shape.n_head_kv);
  params.group = static_cast<int>(shape.group());
  params.causal = call.options.causal;
  params.causal_skip = call.options.causal_skip;
  params.scale_log2 = call.options.scale * std::numbers::log2e_v<float>;
  params.n_split = plan.n_split;
  params.n_row_tile = plan.n_row_tile;
  params.partial_o = reinterpret_cast<float*>(workspace.data());
  params.partial_ml = reinterpret_cast<float2*>(params.partial_o + std::int64_t{plan.n_split} * plan.grid.y *
                                                                       plan.combine_grid.z * kRowTile * shape.head_dim);
  params.record_count = work_count;
  return params;
}

/// The shape of one pass of prefill: n_head_kv heads of one sequence.
[[nodiscard]] inline AttentionShape pass_shape(AttentionShape shape, std::int64_t n_head_kv) {
  shape.batch = 1;
  shape.n_head = n_head_kv * shape.group();
  shape.n_head_kv = n_head_kv;
  return shape;
}

/// The options of one sequence of a batch: its part of the mask.
[[nodiscard]] inline AttentionOptions options_of_sequence(AttentionOptions options, std::int64_t batch) {
  if (!options.mask) return options;
  MaskView& mask = *options.mask;
  mask.data = static_cast<const std::uint8_t*>(mask.data) + batch * mask.shape[2] * mask.shape[3];
  mask.shape[0] = 1;
  return options;
}

/// The KV heads of a pass and their rows in the scratch.
struct UnpackedHeads {
  const Bf16* k = nullptr;  ///< [n_head, rows, head_dim]
  const Bf16* v = nullptr;
  std::int64_t rows = 0, max_kv_len = 0;  ///< of a head in the scratch; of them the most that may be valid
  std::int64_t batch = 0, head0 = 0, n_head = 0;
};

/// A call over bf16 keys and values, which attends over what was unpacked.
/// @param q of all heads of the call: its own, or rotated ones
template <class TCall>
[[nodiscard]] FlatAttentionCall attention_of_pass(const TCall& call, const View<const Bf16, 4>& q,
                                                  const UnpackedHeads& heads) {
  const std::int64_t group = call.q.extent[2] / call.cache.n_head_kv;
  const auto heads_of = [&]<class T>(View<T, 4> view) {
    view.data = &view(heads.batch, 0, heads.head0 * group, 0);
    view.extent[0] = 1;
    view.extent[2] = heads.n_head * group;
    return view;
  };
  const auto cache_view = [&](const Bf16* data) {
    View<const Bf16, 4> view = make_view(data, 1, heads.n_head, heads.rows, call.cache.head_dim);
    view.extent[2] = heads.max_kv_len;
    return view;
  };
  return {.q = heads_of(q),
          .k = cache_view(heads.k),
          .v = cache_view(heads.v),
          .options = options_of_sequence(call.options, heads.batch),
          .kv_len = call.kv_len,
          .out = heads_of(call.out)};
}

}  // namespace gemma4::cuda::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/bf16_attention/call.cuh"
#include "cuda/flash/rows.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"

/// Attention of several rows at once over an uncompressed flat cache: row r sees the first kv_len + r keys and comes
/// out with the bits of a call of its own.
///
/// Rows stand for sequences of one query, all over the same keys, in one launch with the splits that one row has. The
/// blocks of a split stand behind each other, those of all rows and heads: all but the first row's find the keys in the
/// L2.
namespace gemma4::cuda {

/// How rows go through attention at once, or why they do not.
struct Bf16RowsPlan {
  const char* misfit = nullptr;    ///< null: they go at once
  AttentionShape shape = {};       ///< n_query are the rows
  FlashPlan one = {};              ///< of a row by itself
  std::int64_t rows_a_launch = 0;  ///< whose partials the workspace holds
  std::int64_t workspace_bytes = 0;
};

/// Pure host code.
/// @param shape n_query: the rows, of one sequence
/// @param one   of a row by itself
/// @param partials_bytes of workspace that there may be; none: as many as the rows take
/// @throws std::invalid_argument for more than kMostRows rows or more than one sequence
[[nodiscard]] inline Bf16RowsPlan plan_bf16_rows(const AttentionShape& shape, const FlashPlan& one,
                                                 std::optional<std::int64_t> partials_bytes) {
  const char* const who = "bf16_attention_rows";
  detail::require_rows_shape(who, shape);
  Bf16RowsPlan plan{.shape = shape, .one = one};
  if (one.path == FlashPath::kWgmma) plan.misfit = "the wgmma kernels know one length a call";
  if (plan.misfit == nullptr) detail::fit_rows(plan, partials_bytes);
  return plan;
}

namespace detail {

/// Grids of a launch of some of the rows.
[[nodiscard]] inline FlashPlan plan_of_rows(const Bf16RowsPlan& plan, std::int64_t n_row) {
  FlashPlan some = plan.one;
  some.shape.batch = n_row;
  some.grid.y = static_cast<unsigned>(n_row * plan.one.grid.y);
  some.workspace_bytes = n_row * plan.one.workspace_bytes;
  return some;
}

/// Refuses a call that its plan was not made for.
inline void require_rows_call(const FlatAttentionCall& call, const Bf16RowsPlan& plan, std::int64_t workspace_bytes) {
  const char* const who = "bf16_attention_rows";
  require_rows(who, call, plan);
  const AttentionShape found = flat_attention_shape(who, call.q, call.k, call.v, call.out);
  std::optional<std::int64_t> of_last;
  if (call.kv_len.known()) of_last = call.kv_len.host + plan.shape.n_query - 1;
  require_attention(who, found, call.options, of_last);
  require(found == plan.shape, who, ": the plan is of another shape; make it with plan_bf16_rows()");
  require(workspace_bytes >= plan.workspace_bytes, who, ": workspace ", workspace_bytes, " B, need ",
          plan.workspace_bytes, " B; size it with plan_bf16_rows()");
}

}  // namespace detail

/// Attention of rows behind each other, all of them stored already: row r sees the first kv_len + r keys, and none that
/// lies behind.
/// @param call q and out [1, n_row, n_head, head_dim]; kv_len of the first row, on the device that of each row [n_row]
/// @param plan of plan_bf16_rows() for this shape, without a misfit
/// @param workspace at least plan.workspace_bytes, 16-byte aligned
/// @throws std::invalid_argument naming the argument and both values, before any launch
inline void bf16_attention_rows(const FlatAttentionCall& call, const Bf16RowsPlan& plan, std::span<std::byte> workspace,
                                cudaStream_t stream, unsigned long long* tile_count = nullptr) {
  detail::require_rows_call(call, plan, static_cast<std::int64_t>(workspace.size()));
  detail::for_rows_of_launches(call, plan, [&](FlatAttentionCall part, std::int64_t n_row) {
    // All sequences have the same keys.
    for (View<const Bf16, 4>* const keys : {&part.k, &part.v}) keys->extent[0] = n_row, keys->stride[0] = 0;
    part.kv_len_of_each = true;
    detail::attend_flat("bf16_attention_rows", part, detail::plan_of_rows(plan, n_row), workspace, stream, tile_count);
  });
}

}  // namespace gemma4::cuda

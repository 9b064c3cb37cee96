// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/bf16_attention/call.cuh"
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
  static constexpr std::int64_t kMostRows = 8;

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
  require(shape.batch == 1, who, ": batch ", shape.batch, ", need 1: rows are of one sequence");
  require(shape.n_query >= 1 && shape.n_query <= Bf16RowsPlan::kMostRows, who, ": ", shape.n_query, " rows, need 1 to ",
          Bf16RowsPlan::kMostRows);
  Bf16RowsPlan plan{.shape = shape, .one = one, .rows_a_launch = shape.n_query};
  if (one.path == FlashPath::kWgmma) {
    plan.misfit = "the wgmma kernels know one length a call";
    return plan;
  }
  if (partials_bytes && one.workspace_bytes > 0) {
    plan.rows_a_launch = std::min(plan.rows_a_launch, *partials_bytes / one.workspace_bytes);
  }
  if (plan.rows_a_launch < std::min<std::int64_t>(2, shape.n_query)) {
    plan.misfit = "the workspace has room for what one row leaves of split keys";
    return plan;
  }
  plan.workspace_bytes = plan.rows_a_launch * one.workspace_bytes;
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
  require(plan.misfit == nullptr && plan.rows_a_launch > 0, who,
          ": the plan takes no rows at once: ", plan.misfit != nullptr ? plan.misfit : "it has none");
  require(call.kv_len.known() || call.kv_len.device != nullptr, who, ": kv_len of the first row is not given");
  require(call.options.causal && !call.options.mask, who, ": each row sees the keys up to its own, and no mask");
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
  for (std::int64_t first = 0; first < plan.shape.n_query; first += plan.rows_a_launch) {
    const std::int64_t n_row = std::min(plan.rows_a_launch, plan.shape.n_query - first);
    FlatAttentionCall part = call;
    // Tokens stand for sequences, of one query each, whose keys are the same.
    const auto as_sequences = [&](auto& view) {
      view.data += first * view.stride[1];
      view.extent[0] = n_row, view.extent[1] = 1;
      view.stride[0] = view.stride[1];
    };
    as_sequences(part.q), as_sequences(part.out);
    for (View<const Bf16, 4>* const keys : {&part.k, &part.v}) keys->extent[0] = n_row, keys->stride[0] = 0;
    part.kv_len_of_each = true;
    if (part.kv_len.device != nullptr) part.kv_len.device += first;
    if (part.kv_len.known()) part.kv_len.host += first;
    detail::attend_flat("bf16_attention_rows", part, detail::plan_of_rows(plan, n_row), workspace, stream, tile_count);
  }
}

}  // namespace gemma4::cuda

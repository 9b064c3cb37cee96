// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"

/// What attention of several rows at once has in common whatever the cache (kv_attention, tq4_attention,
/// bf16_attention): row r sees the first kv_len + r keys and comes out with the bits of a call of its own. Host code.
///
/// A plan of rows (TPlan) has `misfit` (null: they go at once), `shape` (n_query are the rows, of one sequence), `one`
/// (the plan of a row by itself), `rows_a_launch` (whose partials the workspace holds) and `workspace_bytes`.
namespace gemma4::cuda {

inline constexpr std::int64_t kMostRows = 8;  ///< of a call of rows

namespace detail {

inline void require_rows_shape(const char* who, const AttentionShape& shape) {
  require(shape.batch == 1, who, ": batch ", shape.batch, ", need 1: rows are of one sequence");
  require(shape.n_query >= 1 && shape.n_query <= kMostRows, who, ": ", shape.n_query, " rows, need 1 to ", kMostRows);
}

/// How many rows a launch takes, or that it takes none. @return whether it takes some
/// @param partials_bytes of workspace that there may be; none: as many as the rows take
/// @param most           rows a launch, where a caller fixes them
template <class TPlan>
bool fit_rows(TPlan& plan, std::optional<std::int64_t> partials_bytes, std::optional<std::int64_t> most = {}) {
  const std::int64_t n_row = plan.shape.n_query, of_one = plan.one.workspace_bytes;
  plan.rows_a_launch = std::min(n_row, most.value_or(n_row));
  if (partials_bytes && of_one > 0) plan.rows_a_launch = std::min(plan.rows_a_launch, *partials_bytes / of_one);
  if (plan.rows_a_launch < std::min<std::int64_t>(2, n_row)) {
    plan.misfit = "the workspace has room for what one row leaves of split keys";
    return false;
  }
  plan.workspace_bytes = plan.rows_a_launch * of_one;
  return true;
}

/// Why a plan takes several launches, for the eye; empty where it does not.
template <class TPlan>
[[nodiscard]] std::string why_several_launches(const TPlan& plan) {
  if (plan.rows_a_launch >= plan.shape.n_query) return "";
  return concat("the workspace holds the split keys of ", plan.rows_a_launch, " rows");
}

/// Refuses what no call of rows takes.
template <class TCall, class TPlan>
void require_rows(const char* who, const TCall& call, const TPlan& plan) {
  require(plan.misfit == nullptr && plan.rows_a_launch > 0, who,
          ": the plan takes no rows at once: ", plan.misfit != nullptr ? plan.misfit : "it has none");
  require(call.kv_len.known() || call.kv_len.device != nullptr, who, ": kv_len of the first row is not given");
  require(call.options.causal && !call.options.mask, who, ": each row sees the keys up to its own, and no mask");
}

/// Calls body(part of the call, its rows) for each launch. In a part tokens stand for sequences, of one query each.
/// @param call q and out [1, n_row, n_head, head_dim]; kv_len of the first row, on the device that of each row [n_row]
template <class TCall, class TPlan, class TBody>
void for_rows_of_launches(const TCall& call, const TPlan& plan, TBody&& body) {
  for (std::int64_t first = 0; first < plan.shape.n_query; first += plan.rows_a_launch) {
    const std::int64_t n_row = std::min(plan.rows_a_launch, plan.shape.n_query - first);
    TCall part = call;
    const auto as_sequences = [&](auto& view) {
      view.data += first * view.stride[1];
      view.extent[0] = n_row, view.extent[1] = 1;
      view.stride[0] = view.stride[1];
    };
    as_sequences(part.q), as_sequences(part.out);
    if (part.kv_len.device != nullptr) part.kv_len.device += first;
    if (part.kv_len.known()) part.kv_len.host += first;
    body(part, n_row);
  }
}

}  // namespace detail
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/device/for_listed.cuh"
#include "cuda/flash/rows.cuh"
#include "cuda/tq4_attention/decode_launch.cuh"
#include "cuda/tq4_attention/prefill.cuh"
#include "cuda/tq4_attention/record_call.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"

/// Attention of several rows at once over a TQ4 cache: row r sees the first kv_len + r keys and comes out with the bits
/// of a call of its own.
///
/// Each row has the blocks that it would have by itself, with its own length, in one launch: what is shared is the
/// launch, the multiprocessors that one row leaves idle where keys are few, and the records, which the blocks of the
/// later rows find in the L2. What is not is the decoding: the pairs of a block have 128 registers a thread, of which
/// the output of eight query rows takes 64, so that a second tile of rows has no room. (kv_attention's teams of four
/// warps have: cuda/kv_attention/rows.cuh.)
namespace gemma4::cuda {

/// How rows go through attention at once, or why they do not.
struct Tq4RowsPlan {
  const char* misfit = nullptr;    ///< null: they go at once
  AttentionShape shape = {};       ///< n_query are the rows
  Tq4DecodePlan one = {};          ///< of a row by itself
  std::int64_t rows_a_launch = 0;  ///< whose partials the workspace holds
  std::int64_t workspace_bytes = 0;
};

/// Pure host code.
/// @param shape n_query: the rows, of one sequence
/// @param one   of a row by itself
/// @param byte_levels whether the codec has them
/// @param partials_bytes of workspace that there may be; none: as many as the rows take
/// @throws std::invalid_argument for more than kMostRows rows or more than one sequence
[[nodiscard]] inline Tq4RowsPlan plan_tq4_rows(const AttentionShape& shape, const Tq4DecodePlan& one, bool byte_levels,
                                               std::optional<std::int64_t> partials_bytes) {
  const char* const who = "tq4_attention_rows";
  detail::require_rows_shape(who, shape);
  Tq4RowsPlan plan{.shape = shape, .one = one};
  if (!byte_levels) plan.misfit = "the codebook has no byte levels";
  if (std::ranges::find(kTq4RowsTiles, one.tile) == kTq4RowsTiles.end()) {
    plan.misfit = "no compiled configuration of several rows adds like the one of a row";
  }
  if (plan.misfit == nullptr) detail::fit_rows(plan, partials_bytes);
  return plan;
}

namespace detail {

/// Grids of a launch of some of the rows.
[[nodiscard]] inline Tq4DecodePlan plan_of_rows(const Tq4RowsPlan& plan, std::int64_t n_row) {
  Tq4DecodePlan some = plan.one;
  some.grid.x = static_cast<unsigned>(some.n_split * n_row);
  some.grid.z = static_cast<unsigned>(some.n_row_tile);
  some.combine_grid.z = static_cast<unsigned>(n_row * some.n_row_tile);
  some.workspace_bytes = n_row * plan.one.workspace_bytes;
  return some;
}

/// Refuses a call that its plan was not made for.
inline void require_rows_call(Tq4AttentionCall call, const Tq4RowsPlan& plan, std::int64_t workspace_bytes) {
  const char* const who = "tq4_attention_rows";
  require_rows(who, call, plan);
  require_tq4_records(who, call.cache);
  require(call.codec.head_dim() == call.cache.head_dim, who, ": codec of head_dim ", call.codec.head_dim(),
          ", the cache has ", call.cache.head_dim);
  require(call.codec.k_bytes() && call.codec.v_bytes(), who, ": the plan is for byte levels, the codec has none");
  if (call.kv_len.known()) call.kv_len.host += plan.shape.n_query - 1;  // of the last row
  require_record_call(who, "plan_tq4_rows()", call, plan, workspace_bytes);
}

inline void launch_tq4_rows(const Tq4DecodePlan& plan, const Tq4DecodeParams& params, cudaStream_t stream) {
  const auto launch = [&]<Tq4DecodeTile kTile>() {
    launch_tq4_kernels<Tq4DecodeTraits<kTile, true, true>>(plan, params, stream);
  };
  for_listed<kTq4RowsTiles>(plan.tile, "tq4_attention_rows: the tile is not in kTq4RowsTiles", launch);
}

}  // namespace detail

/// Attention of rows behind each other, all of them stored already: row r sees the first kv_len + r keys, and none that
/// lies behind.
/// @param call q and out [1, n_row, n_head, head_dim]; kv_len of the first row, on the device that of each row [n_row]
/// @param plan of plan_tq4_rows() for this shape, without a misfit
/// @param workspace at least plan.workspace_bytes, 16-byte aligned
/// @throws std::invalid_argument naming the argument and both values, before any launch
inline void tq4_attention_rows(const Tq4AttentionCall& call, const Tq4RowsPlan& plan, std::span<std::byte> workspace,
                               cudaStream_t stream, unsigned long long* work_count = nullptr) {
  detail::require_rows_call(call, plan, static_cast<std::int64_t>(workspace.size()));
  AttentionShape of_one = plan.shape;
  of_one.n_query = 1;
  detail::for_rows_of_launches(call, plan, [&](const Tq4AttentionCall& part, std::int64_t n_row) {
    const Tq4DecodePlan some = detail::plan_of_rows(plan, n_row);
    detail::Tq4DecodeParams params = detail::tq4_decode_params(part, of_one, some, workspace, work_count);
    params.n_token = static_cast<int>(n_row);
    detail::launch_tq4_rows(some, params, stream);
  });
}

}  // namespace gemma4::cuda

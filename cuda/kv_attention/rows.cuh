// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/device/device_info.cuh"
#include "cuda/device/for_listed.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/flash/rows.cuh"
#include "cuda/kv_attention/decode_launch.cuh"
#include "cuda/kv_attention/prefill.cuh"
#include "cuda/tq4_attention.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/kv_format.hpp"

/// Attention of several rows at once over one vector for K and V: row r sees the first kv_len + r keys and comes out
/// with the bits of a call of its own. What is shared is the reading and the decoding of records.
///
/// Who takes which records follows from how many there are, and from the splits and teams: rows with equally many have
/// the same shares, and differ in which keys of the last record they see. Up to kMostRows rows behind each other have
/// at most two counts of records. So the grid has two layers of blocks: those of the rows that have as many as the
/// first, and those of the rows that have one more; where there are none (13 of 16 steps of four rows), the blocks of
/// the second layer leave at once. Nothing of this is known to the host.
///
/// The rows of each token begin a tile of eight: the vote on whether the reference of the weights rises is one tile's,
/// and so are all sums. A configuration gives the bits of the one that a row has by itself if both divide records and
/// dims alike (adds_like()); how many tiles of rows share a decoded record, how it is turned, and how many are in
/// flight change nothing.
namespace gemma4::cuda {

/// The compiled configurations of rows. Which of them serves a plan of one row is decided by that plan's own
/// configuration (kKvDecodeTiles): those that add like it, and of these the one that decodes least often.
inline constexpr std::array kKvRowsTiles{
    // head_dim, v_bits, r_bits, team_warps, teams, n_stage, row_tiles, by_product, batch, parts
    KvDecodeTile{512, 5, 4, 4, 2, 8, 4, false, 4, 2}, KvDecodeTile{512, 4, 4, 4, 2, 12, 4, false, 4, 2},
    KvDecodeTile{512, 0, 0, 4, 4, 5, 2, true},        KvDecodeTile{256, 0, 0, 4, 4, 5, 2, true},
    KvDecodeTile{128, 0, 0, 4, 4, 6, 4, true},        KvDecodeTile{64, 0, 0, 2, 4, 6, 4, true},
};

/// How rows go through attention at once, or why they do not.
struct KvRowsPlan {
  /// From so many on a step takes them at once. On an H100 at 512, 32768 and 131072 keys, us of kv5r4 at once and one
  /// by one: 20.8, 81.7, 221.6 and 22.3, 74.6, 202.4 of two rows, 23.9, 85.5, 224.6 and 33.3, 111.1, 303.6 of three.
  static constexpr std::int64_t kFewestRows = 3;
  static_assert(kMostRows <= kKvRecordTokens, "rows have at most two counts of records");

  const char* misfit = nullptr;  ///< null: they go at once
  AttentionShape shape = {};     ///< n_query are the rows
  KvDecodePlan one = {};         ///< of a row by itself
  KvDecodeTile tile = {};
  std::int64_t rows_a_launch = 0;  ///< whose partials the workspace holds
  std::int64_t workspace_bytes = 0;
};

/// What a caller may fix instead of leaving it to the plan.
struct KvRowsChoice {
  std::optional<KvDecodeTile> tile = std::nullopt;
  std::optional<std::int64_t> rows_a_launch = std::nullopt;
};

namespace detail {

/// Tiles of rows of a call, each token's being its own.
[[nodiscard]] inline std::int64_t tiles_of_rows(const KvRowsPlan& plan, std::int64_t n_row) {
  return n_row * plan.one.n_row_tile;
}

/// The configuration that takes n_tile tiles of rows with the fewest passes over the records and, of those, with the
/// fewest tiles; none: null.
[[nodiscard]] inline const KvDecodeTile* find_rows_tile(const KvDecodeTile& one, std::int64_t n_tile,
                                                        const DeviceInfo& device) {
  const auto passes = [&](const KvDecodeTile& tile) { return (n_tile + tile.row_tiles - 1) / tile.row_tiles; };
  const KvDecodeTile* found = nullptr;
  for (const KvDecodeTile& tile : kKvRowsTiles) {
    if (!tile.adds_like(one) || tile.smem_bytes() > device.smem_limit_bytes) continue;
    const bool is_better = found == nullptr || passes(tile) < passes(*found) ||
                           (passes(tile) == passes(*found) && tile.row_tiles < found->row_tiles);
    if (is_better) found = &tile;
  }
  return found;
}

/// Grids of a launch of some of the rows.
[[nodiscard]] inline KvDecodePlan plan_of_rows(const KvRowsPlan& plan, std::int64_t n_row) {
  KvDecodePlan some = plan.one;
  const std::int64_t n_tile = tiles_of_rows(plan, n_row), row_tiles = plan.tile.row_tiles;
  some.tile = plan.tile;
  some.smem_bytes = plan.tile.smem_bytes();
  some.grid.z = static_cast<unsigned>(2 * ((n_tile + row_tiles - 1) / row_tiles));
  some.combine_grid.z = static_cast<unsigned>(n_tile);
  some.workspace_bytes = n_row * plan.one.workspace_bytes;
  return some;
}

}  // namespace detail

/// Pure host code.
/// @param shape n_query: the rows, of one sequence
/// @param one   of a row by itself
/// @param partials_bytes of workspace that there may be; none: as many as the rows take
/// @throws std::invalid_argument for more than kMostRows rows or more than one sequence
[[nodiscard]] inline KvRowsPlan plan_kv_rows(const AttentionShape& shape, const KvDecodePlan& one,
                                             const DeviceInfo& device, std::optional<std::int64_t> partials_bytes,
                                             const KvRowsChoice& choice = {}) {
  const char* const who = "kv_attention_rows";
  detail::require_rows_shape(who, shape);
  KvRowsPlan plan{.shape = shape, .one = one};
  const KvDecodeTile* tile = detail::find_rows_tile(one.tile, detail::tiles_of_rows(plan, shape.n_query), device);
  if (choice.tile) {
    require(choice.tile->adds_like(one.tile) && choice.tile->smem_bytes() <= device.smem_limit_bytes, who,
            ": the tile of ", choice.tile->teams, " teams adds otherwise than that of one row with ", one.tile.teams,
            ", or needs more than ", device.smem_limit_bytes, " B of shared memory");
    tile = &*choice.tile;
  }
  if (tile == nullptr) {
    plan.misfit = "no compiled configuration of several rows adds like the one of a row that fits";
    return plan;
  }
  plan.tile = *tile;
  if (!detail::fit_rows(plan, partials_bytes, choice.rows_a_launch)) return plan;
  const std::int64_t of_block = std::max<std::int64_t>(1, plan.tile.row_tiles / one.n_row_tile);
  if (plan.rows_a_launch < shape.n_query && plan.rows_a_launch > of_block) {
    plan.rows_a_launch -= plan.rows_a_launch % of_block;  // whole blocks
  }
  plan.workspace_bytes = plan.rows_a_launch * one.workspace_bytes;
  return plan;
}

namespace detail {

/// Refuses a call that its plan was not made for.
inline void require_rows_call(KvAttentionCall call, const KvRowsPlan& plan, std::int64_t workspace_bytes) {
  const char* const who = "kv_attention_rows";
  require_rows(who, call, plan);
  call.codec.require_fits(who, call.cache);
  if (call.kv_len.known()) call.kv_len.host += plan.shape.n_query - 1;  // of the last row
  require_record_call(who, "plan_kv_rows()", call, plan, workspace_bytes);
  require(call.k_weight != nullptr && reinterpret_cast<std::uintptr_t>(call.k_weight) % 16 == 0, who,
          ": k_weight is null or not aligned to 16 bytes");
  require(plan.tile.takes(call.cache.v_bits, call.cache.r_bits), who, ": the plan is for ", plan.tile.v_bits, " and ",
          plan.tile.r_bits, " bits, the cache has ", call.cache.v_bits, " and ", call.cache.r_bits);
}

inline void launch_kv_rows(const KvDecodePlan& plan, const KvDecodeParams& params, cudaStream_t stream) {
  const auto launch = [&]<KvDecodeTile kTile>() {
    using Traits = KvDecodeTraits<kTile, true>;
    Launch{.what = "kv_decode_kernel of rows",
           .grid = plan.grid,
           .block = Traits::kThreads,
           .stream = stream,
           .overlap = plan.overlap,
           .smem_bytes = Traits::kSmemBytes}(kv_decode_kernel<Traits>, params);
    Launch{.what = "tq4_combine_kernel of rows",
           .grid = plan.combine_grid,
           .block = kTq4CombineThreads,
           .stream = stream,
           .overlap = plan.overlap}(tq4_combine_kernel<kTile.head_dim, true>, params.base);
  };
  for_listed<kKvRowsTiles>(plan.tile, "kv_attention_rows: the tile is not in kKvRowsTiles", launch);
}

}  // namespace detail

/// Attention of rows behind each other, all of them stored already: row r sees the first kv_len + r keys, and none that
/// lies behind.
/// @param call q and out [1, n_row, n_head, head_dim]; kv_len of the first row, on the device that of each row [n_row]
/// @param plan of plan_kv_rows() for this shape, without a misfit
/// @param workspace at least plan.workspace_bytes, 16-byte aligned
/// @throws std::invalid_argument naming the argument and both values, before any launch
inline void kv_attention_rows(const KvAttentionCall& call, const KvRowsPlan& plan, std::span<std::byte> workspace,
                              cudaStream_t stream, unsigned long long* work_count = nullptr) {
  detail::require_rows_call(call, plan, static_cast<std::int64_t>(workspace.size()));
  AttentionShape of_one = plan.shape;
  of_one.n_query = 1;
  detail::for_rows_of_launches(call, plan, [&](const KvAttentionCall& part, std::int64_t n_row) {
    const KvDecodePlan some = detail::plan_of_rows(plan, n_row);
    detail::KvDecodeParams params = detail::kv_decode_params(part, of_one, some, workspace, work_count);
    params.base.n_token = static_cast<int>(n_row);
    detail::launch_kv_rows(some, params, stream);
  });
}

}  // namespace gemma4::cuda

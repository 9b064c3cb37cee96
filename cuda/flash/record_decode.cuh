// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cuda/device/device_info.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"

/// Grid, split and workspace of decode attention that reads the records of a compressed cache, and what a caller may
/// fix of them. Shared by tq4_attention and kv_attention, whose tiles differ; host code that can be tested without a
/// GPU.
///
/// The query rows of a KV head go kRowTile at a time. A block takes one such row tile (or several, which then share
/// what it dequantises) and a share of the keys; a second kernel adds the shares.
namespace gemma4::cuda {

/// What a caller may fix instead of leaving it to the plan; tests walk over all of it.
template <class TTile>
struct RecordDecodeChoice {
  std::optional<TTile> tile = std::nullopt;
  std::optional<int> n_split = std::nullopt;
  bool overlap = true;  ///< programmatic dependent launch, where the device has it
};

/// How a call will run. Depends on the shape, the format and the device, never on kv_len nor on buffer_len.
template <class TTile>
struct RecordDecodePlan {
  TTile tile{};
  int n_split = 1;      ///< blocks that share the keys of one row tile
  int n_row_tile = 1;   ///< of a KV head
  dim3 grid{};          ///< n_split, KV heads, sequences times the groups of row tiles that share a block
  dim3 combine_grid{};  ///< rows of a row tile, KV heads, sequences times row tiles
  std::int64_t smem_bytes = 0;
  std::int64_t workspace_bytes = 0;
  bool overlap = false;  ///< each kernel may be set up while the one before it ends (PDL, sm_90)
};

namespace detail {

inline constexpr int kRowTile = 8;           ///< query rows of a KV head: the columns of an mma
inline constexpr int kMaxRecordSplit = 512;  ///< blocks that share the keys of one row tile

/// Row tiles of a KV head in a call of this shape.
[[nodiscard]] inline std::int64_t row_tiles_of(const AttentionShape& shape) {
  return (shape.n_query * shape.group() + kRowTile - 1) / kRowTile;
}

/// The plan for `tile`, which takes row_tiles row tiles a block, blocks_per_sm of which a multiprocessor holds: as many
/// splits as fill the device once.
/// @throws std::invalid_argument on a split or a shape that no grid takes
template <class TTile>
[[nodiscard]] RecordDecodePlan<TTile> plan_record_decode(const char* who, const AttentionShape& shape,
                                                         const DeviceInfo& device, const TTile& tile, int row_tiles,
                                                         int blocks_per_sm, const RecordDecodeChoice<TTile>& choice) {
  const std::int64_t n_row_tile = row_tiles_of(shape), n_group = (n_row_tile + row_tiles - 1) / row_tiles;
  require(shape.n_head_kv <= 65535 && shape.batch * n_row_tile <= 65535, who, ": n_head_kv ", shape.n_head_kv,
          " and batch * n_query * group / 8 = ", shape.batch * n_row_tile, ", need at most 65535 of each");
  RecordDecodePlan<TTile> plan{.tile = tile};
  const std::int64_t n_block = std::int64_t{device.sm_count} * blocks_per_sm;
  plan.n_split = choice.n_split.value_or(static_cast<int>(
      std::clamp<std::int64_t>(n_block / (shape.batch * shape.n_head_kv * n_group), 1, kMaxRecordSplit)));
  require(plan.n_split >= 1 && plan.n_split <= kMaxRecordSplit, who, ": n_split ", plan.n_split, ", need 1 to ",
          kMaxRecordSplit);
  plan.n_row_tile = static_cast<int>(n_row_tile);
  plan.grid = dim3(static_cast<unsigned>(plan.n_split), static_cast<unsigned>(shape.n_head_kv),
                   static_cast<unsigned>(shape.batch * n_group));
  plan.combine_grid = dim3(static_cast<unsigned>(std::min<std::int64_t>(shape.n_query * shape.group(), kRowTile)),
                           plan.grid.y, static_cast<unsigned>(shape.batch * n_row_tile));
  plan.smem_bytes = tile.smem_bytes();
  plan.workspace_bytes = shape.batch * shape.n_head_kv * n_row_tile * plan.n_split * kRowTile * (shape.head_dim + 2) *
                         static_cast<std::int64_t>(sizeof(float));
  plan.overlap = choice.overlap && device.compute_capability >= 90;
  return plan;
}

}  // namespace detail
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <optional>
#include <span>
#include <utility>

#include "cuda/device/device_info.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/tq4_attention/combine.cuh"
#include "cuda/tq4_attention/decode.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"

/// Choice of the configuration, grid and workspace of a TQ4 decode call, and its launch.
namespace gemma4::cuda {

/// What a caller may fix instead of leaving it to the plan; tests walk over all of it.
struct Tq4DecodeChoice {
  std::optional<Tq4DecodeTile> tile = std::nullopt;
  std::optional<int> n_split = std::nullopt;
  bool overlap = true;  ///< programmatic dependent launch, where the device has it
};

/// How a call will run. Depends on the shape and the device, never on kv_len nor on buffer_len.
struct Tq4DecodePlan {
  Tq4DecodeTile tile{};
  int n_split = 1;     ///< blocks that share the keys of one unit
  int n_row_tile = 1;  ///< groups of eight query rows of a KV head
  dim3 grid{};
  dim3 combine_grid{};
  std::int64_t smem_bytes = 0;
  std::int64_t workspace_bytes = 0;
  bool overlap = false;  ///< each kernel may be set up while the one before it ends (PDL, sm_90)
};

/// @throws std::invalid_argument when no configuration fits the device
[[nodiscard]] inline Tq4DecodePlan plan_tq4_decode(const char* who, const AttentionShape& shape,
                                                   const DeviceInfo& device, const Tq4DecodeChoice& choice = {}) {
  Tq4DecodePlan plan;
  const auto fits = [&](const Tq4DecodeTile& tile) {
    return tile.head_dim == shape.head_dim && tile.smem_bytes() <= device.smem_limit_bytes;
  };
  if (choice.tile) {
    require(fits(*choice.tile), who, ": tile of head_dim ", choice.tile->head_dim, " with ", choice.tile->smem_bytes(),
            " B of shared memory, need head_dim ", shape.head_dim, " and at most ", device.smem_limit_bytes, " B");
    plan.tile = *choice.tile;
  } else {
    const auto found = std::find_if(kTq4DecodeTiles.begin(), kTq4DecodeTiles.end(), fits);
    require(found != kTq4DecodeTiles.end(), who, ": no tile for head_dim ", shape.head_dim, " fits ",
            device.smem_limit_bytes, " B of shared memory a block");
    plan.tile = *found;
  }
  const std::int64_t rows = shape.n_query * shape.group(),
                     n_row_tile = (rows + detail::kRowTile - 1) / detail::kRowTile;
  const std::int64_t n_unit = shape.batch * shape.n_head_kv * n_row_tile;
  require(shape.n_head_kv <= 65535 && shape.batch * n_row_tile <= 65535, who, ": n_head_kv ", shape.n_head_kv,
          " and batch * n_query * group / 8 = ", shape.batch * n_row_tile, ", need at most 65535 of each");
  const std::int64_t n_block = std::int64_t{device.sm_count} * plan.tile.blocks_per_sm;
  plan.n_split =
      choice.n_split.value_or(static_cast<int>(std::clamp<std::int64_t>(n_block / n_unit, 1, detail::kTq4MaxSplit)));
  require(plan.n_split >= 1 && plan.n_split <= detail::kTq4MaxSplit, who, ": n_split ", plan.n_split, ", need 1 to ",
          detail::kTq4MaxSplit);
  plan.n_row_tile = static_cast<int>(n_row_tile);
  plan.grid = dim3(static_cast<unsigned>(plan.n_split), static_cast<unsigned>(shape.n_head_kv),
                   static_cast<unsigned>(shape.batch * n_row_tile));
  plan.combine_grid =
      dim3(static_cast<unsigned>(std::min<std::int64_t>(rows, detail::kRowTile)), plan.grid.y, plan.grid.z);
  plan.smem_bytes = plan.tile.smem_bytes();
  plan.workspace_bytes =
      n_unit * plan.n_split * detail::kRowTile * (shape.head_dim + 2) * static_cast<std::int64_t>(sizeof(float));
  plan.overlap = choice.overlap && device.compute_capability >= 90;
  return plan;
}

namespace detail {

/// Calls body.template operator()<kTile>() for the tile of the list that equals `tile`.
template <class TBody>
void for_tq4_decode_tile(const Tq4DecodeTile& tile, TBody&& body) {
  const auto visit = [&]<std::size_t... kIndex>(std::index_sequence<kIndex...>) {
    return ((tile == kTq4DecodeTiles[kIndex] ? (body.template operator()<kTq4DecodeTiles[kIndex]>(), true) : false) ||
            ...);
  };
  require(visit(std::make_index_sequence<kTq4DecodeTiles.size()>{}),
          "tq4_attention: the tile is not in kTq4DecodeTiles");
}

inline void launch_tq4_decode(const Tq4DecodePlan& plan, const Tq4DecodeParams& params, bool byte_levels,
                              cudaStream_t stream) {
  for_tq4_decode_tile(plan.tile, [&]<Tq4DecodeTile kTile>() {
    const auto decode = [&]<class TTraits>() {
      Launch{.what = "tq4_decode_kernel",
             .grid = plan.grid,
             .block = TTraits::kThreads,
             .stream = stream,
             .overlap = plan.overlap,
             .smem_bytes = TTraits::kSmemBytes}(tq4_decode_kernel<TTraits>, params);
    };
    byte_levels ? decode.template operator()<Tq4DecodeTraits<kTile, true>>()
                : decode.template operator()<Tq4DecodeTraits<kTile, false>>();
    Launch{.what = "tq4_combine_kernel",
           .grid = plan.combine_grid,
           .block = kTq4CombineThreads,
           .stream = stream,
           .overlap = plan.overlap}(tq4_combine_kernel<kTile.head_dim>, params);
  });
}

/// What decode takes of a codec: the byte levels of both codebooks where it has them, else their tables.
[[nodiscard]] inline Tq4DecodeLevels decode_levels_of(const Tq4Codec& codec) {
  Tq4DecodeLevels levels{};
  if (codec.k_bytes() && codec.v_bytes()) {
    for (int i = 0; i < 2; ++i)
      levels.k_bytes[i] = codec.k_bytes()->bytes[i], levels.v_bytes[i] = codec.v_bytes()->bytes[i];
    levels.k_scale = codec.k_bytes()->step * 0x1p24f;
    levels.v_weight = 0x1p60f;
    levels.v_scale = codec.v_bytes()->step * 0x1p73f;
  } else {
    levels.k = level_table<F16>(codec.k_codebook());
    levels.v = level_table<Bf16>(codec.v_codebook());
  }
  return levels;
}

}  // namespace detail
}  // namespace gemma4::cuda

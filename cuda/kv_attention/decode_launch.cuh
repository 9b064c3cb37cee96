// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>

#include "cuda/device/device_info.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/kv_attention/decode.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/tq4_attention.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"

/// Choice of the configuration, grid and workspace of a decode call over one vector for K and V, and its launch.
namespace gemma4::cuda {

/// What a caller may fix instead of leaving it to the plan; tests walk over all of it.
struct KvDecodeChoice {
  std::optional<KvDecodeTile> tile = std::nullopt;
  std::optional<int> n_split = std::nullopt;
  bool overlap = true;  ///< programmatic dependent launch, where the device has it
};

/// How a call will run. Depends on the shape, the widths and the device, never on kv_len nor on buffer_len.
struct KvDecodePlan {
  KvDecodeTile tile{};
  int n_split = 1;     ///< blocks that share the keys of one unit
  int n_row_tile = 1;  ///< groups of eight query rows of a KV head
  dim3 grid{};
  dim3 combine_grid{};
  std::int64_t smem_bytes = 0;
  std::int64_t workspace_bytes = 0;
  bool overlap = false;  ///< each kernel may be set up while the one before it ends (PDL, sm_90)
};

/// @throws std::invalid_argument when no configuration fits the device
[[nodiscard]] inline KvDecodePlan plan_kv_decode(const char* who, const AttentionShape& shape, const KvOptions& format,
                                                 const DeviceInfo& device, const KvDecodeChoice& choice = {}) {
  KvDecodePlan plan;
  const std::int64_t rows = shape.n_query * shape.group(),
                     n_row_tile = (rows + detail::kRowTile - 1) / detail::kRowTile;
  const auto fits = [&](const KvDecodeTile& tile) {
    return tile.head_dim == shape.head_dim && tile.takes(format.v_bits, format.r_bits) &&
           tile.smem_bytes() <= device.smem_limit_bytes;
  };
  if (choice.tile) {
    require(fits(*choice.tile), who, ": tile of head_dim ", choice.tile->head_dim, " for ", choice.tile->v_bits,
            " and ", choice.tile->r_bits, " bits with ", choice.tile->smem_bytes(),
            " B of shared memory, need head_dim ", shape.head_dim, ", ", format.v_bits, " and ", format.r_bits,
            " bits and at most ", device.smem_limit_bytes, " B");
    plan.tile = *choice.tile;
  } else {
    const auto serves = [&](const KvDecodeTile& tile) { return fits(tile) && tile.is_measured(); };
    const auto suits = [&](const KvDecodeTile& tile) {
      return serves(tile) && (tile.row_tiles > 1) == (n_row_tile > 1);
    };
    auto found = std::find_if(kKvDecodeTiles.begin(), kKvDecodeTiles.end(), suits);
    if (found == kKvDecodeTiles.end()) found = std::find_if(kKvDecodeTiles.begin(), kKvDecodeTiles.end(), serves);
    require(found != kKvDecodeTiles.end(), who, ": no tile for head_dim ", shape.head_dim, " and ", format.v_bits,
            " and ", format.r_bits, " bits fits ", device.smem_limit_bytes, " B of shared memory a block");
    plan.tile = *found;
  }
  const std::int64_t n_group = (n_row_tile + plan.tile.row_tiles - 1) / plan.tile.row_tiles;
  const std::int64_t n_unit = shape.batch * shape.n_head_kv * n_row_tile;
  require(shape.n_head_kv <= 65535 && shape.batch * n_row_tile <= 65535, who, ": n_head_kv ", shape.n_head_kv,
          " and batch * n_query * group / 8 = ", shape.batch * n_row_tile, ", need at most 65535 of each");
  plan.n_split = choice.n_split.value_or(static_cast<int>(std::clamp<std::int64_t>(
      std::int64_t{device.sm_count} / (shape.batch * shape.n_head_kv * n_group), 1, detail::kTq4MaxSplit)));
  require(plan.n_split >= 1 && plan.n_split <= detail::kTq4MaxSplit, who, ": n_split ", plan.n_split, ", need 1 to ",
          detail::kTq4MaxSplit);
  plan.n_row_tile = static_cast<int>(n_row_tile);
  plan.grid = dim3(static_cast<unsigned>(plan.n_split), static_cast<unsigned>(shape.n_head_kv),
                   static_cast<unsigned>(shape.batch * n_group));
  plan.combine_grid = dim3(static_cast<unsigned>(std::min<std::int64_t>(rows, detail::kRowTile)), plan.grid.y,
                           static_cast<unsigned>(shape.batch * n_row_tile));
  plan.smem_bytes = plan.tile.smem_bytes();
  plan.workspace_bytes =
      n_unit * plan.n_split * detail::kRowTile * (shape.head_dim + 2) * static_cast<std::int64_t>(sizeof(float));
  plan.overlap = choice.overlap && device.compute_capability >= 90;
  return plan;
}

namespace detail {

/// Calls body.template operator()<kTile>() for the tile of the list that equals `tile`.
template <class TBody>
void for_kv_decode_tile(const KvDecodeTile& tile, TBody&& body) {
  const auto visit = [&]<std::size_t... kIndex>(std::index_sequence<kIndex...>) {
    return ((tile == kKvDecodeTiles[kIndex] ? (body.template operator()<kKvDecodeTiles[kIndex]>(), true) : false) ||
            ...);
  };
  require(visit(std::make_index_sequence<kKvDecodeTiles.size()>{}), "kv_attention: the tile is not in kKvDecodeTiles");
}

inline void launch_kv_decode(const KvDecodePlan& plan, const KvDecodeParams& params, cudaStream_t stream) {
  for_kv_decode_tile(plan.tile, [&]<KvDecodeTile kTile>() {
    using Traits = KvDecodeTraits<kTile>;
    Launch{.what = "kv_decode_kernel",
           .grid = plan.grid,
           .block = Traits::kThreads,
           .stream = stream,
           .overlap = plan.overlap,
           .smem_bytes = Traits::kSmemBytes}(kv_decode_kernel<Traits>, params);
    Launch{.what = "tq4_combine_kernel",
           .grid = plan.combine_grid,
           .block = kTq4CombineThreads,
           .stream = stream,
           .overlap = plan.overlap}(tq4_combine_kernel<kTile.head_dim>, params.base);
  });
}

/// What decode takes of a codec.
[[nodiscard]] inline KvDecodeLevels kv_decode_levels_of(const KvCodec& codec) {
  KvDecodeLevels levels{};
  const auto put = [](KvDecodeTable& table, const KvByteLevels& bytes) {
    for (int x = 0; x < 2; ++x) {
      for (int i = 0; i < 2; ++i) table.even[x][i] = bytes.even[x][i], table.odd[x][i] = bytes.odd[x][i];
    }
  };
  put(levels.v, codec.v_bytes());
  put(levels.r, codec.r_bytes());
  levels.v_unit = codec.v_bytes().step * 0x1p24f;
  levels.r_unit = codec.r_bytes().step * 0x1p24f;
  levels.v_weight = 0x1p60f;  // weights below 2^8 and norms below 2^16 against the 2^-133 of the levels
  return levels;
}

/// Of the output: the unit of V's levels over v_weight.
[[nodiscard]] inline float kv_output_scale(const KvCodec& codec) {
  return codec.v_bytes().step * 0x1p73f;
}

}  // namespace detail
}  // namespace gemma4::cuda

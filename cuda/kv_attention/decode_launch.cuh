// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <span>

#include "cuda/device/device_info.cuh"
#include "cuda/device/for_listed.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/flash/record_decode.cuh"
#include "cuda/kv_attention/decode.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/tq4_attention.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"

/// Choice of the configuration, grid and workspace of a decode call over one vector for K and V, and its launch.
namespace gemma4::cuda {

using KvDecodeChoice = RecordDecodeChoice<KvDecodeTile>;
using KvDecodePlan = RecordDecodePlan<KvDecodeTile>;

/// @throws std::invalid_argument when no configuration fits the device
[[nodiscard]] inline KvDecodePlan plan_kv_decode(const char* who, const AttentionShape& shape, const KvOptions& format,
                                                 const DeviceInfo& device, const KvDecodeChoice& choice = {}) {
  const bool several = detail::row_tiles_of(shape) > 1;
  const auto fits = [&](const KvDecodeTile& tile) {
    return tile.head_dim == shape.head_dim && tile.takes(format.v_bits, format.r_bits) &&
           tile.smem_bytes() <= device.smem_limit_bytes;
  };
  const auto suits = [&](const KvDecodeTile& tile) { return fits(tile) && (tile.row_tiles > 1) == several; };
  const auto plan = [&](const KvDecodeTile& tile) {
    return detail::plan_record_decode(who, shape, device, tile, tile.row_tiles, 1, choice);
  };
  if (choice.tile) {
    require(fits(*choice.tile), who, ": tile of head_dim ", choice.tile->head_dim, " for ", choice.tile->v_bits,
            " and ", choice.tile->r_bits, " bits with ", choice.tile->smem_bytes(),
            " B of shared memory, need head_dim ", shape.head_dim, ", ", format.v_bits, " and ", format.r_bits,
            " bits and at most ", device.smem_limit_bytes, " B");
    return plan(*choice.tile);
  }
  auto found = std::find_if(kKvDecodeTiles.begin(), kKvDecodeTiles.end(), suits);
  if (found == kKvDecodeTiles.end()) found = std::find_if(kKvDecodeTiles.begin(), kKvDecodeTiles.end(), fits);
  require(found != kKvDecodeTiles.end(), who, ": no tile for head_dim ", shape.head_dim, " and ", format.v_bits,
          " and ", format.r_bits, " bits fits ", device.smem_limit_bytes, " B of shared memory a block");
  return plan(*found);
}

namespace detail {

inline void launch_kv_decode(const KvDecodePlan& plan, const KvDecodeParams& params, cudaStream_t stream) {
  const auto launch = [&]<KvDecodeTile kTile>() {
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
  };
  for_listed<kKvDecodeTiles>(plan.tile, "kv_attention: the tile is not in kKvDecodeTiles", launch);
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

/// What the kernels are told of a KvAttentionCall.
template <class TCall>
[[nodiscard]] KvDecodeParams kv_decode_params(const TCall& call, const AttentionShape& shape, const KvDecodePlan& plan,
                                              std::span<std::byte> workspace, unsigned long long* work_count) {
  KvDecodeParams params;
  params.base = record_decode_params(call, shape, plan, workspace, work_count);
  params.base.cache = {nullptr, shape.batch, shape.n_head_kv, shape.buffer_len, shape.head_dim};
  params.base.rotation = call.codec.params().v_rotation;
  params.base.levels.v_scale = kv_output_scale(call.codec);
  params.records = call.cache.data;
  params.v_bits = call.cache.v_bits;
  params.r_bits = call.cache.r_bits;
  params.k_weight = call.k_weight;
  params.r_rotation = call.codec.params().r_rotation;
  params.levels = kv_decode_levels_of(call.codec);
  return params;
}

}  // namespace detail
}  // namespace gemma4::cuda

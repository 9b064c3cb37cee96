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
#include "cuda/tq4_attention/combine.cuh"
#include "cuda/tq4_attention/decode.cuh"
#include "cuda/tq4_attention/record_call.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"

/// Choice of the configuration, grid and workspace of a TQ4 decode call, and its launch.
namespace gemma4::cuda {

using Tq4DecodeChoice = RecordDecodeChoice<Tq4DecodeTile>;
using Tq4DecodePlan = RecordDecodePlan<Tq4DecodeTile>;

/// @throws std::invalid_argument when no configuration fits the device
[[nodiscard]] inline Tq4DecodePlan plan_tq4_decode(const char* who, const AttentionShape& shape,
                                                   const DeviceInfo& device, const Tq4DecodeChoice& choice = {}) {
  const auto fits = [&](const Tq4DecodeTile& tile) {
    return tile.head_dim == shape.head_dim && tile.smem_bytes() <= device.smem_limit_bytes;
  };
  const auto plan = [&](const Tq4DecodeTile& tile) {
    return detail::plan_record_decode(who, shape, device, tile, 1, tile.blocks_per_sm, choice);
  };
  if (choice.tile) {
    require(fits(*choice.tile), who, ": tile of head_dim ", choice.tile->head_dim, " with ", choice.tile->smem_bytes(),
            " B of shared memory, need head_dim ", shape.head_dim, " and at most ", device.smem_limit_bytes, " B");
    return plan(*choice.tile);
  }
  const auto found = std::find_if(kTq4DecodeTiles.begin(), kTq4DecodeTiles.end(), fits);
  require(found != kTq4DecodeTiles.end(), who, ": no tile for head_dim ", shape.head_dim, " fits ",
          device.smem_limit_bytes, " B of shared memory a block");
  return plan(*found);
}

namespace detail {

/// @tparam TTraits of the decode kernel
template <class TTraits>
void launch_tq4_kernels(const Tq4DecodePlan& plan, const Tq4DecodeParams& params, cudaStream_t stream) {
  Launch{.what = "tq4_decode_kernel",
         .grid = plan.grid,
         .block = TTraits::kThreads,
         .stream = stream,
         .overlap = plan.overlap,
         .smem_bytes = TTraits::kSmemBytes}(tq4_decode_kernel<TTraits>, params);
  Launch{.what = "tq4_combine_kernel",
         .grid = plan.combine_grid,
         .block = kTq4CombineThreads,
         .stream = stream,
         .overlap = plan.overlap}(tq4_combine_kernel<TTraits::kHeadDim, TTraits::kOfRows>, params);
}

inline void launch_tq4_decode(const Tq4DecodePlan& plan, const Tq4DecodeParams& params, bool byte_levels,
                              cudaStream_t stream) {
  const auto launch = [&]<Tq4DecodeTile kTile>() {
    byte_levels ? launch_tq4_kernels<Tq4DecodeTraits<kTile, true>>(plan, params, stream)
                : launch_tq4_kernels<Tq4DecodeTraits<kTile, false>>(plan, params, stream);
  };
  for_listed<kTq4DecodeTiles>(plan.tile, "tq4_attention: the tile is not in kTq4DecodeTiles", launch);
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

/// What the kernels are told of a Tq4AttentionCall.
template <class TCall>
[[nodiscard]] Tq4DecodeParams tq4_decode_params(const TCall& call, const AttentionShape& shape,
                                                const Tq4DecodePlan& plan, std::span<std::byte> workspace,
                                                unsigned long long* work_count) {
  Tq4DecodeParams params = record_decode_params(call, shape, plan, workspace, work_count);
  params.cache = call.cache;
  params.rotation = call.codec.rotation().params();
  params.levels = decode_levels_of(call.codec);
  return params;
}

}  // namespace detail
}  // namespace gemma4::cuda

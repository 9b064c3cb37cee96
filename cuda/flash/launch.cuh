// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <optional>
#include <span>

#include "cuda/device/device_info.cuh"
#include "cuda/device/for_listed.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/flash/combine.cuh"
#include "cuda/flash/mma_load.cuh"
#include "cuda/flash/mma_sync.cuh"
#include "cuda/flash/wgmma_256.cuh"
#include "cuda/flash/wgmma_512.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"
#include "gemma4/view.hpp"

/// Choice of the kernel, grid and workspace of an attention over bf16 keys, and its launch. Shared by bf16_attention,
/// sliding_attention and the prefill of tq4_attention; host code that can be tested without a GPU up to the launch.
namespace gemma4::cuda {

enum class FlashPath {
  kDecode,   ///< mma.sync, few rows, keys split over blocks
  kPrefill,  ///< mma.sync, any shape and mask
  kWgmma,    ///< sm_90a, head_dim 256 and 512
};

[[nodiscard]] constexpr const char* to_string(FlashPath path) {
  return path == FlashPath::kDecode ? "decode" : path == FlashPath::kPrefill ? "prefill" : "wgmma";
}

/// What a caller may fix instead of leaving it to the plan; tests walk over all of it.
struct FlashChoice {
  std::optional<FlashPath> path = std::nullopt;
  std::optional<FlashTile> tile = std::nullopt;
  std::optional<int> n_split = std::nullopt;
  bool overlap = true;  ///< programmatic dependent launch of the mma.sync kernels, where the device has it
};

/// How a call will run. Depends on the shape, the options' kind and the device, never on kv_len.
struct FlashPlan {
  AttentionShape shape;
  FlashPath path = FlashPath::kPrefill;
  FlashTile tile{};  ///< of the mma.sync kernels
  int n_split = 1;
  const char* misfit = nullptr;  ///< why the wgmma kernels do not take it; null: they would
  bool overlap = false;          ///< the mma.sync kernels are launched under the end of the kernel before
  dim3 grid{};
  int n_thread = 0;
  std::int64_t smem_bytes = 0;
  std::int64_t workspace_bytes = 0;
};

namespace detail {

inline constexpr std::int64_t kDecodeRows = 64;  ///< query rows of a KV head up to which keys are split over blocks
/// The same for the rows of all heads together: so few wgmma blocks would leave most multiprocessors idle, each with
/// all keys to itself.
inline constexpr std::int64_t kDecodeRowsOfAllHeads = 512;

/// Refuses what no call of this shape can accept, whatever its kv_len turns out to be.
inline void require_plannable(const char* who, const AttentionShape& shape, AttentionOptions options) {
  options.causal = false;
  require_attention(who, shape, options, 0);
}

/// Why the wgmma kernels do not take the shape; null: they do. `ring_len` 0: a flat cache.
[[nodiscard]] inline const char* wgmma_misfit(const AttentionShape& shape, const AttentionOptions& options,
                                              std::int64_t ring_len, const DeviceInfo& device) {
  const std::int64_t smem = shape.head_dim == 512 ? Flash512::kSmemBytes : Flash256::kSmemBytes;
  const bool known = shape.head_dim == 256 || (shape.head_dim == 512 && ring_len == 0);
  if (device.compute_capability != 90) return "the device is not sm_90";
  if (!known) return "head_dim is not 256 or, flat, 512";
  if (!wgmma_group(shape.group())) return "the GQA group is no power of two up to 64";
  if (options.mask) return "there is a mask";
  if (!(options.scale > 0)) return "the scale is not positive";
  if (ring_len % kWgmmaKeys != 0) return "the ring is not whole tiles of keys";
  if (device.smem_limit_bytes < smem) return "the tiles do not fit into shared memory";
  return nullptr;
}

/// The first tile of the list for this head_dim and kind that fits; refuses when none does.
[[nodiscard]] inline FlashTile choose_tile(const char* who, std::int64_t head_dim, bool decode,
                                           std::int64_t smem_limit) {
  for (const FlashTile& tile : kFlashTiles) {
    if (tile.head_dim == head_dim && (tile.warps_m == 1) == decode && tile.smem_bytes() <= smem_limit) return tile;
  }
  require(false, who, ": no tile for head_dim ", head_dim, " fits ", smem_limit, " B of shared memory a block");
  return {};
}

[[nodiscard]] inline std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

[[nodiscard]] inline FlashPlan plan_flash(const char* who, const AttentionShape& shape, const AttentionOptions& options,
                                          std::int64_t ring_len, const DeviceInfo& device, const FlashChoice& choice) {
  require(shape.buffer_len < kNoWindow, who, ": buffer_len ", shape.buffer_len, ", need below ", kNoWindow);
  FlashPlan plan{.shape = shape};
  plan.overlap = choice.overlap && device.compute_capability >= 90;
  const std::int64_t rows = shape.n_query * shape.group(), heads = shape.batch * shape.n_head_kv;
  require(heads <= 65535, who, ": batch * n_head_kv is ", heads, ", need at most 65535");
  plan.misfit = wgmma_misfit(shape, options, ring_len, device);
  const bool wgmma = plan.misfit == nullptr;
  plan.path = choice.path.value_or(rows <= kDecodeRows || rows * heads <= kDecodeRowsOfAllHeads ? FlashPath::kDecode
                                   : wgmma                                                      ? FlashPath::kWgmma
                                                                                                : FlashPath::kPrefill);
  if (plan.path == FlashPath::kWgmma) {
    require(wgmma, who,
            ": the wgmma kernels take head_dim 256 or 512 (flat), a power-of-two group up to 64, no mask, a",
            " positive scale and sm_90; asked for head_dim ", shape.head_dim, ", group ", shape.group(), ", sm_",
            device.compute_capability);
    const bool wide = shape.head_dim == 512;
    const std::int64_t blocks = divide_up(rows, wide ? Flash512::kRows : Flash256::kRows);
    plan.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(heads));
    plan.n_thread = wide ? Flash512::kThreads : Flash256::kThreads;
    plan.smem_bytes = wide ? Flash512::kSmemBytes : Flash256::kSmemBytes;
    return plan;
  }
  plan.tile =
      choice.tile.value_or(choose_tile(who, shape.head_dim, plan.path == FlashPath::kDecode, device.smem_limit_bytes));
  require(plan.tile.head_dim == shape.head_dim, who, ": tile of head_dim ", plan.tile.head_dim, " for head_dim ",
          shape.head_dim);
  require(plan.tile.smem_bytes() <= device.smem_limit_bytes, who, ": tile needs ", plan.tile.smem_bytes(),
          " B of shared memory, the device gives ", device.smem_limit_bytes);
  const std::int64_t row_tiles = divide_up(rows, plan.tile.rows());
  // Two blocks a multiprocessor: one computes while the other's tile is on its way.
  plan.n_split = choice.n_split.value_or(
      plan.path == FlashPath::kDecode
          ? static_cast<int>(std::max<std::int64_t>(1, 2 * device.sm_count / (row_tiles * heads)))
          : 1);
  require(plan.n_split >= 1 && plan.n_split <= 65535, who, ": n_split ", plan.n_split, ", need 1 to 65535");
  plan.grid = dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(heads), static_cast<unsigned>(plan.n_split));
  plan.n_thread = plan.tile.n_thread();
  plan.smem_bytes = plan.tile.smem_bytes();
  if (plan.n_split > 1) plan.workspace_bytes = plan.n_split * heads * rows * (shape.head_dim + 2) * 4;
  return plan;
}

template <FlashTile kTile>
void launch_mma(const FlashPlan& plan, const FlashParams& params, cudaStream_t stream) {
  Launch{.what = "flash_mma_kernel",
         .grid = plan.grid,
         .block = static_cast<unsigned>(plan.n_thread),
         .stream = stream,
         .overlap = plan.overlap,
         .smem_bytes = plan.smem_bytes}(flash_mma_kernel<FlashMmaTraits<kTile>>, params);
  if (plan.n_split == 1) return;
  Launch{.what = "flash_combine_kernel",
         .grid = dim3(static_cast<unsigned>(params.n_query * params.group), plan.grid.y),
         .block = kTile.head_dim / 4 * kCombineGroups,
         .stream = stream,
         .overlap = plan.overlap}(flash_combine_kernel<kTile.head_dim>, params);
}

/// Whether the kernel of this plan can apply a transform other than NoTransform.
[[nodiscard]] inline bool transforms_inside(const FlashPlan& plan) {
  return plan.path == FlashPath::kWgmma && plan.shape.head_dim == Flash512::kHeadDim;
}

/// The maps of a call: boxes as the kernel of its head_dim loads them.
[[nodiscard]] inline FlashMaps flash_maps(const AttentionShape& shape, const FlashParams& params) {
  FlashMaps maps{};
  const bool wide = shape.head_dim == 512;
  maps.q = query_map("q", params.q, params.q_stride, shape, wide ? Flash512::kRows : Flash256::kRows, 4);
  maps.out = query_map("out", params.out, params.out_stride, shape, 64, wide ? 4 : 1);
  if (wide) {
    maps.k = key_map("k", params.fresh.k, params.fresh.k_stride, shape, params.max_kv_end, kWgmmaKeys, 2);
    maps.v = key_map("v", params.fresh.v, params.fresh.v_stride, shape, params.max_kv_end, 16, 8);
    return maps;
  }
  const std::int64_t n_fresh = params.ring_len > 0 ? params.n_query : params.max_kv_end;
  maps.k = key_map("k", params.fresh.k, params.fresh.k_stride, shape, n_fresh, kWgmmaKeys, 4);
  maps.v = key_map("v", params.fresh.v, params.fresh.v_stride, shape, n_fresh, kWgmmaKeys, 4);
  maps.old_k = maps.k, maps.old_v = maps.v;
  if (params.ring_len > 0) {
    maps.old_k = key_map("ring_k", params.old.k, params.old.k_stride, shape, params.ring_len, kWgmmaKeys, 4);
    maps.old_v = key_map("ring_v", params.old.v, params.old.v_stride, shape, params.ring_len, kWgmmaKeys, 4);
  }
  return maps;
}

template <class TTransform>
void launch_wgmma(const FlashPlan& plan, const FlashParams& params, const TTransform& transform, cudaStream_t stream) {
  const FlashMaps maps = flash_maps(plan.shape, params);
  const Launch launch{.what = "flash_wgmma_kernel",
                      .grid = plan.grid,
                      .block = static_cast<unsigned>(plan.n_thread),
                      .stream = stream,
                      .smem_bytes = plan.smem_bytes};
  if (plan.shape.head_dim == Flash512::kHeadDim) {
    launch(flash_wgmma_512_kernel<Flash512, TTransform>, params, maps, transform);
  } else {
    launch(flash_wgmma_256_kernel<Flash256>, params, maps);
  }
}

/// Fills what every call sets alike, carves the workspace and launches.
/// @param transform of the queries and results, see NoTransform; another only where transforms_inside()
template <class TTransform = NoTransform>
void launch_flash(const char* who, const FlashPlan& plan, FlashParams params, const AttentionOptions& options,
                  std::span<std::byte> workspace, cudaStream_t stream, const TTransform& transform = {}) {
  const AttentionShape& shape = plan.shape;
  require(TTransform::kIsIdentity || transforms_inside(plan), who,
          ": no kernel of this plan transforms its queries; transform them before");
  require(static_cast<std::int64_t>(workspace.size()) >= plan.workspace_bytes, who, ": workspace ", workspace.size(),
          " B, need ", plan.workspace_bytes, " B for n_split = ", plan.n_split, "; size it with the plan");
  params.batch = static_cast<int>(shape.batch);
  params.n_query = static_cast<int>(shape.n_query);
  params.n_head_kv = static_cast<int>(shape.n_head_kv);
  params.group = static_cast<int>(shape.group());
  params.causal = options.causal;
  params.causal_skip = options.causal_skip;
  params.scale_log2 = options.scale * std::numbers::log2e_v<float>;
  if (options.mask) {
    params.mask = static_cast<const std::uint8_t*>(options.mask->data);
    params.mask_extent = options.mask->shape[3];
  }
  params.n_split = plan.n_split;
  params.partial_o = reinterpret_cast<float*>(workspace.data());
  params.partial_ml =
      params.partial_o + std::int64_t{plan.n_split} * shape.batch * shape.n_query * shape.n_head * shape.head_dim;
  if (plan.path == FlashPath::kWgmma) return launch_wgmma(plan, params, transform, stream);
  for_listed<kFlashTiles>(plan.tile, "flash attention: the tile is not in kFlashTiles",
                          [&]<FlashTile kTile>() { launch_mma<kTile>(plan, params, stream); });
}

template <class T>
void copy_strides(const View<T, 4>& view, std::int64_t (&stride)[3]) {
  for (int axis = 0; axis < 3; ++axis) stride[axis] = view.stride[axis];
}

/// Refuses rows that cannot be read 16 bytes at a time.
template <class T, int kRank>
void require_aligned(const char* who, const char* name, const View<T, kRank>& view) {
  require(reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0, who, ": ", name, " is not aligned to 16 bytes");
  for (int axis = 0; axis + 1 < kRank; ++axis) {
    require(view.stride[axis] * static_cast<std::int64_t>(sizeof(T)) % 16 == 0, who, ": ", name, " has stride ",
            view.stride[axis], " in axis ", axis, ", need a multiple of 16 bytes");
  }
}

}  // namespace detail
}  // namespace gemma4::cuda

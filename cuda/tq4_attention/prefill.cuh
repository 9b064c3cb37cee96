// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/bf16_attention.cuh"
#include "cuda/device/device_count.cuh"
#include "cuda/device/for_head_dim.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/rotation.cuh"
#include "cuda/tq4_attention/hadamard_transform.cuh"
#include "cuda/tq4_attention/record_call.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/checks.hpp"

/// Attention of many queries over a TQ4 cache: the cache is unpacked to bf16, still rotated, into a scratch buffer that
/// the bf16 flash kernels then read. Unpacking costs 0.3 ms for 4 heads of 131072 tokens against tens of milliseconds
/// of attention; doing it inside the flash kernel would repeat it for every 8 queries.
///
///   q' = R q;  K[j] = bf16(k_norm[j] * centroid[k_code[j]]), V alike;  out = R^T attention(q', K, V)
///
/// Heads go through the scratch in groups that fit it. The wgmma kernel of head_dim 512 rotates queries and results
/// itself; otherwise that is a pass before and one after, and the rotated ones live in `out`.
/// Roundings to bf16: q', K, V, the probabilities, the rotated result and the result.
namespace gemma4::cuda {

/// How a call will run.
struct Tq4PrefillPlan {
  AttentionShape shape;
  FlashChoice choice = {};
  DeviceInfo device;
  std::int64_t max_kv_len = 0;      ///< rows that the scratch holds for each head
  std::int64_t heads_per_pass = 1;  ///< KV heads of one sequence in the scratch at a time
  std::int64_t scratch_bytes = 0;   ///< of K and of V together, at the start of the workspace
  std::int64_t workspace_bytes = 0;
};

inline constexpr std::int64_t kTq4PrefillScratch = std::int64_t{256} << 20;  ///< one head of 131072 tokens at 512 dims

/// @param max_kv_len    no call with this plan will have more valid rows; the shorter, the more heads run together
/// @param scratch_limit bytes of scratch to stay within, as long as one head fits
[[nodiscard]] inline Tq4PrefillPlan plan_tq4_attention_prefill(const AttentionShape& shape,
                                                               const AttentionOptions& options,
                                                               const DeviceInfo& device, std::int64_t max_kv_len,
                                                               std::int64_t scratch_limit = kTq4PrefillScratch,
                                                               const FlashChoice& choice = {}) {
  constexpr const char* kWho = "tq4_attention_prefill";
  detail::require_plannable(kWho, shape, options);
  require(max_kv_len >= 1 && max_kv_len <= shape.buffer_len, kWho, ": max_kv_len ", max_kv_len,
          " is outside [1, buffer_len = ", shape.buffer_len, "]");
  const std::int64_t rows = tq4_record_count(max_kv_len) * kTq4RecordTokens;
  const std::int64_t head_bytes = 2 * rows * shape.head_dim * static_cast<std::int64_t>(sizeof(Bf16));
  Tq4PrefillPlan plan{.shape = shape, .choice = choice, .device = device, .max_kv_len = max_kv_len};
  plan.heads_per_pass = std::clamp<std::int64_t>(scratch_limit / head_bytes, 1, shape.n_head_kv);
  plan.scratch_bytes = plan.heads_per_pass * head_bytes;
  plan.workspace_bytes =
      plan.scratch_bytes + plan_bf16_attention(detail::pass_shape(shape, plan.heads_per_pass),
                                               detail::options_of_sequence(options, 0), device, choice)
                               .workspace_bytes;
  return plan;
}

/// The flash plan of one pass over n_head_kv heads of one sequence, heads_per_pass where nothing else is said.
[[nodiscard]] inline FlashPlan plan_tq4_pass(const Tq4PrefillPlan& plan, const AttentionOptions& options,
                                             std::optional<std::int64_t> n_head_kv = std::nullopt) {
  AttentionShape pass = detail::pass_shape(plan.shape, n_head_kv.value_or(plan.heads_per_pass));
  pass.buffer_len = plan.max_kv_len;
  return plan_bf16_attention(pass, detail::options_of_sequence(options, 0), plan.device, plan.choice);
}

namespace detail {

struct Tq4UnpackParams {
  ConstTq4Records cache;
  Tq4SideParams k_side, v_side;
  Bf16* k = nullptr;  ///< [n_head, rows, head_dim]
  Bf16* v = nullptr;
  std::int64_t rows = 0;
  int batch = 0, head0 = 0;
  const std::int32_t* kv_len = nullptr;  ///< null: kv_len_host
  int kv_len_host = 0;
};

/// One side of one record into shared memory, dequantised and scaled: tile [16][head_dim + 8].
template <int kHeadDim, bool kKeys>
__device__ __forceinline__ void unpack_side(const std::byte* record, const float* levels, Bf16* tile, int thread,
                                            int n_thread) {
  constexpr int kStride = kHeadDim + 8;  // 16 bytes more: neighbouring rows start in different banks
  const auto* const words = reinterpret_cast<const std::uint32_t*>(record + (kKeys ? 0 : tq4_v_codes_offset(kHeadDim)));
  const auto* const norms =
      reinterpret_cast<const Tq4Norm*>(record + (kKeys ? tq4_k_norms_offset(kHeadDim) : tq4_v_norms_offset(kHeadDim)));
  for (int piece = thread; piece < kHeadDim / 2; piece += n_thread) {
    const uint4 four = __ldcs(reinterpret_cast<const uint4*>(words) + piece);
    const std::uint32_t word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float value[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) value[e] = levels[tq4_element_index(word[i], e)];
      if constexpr (kKeys) {
        const Tq4Source from = tq4_k_source(kHeadDim, 4 * piece + i, 0);
        const float norm = to_float(norms[from.token]);
        *reinterpret_cast<uint4*>(tile + from.token * kStride + from.dim) =
            make_uint4(pack_bf16(norm * value[0], norm * value[1]), pack_bf16(norm * value[2], norm * value[3]),
                       pack_bf16(norm * value[4], norm * value[5]), pack_bf16(norm * value[6], norm * value[7]));
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const Tq4Source from = tq4_v_source(4 * piece + i, e);
          tile[from.token * kStride + from.dim] = to_bf16(to_float(norms[from.token]) * value[e]);
        }
      }
    }
  }
}

/// Decodes the valid records of some heads into bf16 rows, still rotated. grid: x over records, y = head.
template <int kHeadDim>
__global__ void __launch_bounds__(256) tq4_unpack_kernel(const __grid_constant__ Tq4UnpackParams params) {
  constexpr int kStride = kHeadDim + 8, kChunks = kHeadDim / 8;
  __shared__ __align__(16) Bf16 tile[2][16 * kStride];
  __shared__ float levels[2][16];
  if (threadIdx.x < 16) levels[0][threadIdx.x] = params.k_side.centroids[threadIdx.x];
  if (threadIdx.x >= 32 && threadIdx.x < 48) levels[1][threadIdx.x - 32] = params.v_side.centroids[threadIdx.x - 32];
  const std::int64_t kv_len = params.kv_len != nullptr ? *params.kv_len : params.kv_len_host;
  const std::int64_t n_record = (min(kv_len, params.rows) + 15) / 16;
  const int side = threadIdx.x / 128, thread = threadIdx.x % 128;
  for (std::int64_t r = blockIdx.x; r < n_record; r += gridDim.x) {
    __syncthreads();
    const std::byte* const record = params.cache.record(params.batch, params.head0 + blockIdx.y, r);
    if (side == 0) {
      unpack_side<kHeadDim, true>(record, levels[0], tile[0], thread, 128);
    } else {
      unpack_side<kHeadDim, false>(record, levels[1], tile[1], thread, 128);
    }
    __syncthreads();
    Bf16* const target = (side == 0 ? params.k : params.v) + (blockIdx.y * params.rows + r * 16) * kHeadDim;
    for (int item = thread; item < 16 * kChunks; item += 128) {
      reinterpret_cast<uint4*>(target)[item] =
          *reinterpret_cast<const uint4*>(tile[side] + item / kChunks * kStride + item % kChunks * 8);
    }
  }
}

}  // namespace detail

/// What a call of attention over a TQ4 cache attends with, to and into.
struct Tq4AttentionCall {
  View<const Bf16, 4> q;  ///< [batch, n_query, n_head, head_dim], not rotated; may be `out` itself
  ConstTq4Records cache;  ///< records of [batch, n_head_kv, buffer_len]; tokens >= kv_len never reach the result
  const Tq4Codec& codec;  ///< the one that compressed the cache
  AttentionOptions options;
  /// Valid tokens, read by the kernel from the device or given by the host; absent: all. A number on the device outside
  /// [0, buffer_len] counts as the nearer end. A mask must cover what the host knows: kv_len keys, or the buffer where
  /// only the device has kv_len.
  DeviceCount kv_len;
  View<Bf16, 4> out;  ///< [batch, n_query, n_head, head_dim]
};

namespace detail {

inline void require_tq4_prefill(const char* who, const Tq4AttentionCall& call, const Tq4PrefillPlan& plan,
                                std::int64_t workspace_bytes) {
  const auto& [q, cache, codec, options, kv_len, out] = call;
  const AttentionShape& shape = plan.shape;
  require_tq4_records(who, cache);
  require(codec.head_dim() == cache.head_dim, who, ": codec of head_dim ", codec.head_dim(), ", the cache has ",
          cache.head_dim);
  require(cache.batch == shape.batch && cache.n_head_kv == shape.n_head_kv && cache.buffer_len == shape.buffer_len &&
              cache.head_dim == shape.head_dim,
          who, ": the cache is [", cache.batch, ", ", cache.n_head_kv, ", ", cache.buffer_len, ", ", cache.head_dim,
          "], the plan is of [", shape.batch, ", ", shape.n_head_kv, ", ", shape.buffer_len, ", ", shape.head_dim, "]");
  const std::int64_t extents[4] = {shape.batch, shape.n_query, shape.n_head, shape.head_dim};
  require_extents(who, "q", q, extents);
  require_extents(who, "out", out, extents);
  require_attention(who, shape, options, kv_len.known() ? std::optional<std::int64_t>(kv_len.host) : std::nullopt);
  require_planned_rows(who, kv_len, plan.max_kv_len, shape.buffer_len);
  require(workspace_bytes >= plan.workspace_bytes, who, ": workspace ", workspace_bytes, " B, need ",
          plan.workspace_bytes, " B; size it with plan_tq4_attention_prefill()");
}

/// Everything of a pass over some KV heads of one sequence but which ones.
struct Tq4PrefillPasses {
  const Tq4AttentionCall& call;
  const Tq4PrefillPlan& plan;
  std::span<std::byte> workspace;  ///< of the flash kernels, behind the scratch
  cudaStream_t stream;
  unsigned long long* tile_count;
  std::int64_t rows;  ///< of a head in the scratch
  bool inside;        ///< the kernel rotates queries and results itself; else `out` holds rotated queries

  void unpack(const Tq4UnpackParams& params, std::int64_t n_head_kv) const {
    const dim3 grid(static_cast<unsigned>(std::min<std::int64_t>(rows / kTq4RecordTokens, 8 * plan.device.sm_count)),
                    static_cast<unsigned>(n_head_kv));
    for_head_dim("tq4_attention_prefill", plan.shape.head_dim, [&](auto head_dim) {
      Launch{.what = "tq4_unpack_kernel", .grid = grid, .block = 256, .stream = stream}(
          tq4_unpack_kernel<decltype(head_dim)::value>, params);
    });
  }

  void attend(const Tq4UnpackParams& unpacked, std::int64_t n_head_kv) const {
    const UnpackedHeads heads{.k = unpacked.k,
                              .v = unpacked.v,
                              .rows = rows,
                              .max_kv_len = plan.max_kv_len,
                              .batch = unpacked.batch,
                              .head0 = unpacked.head0,
                              .n_head = n_head_kv};
    const View<const Bf16, 4> rotated = call.out;
    const FlatAttentionCall flat = attention_of_pass(call, inside ? call.q : rotated, heads);
    const char* const who = "tq4_attention_prefill";
    const FlashPlan flash = plan_tq4_pass(plan, call.options, n_head_kv);
    if (inside) {
      attend_flat(who, flat, flash, workspace, stream, tile_count, HadamardTransform{call.codec.rotation().params()});
    } else {
      attend_flat(who, flat, flash, workspace, stream, tile_count);
    }
  }
};

}  // namespace detail

/// Attention over a TQ4 cache for any n_query: the contract of gemma4/attention.hpp.
/// @param call      kv_len is at most plan.max_kv_len
/// @param workspace at least plan.workspace_bytes, 16-byte aligned
/// @throws std::invalid_argument naming the argument and both values, before any launch
inline void tq4_attention_prefill(const Tq4AttentionCall& call, const Tq4PrefillPlan& plan,
                                  std::span<std::byte> workspace, cudaStream_t stream,
                                  unsigned long long* tile_count = nullptr) {
  detail::require_tq4_prefill("tq4_attention_prefill", call, plan, static_cast<std::int64_t>(workspace.size()));
  const AttentionShape& shape = plan.shape;
  const Tq4Codec& codec = call.codec;
  detail::Tq4PrefillPasses passes{.call = call,
                                  .plan = plan,
                                  .workspace = workspace.subspan(static_cast<std::size_t>(plan.scratch_bytes)),
                                  .stream = stream,
                                  .tile_count = tile_count,
                                  .rows = tq4_record_count(plan.max_kv_len) * kTq4RecordTokens,
                                  .inside = false};
  passes.inside = detail::transforms_inside(plan_tq4_pass(plan, call.options, 1)) &&
                  codec.rotation().kind() == RotationKind::kSignedHadamard;
  if (!passes.inside) rotate_forward(codec.rotation(), call.q, call.out, stream);
  detail::Tq4UnpackParams unpack{.cache = call.cache, .k_side = codec.params().k, .v_side = codec.params().v};
  unpack.rows = passes.rows;
  unpack.k = reinterpret_cast<Bf16*>(workspace.data());
  unpack.v = unpack.k + plan.heads_per_pass * passes.rows * shape.head_dim;
  unpack.kv_len = call.kv_len.device;
  unpack.kv_len_host = static_cast<int>(call.kv_len.known() ? call.kv_len.host : plan.max_kv_len);
  for (std::int64_t item = 0; item < shape.batch * shape.n_head_kv;) {
    const std::int64_t head0 = item % shape.n_head_kv;
    const std::int64_t n_head_kv = std::min(plan.heads_per_pass, shape.n_head_kv - head0);
    unpack.batch = static_cast<int>(item / shape.n_head_kv);
    unpack.head0 = static_cast<int>(head0);
    passes.unpack(unpack, n_head_kv);
    passes.attend(unpack, n_head_kv);
    item += n_head_kv;
  }
  if (!passes.inside) rotate_inverse<Bf16, Bf16>(codec.rotation(), call.out, call.out, stream);
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <optional>
#include <type_traits>

#include "cuda/device/device_count.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/qkv_prologue.cuh"
#include "cuda/rope.cuh"
#include "cuda/sliding_decode/kernel.cuh"
#include "cuda/sliding_decode/rows_kernel.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/step_limits.hpp"
#include "gemma4/view.hpp"

/// A decode step of a sliding layer in one launch, from the projections of q, k and v to the result of attention:
///   q = rope(rms_norm(q, q_norm)),  k = rope(rms_norm(k, k_norm)),  v = rms_norm(v),  each rounded once to bf16;
///   k and v into the ring's slot of the position;
///   out[h] = sum_j p[j] V[j],  p = softmax_j(scale * <q[h], K[j]>)  over the keys j in (position - window, position].
/// q, k and v have the bits of qkv_prologue(); scores, weights and sums are float, in an order that depends on the
/// shape, n_split and the number of keys alone. cuda/sliding_decode/kernel.cuh says how.
///
/// A layer of the 31B (32 + 16 heads of 256, window 1024) reads 16.8 MB of keys and values: 4.0 us at 4.2 TB/s. On an
/// H200 it takes 7.6 us behind itself (`attention`, phase step); qkv_prologue() and sliding_attention(), three
/// launches, take longer (`ablation`, sliding_decode_fusion). The reference composes the same from its components
/// (reference/decoder_layer.hpp and layer_cache.hpp).
namespace gemma4::cuda {

/// How a decode step of a sliding layer will run. Where it does not fit, qkv_prologue() and sliding_attention() do it.
struct SlidingDecodePlan {
  AttentionShape shape;
  std::int64_t window = 1;
  const char* misfit = "nothing is planned";  ///< why there is no such launch; null: there is
  int n_split = 1;                            ///< blocks of a cluster
  int n_pair = 1;                             ///< pairs of query heads of a KV head, a cluster each
  std::int64_t smem_bytes = 0;
  [[nodiscard]] bool fits() const { return misfit == nullptr; }
};

namespace detail {

inline constexpr std::int64_t kRowsOfLaunch = SlidingRowsTraits<64>::kRows;
static_assert(2 * kRowsOfLaunch >= kDecodeChunk, "rows go in at most two launches");

/// body(head_dim as a constant), of a layer that fits.
template <class TBody>
auto for_sliding_head_dim(std::int64_t head_dim, TBody&& body) {
  if (head_dim == 64) return body(std::integral_constant<int, 64>{});
  if (head_dim == 128) return body(std::integral_constant<int, 128>{});
  return body(std::integral_constant<int, 256>{});
}

}  // namespace detail

/// Whether and how one token of such a layer goes in one launch; shape.buffer_len is the ring's length.
/// @param n_split blocks that share the keys of a KV head, 1, 2, 4 or 8; none: as many as the device has room for
[[nodiscard]] inline SlidingDecodePlan plan_sliding_decode(const AttentionShape& shape, std::int64_t window,
                                                           const DeviceInfo& device,
                                                           std::optional<int> n_split = std::nullopt) {
  SlidingDecodePlan plan{.shape = shape, .window = window, .misfit = nullptr};
  plan.n_pair = static_cast<int>((shape.group() + 1) / 2);
  const std::int64_t clusters = shape.n_head_kv * plan.n_pair;
  plan.n_split = detail::kSlidingDecodeSplits;
  while (plan.n_split > 1 && clusters * plan.n_split > device.sm_count) plan.n_split /= 2;
  if (n_split) plan.n_split = *n_split;
  plan.smem_bytes = detail::for_sliding_head_dim(shape.head_dim, [](auto head_dim) {
    return static_cast<std::int64_t>(sizeof(detail::SlidingDecodeSmem<detail::SlidingDecodeTraits<head_dim>>));
  });
  if (device.compute_capability < 90) {
    plan.misfit = "the device has no clusters";
  } else if (shape.batch != 1 || shape.n_query != 1) {
    plan.misfit = "it is not one token";
  } else if (shape.head_dim != 64 && shape.head_dim != 128 && shape.head_dim != 256) {
    plan.misfit = "head_dim is not 64, 128 or 256";
  } else if (window > std::int64_t{plan.n_split} * detail::kSlidingDecodeKeys) {
    plan.misfit = "the window is wider than 128 keys a block";
  } else if (shape.buffer_len < window) {
    plan.misfit = "the ring has no slot beside the window's old keys";
  } else if (plan.smem_bytes > device.smem_limit_bytes) {
    plan.misfit = "the keys do not fit into shared memory";
  }
  return plan;
}

/// How several neighbouring tokens of such a layer go, each with the bits of a launch of its own.
struct SlidingRowsPlan {
  SlidingDecodePlan one = {};                 ///< of a row
  std::int64_t n_row = 0;                     ///< 2 to kDecodeChunk
  const char* misfit = "nothing is planned";  ///< why they go one by one; null: up to four a launch
  std::int64_t smem_bytes = 0;
  [[nodiscard]] bool fits() const { return misfit == nullptr; }
};

/// @param one of plan_sliding_decode(): keys are split as for one row, whose order of sums depends on it
[[nodiscard]] inline SlidingRowsPlan plan_sliding_rows(const SlidingDecodePlan& one, std::int64_t n_row,
                                                       const DeviceInfo& device) {
  SlidingRowsPlan plan{.one = one, .n_row = n_row, .misfit = one.misfit};
  if (!one.fits()) return plan;
  plan.smem_bytes = detail::for_sliding_head_dim(one.shape.head_dim, [](auto head_dim) {
    return static_cast<std::int64_t>(sizeof(detail::SlidingRowsSmem<detail::SlidingRowsTraits<head_dim>>));
  });
  if (n_row < 2 || n_row > kDecodeChunk) {
    plan.misfit = "there are not 2 to 8 rows";
  } else if (one.shape.buffer_len < one.window + std::min(n_row, detail::kRowsOfLaunch) - 1) {
    plan.misfit = "a row's slot of the ring holds a key that another row sees";
  } else if (plan.smem_bytes > device.smem_limit_bytes) {
    plan.misfit = "the keys of the rows do not fit into shared memory";
  }
  return plan;
}

namespace detail {

inline void require_sliding_decode(const char* who, const SlidingDecodeParams& params, const SlidingDecodePlan& plan,
                                   float scale, std::int64_t n_row = 1) {
  const AttentionShape& shape = plan.shape;
  require(plan.fits(), who, ": the plan does not fit: ", plan.fits() ? "" : plan.misfit,
          "; use qkv_prologue() and sliding_attention()");
  require(plan.n_split == 1 || plan.n_split == 2 || plan.n_split == 4 || plan.n_split == 8, who, ": n_split ",
          plan.n_split, ", need 1, 2, 4 or 8");
  require_qkv<float>(
      who,
      {.q = params.q, .k = params.k, .v = params.v, .q_out = params.out, .norms = params.norms, .rope = params.rope});
  require_extents(who, "q", params.q, {n_row, shape.n_head, shape.head_dim});
  require_extents(who, "k", params.k, {n_row, shape.n_head_kv, shape.head_dim});
  for (const View<Bf16, 3>* ring : {&params.ring_k, &params.ring_v}) {
    const char* const name = ring == &params.ring_k ? "ring_k" : "ring_v";
    require_extents(who, name, *ring, {shape.n_head_kv, shape.buffer_len, shape.head_dim});
    require_vectors(who, name, *ring);
    require(ring->stride[1] == shape.head_dim, who, ": rows of ", name, " are ", ring->stride[1],
            " values apart, need head_dim = ", shape.head_dim);
  }
  require(static_cast<const void*>(params.out.data) != params.q.data, who,
          ": out is the memory of q, which other blocks still read");
  require(params.window >= 1 && scale > 0, who, ": window ", params.window, " and scale ", scale,
          ", need at least 1 and a positive one");
}

}  // namespace detail

/// What a call of sliding_decode works on.
struct SlidingDecodeCall {
  View<const float, 3> q, k, v;  ///< [1, n_head or n_head_kv, head_dim], as projected
  QkNorms norms;
  /// Of the token, on the device or known to the host. Neither it nor an old row of the ring is written by the kernel
  /// in front of this one in the stream: with `overlap` they are read before its end.
  DeviceCount position;
  const RopeParams& rope;
  View<Bf16, 3> ring_k, ring_v;  ///< [n_head_kv, ring_len, head_dim], rows next to each other
  float scale = 1.0f;
  View<Bf16, 3> out;  ///< [1, n_head, head_dim], not the memory of q
};

namespace detail {

[[nodiscard]] inline SlidingDecodeParams sliding_decode_params(const char* who, const SlidingDecodeCall& call,
                                                               const SlidingDecodePlan& plan) {
  const DeviceCount& position = call.position;
  require(position.device != nullptr || position.known(), who, ": position is neither on the device nor on the host");
  return {.q = call.q,
          .k = call.k,
          .v = call.v,
          .ring_k = call.ring_k,
          .ring_v = call.ring_v,
          .out = call.out,
          .norms = call.norms,
          .rope = call.rope,
          .position = position.device,
          .position_host = static_cast<std::int32_t>(position.host),
          .ring_len = static_cast<std::int32_t>(plan.shape.buffer_len),
          .window = static_cast<std::int32_t>(plan.window),
          .group = static_cast<std::int32_t>(plan.shape.group()),
          .n_pair = plan.n_pair,
          .n_split = plan.n_split,
          .scale_log2 = call.scale * std::numbers::log2e_v<float>};
}

[[nodiscard]] inline Launch sliding_decode_launch(const char* what, const SlidingDecodePlan& plan, cudaStream_t stream,
                                                  bool overlap) {
  return {.what = what,
          .grid = static_cast<unsigned>(plan.shape.n_head_kv * plan.n_pair * plan.n_split),
          .block = SlidingDecodeTraits<64>::kThreads,
          .stream = stream,
          .overlap = overlap,
          .smem_bytes = plan.smem_bytes,
          .cluster = plan.n_split};
}

/// Some rows of a call.
[[nodiscard]] inline SlidingDecodeCall rows_of(SlidingDecodeCall call, std::int64_t first, std::int64_t n_row) {
  const auto cut = [&](auto& view) {
    view.data += first * view.stride[0];
    view.extent[0] = n_row;
  };
  cut(call.q), cut(call.k), cut(call.v), cut(call.out);
  if (call.position.device != nullptr) call.position.device += first;
  if (call.position.known()) call.position.host += first;
  return call;
}

}  // namespace detail

/// Normalises and turns q, k and v of one token, stores k and v in the ring's slot of its position, and attends: one
/// launch, which can be captured; a replay reads the position and the vectors of that moment. Slots outside the window
/// never reach the result, and all but the position's own keep their bits.
/// @param plan     of plan_sliding_decode() for this shape, one that fits
/// @param overlap  lets the kernel be set up, and fetch old keys, while the one before it still runs
/// @throws std::invalid_argument on extents that are not the plan's, rows that do not begin at multiples of 16 bytes,
///         a missing position, a plan that does not fit
/// Error: that of qkv_prologue() in q, k and v; attention on those, attention_bound() with unit 2^-22 (ex2.approx),
/// weights in float, output_unit 2^-8.
inline void sliding_decode(const SlidingDecodeCall& call, const SlidingDecodePlan& plan, cudaStream_t stream,
                           bool overlap = false) {
  constexpr const char* kWho = "sliding_decode";
  const detail::SlidingDecodeParams params = detail::sliding_decode_params(kWho, call, plan);
  detail::require_sliding_decode(kWho, params, plan, call.scale);
  const detail::Launch launch = detail::sliding_decode_launch("sliding_decode_kernel", plan, stream, overlap);
  detail::for_sliding_head_dim(plan.shape.head_dim, [&](auto head_dim) {
    launch(detail::sliding_decode_kernel<detail::SlidingDecodeTraits<head_dim>>, params);
  });
}

/// The same for n_row neighbouring tokens, in one launch or two of up to four rows: row r of q, k, v and out stands at
/// the position of the first plus r. Each row has the bits of a launch of its own behind those of the rows before it,
/// and so has the ring (cuda/sliding_decode/rows_kernel.cuh says why). A launch reads the layer's keys and values once.
/// @param call     q, k, v and out [n_row, ...]; a position on the device is the first of n_row that increase by one
/// @param overlap  as there; the second launch asks for no key before the first has ended
/// @throws as sliding_decode()
inline void sliding_decode_rows(const SlidingDecodeCall& call, const SlidingRowsPlan& plan, cudaStream_t stream,
                                bool overlap = false) {
  constexpr const char* kWho = "sliding_decode_rows";
  require(plan.fits(), kWho, ": the plan does not fit: ", plan.fits() ? "" : plan.misfit,
          "; use sliding_decode() for each row");
  detail::require_sliding_decode(kWho, detail::sliding_decode_params(kWho, call, plan.one), plan.one, call.scale,
                                 plan.n_row);
  detail::Launch launch = detail::sliding_decode_launch("sliding_rows_kernel", plan.one, stream, overlap);
  launch.smem_bytes = plan.smem_bytes;
  const bool is_one = plan.n_row <= detail::kRowsOfLaunch;
  const std::int64_t n_first = is_one ? plan.n_row : (plan.n_row + 1) / 2;
  for (std::int64_t first = 0; first < plan.n_row; first += n_first) {
    const std::int64_t n_row = std::min(plan.n_row - first, n_first);
    const detail::SlidingRowsParams params{
        .one = detail::sliding_decode_params(kWho, detail::rows_of(call, first, n_row), plan.one),
        .n_row = static_cast<std::int32_t>(n_row),
        .ring_rests = first == 0,
        .read_again = first + n_row < plan.n_row};
    detail::for_sliding_head_dim(plan.one.shape.head_dim, [&](auto head_dim) {
      launch(detail::sliding_rows_kernel<detail::SlidingRowsTraits<head_dim>>, params);
    });
  }
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device/launch.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/cache_update.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// The uncompressed flat cache on the device: the baseline that TQ4 is judged against. Mirror: reference/bf16_cache.hpp
namespace gemma4::cuda {

namespace detail {

/// One thread 8 values of K and of V. grid: x over pieces of a token, y = token, z = batch.
template <class TIn>
__global__ void bf16_update_kernel(const __grid_constant__ View<const TIn, 4> k,
                                   const __grid_constant__ View<const TIn, 4> v, const std::int32_t* positions,
                                   const __grid_constant__ View<Bf16, 4> k_cache,
                                   const __grid_constant__ View<Bf16, 4> v_cache) {
  const std::int64_t pieces = k.extent[3] / 8, item = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  if (item >= k.extent[2] * pieces) return;
  const std::int64_t head = item / pieces, dim = item % pieces * 8, position = positions[blockIdx.y];
  if (position < 0 || position >= k_cache.extent[2]) return;  // the host may not know: never out of bounds
  float value[8];
  load_values(&k(blockIdx.z, blockIdx.y, head, dim), value);
  store_values(&k_cache(blockIdx.z, head, position, dim), value);
  load_values(&v(blockIdx.z, blockIdx.y, head, dim), value);
  store_values(&v_cache(blockIdx.z, head, position, dim), value);
}

}  // namespace detail

/// Stores k and v [batch, n_new, n_head_kv, head_dim] (float or Bf16), rounded to bf16, at `positions` of the cache
/// [batch, n_head_kv, buffer_len, head_dim] in one launch; every other row keeps its bits. The contract is that of
/// gemma4/cache_update.hpp; vectors begin at multiples of 16 bytes.
/// @throws std::invalid_argument on extents that do not fit and, where the host knows the positions, on one outside the
///         buffer or given twice
template <class TIn>
void bf16_cache_update(const View<const TIn, 4>& k, const View<const TIn, 4>& v, const DevicePositions& positions,
                       const View<Bf16, 4>& k_cache, const View<Bf16, 4>& v_cache, cudaStream_t stream) {
  constexpr const char* kWho = "bf16_cache_update";
  const std::int64_t batch = k_cache.extent[0], n_head_kv = k_cache.extent[1], head_dim = k_cache.extent[3];
  require_extents(kWho, "v_cache", v_cache, {batch, n_head_kv, k_cache.extent[2], head_dim});
  require_extents(kWho, "k", k, {batch, positions.count, n_head_kv, head_dim});
  require_extents(kWho, "v", v, {batch, positions.count, n_head_kv, head_dim});
  require_contiguous_rows(kWho, "k", k);
  require_contiguous_rows(kWho, "v", v);
  require_contiguous_rows(kWho, "k_cache", k_cache);
  require_contiguous_rows(kWho, "v_cache", v_cache);
  require(head_dim % 8 == 0, kWho, ": head_dim ", head_dim, ", need a multiple of 8");
  if (!positions.host.empty()) {
    require(static_cast<std::int64_t>(positions.host.size()) == positions.count, kWho, ": ", positions.host.size(),
            " positions on the host, ", positions.count, " on the device");
    require_positions(kWho, positions.host, k_cache.extent[2]);
  }
  require(positions.count <= 65535 && batch <= 65535, kWho, ": ", positions.count, " positions, batch ", batch,
          ", need at most 65535 of each");
  if (positions.count == 0) return;
  require(positions.device != nullptr, kWho, ": positions are null");
  const dim3 grid(static_cast<unsigned>((n_head_kv * head_dim / 8 + 127) / 128), static_cast<unsigned>(positions.count),
                  static_cast<unsigned>(batch));
  detail::Launch{.what = "bf16_update_kernel", .grid = grid, .block = 128, .stream = stream}(
      detail::bf16_update_kernel<TIn>, k, v, positions.device, k_cache, v_cache);
}

}  // namespace gemma4::cuda

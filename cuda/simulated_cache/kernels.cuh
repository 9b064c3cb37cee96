// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/ptx/vector_io.cuh"
#include "cuda/rotation.cuh"
#include "gemma4/cache_update.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/quantisers/quantiser.hpp"
#include "gemma4/view.hpp"

/// The two kernels of a simulated cache: a thread a scale block, and a warp a scale block for what searches long.
namespace gemma4::cuda {

/// What the kernels take: k, v [batch, n_new, n_head_kv, head_dim]; the caches [batch, n_head_kv, buffer_len,
/// head_dim]. Row t is stored at positions[t] - delay; below `sink` as it is.
template <Quantiser TQuantiser, class TIn>
struct SimulatedCacheParams {
  TQuantiser quantiser;
  int block_size;
  bool hadamard;
  RotationParams rotation;
  std::int64_t batch, n_new, n_head_kv;
  View<const TIn, 4> k, v;
  const std::int32_t* positions;  ///< [n_new]; null: row t is at t
  std::int64_t delay, sink;
  bool in_place;  ///< k and v are not read: the rows of the cache are, and those below `sink` stay
  View<Bf16, 4> k_cache, v_cache;
};

namespace detail {

/// Vectors that a block of one warp holds: 33 KiB of shared memory at head_dim 512, six blocks an SM.
inline constexpr int kSimulatedVectors = 16;

/// One of the vectors of an update: item = ((b * n_new + t) * n_head_kv + h) * 2 + (0: K, 1: V), and where it goes.
struct SimulatedItem {
  std::int64_t b, t, h;
  CacheSide side;
  std::int64_t position;
  bool is_inside;  ///< the host may not know: never out of bounds
  bool is_exact;

  template <class TParams>
  [[nodiscard]] __device__ static SimulatedItem of(std::int64_t item, const TParams& params) {
    SimulatedItem at{.b = item / 2 / params.n_head_kv / params.n_new,
                     .t = item / 2 / params.n_head_kv % params.n_new,
                     .h = item / 2 % params.n_head_kv,
                     .side = (item & 1) == 0 ? CacheSide::kKey : CacheSide::kValue};
    at.position = (params.positions != nullptr ? params.positions[at.t] : at.t) - params.delay;
    at.is_inside = at.position >= 0 && at.position < params.k_cache.extent[2];
    at.is_exact = at.position < params.sink;
    return at;
  }

  template <class TParams>
  [[nodiscard]] __device__ const View<Bf16, 4>& cache(const TParams& params) const {
    return side == CacheSide::kKey ? params.k_cache : params.v_cache;
  }

  /// This lane's values of the vector as it came.
  template <int kValues, class TParams>
  __device__ void load(const TParams& params, float (&x)[kValues]) const {
    const int first = static_cast<int>(threadIdx.x & 31) * kValues;
    if (!params.in_place) {
      load_values(&(side == CacheSide::kKey ? params.k : params.v)(b, t, h, first), x);
    } else if (is_inside) {
      load_values(&cache(params)(b, h, position, first), x);
    } else {
#pragma unroll
      for (float& value : x) value = 0.0f;
    }
  }

  /// `x` rotated back into its row; where the row is exact, what came instead.
  template <int kHeadDim, class TParams>
  __device__ void store(const TParams& params, float (&x)[kHeadDim / 32]) const {
    if (!is_inside || (is_exact && params.in_place)) return;
    if (is_exact) {
      load(params, x);
    } else if (params.hadamard) {
      rotate_back_warp<kHeadDim>(params.rotation, x);
    }
#pragma unroll
    for (float& value : x) value = value != value ? quiet_nan() : value;
    store_values(&cache(params)(b, h, position, static_cast<int>(threadIdx.x & 31) * (kHeadDim / 32)), x);
  }
};

template <class TParams>
[[nodiscard]] __device__ std::int64_t vector_count(const TParams& params) {
  return 2 * params.batch * params.n_new * params.n_head_kv;
}

/// A table in shared memory answers a warp whose threads ask for different entries; one in constant memory queues.
template <class TQuantiser>
__device__ const TQuantiser& shared_functor(const TQuantiser& from, unsigned char* memory) {
  const auto* const source = reinterpret_cast<const unsigned char*>(&from);
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof(TQuantiser)); i += 32) memory[i] = source[i];
  return *reinterpret_cast<const TQuantiser*>(memory);
}

/// One warp reads its vectors and rotates them, its threads quantise a scale block each, it rotates them back and
/// stores them.
template <int kHeadDim, Quantiser TQuantiser, class TIn>
__global__ void __launch_bounds__(32)
    simulated_update_kernel(const __grid_constant__ SimulatedCacheParams<TQuantiser, TIn> params) {
  constexpr int kValues = kHeadDim / 32;
  // A row is one value longer, so that threads at the same place of their rows read different banks.
  __shared__ float rows[kSimulatedVectors][kHeadDim + 1];
  __shared__ __align__(16) unsigned char functor[sizeof(TQuantiser)];
  const TQuantiser& quantiser = shared_functor(params.quantiser, functor);
  const int lane = static_cast<int>(threadIdx.x);
  const std::int64_t first = blockIdx.x * std::int64_t{kSimulatedVectors};
  const std::int64_t left = vector_count(params) - first;
  const int count = left < kSimulatedVectors ? static_cast<int>(left) : kSimulatedVectors;
  float x[kValues];
  for (int r = 0; r < count; ++r) {
    SimulatedItem::of(first + r, params).load(params, x);
    if (params.hadamard) rotate_warp<kHeadDim>(params.rotation, x);
#pragma unroll
    for (int i = 0; i < kValues; ++i) rows[r][lane * kValues + i] = x[i];
  }
  __syncwarp();
  for (int task = lane; task < count * (kHeadDim / params.block_size); task += 32) {
    const int r = task % count, block = task / count;
    const CacheSide side = SimulatedItem::of(first + r, params).side;
    roundtrip_block(quantiser, side, &rows[r][block * params.block_size], params.block_size);
  }
  __syncwarp();
  for (int r = 0; r < count; ++r) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[i] = rows[r][lane * kValues + i];
    SimulatedItem::of(first + r, params).template store<kHeadDim>(params, x);
  }
}

/// The warp of a block, as a quantiser sees it.
struct WarpTeam {
  static constexpr int kSize = 32;
  [[nodiscard]] __host__ __device__ static int lane() {
#if defined(__CUDA_ARCH__)
    return static_cast<int>(threadIdx.x & 31);
#else
    return 0;  // never run: a device's team, in a function that both sides compile
#endif
  }
  __host__ __device__ static void sync() {
#if defined(__CUDA_ARCH__)
    __syncwarp();
#endif
  }
};

/// The same with one vector a block, whose warp quantises each scale block together. Shared memory at head_dim 512:
/// 35 KiB of a trellis's scratch, its table and the row.
template <int kHeadDim, TeamQuantiser TQuantiser, class TIn>
__global__ void __launch_bounds__(32)
    simulated_team_kernel(const __grid_constant__ SimulatedCacheParams<TQuantiser, TIn> params) {
  constexpr int kValues = kHeadDim / 32;
  __shared__ float row[kHeadDim];
  __shared__ typename TQuantiser::template Scratch<kHeadDim> scratch;
  __shared__ __align__(16) unsigned char functor[sizeof(TQuantiser)];
  const TQuantiser& quantiser = shared_functor(params.quantiser, functor);
  const int lane = static_cast<int>(threadIdx.x);
  const SimulatedItem at = SimulatedItem::of(blockIdx.x, params);
  float x[kValues];
  at.load(params, x);
  if (params.hadamard) rotate_warp<kHeadDim>(params.rotation, x);
#pragma unroll
  for (int i = 0; i < kValues; ++i) row[lane * kValues + i] = x[i];
  __syncwarp();
  for (int first = 0; first < kHeadDim; first += params.block_size) {
    const bool is_finite = is_finite_block(row + first, params.block_size);
    __syncwarp();
    if (is_finite) {
      quantiser.template roundtrip_by<WarpTeam>(at.side, row + first, params.block_size, scratch);
    } else {
      for (int i = lane; i < params.block_size; i += 32) row[first + i] = quiet_nan();
    }
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) x[i] = row[lane * kValues + i];
  at.store<kHeadDim>(params, x);
}

}  // namespace detail
}  // namespace gemma4::cuda

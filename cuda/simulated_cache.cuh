// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device/check.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/rotation.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/cache_update.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/quantisers/quantiser.hpp"
#include "gemma4/view.hpp"

/// A cache format before it has a kernel: dequantise(quantise(x)) in the uncompressed flat cache, with the bits of the
/// reference. What a quantiser is, and why both rooms get the same bits: gemma4/quantisers/quantiser.hpp.
///
/// Made for any functor, not for speed: sixteen vectors lie in shared memory, and a thread takes a scale block of one.
/// The rotations around it are one warp a vector. Bytes: 2 D read and 2 D written a vector (bf16).
/// Mirror: reference/simulated_cache.hpp
namespace gemma4::cuda {

/// A simulated format and its rotation, ready for kernels.
template <Quantiser TQuantiser>
class SimulatedCodec {
 public:
  /// @throws std::invalid_argument unless head_dim is a power of two from 64 to 512 and the quantiser's blocks fill it
  SimulatedCodec(std::int64_t head_dim, const Simulated<TQuantiser>& format)
      : format_(format), rotation_(Rotation::signed_hadamard(head_dim, format.seed)) {
    require(block_size() > 0 && head_dim % block_size() == 0, "SimulatedCodec: ", format.name(), " has blocks of ",
            block_size(), " values, which do not fill head_dim ", head_dim);
  }

  [[nodiscard]] std::int64_t head_dim() const { return rotation_.head_dim(); }
  [[nodiscard]] std::int64_t block_size() const { return format_.quantiser.block_size(head_dim()); }
  [[nodiscard]] const Simulated<TQuantiser>& format() const { return format_; }
  [[nodiscard]] const Rotation& rotation() const { return rotation_; }

 private:
  Simulated<TQuantiser> format_;
  Rotation rotation_;
};

/// What the kernel takes: k, v [batch, n_new, n_head_kv, head_dim]; the caches [batch, n_head_kv, buffer_len,
/// head_dim].
template <Quantiser TQuantiser, class TIn>
struct SimulatedCacheParams {
  TQuantiser quantiser;
  int block_size;
  bool hadamard;
  RotationParams rotation;
  View<const TIn, 4> k, v;
  const std::int32_t* positions;  ///< [n_new]
  View<Bf16, 4> k_cache, v_cache;
};

namespace detail {

/// Vectors that a block of one warp holds: 33 KiB of shared memory at head_dim 512, six blocks an SM.
inline constexpr int kSimulatedVectors = 16;

/// One of the vectors of an update: item = ((b * n_new + t) * n_head_kv + h) * 2 + (0: K, 1: V).
struct SimulatedItem {
  std::int64_t b, t, h;
  CacheSide side;

  [[nodiscard]] __device__ static SimulatedItem of(std::int64_t item, std::int64_t n_new, std::int64_t n_head_kv) {
    return {.b = item / 2 / n_head_kv / n_new,
            .t = item / 2 / n_head_kv % n_new,
            .h = item / 2 % n_head_kv,
            .side = (item & 1) == 0 ? CacheSide::kKey : CacheSide::kValue};
  }
};

/// One warp reads its vectors and rotates them, its threads quantise a scale block each, it rotates them back and
/// stores them.
template <int kHeadDim, Quantiser TQuantiser, class TIn>
__global__ void __launch_bounds__(32)
    simulated_update_kernel(const __grid_constant__ SimulatedCacheParams<TQuantiser, TIn> params) {
  constexpr int kValues = kHeadDim / 32;
  // A row is one value longer, so that threads at the same place of their rows read different banks.
  __shared__ float rows[kSimulatedVectors][kHeadDim + 1];
  // A table in shared memory answers a warp whose threads ask for different entries; one in constant memory queues.
  __shared__ __align__(16) unsigned char functor[sizeof(TQuantiser)];
  const int lane = static_cast<int>(threadIdx.x);
  const auto* const source = reinterpret_cast<const unsigned char*>(&params.quantiser);
  for (int i = lane; i < static_cast<int>(sizeof(TQuantiser)); i += 32) functor[i] = source[i];

  const std::int64_t n_new = params.k.extent[1], n_head_kv = params.k.extent[2];
  const std::int64_t first = blockIdx.x * std::int64_t{kSimulatedVectors};
  const std::int64_t left = 2 * params.k.extent[0] * n_new * n_head_kv - first;
  const int count = left < kSimulatedVectors ? static_cast<int>(left) : kSimulatedVectors;
  float x[kValues];
  for (int r = 0; r < count; ++r) {
    const SimulatedItem at = SimulatedItem::of(first + r, n_new, n_head_kv);
    load_values(&(at.side == CacheSide::kKey ? params.k : params.v)(at.b, at.t, at.h, lane * kValues), x);
    if (params.hadamard) rotate_warp<kHeadDim>(params.rotation, x);
#pragma unroll
    for (int i = 0; i < kValues; ++i) rows[r][lane * kValues + i] = x[i];
  }
  __syncwarp();
  const auto& quantiser = *reinterpret_cast<const TQuantiser*>(functor);
  for (int task = lane; task < count * (kHeadDim / params.block_size); task += 32) {
    const int r = task % count, block = task / count;
    const CacheSide side = SimulatedItem::of(first + r, n_new, n_head_kv).side;
    roundtrip_block(quantiser, side, &rows[r][block * params.block_size], params.block_size);
  }
  __syncwarp();
  for (int r = 0; r < count; ++r) {
    const SimulatedItem at = SimulatedItem::of(first + r, n_new, n_head_kv);
    const std::int64_t position = params.positions[at.t];
    if (position < 0 || position >= params.k_cache.extent[2]) continue;  // the host may not know: never out of bounds
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[i] = rows[r][lane * kValues + i];
    if (params.hadamard) rotate_back_warp<kHeadDim>(params.rotation, x);
#pragma unroll
    for (float& value : x) value = value != value ? quiet_nan() : value;
    const View<Bf16, 4>& cache = at.side == CacheSide::kKey ? params.k_cache : params.v_cache;
    store_values(&cache(at.b, at.h, position, lane * kValues), x);
  }
}

}  // namespace detail

/// Stores what the format would read back of k and v [batch, n_new, n_head_kv, head_dim] (float or Bf16), rounded to
/// bf16, at `positions` of the flat cache [batch, n_head_kv, buffer_len, head_dim], in one launch; every other row
/// keeps its bits. The contract is that of gemma4/cache_update.hpp. Nothing waits for the host: the call can be
/// captured, and a replay reads the positions and vectors of that moment. Vectors begin at multiples of 16 bytes.
/// @throws std::invalid_argument on extents that do not fit and, where the host knows the positions, on one outside the
///         buffer or given twice
template <class TIn, Quantiser TQuantiser>
void simulated_cache_update(const SimulatedCodec<TQuantiser>& codec, const View<const TIn, 4>& k,
                            const View<const TIn, 4>& v, const DevicePositions& positions, const View<Bf16, 4>& k_cache,
                            const View<Bf16, 4>& v_cache, cudaStream_t stream) {
  constexpr const char* kWho = "simulated_cache_update";
  const std::int64_t batch = k_cache.extent[0], n_head_kv = k_cache.extent[1], head_dim = codec.head_dim();
  require_extents(kWho, "k_cache", k_cache, {batch, n_head_kv, k_cache.extent[2], head_dim});
  require_extents(kWho, "v_cache", v_cache, {batch, n_head_kv, k_cache.extent[2], head_dim});
  require_extents(kWho, "k", k, {batch, positions.count, n_head_kv, head_dim});
  require_extents(kWho, "v", v, {batch, positions.count, n_head_kv, head_dim});
  require_contiguous_rows(kWho, "k", k);
  require_contiguous_rows(kWho, "v", v);
  require_contiguous_rows(kWho, "k_cache", k_cache);
  require_contiguous_rows(kWho, "v_cache", v_cache);
  if (!positions.host.empty()) {
    require(static_cast<std::int64_t>(positions.host.size()) == positions.count, kWho, ": ", positions.host.size(),
            " positions on the host, ", positions.count, " on the device");
    require_positions(kWho, positions.host, k_cache.extent[2]);
  }
  const std::int64_t n_vector = 2 * batch * positions.count * n_head_kv;
  if (n_vector == 0) return;
  require(positions.device != nullptr, kWho, ": positions are null");
  const SimulatedCacheParams<TQuantiser, TIn> params{.quantiser = codec.format().quantiser,
                                                     .block_size = static_cast<int>(codec.block_size()),
                                                     .hadamard = codec.format().hadamard,
                                                     .rotation = codec.rotation().params(),
                                                     .k = k,
                                                     .v = v,
                                                     .positions = positions.device,
                                                     .k_cache = k_cache,
                                                     .v_cache = v_cache};
  const auto grid = static_cast<unsigned>((n_vector + detail::kSimulatedVectors - 1) / detail::kSimulatedVectors);
  for_head_dim(kWho, head_dim, [&](auto dim) {
    detail::Launch{.what = "simulated_update_kernel", .grid = grid, .block = 32, .stream = stream}(
        detail::simulated_update_kernel<decltype(dim)::value, TQuantiser, TIn>, params);
  });
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

#include "cuda/device/for_head_dim.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/rotation.cuh"
#include "cuda/simulated_cache/kernels.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/cache_update.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/quantisers/quantiser.hpp"
#include "gemma4/view.hpp"

/// A cache format before it has a kernel: dequantise(quantise(x)) in the uncompressed flat cache, with the bits of the
/// reference. What a quantiser is, and why both rooms get the same bits: gemma4/quantisers/quantiser.hpp.
///
/// Made for any functor, not for speed: sixteen vectors lie in shared memory, and a thread takes a scale block of one;
/// a functor that searches long (TeamQuantiser) has a warp a vector. The rotations around it are one warp a vector.
/// Bytes: 2 D read and 2 D written a vector (bf16). Mirror: reference/simulated_cache.hpp
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

namespace detail {

/// What all calls have in common; the caller fills in where the rows come from and go to.
template <class TIn, Quantiser TQuantiser>
[[nodiscard]] SimulatedCacheParams<TQuantiser, TIn> simulated_params(const SimulatedCodec<TQuantiser>& codec,
                                                                     const View<Bf16, 4>& k_cache,
                                                                     const View<Bf16, 4>& v_cache, std::int64_t n_new) {
  return {.quantiser = codec.format().quantiser,
          .block_size = static_cast<int>(codec.block_size()),
          .hadamard = codec.format().hadamard,
          .rotation = codec.rotation().params(),
          .batch = k_cache.extent[0],
          .n_new = n_new,
          .n_head_kv = k_cache.extent[1],
          .k = {},
          .v = {},
          .positions = nullptr,
          .delay = 0,
          .sink = codec.format().sink,
          .in_place = false,
          .k_cache = k_cache,
          .v_cache = v_cache};
}

template <class TQuantiser, class TIn>
void launch_simulated(const char* who, const SimulatedCacheParams<TQuantiser, TIn>& params, cudaStream_t stream) {
  const std::int64_t n_vector = 2 * params.batch * params.n_new * params.n_head_kv;
  if (n_vector == 0) return;
  for_head_dim(who, params.k_cache.extent[3], [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::value;
    if constexpr (TeamQuantiser<TQuantiser>) {
      Launch{.what = "simulated_team_kernel", .grid = static_cast<unsigned>(n_vector), .block = 32, .stream = stream}(
          simulated_team_kernel<kHeadDim, TQuantiser, TIn>, params);
    } else {
      const auto grid = static_cast<unsigned>((n_vector + kSimulatedVectors - 1) / kSimulatedVectors);
      Launch{.what = "simulated_update_kernel", .grid = grid, .block = 32, .stream = stream}(
          simulated_update_kernel<kHeadDim, TQuantiser, TIn>, params);
    }
  });
}

/// Caches of the codec's head_dim, alike, and positions that the host does not know to be wrong.
inline void require_simulated_caches(const char* who, const View<Bf16, 4>& k_cache, const View<Bf16, 4>& v_cache,
                                     const DevicePositions& positions, std::int64_t head_dim) {
  const std::int64_t batch = k_cache.extent[0], n_head_kv = k_cache.extent[1];
  require_extents(who, "k_cache", k_cache, {batch, n_head_kv, k_cache.extent[2], head_dim});
  require_extents(who, "v_cache", v_cache, {batch, n_head_kv, k_cache.extent[2], head_dim});
  require_contiguous_rows(who, "k_cache", k_cache);
  require_contiguous_rows(who, "v_cache", v_cache);
  if (!positions.host.empty()) {
    require(static_cast<std::int64_t>(positions.host.size()) == positions.count, who, ": ", positions.host.size(),
            " positions on the host, ", positions.count, " on the device");
    require_positions(who, positions.host, k_cache.extent[2]);
  }
}

}  // namespace detail

/// Stores what the format would read back of k and v [batch, n_new, n_head_kv, head_dim] (float or Bf16), rounded to
/// bf16, at `positions` of the flat cache [batch, n_head_kv, buffer_len, head_dim], in one launch; every other row
/// keeps its bits. At positions below the format's sink K and V are stored as they are, a NaN as quiet_nan(). Its tail
/// is not looked at: with one, tokens are stored by bf16_cache_update() and quantised by simulated_cache_age(). The
/// contract is that of gemma4/cache_update.hpp. Nothing waits for the host: the call can be captured, and a replay
/// reads the positions and vectors of that moment. Vectors begin at multiples of 16 bytes.
/// @throws std::invalid_argument on extents that do not fit and, where the host knows the positions, on one outside the
///         buffer or given twice
template <class TIn, Quantiser TQuantiser>
void simulated_cache_update(const SimulatedCodec<TQuantiser>& codec, const View<const TIn, 4>& k,
                            const View<const TIn, 4>& v, const DevicePositions& positions, const View<Bf16, 4>& k_cache,
                            const View<Bf16, 4>& v_cache, cudaStream_t stream) {
  constexpr const char* kWho = "simulated_cache_update";
  const std::int64_t batch = k_cache.extent[0], n_head_kv = k_cache.extent[1], head_dim = codec.head_dim();
  detail::require_simulated_caches(kWho, k_cache, v_cache, positions, head_dim);
  require_extents(kWho, "k", k, {batch, positions.count, n_head_kv, head_dim});
  require_extents(kWho, "v", v, {batch, positions.count, n_head_kv, head_dim});
  require_contiguous_rows(kWho, "k", k);
  require_contiguous_rows(kWho, "v", v);
  require(positions.count == 0 || positions.device != nullptr, kWho, ": positions are null");
  auto params = detail::simulated_params<TIn>(codec, k_cache, v_cache, positions.count);
  params.k = k;
  params.v = v;
  params.positions = positions.device;
  detail::launch_simulated(kWho, params, stream);
}

/// What leaves a tail: the rows at `positions` minus the format's tail become what the format would read back of them,
/// in place and in one launch. Rows below its sink and positions before the first token are left as they are. It can be
/// captured as simulated_cache_update() can.
/// @throws std::invalid_argument as that
template <Quantiser TQuantiser>
void simulated_cache_age(const SimulatedCodec<TQuantiser>& codec, const DevicePositions& positions,
                         const View<Bf16, 4>& k_cache, const View<Bf16, 4>& v_cache, cudaStream_t stream) {
  constexpr const char* kWho = "simulated_cache_age";
  detail::require_simulated_caches(kWho, k_cache, v_cache, positions, codec.head_dim());
  require(positions.count == 0 || positions.device != nullptr, kWho, ": positions are null");
  auto params = detail::simulated_params<Bf16>(codec, k_cache, v_cache, positions.count);
  params.positions = positions.device;
  params.delay = codec.format().tail;
  params.in_place = true;
  detail::launch_simulated(kWho, params, stream);
}

/// k and v [n_token, n_head_kv, head_dim] become what the format would read back of them, all of them.
/// @throws std::invalid_argument on extents that do not fit
template <Quantiser TQuantiser>
void simulated_roundtrip(const SimulatedCodec<TQuantiser>& codec, const View<Bf16, 3>& k, const View<Bf16, 3>& v,
                         cudaStream_t stream) {
  constexpr const char* kWho = "simulated_roundtrip";
  const auto as_cache = [](const View<Bf16, 3>& rows) {  // [1, n_head_kv, n_token, head_dim]
    View<Bf16, 4> cache = with_batch(rows);
    std::swap(cache.extent[1], cache.extent[2]);
    std::swap(cache.stride[1], cache.stride[2]);
    return cache;
  };
  detail::require_simulated_caches(kWho, as_cache(k), as_cache(v), {}, codec.head_dim());
  auto params = detail::simulated_params<Bf16>(codec, as_cache(k), as_cache(v), k.extent[0]);
  params.sink = 0;
  params.in_place = true;
  detail::launch_simulated(kWho, params, stream);
}

}  // namespace gemma4::cuda

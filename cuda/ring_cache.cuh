// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/device_count.cuh"
#include "cuda/device/launch.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// The bf16 ring of a sliding layer on the device. Bytes of a commit: min(n_new, ring_len) rows of K and V, read once
/// and written once. Mirror: reference/ring_cache.hpp
namespace gemma4::cuda {

namespace detail {

/// One thread 16 bytes of K and of V. grid: x over pieces of a token, y = token among those that stay.
static __global__ void ring_commit_kernel(const __grid_constant__ View<const Bf16, 3> k_new,
                                          const __grid_constant__ View<const Bf16, 3> v_new,
                                          const __grid_constant__ View<Bf16, 3> ring_k,
                                          const __grid_constant__ View<Bf16, 3> ring_v, const std::int32_t* position,
                                          std::int64_t position_host) {
  const std::int64_t n_new = k_new.extent[0], ring_len = ring_k.extent[1], pieces = ring_k.extent[2] / 8;
  const std::int64_t item = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  if (item >= ring_k.extent[0] * pieces) return;
  const std::int64_t head = item / pieces, dim = item % pieces * 8;
  const std::int64_t token = max(std::int64_t{0}, n_new - ring_len) + blockIdx.y;
  const std::int64_t first = position != nullptr ? *position : position_host;
  if (first < 0) return;  // the host may not know: never out of bounds
  const std::int64_t slot = ring_slot(first + token, ring_len);
  *reinterpret_cast<uint4*>(&ring_k(head, slot, dim)) = *reinterpret_cast<const uint4*>(&k_new(token, head, dim));
  *reinterpret_cast<uint4*>(&ring_v(head, slot, dim)) = *reinterpret_cast<const uint4*>(&v_new(token, head, dim));
}

}  // namespace detail

/// Stores the last min(n_new, ring_len) of the tokens at position, position + 1, ... in their slots.
/// @param k_new, v_new   [n_new, n_head_kv, head_dim], rows at multiples of 16 bytes
/// @param position       read by the kernel from the device, or given by the host
/// @param ring_k, ring_v [n_head_kv, ring_len, head_dim]
/// @throws std::invalid_argument on extents that do not fit
inline void ring_cache_commit(View<const Bf16, 3> k_new, View<const Bf16, 3> v_new, DeviceCount position,
                              View<Bf16, 3> ring_k, View<Bf16, 3> ring_v, cudaStream_t stream) {
  constexpr const char* kWho = "ring_cache_commit";
  const std::int64_t n_new = k_new.extent[0], n_head_kv = ring_k.extent[0], head_dim = ring_k.extent[2];
  require_extents(kWho, "ring_v", ring_v, {n_head_kv, ring_k.extent[1], head_dim});
  require_extents(kWho, "k_new", k_new, {n_new, n_head_kv, head_dim});
  require_extents(kWho, "v_new", v_new, {n_new, n_head_kv, head_dim});
  require(head_dim % 8 == 0, kWho, ": head_dim ", head_dim, ", need a multiple of 8");
  require(position.device != nullptr || position.known(), kWho, ": position is neither on the device nor on the host");
  const auto require_rows = [&](const char* name, const View<const Bf16, 3>& view) {
    require_contiguous_rows(kWho, name, view);
    require(reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && view.stride[0] % 8 == 0 && view.stride[1] % 8 == 0,
            kWho, ": rows of ", name, " do not begin at multiples of 16 bytes");
  };
  require_rows("k_new", k_new);
  require_rows("v_new", v_new);
  require_rows("ring_k", ring_k);
  require_rows("ring_v", ring_v);
  if (n_new == 0) return;
  const std::int64_t n_stay = std::min(n_new, ring_k.extent[1]);
  require(n_stay <= 65535, kWho, ": ", n_stay, " tokens stay, need at most 65535");
  const dim3 grid(static_cast<unsigned>((n_head_kv * head_dim / 8 + 127) / 128), static_cast<unsigned>(n_stay));
  detail::Launch{.what = "ring_commit_kernel", .grid = grid, .block = 128, .stream = stream}(
      detail::ring_commit_kernel, k_new, v_new, ring_k, ring_v, position.device, position.host);
}

/// K and V of the last `ring_len` tokens of a sliding layer; begins as zeros. The token at absolute position p lives in
/// slot ring_slot(p, ring_len) until the token at p + ring_len replaces it. A chunk is committed after it has attended.
class RingCache {
 public:
  RingCache(std::int64_t n_head_kv, std::int64_t ring_len, std::int64_t head_dim, cudaStream_t stream = nullptr)
      : n_head_kv_(n_head_kv), ring_len_(ring_len), head_dim_(head_dim) {
    require(n_head_kv >= 1, "ring_cache: n_head_kv ", n_head_kv, ", need at least 1");
    require(ring_len >= 1, "ring_cache: ring_len ", ring_len, ", need at least 1");
    require(head_dim >= 8 && head_dim % 8 == 0, "ring_cache: head_dim ", head_dim, ", need a multiple of 8");
    k_ = DeviceBuffer<Bf16>(n_head_kv * ring_len * head_dim);
    v_ = DeviceBuffer<Bf16>(n_head_kv * ring_len * head_dim);
    k_.fill_bytes(0, stream);
    v_.fill_bytes(0, stream);
  }

  [[nodiscard]] std::int64_t ring_len() const { return ring_len_; }
  [[nodiscard]] std::int64_t bytes() const { return k_.bytes() + v_.bytes(); }
  /// [n_head_kv, ring_len, head_dim]
  [[nodiscard]] View<Bf16, 3> k() { return make_view(k_.data(), n_head_kv_, ring_len_, head_dim_); }
  [[nodiscard]] View<Bf16, 3> v() { return make_view(v_.data(), n_head_kv_, ring_len_, head_dim_); }
  [[nodiscard]] View<const Bf16, 3> k() const { return make_view(k_.data(), n_head_kv_, ring_len_, head_dim_); }
  [[nodiscard]] View<const Bf16, 3> v() const { return make_view(v_.data(), n_head_kv_, ring_len_, head_dim_); }

  void commit(View<const Bf16, 3> k_new, View<const Bf16, 3> v_new, DeviceCount position, cudaStream_t stream) {
    ring_cache_commit(k_new, v_new, position, k(), v(), stream);
  }

 private:
  std::int64_t n_head_kv_, ring_len_, head_dim_;
  DeviceBuffer<Bf16> k_, v_;
};

}  // namespace gemma4::cuda

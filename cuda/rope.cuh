// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/device/device_count.cuh"
#include "cuda/device/launch.cuh"
#include "gemma4/checks.hpp"
#include "gemma4/config.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

namespace gemma4::cuda {

inline constexpr int kMaxRopePairs = 256;  ///< head_dim 512

/// The frequencies of one kind of layer, as kernels take them.
struct RopeParams {
  int head_dim = 0;
  int n_pair = 0;
  double frequency[kMaxRopePairs] = {};  ///< radians a position: rope_theta^(-2 i / head_dim)
};
static_assert(std::is_trivially_copyable_v<RopeParams>);

/// @throws std::invalid_argument on a head_dim above 512 or more pairs than head_dim / 2
[[nodiscard]] inline RopeParams rope_params(const AttentionConfig& attention) {
  const std::int64_t head_dim = attention.head_dim, n_pair = attention.rope_pairs;
  require(head_dim > 0 && head_dim <= 2 * kMaxRopePairs && head_dim % 2 == 0, "rope: head_dim ", head_dim,
          ", need an even one up to ", 2 * kMaxRopePairs);
  require(n_pair >= 0 && n_pair <= head_dim / 2, "rope: rope_pairs ", n_pair,
          ", need 0 to head_dim / 2 = ", head_dim / 2);
  RopeParams params{.head_dim = static_cast<int>(head_dim), .n_pair = static_cast<int>(n_pair)};
  for (int i = 0; i < params.n_pair; ++i) {
    params.frequency[i] = std::pow(attention.rope_theta, -2.0 * i / static_cast<double>(head_dim));
  }
  return params;
}

namespace detail {

/// cos and sin of position * frequency. The angle in half turns and its reduction to [-1, 1] are in double: at position
/// 262143 a float angle would be off by 0.008 rad. Error, for positions below 2^18 and frequencies to 1:
///   half turns   83443 * 4 roundings of 2^-53 (frequency, 1 / pi, two products), the reduction is exact     < 2^-34
///   in float     half an ulp below 1, 2^-25, times pi, 2^-23.3; sincospif: 2 ulp below 1, 2^-23, together   < 2^-22
/// (sincosf of a reduced angle in radians is as exact, and brings a slow path for large arguments that never runs.)
[[nodiscard]] __device__ __forceinline__ float2 rope_cos_sin(std::int64_t position, double frequency) {
  constexpr double kInversePi = 0.318309886183790671538;
  const double half_turns = static_cast<double>(position) * frequency * kInversePi;
  float2 result;
  sincospif(static_cast<float>(half_turns - 2.0 * rint(0.5 * half_turns)), &result.y, &result.x);
  return result;
}

/// The half of a turned pair that was `own`: the first as fma(a, cos, -b sin), the second as fma(b, cos, a sin). These
/// two operations wherever RoPE is computed, so that fused and separate kernels agree bit for bit.
[[nodiscard]] __device__ __forceinline__ float rope_turn(float own, float other, float2 cos_sin, bool second) {
  return fmaf(own, cos_sin.x, other * (second ? cos_sin.y : -cos_sin.y));
}

/// Turns the pairs of a vector in a warp: the partner of value i of lane l is value i of lane l ^ 16. `cos_sin` holds
/// pair l * kValues + i at i * 16 + l, so that the lanes of a warp read neighbours.
template <int kHeadDim>
__device__ __forceinline__ void rope_warp(const float2* cos_sin, int n_pair, float (&x)[kHeadDim / 32]) {
  constexpr int kValues = kHeadDim / 32;
  const int lane = threadIdx.x & 31, column = lane & 15;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float other = __shfl_xor_sync(~0u, x[i], 16);
    if (column * kValues + i < n_pair) x[i] = rope_turn(x[i], other, cos_sin[i * 16 + column], lane >= 16);
  }
}

/// A block a token and a share of its heads, blockIdx.y of gridDim.y: the angles once, then the heads.
template <class T>
__global__ void __launch_bounds__(256)
    rope_kernel(const __grid_constant__ RopeParams params, const std::int32_t* position, std::int64_t position_host,
                const __grid_constant__ View<T, 3> x) {
  __shared__ float2 cos_sin[kMaxRopePairs];
  const std::int64_t token = blockIdx.x;
  const std::int64_t at = (position != nullptr ? *position : position_host) + token;
  for (int i = threadIdx.x; i < params.n_pair; i += blockDim.x) cos_sin[i] = rope_cos_sin(at, params.frequency[i]);
  __syncthreads();
  const int n_item = static_cast<int>(x.extent[1]) * params.n_pair;
  const int step = static_cast<int>(gridDim.y * blockDim.x);
  for (int item = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); item < n_item; item += step) {
    const int head = item / params.n_pair, i = item % params.n_pair;
    T* const first = x.data + token * x.stride[0] + head * x.stride[1] + i;
    T* const second = first + params.head_dim / 2;
    const float a = to_float(*first), b = to_float(*second);
    const float2 turn = cos_sin[i];
    *first = from_float<T>(rope_turn(a, b, turn, false));
    *second = from_float<T>(rope_turn(b, a, turn, true));
  }
}

}  // namespace detail

/// Rotary position embedding in split-half order, in place: pair i of a head is (x[i], x[i + head_dim / 2]) and turns
/// by position * frequency[i], i < n_pair; the other coordinates keep their bits.
/// @param x         [n_token, n_head, head_dim] Bf16 or float
/// @param position  of the first token, read by the kernel from the device or given by the host; token t stands at
///                  position + t
/// @throws std::invalid_argument on another head_dim or a missing position
/// Bytes: the turned coordinates read and written once; float arithmetic, |error| <= (|a| + |b|) * 2^-22 and roundings.
/// Mirror: reference/rope.hpp
template <class T>
void rope(const View<T, 3>& x, DeviceCount position, const RopeParams& params, cudaStream_t stream) {
  require(x.extent[2] == params.head_dim, "rope: head_dim ", x.extent[2], ", the frequencies are for ",
          params.head_dim);
  require_contiguous_rows("rope", "x", x);
  require(position.device != nullptr || position.known(), "rope: position is neither on the device nor on the host");
  if (x.extent[0] == 0 || x.extent[1] == 0 || params.n_pair == 0) return;
  const std::int64_t n_share =
      std::clamp<std::int64_t>(4096 / x.extent[0], 1, (x.extent[1] * params.n_pair + 255) / 256);
  const dim3 grid(static_cast<unsigned>(x.extent[0]), static_cast<unsigned>(n_share));
  detail::Launch{.what = "rope_kernel", .grid = grid, .block = 256, .stream = stream}(
      detail::rope_kernel<T>, params, position.device, position.host, x);
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device/for_head_dim.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

namespace gemma4::cuda {

/// Learned weights of the norms of q and k, [head_dim] each, on the device.
struct QkNorms {
  const float* q = nullptr;
  const float* k = nullptr;
  float epsilon = 1e-6f;
};

namespace detail {

/// x / sqrt(mean(x^2) + epsilon) * weight of a vector in a warp, lane l holding values (D / 32) l and on; a null
/// weight is none.
template <int kHeadDim>
__device__ __forceinline__ void rms_norm_warp(float (&x)[kHeadDim / 32], const float* weight, float epsilon) {
  constexpr int kValues = kHeadDim / 32;
  float factor[kValues];  // on its way while the sum is made
#pragma unroll
  for (float& value : factor) value = 1.0f;  // a factor that leaves the bits
  if (weight != nullptr) load_values(weight + (threadIdx.x & 31) * kValues, factor);
  float sum = 0.0f;
#pragma unroll
  for (const float value : x) sum = fmaf(value, value, sum);
  const float scale = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(kHeadDim) + epsilon);
#pragma unroll
  for (int i = 0; i < kValues; ++i) x[i] = x[i] * scale * factor[i];
}

/// One warp a head.
template <int kHeadDim, class TIn, class TOut>
__global__ void __launch_bounds__(128)
    rms_norm_heads_kernel(const __grid_constant__ View<const TIn, 2> x, const float* weight, float epsilon,
                          const __grid_constant__ View<TOut, 2> out) {
  constexpr int kValues = kHeadDim / 32;
  const std::int64_t row = blockIdx.x * std::int64_t{4} + threadIdx.x / 32;
  if (row >= x.extent[0]) return;
  const int first = static_cast<int>(threadIdx.x & 31) * kValues;
  float values[kValues];
  load_values(&x(row, first), values);
  rms_norm_warp<kHeadDim>(values, weight, epsilon);
  store_values(&out(row, first), values);
}

/// One block a row, kEach values of it a thread at a time. Sums run in a fixed order.
template <int kEach, class TIn, class TOut>
__global__ void __launch_bounds__(256)
    rms_norm_rows_kernel(const __grid_constant__ View<const TIn, 2> x, const float* weight, float epsilon,
                         const __grid_constant__ View<TOut, 2> out) {
  const TIn* const from = x.data + blockIdx.x * x.stride[0];
  TOut* const to = out.data + blockIdx.x * out.stride[0];
  const int width = static_cast<int>(x.extent[1]);
  float sum = 0.0f;
  for (int first = threadIdx.x * kEach; first < width; first += 256 * kEach) {
    float values[kEach];
    load_values(from + first, values);
#pragma unroll
    for (const float value : values) sum = fmaf(value, value, sum);
  }
  __shared__ float parts[8];
  block_sum_in_place(sum, parts, threadIdx.x, [] { __syncthreads(); });
  const float scale = 1.0f / sqrtf(sum / static_cast<float>(width) + epsilon);
  for (int first = threadIdx.x * kEach; first < width; first += 256 * kEach) {
    float values[kEach], factor[kEach];
    load_values(from + first, values);  // from the cache: this block has just read them
    if (weight != nullptr) load_values(weight + first, factor);
#pragma unroll
    for (int i = 0; i < kEach; ++i) values[i] = weight != nullptr ? values[i] * scale * factor[i] : values[i] * scale;
    store_values(to + first, values);
  }
}

}  // namespace detail

/// out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * weight, row by row, in float32.
/// @param x       [n_row, width] Bf16 or float; for the per-head norms of q, k and v a row is one head
/// @param weight  [width] on the device, or null: no weight (the norm of v)
/// @param out     [n_row, width] Bf16 or float; may be x itself
/// @throws std::invalid_argument when extents differ, or when the width is a multiple of 8 and a row, or the weight,
///         does not begin at a multiple of 16 bytes
/// Error: (width / 256 + 16) * 2^-24 relative, and the rounding of the output. Bytes: x read once (a row a second time,
/// from the cache), out written once: bf16 rows of 5376, 2048 of them, 44 MB, 10.2 us at 4.3 TB/s.
/// Mirror: reference/rms_norm.hpp
template <class TIn, class TOut>
void rms_norm(const View<const TIn, 2>& x, const float* weight, float epsilon, const View<TOut, 2>& out,
              cudaStream_t stream) {
  constexpr const char* kWho = "rms_norm";
  const std::int64_t n_row = x.extent[0], width = x.extent[1];
  require_extents(kWho, "out", out, {n_row, width});
  require_contiguous_rows(kWho, "x", x);
  require_contiguous_rows(kWho, "out", out);
  require(width >= 1 && width < (std::int64_t{1} << 30), kWho, ": width ", width, ", need 1 to 2^30");
  require(n_row < (std::int64_t{1} << 31), kWho, ": ", n_row, " rows, need fewer than 2^31");
  if (n_row == 0) return;
  const detail::Launch rows{
      .what = "rms_norm_rows_kernel", .grid = static_cast<unsigned>(n_row), .block = 256, .stream = stream};
  if (width % 8 != 0) return rows(detail::rms_norm_rows_kernel<1, TIn, TOut>, x, weight, epsilon, out);
  require_aligned_rows(kWho, "x", x);
  require_aligned_rows(kWho, "out", out);
  require_aligned_rows(kWho, "weight", make_view(weight, width));
  if (!is_power_of_two(width) || width < 64 || width > 512) {
    return rows(detail::rms_norm_rows_kernel<8, TIn, TOut>, x, weight, epsilon, out);
  }
  const detail::Launch heads{
      .what = "rms_norm_heads_kernel", .grid = static_cast<unsigned>((n_row + 3) / 4), .block = 128, .stream = stream};
  for_head_dim(kWho, width, [&](auto head_dim) {
    heads(detail::rms_norm_heads_kernel<decltype(head_dim)::value, TIn, TOut>, x, weight, epsilon, out);
  });
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device/check.cuh"
#include "cuda/rotation.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

namespace gemma4::cuda {

namespace detail {

/// Refuses a view whose rows do not begin at multiples of 16 bytes.
template <class T, int kRank>
void require_aligned_rows(const char* who, const char* name, const View<T, kRank>& view) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  bool aligned = reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
  for (int axis = 0; axis + 1 < kRank; ++axis) aligned = aligned && view.stride[axis] * kSize % 16 == 0;
  require(aligned, who, ": rows of ", name, " do not begin at multiples of 16 bytes");
}

/// x / sqrt(mean(x^2) + epsilon) * weight of a vector that lies in a warp as rotation.cuh lays it; a null weight is
/// none.
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
#pragma unroll
  for (int lane_bit = 16; lane_bit > 0; lane_bit /= 2) sum += __shfl_xor_sync(~0u, sum, lane_bit);
  const float scale = 1.0f / sqrtf(sum / static_cast<float>(kHeadDim) + epsilon);
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
#pragma unroll
  for (int lane_bit = 16; lane_bit > 0; lane_bit /= 2) sum += __shfl_xor_sync(~0u, sum, lane_bit);
  __shared__ float parts[8];
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (const float part : parts) sum += part;
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
  if (width % 8 != 0) {
    detail::rms_norm_rows_kernel<1, TIn, TOut>
        <<<static_cast<unsigned>(n_row), 256, 0, stream>>>(x, weight, epsilon, out);
    return check_launch("rms_norm_rows_kernel");
  }
  detail::require_aligned_rows(kWho, "x", x);
  detail::require_aligned_rows(kWho, "out", out);
  detail::require_aligned_rows(kWho, "weight", make_view(weight, width));
  if (is_power_of_two(width) && width >= 64 && width <= 512) {
    for_head_dim(kWho, width, [&](auto head_dim) {
      detail::rms_norm_heads_kernel<decltype(head_dim)::value, TIn, TOut>
          <<<static_cast<unsigned>((n_row + 3) / 4), 128, 0, stream>>>(x, weight, epsilon, out);
    });
  } else {
    detail::rms_norm_rows_kernel<8, TIn, TOut>
        <<<static_cast<unsigned>(n_row), 256, 0, stream>>>(x, weight, epsilon, out);
  }
  check_launch("rms_norm kernels");
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/check.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

namespace gemma4::cuda {

namespace detail {

/// kThreads threads a row: 32 (a head) or 256 (a token). Sums run in a fixed order.
template <int kThreads, class TIn, class TOut>
__global__ void __launch_bounds__(256)
    rms_norm_kernel(const __grid_constant__ View<const TIn, 2> x, const float* weight, float epsilon,
                    const __grid_constant__ View<TOut, 2> out) {
  constexpr int kRows = 256 / kThreads;
  const std::int64_t row = blockIdx.x * std::int64_t{kRows} + threadIdx.x / kThreads;
  const int thread = threadIdx.x % kThreads, width = static_cast<int>(x.extent[1]);
  if (kThreads == 32 && row >= x.extent[0]) return;
  const TIn* const from = x.data + row * x.stride[0];
  TOut* const to = out.data + row * out.stride[0];
  float sum = 0.0f;
#pragma unroll 4
  for (int i = thread; i < width; i += kThreads) {
    const float value = to_float(from[i]);
    sum = fmaf(value, value, sum);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if constexpr (kThreads > 32) {
    __shared__ float parts[kThreads / 32];
    if ((thread & 31) == 0) parts[thread / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (const float part : parts) sum += part;
  }
  const float scale = 1.0f / sqrtf(sum / static_cast<float>(width) + epsilon);
#pragma unroll 4
  for (int i = thread; i < width; i += kThreads) {
    const float value = to_float(from[i]) * scale;
    to[i] = from_float<TOut>(weight != nullptr ? value * weight[i] : value);
  }
}

}  // namespace detail

/// out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * weight, row by row, in float32.
/// @param x       [n_row, width] Bf16 or float; for the per-head norms of q, k and v a row is one head
/// @param weight  [width] on the device, or null: no weight (the norm of v)
/// @param out     [n_row, width] Bf16 or float; may be x itself
/// @throws std::invalid_argument when extents differ
/// Error: (width / 256 + 16) * 2^-24 relative, and the rounding of the output. Bytes: x read once (twice through the
/// cache), out written once. Mirror: reference/rms_norm.hpp
template <class TIn, class TOut>
void rms_norm(const View<const TIn, 2>& x, const float* weight, float epsilon, const View<TOut, 2>& out,
              cudaStream_t stream) {
  require_extents("rms_norm", "out", out, {x.extent[0], x.extent[1]});
  require_contiguous_rows("rms_norm", "x", x);
  require_contiguous_rows("rms_norm", "out", out);
  require(x.extent[1] >= 1 && x.extent[1] < (std::int64_t{1} << 30), "rms_norm: width ", x.extent[1],
          ", need 1 to 2^30");
  if (x.extent[0] == 0) return;
  if (x.extent[1] <= 512) {
    detail::rms_norm_kernel<32, TIn, TOut>
        <<<static_cast<unsigned>((x.extent[0] + 7) / 8), 256, 0, stream>>>(x, weight, epsilon, out);
  } else {
    detail::rms_norm_kernel<256, TIn, TOut>
        <<<static_cast<unsigned>(x.extent[0]), 256, 0, stream>>>(x, weight, epsilon, out);
  }
  check_launch("rms_norm_kernel");
}

}  // namespace gemma4::cuda

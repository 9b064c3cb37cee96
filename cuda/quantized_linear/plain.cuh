// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device/check.cuh"
#include "cuda/device/launch.cuh"
#include "gemma4/float16.hpp"

/// Products of few tokens with BF16, F16 and F32 rows, in float: a warp a row, lanes stride over the columns, sums in
/// an order that depends on the number of columns alone. No matrix of the 31B has these types; correct before fast.
namespace gemma4::cuda::detail {

inline constexpr int kPlainTokens = 8;

template <class TWeight>
struct PlainLinearParams {
  const TWeight* weight;  ///< [rows, cols]
  const void* x;
  void* out;
  std::int64_t rows, cols, x_stride, out_stride;
  int n_token;
  bool x_is_bf16, out_is_bf16;
};

template <class TWeight>
__global__ void __launch_bounds__(256) plain_linear_kernel(const __grid_constant__ PlainLinearParams<TWeight> params) {
  const std::int64_t row = blockIdx.x * std::int64_t{8} + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (row >= params.rows) return;
  const TWeight* const weight = params.weight + row * params.cols;
  float sum[kPlainTokens] = {};
  for (std::int64_t k = lane; k < params.cols; k += 32) {
    const float w = to_float(weight[k]);
#pragma unroll
    for (int t = 0; t < kPlainTokens; ++t) {
      if (t >= params.n_token) break;
      const std::int64_t at = t * params.x_stride + k;
      const float x =
          params.x_is_bf16 ? to_float(static_cast<const Bf16*>(params.x)[at]) : static_cast<const float*>(params.x)[at];
      sum[t] = __fmaf_rn(w, x, sum[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kPlainTokens; ++t) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum[t] = __fadd_rn(sum[t], __shfl_xor_sync(~0u, sum[t], step));
    if (lane != 0 || t >= params.n_token) continue;
    const std::int64_t at = t * params.out_stride + row;
    if (params.out_is_bf16) {
      static_cast<Bf16*>(params.out)[at] = to_bf16(sum[t]);
    } else {
      static_cast<float*>(params.out)[at] = sum[t];
    }
  }
}

template <class TWeight>
void launch_plain_linear(const PlainLinearParams<TWeight>& params, cudaStream_t stream) {
  Launch{.what = "plain_linear_kernel",
         .grid = static_cast<unsigned>((params.rows + 7) / 8),
         .block = 256,
         .stream = stream}(plain_linear_kernel<TWeight>, params);
}

}  // namespace gemma4::cuda::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "cuda/device/launch.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/quantized_linear/input.cuh"
#include "cuda/weights/activation_blocks.cuh"
#include "gemma4/float16.hpp"

/// Activations as 8-bit integers before the product: a launch in front makes the codes once, in device memory, and each
/// block of the product copies them. Same codes, so the same results.
///
/// Made by each block for itself, codes of 5376, 8192, 16384 and 21504 values cost 1.2, 1.5, 2.9 and 4 us a token (the
/// int8 products of an H100, from 1 token to 4), and no row is multiplied until then; a launch costs one dependency
/// more, whatever the tokens. Bytes of a token: cols / 32 * 40, written once, read by each block out of the L2 cache.
namespace gemma4::cuda::detail {

inline constexpr int kCodesThreads = 128;

/// One piece of eight values a thread; a row of the grid a token.
static __global__ void __launch_bounds__(kCodesThreads)
    linear_codes_kernel(const __grid_constant__ LinearInput in, int n_piece, int n_group, std::uint8_t* codes) {
  // The product may start under the end of the kernel in front of this one: it waits for this one, which waits itself.
  allow_next_kernel();
  wait_for_previous_kernel();
  const int token = static_cast<int>(blockIdx.y), begin = static_cast<int>(blockIdx.x) * kCodesThreads;
  const int end = min(begin + kCodesThreads, n_piece), thread = static_cast<int>(threadIdx.x);
  std::uint8_t* const to = codes + std::int64_t{token} * n_group * kActivationBytesPerGroup;
  if (in.x_is_bf16) {
    quantize_row<kCodesThreads, Bf16, 1>(static_cast<const Bf16*>(in.x) + token * in.x_stride, to, n_group, begin, end,
                                         thread);
  } else {
    quantize_row<kCodesThreads, float, 1>(static_cast<const float*>(in.x) + token * in.x_stride, to, n_group, begin,
                                          end, thread);
  }
}

inline void launch_linear_codes(const LinearInput& in, std::int64_t n_token, std::int64_t cols, std::uint8_t* codes,
                                bool overlap, cudaStream_t stream) {
  const auto n_piece = static_cast<int>(cols / 8);
  Launch{.what = "linear_codes_kernel",
         .grid =
             dim3(static_cast<unsigned>((n_piece + kCodesThreads - 1) / kCodesThreads), static_cast<unsigned>(n_token)),
         .block = kCodesThreads,
         .stream = stream,
         .overlap = overlap}(linear_codes_kernel, in, n_piece, static_cast<int>(activation_groups(cols)), codes);
}

}  // namespace gemma4::cuda::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/quantized_linear/activation_blocks.cuh"
#include "gemma4/float16.hpp"

/// How the kernel of few_tokens.cuh comes by its activations: rows that an earlier kernel wrote become blocks of 8-bit
/// integers in shared memory, in each block of the grid for itself.
namespace gemma4::cuda::detail {

struct LinearInput {
  const void* x = nullptr;  ///< [n_token, cols] Bf16 or float
  std::int64_t x_stride = 0;
  bool x_is_bf16 = false;
};

/// All rows, quantised into `activations` [kTokens, n_group]; those beyond n_token are zeros. Waits for the kernel in
/// front, which may have written them.
template <int kTokens, int kThreads>
__device__ __forceinline__ void load_and_quantize(const LinearInput& in, int n_token, int n_piece, int n_group,
                                                  std::uint8_t* activations) {
  wait_for_previous_kernel();
  for (int token = 0; token < kTokens; ++token) {
    std::uint8_t* const to = activations + token * n_group * kActivationBytesPerGroup;
    const bool exists = token < n_token;
    if (in.x_is_bf16) {
      const Bf16* const x = exists ? static_cast<const Bf16*>(in.x) + token * in.x_stride : nullptr;
      quantize_row<kThreads>(x, to, n_group, n_piece, threadIdx.x);
    } else {
      const float* const x = exists ? static_cast<const float*>(in.x) + token * in.x_stride : nullptr;
      quantize_row<kThreads>(x, to, n_group, n_piece, threadIdx.x);
    }
  }
}

}  // namespace gemma4::cuda::detail

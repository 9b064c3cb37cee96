// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/quantized_linear/activation_blocks.cuh"
#include "gemma4/float16.hpp"

/// How the kernel of few_tokens.cuh comes by its activations: rows that an earlier kernel wrote become blocks of 8-bit
/// integers in shared memory, in each block of the grid for itself; or they are such blocks already, and copied.
namespace gemma4::cuda::detail {

struct LinearInput {
  const void* x = nullptr;  ///< [n_token, cols] Bf16 or float
  std::int64_t x_stride = 0;
  bool x_is_bf16 = false;
  const std::uint8_t* codes = nullptr;  ///< the rows as blocks already, one behind the other (codes_ahead.cuh), or null
};

/// Copies n_bytes, a multiple of 16, with kThreads threads: as many reads as one thread has are on their way at a time.
template <int kThreads>
__device__ __forceinline__ void copy_codes(const std::uint8_t* from, int n_bytes, std::uint8_t* to) {
  constexpr int kUnroll = 7;  // the widest row of the 31B, 26880 bytes, by 256 threads
  for (int first = 16 * static_cast<int>(threadIdx.x); first < n_bytes; first += 16 * kUnroll * kThreads) {
    uint4 piece[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = first + 16 * i * kThreads;
      if (at < n_bytes) piece[i] = __ldcg(reinterpret_cast<const uint4*>(from + at));
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = first + 16 * i * kThreads;
      if (at < n_bytes) *reinterpret_cast<uint4*>(to + at) = piece[i];
    }
  }
}

/// All rows as blocks in `activations` [kTokens, n_group]: copied, or quantised; then those beyond n_token are zeros.
/// Waits for the kernel in front, which may have written them.
template <int kTokens, int kThreads>
__device__ __forceinline__ void load_activations(const LinearInput& in, int n_token, int n_piece, int n_group,
                                                 std::uint8_t* activations) {
  wait_for_previous_kernel();
  if (in.codes != nullptr) {
    return copy_codes<kThreads>(in.codes, n_token * n_group * kActivationBytesPerGroup, activations);
  }
  for (int token = 0; token < kTokens; ++token) {
    std::uint8_t* const to = activations + token * n_group * kActivationBytesPerGroup;
    const bool exists = token < n_token;
    if (in.x_is_bf16) {
      const Bf16* const x = exists ? static_cast<const Bf16*>(in.x) + token * in.x_stride : nullptr;
      quantize_row<kThreads>(x, to, n_group, 0, n_piece, threadIdx.x);
    } else {
      const float* const x = exists ? static_cast<const float*>(in.x) + token * in.x_stride : nullptr;
      quantize_row<kThreads>(x, to, n_group, 0, n_piece, threadIdx.x);
    }
  }
}

}  // namespace gemma4::cuda::detail

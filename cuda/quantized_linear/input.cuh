// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/weights/activation_blocks.cuh"
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
/// @tparam kUnroll reads of a thread; 7: the widest row of the 31B, 26880 bytes, by 256 threads
template <int kThreads, int kUnroll>
__device__ __forceinline__ void copy_codes(const std::uint8_t* from, int n_bytes, std::uint8_t* to) {
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

/// Quantises kTokens rows, of which those from n_token on are zeros. The pieces of all rows are one list, so that
/// memory is waited for once for rows of 5376 values, and not once a row.
/// @tparam kUnroll reads of a thread before the first use
template <int kTokens, int kThreads, int kUnroll, class TIn>
__device__ __forceinline__ void quantize_rows(const TIn* x, std::int64_t stride, int n_token, int n_piece, int n_group,
                                              std::uint8_t* activations) {
  const PieceList pieces(static_cast<std::uint32_t>(n_piece));
  const int n_there = kTokens * n_piece, thread = static_cast<int>(threadIdx.x);
  for (int first = 0; first < n_there; first += kUnroll * kThreads) {
    RawValues<8, TIn> raw[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = first + i * kThreads + thread;
      const int token = pieces.row_of(at);
      raw[i].clear();
      if (at < n_there && token < n_token) raw[i].load_from_l2(x + token * stride + 8 * (at - token * n_piece));
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * kThreads >= n_there) break;
      const int at = first + i * kThreads + thread;
      const int token = pieces.row_of(at);
      float values[8];
      raw[i].widen(values);
      quantize_eight(values, activations + token * n_group * kActivationBytesPerGroup, n_group,
                     (at - token * n_piece) / 4, at < n_there);
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
    return copy_codes<kThreads, 7>(in.codes, n_token * n_group * kActivationBytesPerGroup, activations);
  }
  const auto* const as_bf16 = static_cast<const Bf16*>(in.x);
  const auto* const as_float = static_cast<const float*>(in.x);
  if constexpr (kTokens == 1) {
    if (in.x_is_bf16) return quantize_row<kThreads>(as_bf16, activations, n_group, 0, n_piece, threadIdx.x);
    return quantize_row<kThreads>(as_float, activations, n_group, 0, n_piece, threadIdx.x);
  } else {
    if (in.x_is_bf16) {
      return quantize_rows<kTokens, kThreads, kManyPieces<Bf16>>(as_bf16, in.x_stride, n_token, n_piece, n_group,
                                                                 activations);
    }
    quantize_rows<kTokens, kThreads, kManyPieces<float>>(as_float, in.x_stride, n_token, n_piece, n_group, activations);
  }
}

}  // namespace gemma4::cuda::detail

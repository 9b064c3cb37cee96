// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/cache_hint.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/quantized_linear/activation_blocks.cuh"
#include "cuda/residual_norm/row_norm.cuh"
#include "gemma4/float16.hpp"

/// How a kernel of linear_decode.cuh comes by its activations: rows that an earlier kernel wrote, or the residual
/// stream itself, which it then finishes and normalises (row_norm.cuh). Each block does so for itself, and ends with
/// blocks of 8-bit integers in shared memory; one block stores the finished residual.
namespace gemma4::cuda::detail {

inline constexpr int kMaxRowPieces = 3;  ///< a thread, of a row that is normalised here
inline constexpr int kMaxNormCols = kMaxRowPieces * kRowThreads * kRowPiece;

/// Rows of the first form lie in x; of the second in residual and x, and `norm` tells them apart.
struct LinearInput {
  const void* x = nullptr;  ///< [n_token, cols] Bf16 or float; second form: what is pending, float, or null
  std::int64_t x_stride = 0;
  bool x_is_bf16 = false;
  const float* norm = nullptr;      ///< [cols], null in the first form
  const float* residual = nullptr;  ///< [n_token, cols]
  std::int64_t residual_stride = 0;
  float* residual_out = nullptr;  ///< [n_token, cols], not `residual`; may be null
  std::int64_t residual_out_stride = 0;
  const float* post_norm = nullptr;  ///< [cols]
  float scale = 1.0f;                ///< of the layer
  float epsilon = 0.0f;
};

/// A piece of a row of float, from memory that this kernel does not write.
__device__ __forceinline__ void load_piece(const float* row, int piece, float (&values)[kRowPiece]) {
  RawValues<kRowPiece, float> raw;
  raw.load_from_l2(row + kRowPiece * piece);
  raw.widen(values);
}

__device__ __forceinline__ void store_piece(float* row, int piece, const float (&values)[kRowPiece]) {
  float4* const to = reinterpret_cast<float4*>(row + kRowPiece * piece);
  to[0] = make_float4(values[0], values[1], values[2], values[3]);
  to[1] = make_float4(values[4], values[5], values[6], values[7]);
}

/// Two values as bf16 holds them.
__device__ __forceinline__ void round_to_bf16(float& a, float& b) {
  const std::uint32_t both = pack_bf16(a, b);
  a = bit_cast<float>(both << 16), b = bit_cast<float>(both & 0xFFFF0000u);
}

/// Rows of the second form. The weights of a norm are fetched before the kernel in front has ended, and so is the
/// residual of the first token where something is pending: the kernel in front wrote that, an earlier one the residual.
/// @param parts  shared memory of two sums
template <int kTokens>
__device__ __forceinline__ void finish_and_quantize(const LinearInput& in, int n_token, int n_piece, int n_group,
                                                    std::uint8_t* activations, float (&parts)[2][kRowWarps]) {
  const int thread = static_cast<int>(threadIdx.x), width = kRowPiece * n_piece;
  const float* const pending_rows = static_cast<const float*>(in.x);
  const bool has_pending = pending_rows != nullptr;
  float post_norm[kMaxRowPieces][kRowPiece] = {}, x[kMaxRowPieces][kRowPiece] = {};
  const auto load_row = [&](const float* row, float(&to)[kMaxRowPieces][kRowPiece]) {
#pragma unroll
    for (int i = 0; i < kMaxRowPieces; ++i) {
      if (i * kRowThreads + thread < n_piece) load_piece(row, i * kRowThreads + thread, to[i]);
    }
  };
  for (int piece = 4 * thread; piece < n_piece; piece += 4 * kRowThreads) {
    prefetch_line(in.norm + kRowPiece * piece);
  }
  if (has_pending) load_row(in.post_norm, post_norm), load_row(in.residual, x);
  wait_for_previous_kernel();
  int turn = 0;  // of the two sums
#pragma unroll 1
  for (int token = 0; token < kTokens; ++token) {
    if (token < n_token) {
      float sum = 0.0f;
      if (has_pending) {
        float pending[kMaxRowPieces][kRowPiece] = {};
        load_row(pending_rows + token * in.x_stride, pending);
        if (token > 0) load_row(in.residual + token * in.residual_stride, x);
#pragma unroll
        for (int i = 0; i < kMaxRowPieces; ++i) sum = add_squares(sum, pending[i]);
        const float scale = norm_scale(sum_of_row<1>(sum, parts[turn], thread), width, in.epsilon);
        turn ^= 1;
#pragma unroll
        for (int i = 0; i < kMaxRowPieces; ++i) {
#pragma unroll
          for (int j = 0; j < kRowPiece; ++j) {
            x[i][j] = finished(x[i][j], pending[i][j], scale, post_norm[i][j], in.scale);
          }
        }
      } else {
        load_row(in.residual + token * in.residual_stride, x);
      }
      float norm[kMaxRowPieces][kRowPiece] = {};  // not earlier: registers
      load_row(in.norm, norm);
      sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kMaxRowPieces; ++i) {
        const int piece = i * kRowThreads + thread;
        if (blockIdx.x == 0 && in.residual_out != nullptr && piece < n_piece) {
          store_piece(in.residual_out + token * in.residual_out_stride, piece, x[i]);
        }
        sum = add_squares(sum, x[i]);
      }
      const float scale = norm_scale(sum_of_row<1>(sum, parts[turn], thread), width, in.epsilon);
      turn ^= 1;
#pragma unroll
      for (int i = 0; i < kMaxRowPieces; ++i) {
#pragma unroll
        for (int j = 0; j < kRowPiece; j += 2) {
          x[i][j] = normalised(x[i][j], scale, norm[i][j]);
          x[i][j + 1] = normalised(x[i][j + 1], scale, norm[i][j + 1]);
          round_to_bf16(x[i][j], x[i][j + 1]);
        }
      }
    } else {
#pragma unroll
      for (float(&piece)[kRowPiece] : x) {
#pragma unroll
        for (float& value : piece) value = 0.0f;
      }
    }
    std::uint8_t* const to = activations + token * n_group * kActivationBytesPerGroup;
#pragma unroll
    for (int i = 0; i < kMaxRowPieces; ++i) {
      const int piece = i * kRowThreads + thread;
      if (i * kRowThreads >= n_piece) break;
      quantize_eight(x[i], to, n_group, piece / 4, piece < n_piece);
    }
  }
}

/// Rows of the first form.
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

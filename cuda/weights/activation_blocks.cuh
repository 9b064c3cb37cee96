// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "gemma4/float16.hpp"
#include "gemma4/plan/packed_rows.hpp"
#include "gemma4/platform.hpp"

/// Activations as 8-bit integers in blocks of 32: made by each thread block of a product for itself in shared memory,
/// or in device memory by a launch in front of it, of their own (cuda/quantized_linear/codes_ahead.cuh) or that of the
/// norm which writes the activations (cuda/residual_norm.cuh). The same codes in any case.
///
/// Block scale s = max|x| / 127, code q = round(x / s) to nearest even, so that |x - s q| <= s / 2 (and a few ulp). A
/// block whose largest magnitude is below 2^-110 becomes zero. A block with an infinity or a NaN gets scale NaN, and
/// with it every output of its row: callers refuse such activations, the kernel does not hide them.
/// Bytes of a row, for G blocks: [0:16G) codes 0-15 of each | [16G:32G) codes 16-31 | [32G:40G) BlockTail.
namespace gemma4::cuda {

namespace detail {

inline constexpr int kActivationBytesPerGroup = 40;

/// Groups of a token's activations: an even number, so that each token begins at 16 bytes.
[[nodiscard]] constexpr std::int64_t activation_groups(std::int64_t cols) {
  return (row_groups(cols) + 1) / 2 * 2;
}

}  // namespace detail

/// Room for codes in device memory; launches of one stream may share it. Null: there is none.
struct LinearCodes {
  std::uint8_t* data = nullptr;  ///< at a multiple of 16 bytes
  std::int64_t n_bytes = 0;
};

/// Bytes of the codes of n_token rows of cols values.
[[nodiscard]] constexpr std::int64_t linear_codes_bytes(std::int64_t n_token, std::int64_t cols) {
  return n_token * detail::activation_groups(cols) * detail::kActivationBytesPerGroup;
}

namespace detail {

/// 1.5 * 2^23: added to a float below 2^22, it rounds it to an integer, to nearest even, and leaves that in the low
/// bits; subtracted from a float with these bits plus an integer, it converts the integer. kMagic is its bits.
inline constexpr float kMagicFloat = 12582912.0f;
inline constexpr int kMagic = 0x4B400000;
static_assert(bit_cast<int>(kMagicFloat) == kMagic);

/// Scale of a block and the sums of its codes 0-15 (low half) and 16-31 (high half).
struct BlockTail {
  float scale;
  std::uint32_t sums;
};

/// Eight values of a block as codes, the block's scale, and its sums: four neighbouring lanes hold a block.
struct EightCodes {
  std::uint32_t word[2];
  float scale;
  int sum;    ///< of the codes of this half of the block, 16
  int other;  ///< and of the other half

  /// Every lane of the warp calls.
  __device__ __forceinline__ explicit EightCodes(const float (&x)[8]) {
    float largest = fabsf(x[0]);
#pragma unroll
    for (int i = 1; i < 8; ++i) largest = max_or_nan(largest, fabsf(x[i]));
    largest = max_or_nan(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = max_or_nan(largest, __shfl_xor_sync(~0u, largest, 2));
    const bool is_zero = largest < 0x1p-110f;
    // The difference is zero, or NaN where the largest is not finite; codes then are what they may.
    scale = is_zero ? 0.0f : __fadd_rn(__fmul_rn(largest, 1.0f / 127.0f), __fsub_rn(largest, largest));
    // (An exact division costs the widest product time.)
    const float inverse = is_zero ? 0.0f : __fmul_rn(reciprocal_approx(__fmul_rn(largest, 0x1p-8f)), 127.0f * 0x1p-8f);
    // The low byte of the sum is the code.
    std::uint32_t bits[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) bits[i] = bit_cast<std::uint32_t>(__fmaf_rn(x[i], inverse, kMagicFloat));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      word[i] = __byte_perm(__byte_perm(bits[4 * i], bits[4 * i + 1], 0x0040),
                            __byte_perm(bits[4 * i + 2], bits[4 * i + 3], 0x0040), 0x5410);
    }
    sum = dot4(word[0], 0x01010101u, dot4(word[1], 0x01010101u, 0));
    sum += __shfl_xor_sync(~0u, sum, 1);
    other = __shfl_xor_sync(~0u, sum, 2);
  }
};

/// Four neighbouring lanes hold a block, eight values each; every lane of the warp calls. Stores the block.
__device__ __forceinline__ void quantize_eight(const float (&x)[8], std::uint8_t* activations, int n_group, int group,
                                               bool valid) {
  const int part = threadIdx.x & 3;
  const EightCodes eight(x);
  if (!valid) return;
  std::uint8_t* const codes = activations + 16 * (part / 2 * n_group + group) + 8 * (part & 1);
  *reinterpret_cast<uint2*>(codes) = make_uint2(eight.word[0], eight.word[1]);
  if (part == 0) {
    reinterpret_cast<BlockTail*>(activations + 32 * n_group)[group] = {
        eight.scale,
        (static_cast<std::uint32_t>(eight.sum) & 0xFFFFu) | (static_cast<std::uint32_t>(eight.other) << 16)};
  }
}

/// Pieces of several rows, `each` a row, as one list: the row of piece i is i / each, as the upper half of a product;
/// exact while i * each < 2^32.
struct PieceList {
  std::uint32_t inverse;

  __device__ __forceinline__ explicit PieceList(std::uint32_t each) : inverse(0xFFFFFFFFu / each + 1) {}
  [[nodiscard]] __device__ __forceinline__ int row_of(int piece) const {
    return static_cast<int>(__umulhi(static_cast<std::uint32_t>(piece), inverse));
  }
};

/// Reads of eight values that registers hold where nothing else is under way.
template <class TIn>
inline constexpr int kManyPieces = sizeof(TIn) == 2 ? 11 : 5;

/// Quantises pieces `begin` to `end` of row `x`, 8 values each, with kThreads threads (whole warps, `thread` counts
/// them). As many reads as registers hold are issued before the first use: the 21504 values of the widest row of the
/// 31B wait for memory once. Null x: zeros.
/// @tparam kUnroll reads a thread before the first use
template <int kThreads, class TIn, int kUnroll = kManyPieces<TIn>>
__device__ __forceinline__ void quantize_row(const TIn* x, std::uint8_t* activations, int n_group, int begin, int end,
                                             int thread) {
  for (int first = begin; first < end; first += kUnroll * kThreads) {
    RawValues<8, TIn> raw[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int piece = first + i * kThreads + thread;
      raw[i].clear();
      if (x != nullptr && piece < end) raw[i].load_from_l2(x + 8 * piece);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * kThreads >= end) break;
      const int piece = first + i * kThreads + thread;
      float values[8];
      raw[i].widen(values);
      quantize_eight(values, activations, n_group, piece / 4, piece < end);
    }
  }
}

}  // namespace detail

}  // namespace gemma4::cuda

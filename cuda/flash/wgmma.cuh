// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/flash/params.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/opaque.cuh"
#include "cuda/ptx/shared_memory.cuh"
#include "cuda/ptx/tensor_copy.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/softmax_state.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/view.hpp"

/// What the two wgmma flash kernels share (cuda/flash/wgmma_512.cuh and cuda/flash/wgmma_256.cuh): the softmax of one
/// [64, 64] tile of scores in the accumulator layout, its masks, and the tensor maps of their operands.
///
/// In shared memory a tile of `rows` vectors is cut into blocks of 64 dimensions: [head_dim / 64][rows][64], each block
/// in the 128-byte swizzle. One tensor copy of a box {64, rows, blocks} writes that.
namespace gemma4::cuda::detail {

inline constexpr int kWgmmaKeys = 64;  ///< keys in a tile

/// Copied by value into the kernel. `old_k`, `old_v` are used by sliding layers alone.
struct FlashMaps {
  CUtensorMap q, k, v, old_k, old_v, out;
};

/// What a kernel does to each query vector as it arrives and to each result before it leaves: nothing. A transform that
/// does something has kIsIdentity = false and, for a vector of D values in a warp, D / 32 neighbours a lane,
///   __device__ void forward<D>(float (&x)[D / 32]) const;    // of a query
///   __device__ void inverse<D>(float (&x)[D / 32]) const;    // of a result
/// It is a parameter of the kernel, so it is trivially copyable.
struct NoTransform {
  static constexpr bool kIsIdentity = true;
};

/// Whether a tile of 64 rows holds whole tokens.
[[nodiscard]] constexpr bool wgmma_group(std::int64_t group) {
  return is_power_of_two(group) && group <= 64;
}

/// Map of q or out [batch, n_query, n_head, head_dim]: a box is `rows` rows (token, then head of the group) of `blocks`
/// blocks of 64 dimensions.
[[nodiscard]] inline CUtensorMap query_map(const char* what, const Bf16* data, const std::int64_t (&stride)[3],
                                           const AttentionShape& shape, int rows, int blocks) {
  const auto bytes = [](std::int64_t elements) { return static_cast<std::uint64_t>(elements * 2); };
  const auto group = static_cast<std::uint32_t>(shape.group());
  const TensorMapShape map{
      .extent = {64, static_cast<std::uint64_t>(shape.n_head), static_cast<std::uint64_t>(shape.n_query),
                 static_cast<std::uint64_t>(shape.head_dim / 64), static_cast<std::uint64_t>(shape.batch)},
      .stride_bytes = {bytes(stride[2]), bytes(stride[1]), 128, bytes(stride[0])},
      .box = {64, group, static_cast<std::uint32_t>(rows) / group, static_cast<std::uint32_t>(blocks), 1}};
  return make_tensor_map(what, data, map);
}

/// Map of keys or values [batch, n_head_kv, n_row, head_dim]: a box is `rows` rows of `blocks` blocks of 64 dimensions.
[[nodiscard]] inline CUtensorMap key_map(const char* what, const Bf16* data, const std::int64_t (&stride)[3],
                                         const AttentionShape& shape, std::int64_t n_row, int rows, int blocks) {
  const auto bytes = [](std::int64_t elements) { return static_cast<std::uint64_t>(elements * 2); };
  const TensorMapShape map{
      .extent = {64, static_cast<std::uint64_t>(n_row), static_cast<std::uint64_t>(shape.head_dim / 64),
                 static_cast<std::uint64_t>(shape.n_head_kv), static_cast<std::uint64_t>(shape.batch)},
      .stride_bytes = {bytes(stride[2]), 128, bytes(stride[1]), bytes(stride[0])},
      .box = {64, static_cast<std::uint32_t>(rows), static_cast<std::uint32_t>(blocks), 1, 1}};
  return make_tensor_map(what, data, map);
}

/// Running softmax of a thread's two rows; the maximum is that of the unscaled scores.
struct WgmmaSoftmax {
  SoftmaxState row[2];
};

/// Hides the keys that a row does not see; `first` is the position of the tile's first key.
__device__ __forceinline__ void hide_tile(float (&s)[32], int first, const KeyRange (&keys)[2]) {
  const int column = first + (threadIdx.x & 3) * 2;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int half = (i >> 1) & 1, position = column + (i >> 2) * 8 + (i & 1);
    if (position < keys[half].lo || position >= keys[half].hi) s[i] = -INFINITY;
  }
}

/// Turns scores into probabilities 2^((s - m) scale_log2), updates m and l, and gives the factor of what was summed
/// under the old maximum; the factor is exactly 1 where the maximum did not grow.
__device__ __forceinline__ void softmax_tile(WgmmaSoftmax& state, float (&s)[32], float (&alpha)[2], float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    SoftmaxState& row = state.row[half];
    float maximum = s[2 * half];
#pragma unroll
    for (int i = 0; i < 8; ++i) maximum = fmaxf(maximum, fmaxf(s[4 * i + 2 * half], s[4 * i + 2 * half + 1]));
    maximum = fmaxf(row.maximum, quad_max(maximum));
    const float shift = softmax_reference(maximum) * scale_log2;
    alpha[half] = row.maximum == maximum ? 1.0f : exp2_approx(fmaf(row.maximum, scale_log2, -shift));
    row.maximum = maximum;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& p = s[4 * i + 2 * half + j];
        p = exp2_approx(fmaf(p, scale_log2, -shift));
        sum += p;
      }
    }
    row.sum = fmaf(row.sum, alpha[half], sum);
  }
}

/// Probabilities as the A fragments of four 16-key steps.
__device__ __forceinline__ void pack_probabilities(std::uint32_t (&p)[4][4], const float (&s)[32]) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[step][i] = pack_bf16(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
  }
}

/// o rows times alpha, skipped where no row of the warp changed its maximum.
__device__ __forceinline__ void rescale(float (&o)[128], const float (&alpha)[2]) {
  if (!__any_sync(~0u, alpha[0] != 1.0f || alpha[1] != 1.0f)) return;
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] *= alpha[(i >> 1) & 1];
}

/// 1 / l of both rows, summed over the quad; 0 for a row that saw no key.
__device__ __forceinline__ void inverse_sum(const WgmmaSoftmax& state, float (&inverse)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    inverse[half] = softmax_inverse(quad_sum(state.row[half].sum));
  }
}

/// Writes o * inverse of 64 rows and 256 dimensions as bf16 into four blocks of [block_rows][64] at `target`, from row
/// `row0` of each block on.
__device__ __forceinline__ void store_rows(const float (&o)[128], const float (&inverse)[2], std::uint32_t target,
                                           int block_rows, int row0) {
  const int lane = threadIdx.x & 31, row = row0 + (threadIdx.x & 127) / 32 * 16 + (lane & 15);
#pragma unroll
  for (int i = 0; i < 16; ++i) {  // 16 columns at a time
    const std::uint32_t f0 = pack_bf16(o[8 * i] * inverse[0], o[8 * i + 1] * inverse[0]);
    const std::uint32_t f1 = pack_bf16(o[8 * i + 2] * inverse[1], o[8 * i + 3] * inverse[1]);
    const std::uint32_t f2 = pack_bf16(o[8 * i + 4] * inverse[0], o[8 * i + 5] * inverse[0]);
    const std::uint32_t f3 = pack_bf16(o[8 * i + 6] * inverse[1], o[8 * i + 7] * inverse[1]);
    const int chunk = (2 * i + (lane >> 4)) & 7;
    const std::uint32_t address = target + (i >> 2) * block_rows * 128 + row * 128 + ((chunk ^ (row & 7)) << 4);
    store_matrix_x4(address, f0, f1, f2, f3);
  }
}

/// Writes zeros over the rows [valid_lo, valid_hi)'s complement in `rows` rows of four blocks of 64 dimensions, each
/// [block_rows][64]; for values beyond the last key, whose probability of 0 must not meet a NaN. One warpgroup.
__device__ __forceinline__ void clear_rows(std::uint32_t target, int block_rows, int rows, int valid_lo, int valid_hi) {
  for (int item = threadIdx.x & 127; item < rows * 32; item += 128) {
    const int row = item >> 5, block = (item >> 3) & 3, chunk = item & 7;
    if (row >= valid_lo && row < valid_hi) continue;
    const std::uint32_t address = target + block * block_rows * 128 + row * 128 + chunk * 16;
    store_shared_x4(address, 0, 0, 0, 0);
  }
}

}  // namespace gemma4::cuda::detail

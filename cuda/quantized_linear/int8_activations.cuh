// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/quantized_linear/input.cuh"
#include "cuda/weights/activation_blocks.cuh"
#include "gemma4/float16.hpp"
#include "gemma4/platform.hpp"

/// Activations of the products on tensor cores (int8_tokens.cuh): the blocks of activation_blocks.cuh, laid out so that
/// one ldmatrix brings what the lanes of a warp need of them.
///
/// The tokens of a launch are columns of b, in sets: four tokens (narrow), or eight (wide). Of a set of kSet columns,
/// for G groups, a multiple of 8: codes, column c at (32G + 16) c: [0:16G) codes 0-15 of each group | [16G:32G) codes
/// 16-31 | 16 bytes nobody reads, so that eight columns (or four, at two groups 4 apart) lie in different banks.
/// Behind the codes the tails, 8 kSet bytes a group, floats: the block's scale s, and s times the sum of its codes;
///   narrow: column c at 8c: scale, scaled sum
///   wide:   columns 2p and 2p + 1 at 16p: their scales, their scaled sums
/// which is what lane 4g + t takes in one load: column t, or 2t and 2t + 1.
namespace gemma4::cuda::detail {

/// @tparam kSet columns: 4 or 8
template <int kSet>
struct Int8Columns {
  static_assert(kSet == 4 || kSet == 8);
  [[nodiscard]] GEMMA4_HD static constexpr int pitch(int n_group) { return 32 * n_group + 16; }
  [[nodiscard]] GEMMA4_HD static constexpr int code_bytes(int n_group) { return kSet * pitch(n_group); }
  [[nodiscard]] GEMMA4_HD static constexpr int bytes(int n_group) { return code_bytes(n_group) + 8 * kSet * n_group; }
  /// Where the tail of a column's group has its scale, in floats; its scaled sum is kSumBehind further on.
  [[nodiscard]] GEMMA4_HD static constexpr int tail(int group, int column) {
    return kSet == 4 ? 8 * group + 2 * column : 16 * group + 4 * (column / 2) + column % 2;
  }
  static constexpr int kSumBehind = kSet == 4 ? 1 : 2;
};

/// Groups as the layout counts them: whole super-blocks, of which a step takes one.
[[nodiscard]] GEMMA4_HD constexpr int int8_groups(int groups) {
  return (groups + 7) / 8 * 8;
}

/// Quantises n_piece pieces of eight values of each of n_token rows. The pieces of all tokens are one list, so that
/// memory is waited for once or twice and not once a token. Columns beyond n_token are not written: what they hold goes
/// nowhere.
/// @param x        [n_token, ...] the first value, rows `stride` apart
/// @param columns  sets of kSet columns, one behind the other
template <int kSet, int kThreads, class TIn>
__device__ __forceinline__ void quantize_columns(const TIn* x, std::int64_t stride, int n_token, int n_piece,
                                                 std::uint8_t* columns, int n_group) {
  using Layout = Int8Columns<kSet>;
  constexpr int kUnroll = sizeof(TIn) == 2 ? 6 : 3;
  const PieceList pieces(static_cast<std::uint32_t>(n_piece));
  const int n_there = n_token * n_piece, thread = static_cast<int>(threadIdx.x), part = thread & 3;
  std::uint8_t* const codes = columns + 16 * (part / 2) * n_group + 8 * (part & 1);  // of a group's part
  for (int first = 0; first < n_there; first += kUnroll * kThreads) {
    RawValues<8, TIn> raw[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = first + i * kThreads + thread, token = pieces.row_of(at);
      raw[i].clear();
      if (at < n_there) raw[i].load_from_l2(x + token * stride + 8 * (at - token * n_piece));
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * kThreads >= n_there) break;
      const int at = first + i * kThreads + thread, token = pieces.row_of(at);
      const int group4 = at - token * n_piece - part;  // four times the group
      const int column = token % kSet, set = token / kSet * Layout::bytes(n_group);
      float values[8];
      raw[i].widen(values);
      const EightCodes eight(values);
      if (at >= n_there) continue;
      *reinterpret_cast<uint2*>(codes + set + column * Layout::pitch(n_group) + 4 * group4) =
          make_uint2(eight.word[0], eight.word[1]);
      if (part == 0) {
        float* const tail =
            reinterpret_cast<float*>(columns + set + Layout::code_bytes(n_group)) + Layout::tail(group4 / 4, column);
        tail[0] = eight.scale;
        tail[Layout::kSumBehind] = __fmul_rn(eight.scale, static_cast<float>(eight.sum + eight.other));
      }
    }
  }
}

/// Copies the codes of n_there groups of each of n_token rows, from group `first` on, out of rows that were made blocks
/// before (activation_blocks.cuh) with row_group groups each. Halves of blocks and tails of all tokens are one list, as
/// the pieces of quantize_columns() are.
template <int kSet, int kThreads>
__device__ __forceinline__ void copy_columns(const std::uint8_t* codes, int row_group, int n_token, int first,
                                             int n_there, std::uint8_t* columns, int n_group) {
  using Layout = Int8Columns<kSet>;
  constexpr int kUnroll = 4;
  const std::uint32_t each = 3 * static_cast<std::uint32_t>(n_there);
  const PieceList parts(each);
  const int n_part = n_token * static_cast<int>(each), thread = static_cast<int>(threadIdx.x);
  struct Part {
    int token, kind, group;  ///< kind 0 and 1: half of a block; 2: its tail
  };
  const auto part_of = [&](int at) {
    const int token = parts.row_of(at);
    const int in_row = at - token * static_cast<int>(each), kind = (in_row >= n_there) + (in_row >= 2 * n_there);
    return Part{token, kind, in_row - kind * n_there};
  };
  for (int begin = thread; begin < n_part; begin += kUnroll * kThreads) {
    uint4 bits[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (begin + i * kThreads >= n_part) break;
      const Part part = part_of(begin + i * kThreads);
      const std::uint8_t* const row = codes + part.token * row_group * kActivationBytesPerGroup;
      const int group = first + part.group;
      if (part.kind == 2) {
        const uint2 tail = __ldcg(reinterpret_cast<const uint2*>(row + 32 * row_group) + group);
        bits[i].x = tail.x, bits[i].y = tail.y;
      } else {
        bits[i] = __ldcg(reinterpret_cast<const uint4*>(row) + part.kind * row_group + group);
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (begin + i * kThreads >= n_part) break;
      const Part part = part_of(begin + i * kThreads);
      const int column = part.token % kSet;
      std::uint8_t* const set = columns + part.token / kSet * Layout::bytes(n_group);
      if (part.kind == 2) {
        float* const tail =
            reinterpret_cast<float*>(set + Layout::code_bytes(n_group)) + Layout::tail(part.group, column);
        const int low = static_cast<std::int16_t>(bits[i].y & 0xFFFFu),
                  high = static_cast<std::int32_t>(bits[i].y) >> 16;
        tail[0] = __uint_as_float(bits[i].x);
        tail[Layout::kSumBehind] = __fmul_rn(__uint_as_float(bits[i].x), static_cast<float>(low + high));
      } else {
        *reinterpret_cast<uint4*>(set + column * Layout::pitch(n_group) + 16 * (part.kind * n_group + part.group)) =
            bits[i];
      }
    }
  }
}

/// The pieces from `first` on of all rows, waiting for the kernel in front, which may have written them.
template <int kSet, int kThreads>
__device__ __forceinline__ void load_columns(const LinearInput& in, int row_group, int n_token, int first, int n_piece,
                                             std::uint8_t* columns, int n_group) {
  wait_for_previous_kernel();
  if (in.codes != nullptr) {
    copy_columns<kSet, kThreads>(in.codes, row_group, n_token, first / 4, n_piece / 4, columns, n_group);
  } else if (in.x_is_bf16) {
    quantize_columns<kSet, kThreads>(static_cast<const Bf16*>(in.x) + 8 * first, in.x_stride, n_token, n_piece, columns,
                                     n_group);
  } else {
    quantize_columns<kSet, kThreads>(static_cast<const float*>(in.x) + 8 * first, in.x_stride, n_token, n_piece,
                                     columns, n_group);
  }
}

}  // namespace gemma4::cuda::detail

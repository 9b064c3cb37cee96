// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/shared_memory.cuh"
#include "cuda/quantized_linear/few_tokens.cuh"
#include "cuda/quantized_linear/int8_activations.cuh"
#include "cuda/quantized_linear/int8_dot.cuh"
#include "cuda/quantized_linear/int8_dot_every.cuh"
#include "cuda/quantized_linear/stages.cuh"
#include "cuda/weights/layout.cuh"
#include "gemma4/platform.hpp"

/// The kernel of quantized_linear on the tensor cores' 8-bit integers: for 1 to 16 tokens, of which one unpacking of a
/// weight serves four or eight. Ring, producer and finisher are those of few_tokens.cuh, and so are the results, bit
/// for bit: a group of 32 weights is one mma, whose integer sums are exact, each sum is scaled by itself as there
/// (int8_dot.cuh), and a task's 32 groups are added in the tree of its 32 lanes: groups 16 apart, then 8, 4, 2, 1. A
/// warp walks the four super-blocks of a task in the order 0, 2, 1, 3, so that eight sums a row and token, one for each
/// group of a super-block, are all that it keeps of the tree.
///
///   a: weights, rows g of 8;  b: tokens;  lane 4g + t ends with row g of
///   wide (8 columns): tokens 2t and 2t + 1; one mma a group, whose lower 8 rows are the upper half of a group that has
///     two scales, or nothing
///   narrow (4 tokens): token t; one mma a pair of groups, 4 apart: the upper rows are one of them and even columns its
///     activations, the lower rows and odd columns the other. What rows of one make with columns of the other is
///     not read.
/// For 16 tokens a warp takes each task twice, once for each set of eight columns.
///
/// Instructions a group of 8 rows, as compiled for sm_90a, narrow and wide (a dot product takes some 10 a token):
///   Q4_K 20, 28 for 144 B | Q5_K 25, 33 for 176 B | Q6_K 27, 35 for 210 B | Q8_0 13, 22 for 272 B | Q2_K 28, 42 for 84
///   B
/// At 16.5 to 18.6 B a clock a multiprocessor issues 31 to 35 while 144 B come. Bytes out of shared memory for
/// Q4_K: 5.6 and 8.6 clocks of 7.7 to 8.7, so that wide products are at the edge there, by the tails (4 of them): 16
/// rows at a time would halve that, and need twice the sums. Making codes of 8 tokens of 5376 is 2 us of a
/// multiprocessor's issue, done by each of them; by chunks it comes between the products. Measured on an H100, chains
/// of Q4_K_M: 1.30 of the time by dot products for one token, 0.74 for eight. From one token to four, a product's time
/// grows by 1.2 us a token of 5376 values, 1.5 of 8192, 2.9 of 16384 and 4 of 21504: that is the making of codes, not
/// the products, so codes_ahead.cuh. And rows that come by chunks are not dealt: 1.73 for one token of 16384 values.
namespace gemma4::cuda {

namespace detail {

inline constexpr int kInt8StageRows = 8;
inline constexpr int kInt8PassRows = 128;  ///< where activations come chunk by chunk: 4 KB of sums for 8 tokens

/// Bytes from one row of a slot to the next: an odd number of 16, so that ldmatrix finds eight rows in different banks.
[[nodiscard]] GEMMA4_HD constexpr std::int64_t int8_pitch(std::int64_t bytes) {
  return bytes / 16 % 2 == 0 ? bytes + 16 : bytes;
}

/// ByPasses: matrix by matrix, passes of rows, chunk by chunk, eight rows at a time. A pass is eight rows, so that this
/// is the order of ByRows, or as many as have room for their sums: each chunk of the activations is then there once a
/// pass, and no more than a chunk at a time.
struct ByPasses {
  static constexpr bool kKeepsSums = true;
  [[nodiscard]] static __device__ __forceinline__ std::uint32_t pitch(const LinearMatrix& matrix,
                                                                      const LinearStage& stage, std::uint32_t) {
    return stage.is_last_chunk ? matrix.last_pitch : matrix.chunk_pitch;
  }

  template <class TNext, class TBody>
  static __device__ __forceinline__ void for_each(const LinearParams& params, TNext&& next, TBody&& body) {
    LinearStage stage{};
#pragma unroll 1
    for (int index = 0; index < params.n_matrix; ++index) {
      const LinearMatrix matrix = params.matrix[index];
      const bool is_dealt = params.tickets != nullptr && index + 1 == params.n_matrix;
      const std::uint32_t block = index % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
      int row = is_dealt ? params.share_rows * static_cast<int>(blockIdx.x)
                         : linear_first_row(matrix.rows, params.row_align, block, gridDim.x);
      int end =
          is_dealt ? row + params.share_rows : linear_first_row(matrix.rows, params.row_align, block + 1, gridDim.x);
#pragma unroll 1
      for (;; row += params.pass_rows) {
        if (row >= end) {
          if (!is_dealt) break;
          row = next(stage);
          if (row < 0) break;
          end = min(row + params.ticket_rows, matrix.rows);
        }
        stage.pass_row = row;
        const int pass_end = min(row + params.pass_rows, end);
#pragma unroll 1
        for (stage.chunk = 0; stage.chunk < params.n_chunk; ++stage.chunk) {
          stage.is_last_chunk = stage.chunk + 1 == params.n_chunk;
#pragma unroll 1
          for (stage.row = row; stage.row < pass_end; stage.row += kInt8StageRows) {
            stage.n_row = min(kInt8StageRows, pass_end - stage.row);
            body(matrix, stage);
            if (++stage.slot == params.n_slot) stage.slot = 0, stage.phase ^= 1u;
          }
        }
      }
    }
  }
};

/// Where a lane finds activations.
struct Int8Lane {
  std::uint32_t columns;      ///< shared address of its 16 bytes of the first groups' codes for ldmatrix
  const std::uint8_t* tails;  ///< of its tokens, of the first group

  /// @param set   of kSet columns
  /// @param first group
  template <int kSet>
  [[nodiscard]] static __device__ __forceinline__ Int8Lane at(const std::uint8_t* set, int n_group, int first) {
    using Layout = Int8Columns<kSet>;
    const int lane = threadIdx.x & 31, matrix = lane / 8, row = lane % 8;
    // Matrices: lower and upper codes of a group, then of another. Narrow: odd rows are the group 4 further on, and the
    // other group is the next; wide: the other is 4 further on.
    const int column = kSet == 4 ? row / 2 : row;
    const int group = kSet == 4 ? row % 2 * 4 + matrix / 2 : matrix / 2 * 4;
    const int place = column * Layout::pitch(n_group) + 16 * (matrix % 2 * n_group + first + group);
    return {shared_address(set + place), set + Layout::code_bytes(n_group) + 8 * kSet * first + 2 * kSet * (lane % 4)};
  }
};

/// 1, 2 or 4 floats in one piece.
template <int kCount>
__device__ __forceinline__ void load_floats(const std::uint8_t* from, float* value) {
  struct alignas(4 * kCount) Piece {
    float value[kCount];
  };
  const Piece piece = *reinterpret_cast<const Piece*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] = piece.value[i];
}

/// The tails of a lane's tokens for a group of a step; scaled sums only where a format has a use for them.
template <int kSet, bool kHasSums>
__device__ __forceinline__ void load_tails(const Int8Lane& lane, int group, Int8Tail (&tail)[kSet / 4]) {
  constexpr int kEach = kSet / 4, kCount = kHasSums ? 2 * kEach : kEach;
  float value[2 * kEach] = {};
  load_floats<kCount>(lane.tails + 8 * kSet * group, value);
#pragma unroll
  for (int c = 0; c < kEach; ++c) tail[c] = {value[c], value[kEach + c]};
}

template <class TFormat>
__device__ __forceinline__ void mma_of(int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if constexpr (TFormat::kUnsigned) {
    mma_u8_s8(c, a, b0, b1);
  } else {
    mma_s8(c, a, b0, b1);
  }
}

/// Integer sums of two groups, j and j + 4, with the four tokens: of group j + 4i in sums[i].
/// @param low, high  words of the two, b0, b1 columns of both
template <class TFormat>
__device__ __forceinline__ void pair_sums(const typename TFormat::Row& row, int j, const std::uint32_t (&low)[2],
                                          const std::uint32_t (&high)[2], std::uint32_t b0, std::uint32_t b1,
                                          Int8Sums (&sums)[2]) {
  constexpr int kBits = TFormat::Sum::kBits;
  int c[4] = {kBits, kBits, kBits, kBits};
  if constexpr (TFormat::kSplit) {
    int d[4] = {kBits, kBits, kBits, kBits};
    mma_s8_half(c, low[0], low[1], b0);
    mma_s8_half(d, high[0], high[1], b1);
    sums[0].high = d[0], sums[1].high = d[3];
  } else {
    mma_of<TFormat>(c, {low[0], low[1], high[0], high[1]}, b0, b1);
  }
  sums[0].low = c[0], sums[1].low = c[3];
  if constexpr (TFormat::kHasMinima) {
    int m[4] = {kMagic, kMagic, kMagic, kMagic};
    std::uint32_t a[4];
    row.minima(j, a[0], a[2]);
    row.minima(j + 4, a[1], a[3]);
    mma_s8(m, a, b0, b1);
    sums[0].minima = m[0], sums[1].minima = m[3];
  }
}

/// Integer sums of group j with a lane's two tokens of eight.
template <class TFormat>
__device__ __forceinline__ void group_sums(const typename TFormat::Row& row, int j, std::uint32_t low,
                                           std::uint32_t high, std::uint32_t b0, std::uint32_t b1,
                                           Int8Sums (&sums)[2]) {
  constexpr int kBits = TFormat::Sum::kBits;
  int c[4] = {kBits, kBits, kBits, kBits};
  mma_of<TFormat>(c, {low, 0u, TFormat::kSplit ? 0u : high, TFormat::kSplit ? high : 0u}, b0, b1);
  sums[0].low = c[0], sums[1].low = c[1];
  if constexpr (TFormat::kSplit) sums[0].high = c[2], sums[1].high = c[3];
  if constexpr (TFormat::kHasMinima) {
    int m[4] = {kMagic, kMagic, kMagic, kMagic};
    std::uint32_t a[4] = {0, 0, 0, 0};
    row.minima(j, a[0], a[2]);
    mma_s8(m, a, b0, b1);
    sums[0].minima = m[0], sums[1].minima = m[1];
  }
}

/// Whether no row of a type ends within a step.
template <TensorType kType>
inline constexpr bool kIsOfSuperBlocks = block_size(kType) == 8 * kGroup;

/// A step: adds the terms of its groups to sum[group][token of the lane], or makes them that.
/// @param count of its groups that exist; what lies behind them in shared memory may be anything
template <TensorType kType, int kSet, bool kAdd>
__device__ __forceinline__ void multiply_step(const Int8Place& place, const Int8Lane& lane, int count,
                                              float (&sum)[8][kSet / 4]) {
  using Format = Int8Format<kType>;
  const typename Format::Row row(place);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t low[4], high[4], b[4];
    row.fragments(half, low, high);
    if constexpr (kSet == 4) load_matrix_x4(b, lane.columns + 32 * half);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const int j = 2 * half + p;
      Int8Sums sums[2][kSet / 4];  // of groups j and j + 4
      if constexpr (kSet == 4) {
        Int8Sums pair[2];
        pair_sums<Format>(row, j, {low[2 * p], low[2 * p + 1]}, {high[2 * p], high[2 * p + 1]}, b[2 * p], b[2 * p + 1],
                          pair);
        sums[0][0] = pair[0], sums[1][0] = pair[1];
      } else {
        load_matrix_x4(b, lane.columns + 16 * j);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          group_sums<Format>(row, j + 4 * i, low[2 * p + i], high[2 * p + i], b[2 * i], b[2 * i + 1], sums[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int group = j + 4 * i;
        Int8Tail tail[kSet / 4];
        load_tails<kSet, Format::kHasSums>(lane, group, tail);
#pragma unroll
        for (int c = 0; c < kSet / 4; ++c) {
          float term = row.term(group, sums[i][c], tail[c]);
          if (!kIsOfSuperBlocks<kType> && group >= count) term = 0.0f;
          sum[group][c] = kAdd ? __fadd_rn(sum[group][c], term) : term;
        }
      }
    }
  }
}

/// One task: up to 32 groups of 8 rows with a set of columns.
/// @param slot      the stage
/// @param n_left    groups of the chunk from the task's first on
/// @param partials  [kSet, kMaxStageRows], of the task and the set
template <TensorType kType, int kSet>
__device__ __forceinline__ void multiply_int8(const std::uint8_t* slot, int pitch, int groups, int first, int n_left,
                                              Int8Lane lane, float* partials) {
  const int l = threadIdx.x & 31, matrix = l / 8;
  const std::uint8_t* const chunk = slot + l / 4 * pitch;
  const std::uint32_t matrices = shared_address(slot + l % 8 * pitch + 16 * (first + matrix / 2 + matrix % 2 * 4));
  float total[8][kSet / 4] = {};
#pragma unroll 1
  for (int half = 0; half < 2 && 8 * half < n_left; ++half) {
    float sum[8][kSet / 4];
    const auto step = [&]<bool kAdd>(int block) {
      const Int8Lane at{lane.columns + 128 * block, lane.tails + 64 * kSet * block};
      multiply_step<kType, kSet, kAdd>({chunk, matrices + 128 * block, groups, first + 8 * block}, at,
                                       n_left - 8 * block, sum);
    };
    step.template operator()<false>(half);
    if (8 * (half + 2) < n_left) step.template operator()<true>(half + 2);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int c = 0; c < kSet / 4; ++c) total[j][c] = __fadd_rn(total[j][c], sum[j][c]);
    }
  }
#pragma unroll
  for (int c = 0; c < kSet / 4; ++c) {
    const auto four = [&](int j) {
      return __fadd_rn(__fadd_rn(total[j][c], total[j + 4][c]), __fadd_rn(total[j + 2][c], total[j + 6][c]));
    };
    partials[(l % 4 * (kSet / 4) + c) * kMaxStageRows + l / 4] = __fadd_rn(four(0), four(1));
  }
}

/// The activations of a chunk, or all of them, by the warps that multiply.
template <int kSet, int kWarps>
__device__ __forceinline__ void load_chunk(const LinearParams& params, std::uint8_t* activations, int chunk) {
  const int first = params.is_by_chunk ? 4 * chunk * params.full_groups : 0;
  const int n_piece = params.is_by_chunk ? min(4 * params.full_groups, params.n_piece - first) : params.n_piece;
  const int row_group = (params.n_piece / 4 + 1) / 2 * 2;  // activation_groups()
  load_columns<kSet, 32 * kWarps>(params.input, row_group, params.n_token, first, n_piece, activations, params.n_group);
  named_barrier_sync<1, 32 * kWarps>();
}

/// The warps that multiply, as multiply() of few_tokens.cuh; a task is there once for each set of columns.
template <int kSet, int kWarps>
__device__ __forceinline__ void multiply_columns(const LinearParams& params, unsigned char* smem) {
  const int n_set = kSet == 4 ? 1 : params.n_set;  // one or two
  std::uint8_t* const activations = smem + params.smem.activations;
  load_chunk<kSet, kWarps>(params, activations, 0);
  const RingBarriers barriers(params, smem);
  const int n_task = params.n_task, warp = threadIdx.x / 32;
  const bool has_short = is_short_task(params.full_groups % 32);
  const int n_long = has_short ? n_task - 1 : n_task;
  int next_long = warp, next_short = warp, there = 0;
  const auto next = [&](const LinearStage& stage) {
    mbarrier_wait(barriers.full + 8 * stage.slot, stage.phase);
    const int row = warp_value(note_of(params, smem, stage));
    if (row < 0) mbarrier_arrive(barriers.empty + 8 * stage.slot);
    return row;
  };
  ByPasses::for_each(params, next, [&](const LinearMatrix& matrix, const LinearStage& stage) {
    if (params.is_by_chunk && stage.chunk != there) {
      named_barrier_sync<1, 32 * kWarps>();  // all warps are through with the chunk before
      there = stage.chunk;
      load_chunk<kSet, kWarps>(params, activations, there);
    }
    const int groups = stage.is_last_chunk ? params.last_groups : params.full_groups;
    const int pitch = stage.is_last_chunk ? matrix.last_pitch : matrix.chunk_pitch;
    const std::uint8_t* const slot = smem + stage.slot * params.slot_bytes;
    mbarrier_wait(barriers.full + 8 * stage.slot, stage.phase);
#pragma unroll 1
    for (;;) {
      int unit;  // a task and a set
      if (next_long < n_set * n_long) {
        unit = next_long, next_long += kWarps;
      } else if (has_short && next_short < n_set) {
        unit = n_set * n_long + next_short, next_short += kWarps;
      } else {
        break;
      }
      const int set = unit & (n_set - 1), task = unit >> (n_set - 1), first = 32 * task;
      if (first >= groups) continue;
      const int first_there = params.is_by_chunk ? first : stage.chunk * params.full_groups + first;
      const Int8Lane lane =
          Int8Lane::at<kSet>(activations + set * Int8Columns<kSet>::bytes(params.n_group), params.n_group, first_there);
      float* const to = reinterpret_cast<float*>(smem + params.smem.partials) +
                        ((stage.slot * n_task + task) * n_set + set) * kSet * kMaxStageRows;
      for_packed_type<true>(matrix.type, [&]<TensorType kType>() {
        multiply_int8<kType, kSet>(slot, pitch, groups, first, groups - first, lane, to);
      });
    }
    next_long -= n_set * n_long;
    if (has_short) next_short -= n_set;
    mbarrier_arrive(barriers.empty + 8 * stage.slot);
  });
}

/// @tparam kSet   columns of an mma that tokens have: 4 or 8; results of those beyond params.n_token are not stored
/// @tparam kWarps that multiply: 8 where two blocks share a multiprocessor, 14 where it has one; either way there are
///                some 100 registers a thread
template <int kSet, int kWarps>
__global__ void __launch_bounds__(32 * (kWarps + 2), 16 / kWarps)
    linear_int8_kernel(const __grid_constant__ LinearParams params) {
  extern __shared__ __align__(128) unsigned char linear_smem_bytes[];
  if (threadIdx.x == 0) init_ring(params, linear_smem_bytes, kWarps);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (warp == kWarps) {
    copy_stages<ByPasses>(params, linear_smem_bytes);
  } else if (warp < kWarps) {
    multiply_columns<kSet, kWarps>(params, linear_smem_bytes);
  } else if (kSet == 4 || params.n_set == 1) {
    finish_stages<kSet, ByPasses>(params, linear_smem_bytes);
  } else {
    finish_stages<2 * kSet, ByPasses>(params, linear_smem_bytes);
  }
}

}  // namespace detail

}  // namespace gemma4::cuda

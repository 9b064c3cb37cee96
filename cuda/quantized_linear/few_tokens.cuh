// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/quantized_linear/dot.cuh"
#include "cuda/quantized_linear/dot_every.cuh"
#include "cuda/quantized_linear/input.cuh"
#include "cuda/quantized_linear/stages.cuh"
#include "cuda/weights/activation_blocks.cuh"
#include "cuda/weights/layout.cuh"
#include "gemma4/float16.hpp"

/// The kernel of quantized_linear for few tokens: weights are read once, in one stream a block.
///
/// A block owns a run of rows, so a contiguous range of memory; with LinearTickets the last fifth of the rows is dealt
/// to blocks that have done theirs (dynamic row scheduling): multiprocessors differ in their share of the memory's
/// rate, so that the blocks of an equal division end far apart. A producer warp fetches the rows, stage by stage (some
/// rows of one chunk), into a ring of shared memory (stages.cuh, which has the protocol as a table). Eight consumer
/// warps first quantise the activations, or copy what a launch in front has made of them (input.cuh), then take tasks:
/// 32 groups (a lane each) of every row of a stage.
/// The lanes' sums of a row are added by a tree, the tasks' sums of a row by the finishing warp, in order, which also
/// ends the row (activation, softcap, store).
///
/// Two blocks share a multiprocessor, and the next kernel's blocks may start as soon as these have begun (programmatic
/// dependent launch): each takes the place of one that has ended, and fills its ring while the others end. A grid of
/// one block a multiprocessor does not do that: where a block ends early, two of the next kernel's find room and
/// elsewhere none. Nor do clusters of blocks that would share the normalisation of their input: the places of all must
/// come free at once, and the larger the cluster, the longer the chain took.
///
/// The order of every sum depends on the number of columns alone: not on the number of tokens, rows, matrices, blocks
/// or stages. Work of 8 rows of 32 groups of Q4_K is some 8 * 40 instructions a lane for 4.5 KB; what steers it (rows,
/// groups, slots) has to stay in the warp's uniform registers: noted in shared memory for each stage, it made the loop
/// half as slow again.
namespace gemma4::cuda {

namespace detail {

/// Sums of 4 or 8 rows over the lanes: lanes of row r are 32 / kRows neighbours. Each row's tree is the same for both:
/// lanes 16 apart, then 8, 4, 2, 1.
template <int kRows>
[[nodiscard]] __device__ __forceinline__ float add_lanes(const float (&row)[kRows]) {
  const int lane = threadIdx.x & 31;
  float sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) sum[r] = row[r];
  int step = 16;
#pragma unroll
  for (int half = kRows / 2; half > 0; half /= 2, step /= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const float other = __shfl_xor_sync(~0u, upper ? sum[r] : sum[r + half], step);
      sum[r] = __fadd_rn(upper ? sum[r + half] : sum[r], other);
    }
  }
#pragma unroll
  for (; step > 0; step /= 2) sum[0] = __fadd_rn(sum[0], __shfl_xor_sync(~0u, sum[0], step));
  return sum[0];
}

/// One task: this lane's group of every row of a stage of kStageRows, for all tokens.
/// @param partials [kTokens, kMaxStageRows], of the task
template <TensorType kType, int kTokens, int kStageRows>
__device__ __forceinline__ void multiply_stage(const std::uint8_t* slot, int groups, int group, int n_row,
                                               const LaneActivation (&x)[kTokens], float* partials) {
  using Format = LinearFormatFor<kType, kTokens>;
  constexpr int kRows = kTokens == 1 ? kStageRows : kTaskRows;
  const int lane = threadIdx.x & 31;
  const int bytes = static_cast<int>(chunk_bytes(kType, groups));
#pragma unroll
  for (int first = 0; first < kStageRows; first += kRows) {
    if (first > 0 && first >= n_row) break;
    float sum[kTokens][kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Rows beyond n_row are what an earlier stage left; their sums go nowhere.
      typename Format::Weights weights;
      weights.load(slot + (first + r) * bytes, groups, group);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) sum[t][r] = Format::term(weights, x[t], 0.0f);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float total = add_lanes(sum[t]);
      if (lane % (32 / kRows) == 0) partials[t * kMaxStageRows + first + lane / (32 / kRows)] = total;
    }
  }
}

/// Whether the last task of a chunk is short: its groups then fit into a quarter of a warp.
inline constexpr int kShortGroups = 8;
[[nodiscard]] GEMMA4_HD constexpr bool is_short_task(int groups) {
  return groups > 0 && groups <= kShortGroups;
}

/// A short task: 8 lanes a row, so four rows at a time. Same sums: those of the lanes that are missing are zeros.
template <TensorType kType, int kTokens>
__device__ __forceinline__ void multiply_short(const std::uint8_t* slot, int groups, int group, int n_row,
                                               const LaneActivation (&x)[kTokens], float* partials) {
  using Format = LinearFormatFor<kType, kTokens>;
  const int lane = threadIdx.x & 31;
  const int bytes = static_cast<int>(chunk_bytes(kType, groups));
#pragma unroll
  for (int first = 0; first < kMaxStageRows; first += 32 / kShortGroups) {
    if (first >= n_row) break;
    const int row = first + lane / kShortGroups;
    typename Format::Weights weights;
    weights.load(slot + row * bytes, groups, group);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float sum = Format::term(weights, x[t], 0.0f);
#pragma unroll
      for (int step = kShortGroups / 2; step > 0; step /= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, step));
      }
      if (lane % kShortGroups == 0) partials[t * kMaxStageRows + row] = sum;
    }
  }
}

/// gelu(gate) * up with the tanh form of gelu, in float, each operation rounded by itself.
/// Source: arXiv:1606.08415. Mirror: reference/fused_mlp.hpp
[[nodiscard]] __device__ __forceinline__ float gelu_times(float gate, float up) {
  constexpr float kSqrt2OverPi = 0.79788456080286535588f;
  const float cube = __fmul_rn(__fmul_rn(__fmul_rn(0.044715f, gate), gate), gate);
  const float inner = __fmul_rn(kSqrt2OverPi, __fadd_rn(gate, cube));
  return __fmul_rn(__fmul_rn(__fmul_rn(0.5f, gate), __fadd_rn(1.0f, tanhf(inner))), up);
}

[[nodiscard]] __device__ __forceinline__ float softcapped(float value, float cap) {
  return __fmul_rn(cap, tanhf(__fdiv_rn(value, cap)));
}

__device__ __forceinline__ void store_value(void* out, std::int64_t at, float value, bool is_bf16) {
  if (is_bf16) {
    static_cast<Bf16*>(out)[at] = to_bf16(value);
  } else {
    static_cast<float*>(out)[at] = value;
  }
}

/// Ends row `row` of a stage, whose sum is `value`; `up` is that of the row behind it.
__device__ __forceinline__ void store_row(const LinearParams& params, const LinearMatrix& matrix, int token, int row,
                                          float value, float up) {
  const std::int64_t first = token * matrix.out_stride;
  switch (params.epilogue) {
    case LinearEpilogue::kGeluUp:
      if (row % 2 == 0) store_value(matrix.out, first + row / 2, gelu_times(value, up), params.out_is_bf16);
      break;
    case LinearEpilogue::kSoftcap:
      store_value(matrix.out, first + row, softcapped(value, params.softcap), params.out_is_bf16);
      break;
    default:
      store_value(matrix.out, first + row, value, params.out_is_bf16);
  }
}

/// One thread of each block, when the block has taken its last ticket: the last one leaves zeros.
__device__ __forceinline__ void end_tickets(LinearTickets& tickets) {
  if (atomicInc(&tickets.n_ended, gridDim.x - 1) + 1 == gridDim.x) tickets.next = 0;
}

/// The finishing warp: adds the tasks' sums of a stage to those of the chunks before, and after the last chunk ends the
/// rows. Lane l holds row l % 8 of tokens l / 8, l / 8 + 4, ...
template <int kTokens, class TOrder>
__device__ __forceinline__ void finish_stages(const LinearParams& params, unsigned char* smem) {
  constexpr int kEach = (kTokens + 3) / 4;
  const RingBarriers barriers(params, smem);
  const float* const partials = reinterpret_cast<const float*>(smem + params.smem.partials);
  const int lane = threadIdx.x & 31, row = lane % kMaxStageRows;
  for (int slot = 0; slot < params.n_slot; ++slot) mbarrier_arrive(barriers.full + 8 * slot);  // no sums wait there
  wait_for_previous_kernel();  // nothing is stored before it has ended
  allow_next_kernel();
  float sum[kEach];
  const auto next = [&](const LinearStage& stage) {
    mbarrier_wait(barriers.empty + 8 * stage.slot, stage.phase);
    return warp_value(note_of(params, smem, stage));
  };
  TOrder::for_each(params, next, [&](const LinearMatrix& matrix, const LinearStage& stage) {
    const int n_task = ((stage.is_last_chunk ? params.last_groups : params.full_groups) + 31) / 32;
    const float* const from = partials + stage.slot * params.n_task * kTokens * kMaxStageRows;
    mbarrier_wait(barriers.empty + 8 * stage.slot, stage.phase);
    float part[kEach][kMaxTasks];  // all loads before the first addition
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int token = lane / kMaxStageRows + 4 * i;
#pragma unroll
      for (int task = 0; task < kMaxTasks; ++task) {
        part[i][task] = token < kTokens && task < n_task ? from[(task * kTokens + token) * kMaxStageRows + row] : 0.0f;
      }
    }
    mbarrier_arrive(barriers.full + 8 * stage.slot);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int token = lane / kMaxStageRows + 4 * i;
      // Where a pass has many rows, what is known of them waits in shared memory, for this lane.
      float* const kept =
          reinterpret_cast<float*>(smem + params.smem.sums) + (stage.row - stage.pass_row) * kTokens + 32 * i + lane;
      if (TOrder::kKeepsSums && stage.chunk > 0) sum[i] = *kept;
      float value = stage.chunk == 0 ? 0.0f : sum[i];
#pragma unroll
      for (int task = 0; task < kMaxTasks; ++task) {
        if (task < n_task) value = __fadd_rn(value, part[i][task]);
      }
      sum[i] = value;
      if (TOrder::kKeepsSums && !stage.is_last_chunk) *kept = value;
      if (!stage.is_last_chunk) continue;
      const float up = __shfl_down_sync(~0u, value, 1);
      if (row < stage.n_row && token < params.n_token) store_row(params, matrix, token, stage.row + row, value, up);
    }
  });
  if (params.tickets != nullptr && lane == 0) end_tickets(*params.tickets);
}

/// One task of a stage, of a type that is known when compiled. The widest chunk, which most rows of the 31B consist of,
/// has code of its own in the kernel of all formats: places in a slot are then part of the loads, of which 3 a row and
/// lane were computed (Q2_K: 381 instructions for 8 rows, and 415 without).
template <TensorType kType, int kTokens>
__device__ __forceinline__ void multiply_task(const std::uint8_t* slot, int groups, int group, int n_row,
                                              const LaneActivation (&x)[kTokens], float* partials, bool is_short,
                                              bool is_tall) {
  constexpr bool kOneOfAll = kTokens == 1 && !is_of_four_formats(kType);
  constexpr int kRows = stage_rows(kType, false);
  if (is_short) {
    multiply_short<kType, kTokens>(slot, groups, group, n_row, x, partials);
  } else if (kTokens == 1 && kType == TensorType::kQ6K && is_tall) {
    multiply_stage<kType, kTokens, stage_rows(kType, true)>(slot, groups, group, n_row, x, partials);
  } else if (kTokens == 1 && kRows > kTaskRows && n_row <= kTaskRows) {
    multiply_stage<kType, kTokens, kTaskRows>(slot, groups, group, n_row, x, partials);
  } else if (kOneOfAll && groups == kMaxChunkGroups) {
    multiply_stage<kType, kTokens, kRows>(slot, kMaxChunkGroups, group, n_row, x, partials);
  } else {
    multiply_stage<kType, kTokens, kRows>(slot, groups, group, n_row, x, partials);
  }
}

/// Calls body.operator()<kType>() for a type of the four.
template <class TBody>
__device__ __forceinline__ void for_type_of_four(TensorType type, TBody&& body) {
  switch (type) {
    case TensorType::kQ4K:
      return body.template operator()<TensorType::kQ4K>();
    case TensorType::kQ5K:
      return body.template operator()<TensorType::kQ5K>();
    case TensorType::kQ6K:
      return body.template operator()<TensorType::kQ6K>();
    default:
      return body.template operator()<TensorType::kQ8_0>();
  }
}

/// Calls body.operator()<kType>() for a packed type; one of the four where kEvery is false.
template <bool kEvery, class TBody>
__device__ __forceinline__ void for_packed_type(TensorType type, TBody&& body) {
  if constexpr (kEvery) {
    switch (type) {
      case TensorType::kQ4_0:
        return body.template operator()<TensorType::kQ4_0>();
      case TensorType::kQ4_1:
        return body.template operator()<TensorType::kQ4_1>();
      case TensorType::kQ5_0:
        return body.template operator()<TensorType::kQ5_0>();
      case TensorType::kQ5_1:
        return body.template operator()<TensorType::kQ5_1>();
      case TensorType::kIq4Nl:
        return body.template operator()<TensorType::kIq4Nl>();
      case TensorType::kIq4Xs:
        return body.template operator()<TensorType::kIq4Xs>();
      case TensorType::kQ3K:
        return body.template operator()<TensorType::kQ3K>();
      case TensorType::kQ2K:
        return body.template operator()<TensorType::kQ2K>();
      default:
        break;
    }
  }
  for_type_of_four(type, body);
}

/// The warps that multiply: tasks are dealt in turn, short ones apart, so that each gets as many of both. Every warp
/// passes every stage in order, with or without a task in it: a wait for a barrier's parity tells only neighbouring
/// phases apart.
template <int kTokens, bool kEvery>
__device__ __forceinline__ void multiply(const LinearParams& params, unsigned char* smem) {
  std::uint8_t* const activations = smem + params.smem.activations;
  load_activations<kTokens, 32 * kLinearWarps>(params.input, params.n_token, params.n_piece, params.n_group,
                                               activations);
  named_barrier_sync<1, 32 * kLinearWarps>();
  const RingBarriers barriers(params, smem);
  float* const partials = reinterpret_cast<float*>(smem + params.smem.partials);
  const int n_group = params.n_group, n_task = params.n_task, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const bool has_short = is_short_task(params.full_groups % 32);
  const int n_long = has_short ? n_task - 1 : n_task;
  int next_long = warp, next_short = warp;
  const auto next = [&](const LinearStage& stage) {
    mbarrier_wait(barriers.full + 8 * stage.slot, stage.phase);
    const int row = warp_value(note_of(params, smem, stage));
    if (row < 0) mbarrier_arrive(barriers.empty + 8 * stage.slot);
    return row;
  };
  ByRows<kEvery>::for_each(params, next, [&](const LinearMatrix& matrix, const LinearStage& stage) {
    const int groups = stage.is_last_chunk ? params.last_groups : params.full_groups;
    const std::uint8_t* const slot = smem + stage.slot * params.slot_bytes;
    mbarrier_wait(barriers.full + 8 * stage.slot, stage.phase);
    const auto run = [&](int task, bool is_short) {
      if (32 * task >= groups) return;
      const int in_task = is_short ? lane % kShortGroups : lane;
      const bool valid = 32 * task + in_task < groups;
      const int group = valid ? 32 * task + in_task : 0;
      LaneActivation x[kTokens];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        x[t].load(activations + t * n_group * kActivationBytesPerGroup, n_group,
                  stage.chunk * params.full_groups + group, valid);
      }
      float* const to = partials + (stage.slot * n_task + task) * kTokens * kMaxStageRows;
      for_packed_type<kEvery>(matrix.type, [&]<TensorType kType>() {
        multiply_task<kType, kTokens>(slot, groups, group, stage.n_row, x, to, is_short, params.is_tall);
      });
    };
#pragma unroll 1
    for (; next_long < n_long; next_long += kLinearWarps) run(next_long, false);
    next_long -= n_long;
    if (has_short && next_short-- == 0) {
      run(n_long, true);
      next_short = kLinearWarps - 1;
    }
    mbarrier_arrive(barriers.empty + 8 * stage.slot);
  });
}

/// @tparam kTokens tokens as compiled, 1, 2, 4 or 8; those beyond params.n_token are zeros and not stored
/// @tparam kEvery  whether matrices may have any packed type, or one of the four
template <int kTokens, bool kEvery>
__global__ void __launch_bounds__(kLinearThreads, kTokens <= 4 ? 2 : 1)
    linear_decode_kernel(const __grid_constant__ LinearParams params) {
  extern __shared__ __align__(128) unsigned char linear_smem_bytes[];
  if (threadIdx.x == 0) init_ring(params, linear_smem_bytes);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (warp == kLinearWarps) {
    copy_stages<ByRows<kEvery>>(params, linear_smem_bytes);
  } else if (warp > kLinearWarps) {
    finish_stages<kTokens, ByRows<kEvery>>(params, linear_smem_bytes);
  } else {
    multiply<kTokens, kEvery>(params, linear_smem_bytes);
  }
}

}  // namespace detail

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "cuda/activation_blocks.cuh"
#include "cuda/kernel_chain.cuh"
#include "cuda/linear_dot.cuh"
#include "cuda/mma.cuh"
#include "cuda/weight_layout.cuh"
#include "gemma4/float16.hpp"

/// The kernel of quantized_linear for few tokens: weights are read once, in one stream a block.
///
/// A block owns a run of rows, so a contiguous range of memory. Its producer warp copies it, stage by stage (some rows
/// of one chunk), into a ring of shared memory, and begins as soon as the blocks of the kernel in front have gone,
/// before what they wrote can be read: the ring holds 50 KB or more, while an SM needs about 30 KB in flight to keep
/// the memory busy. The other warps first quantise the activations, then take tasks: 32 groups (a lane each) of every
/// row of a stage. The lanes' sums of a row are added by a tree, the tasks' sums of a row by the producer warp, in
/// order, which also ends the row (activation, softcap, store).
///
/// The order of every sum depends on the number of columns alone: not on the number of tokens, rows, matrices, blocks
/// or stages. Work of 8 rows of 32 groups of Q4_K is some 8 * 40 instructions a lane for 4.5 KB.
namespace gemma4::cuda {

/// What becomes of the sum v of a row.
enum class LinearEpilogue : std::int32_t {
  kNone,     ///< out[row] = v
  kGeluUp,   ///< rows 2i and 2i + 1 are gate and up: out[i] = gelu(v[2i]) * v[2i + 1]
  kSoftcap,  ///< out[row] = cap * tanh(v / cap)
};

namespace detail {

inline constexpr int kLinearWarps = 8;                          ///< that multiply
inline constexpr int kLinearThreads = 32 * (kLinearWarps + 1);  ///< and one that copies and finishes
inline constexpr int kMaxLinearMatrices = 4;
inline constexpr int kMaxLinearSlots = 8;
inline constexpr int kMaxStageRows = 8;
inline constexpr int kTaskRows = 4;  ///< rows that a lane has under way at a time, for more than one token
inline constexpr int kMaxTasks = (kMaxChunkGroups + 31) / 32;

/// Rows of a stage: 24 KB of the widest chunk for Q4_K, 15 to 23 KB for the others.
[[nodiscard]] GEMMA4_HD constexpr int stage_rows(TensorType type) {
  return type == TensorType::kQ4K ? 8 : 4;
}

struct LinearMatrix {
  const std::uint8_t* data;
  void* out;
  std::int64_t out_stride;
  std::int64_t row_bytes;
  std::int32_t chunk_bytes;  ///< of a full chunk
  std::int32_t rows;
  TensorType type;
};

/// Where things lie in shared memory, in bytes.
struct LinearSmem {
  std::int32_t activations, partials, barriers, total;
};

/// Groups of a token's activations in shared memory: an even number, so that each token begins at 16 bytes.
[[nodiscard]] constexpr std::int64_t activation_groups(std::int64_t cols) {
  return (row_groups(cols) + 1) / 2 * 2;
}

/// @param n_token as compiled: 1, 2, 4 or 8
[[nodiscard]] constexpr LinearSmem linear_smem(std::int64_t cols, int n_token, int n_slot, int slot_bytes) {
  const std::int64_t ring = std::int64_t{n_slot} * slot_bytes;
  const std::int64_t partials = ring + activation_groups(cols) * kActivationBytesPerGroup * n_token;
  const std::int64_t n_task = (chunk_groups(cols) + 31) / 32;
  const std::int64_t barriers = partials + 2 * n_slot * n_task * n_token * kMaxStageRows * 4;
  return {static_cast<std::int32_t>(ring), static_cast<std::int32_t>(partials), static_cast<std::int32_t>(barriers),
          static_cast<std::int32_t>(barriers + 16 * n_slot)};
}

/// What divides is divided on the host: a 64-bit division in the loop over tasks once halved the rate of the kernel.
struct LinearParams {
  LinearMatrix matrix[kMaxLinearMatrices];
  std::int32_t n_matrix;
  std::int32_t row_align;  ///< rows that stay in one block: 2 for pairs of gate and up
  const void* x;
  std::int64_t x_stride;
  std::int32_t n_token;
  std::int32_t n_piece;      ///< of a row, 8 values each
  std::int32_t n_group;      ///< of a token in shared memory
  std::int32_t n_chunk;      ///< of a row
  std::int32_t full_groups;  ///< of every chunk but the last
  std::int32_t last_groups;
  std::int32_t n_task;  ///< of a full chunk
  std::int32_t n_slot;
  std::int32_t slot_bytes;
  LinearSmem smem;
  bool x_is_bf16, out_is_bf16;
  LinearEpilogue epilogue;
  float softcap;
};
static_assert(std::is_trivially_copyable_v<LinearParams>);

/// First row of a matrix that belongs to block `block` or one after it: equal shares, to a row.
[[nodiscard]] GEMMA4_HD constexpr std::int32_t linear_first_row(std::int32_t rows, std::int32_t align,
                                                                std::uint32_t block, std::uint32_t n_block) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(rows / align) * block / n_block) * align;
}

/// Walks over the stages of a block: matrix by matrix, some rows at a time, chunk by chunk. Keeps what it needs of a
/// matrix in registers: parameters at an index that is not known at compile time take long to come.
struct StageCursor {
  const LinearParams* params;
  LinearMatrix matrix{};
  int slot = 0, index = -1, chunk = 0, row = 0, end = 0, step = 0;
  std::uint32_t phase = 0;

  __device__ __forceinline__ explicit StageCursor(const LinearParams& p) : params(&p) { next_matrix(); }
  [[nodiscard]] __device__ __forceinline__ bool done() const { return index >= params->n_matrix; }
  [[nodiscard]] __device__ __forceinline__ int n_row() const { return min(step, end - row); }
  [[nodiscard]] __device__ __forceinline__ int groups() const {
    return is_last_chunk() ? params->last_groups : params->full_groups;
  }
  [[nodiscard]] __device__ __forceinline__ bool is_last_chunk() const { return chunk + 1 == params->n_chunk; }

  __device__ __forceinline__ void advance() {
    if (++slot == params->n_slot) slot = 0, phase ^= 1u;
    if (++chunk < params->n_chunk) return;
    chunk = 0;
    row += step;
    if (row >= end) next_matrix();
  }

 private:
  __device__ __forceinline__ void next_matrix() {
    do {
      if (++index >= params->n_matrix) return;
      // Mirrored for every other matrix, so that it is not always the same blocks that get a row more.
      const std::uint32_t block = index % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
      matrix = params->matrix[index];
      row = linear_first_row(matrix.rows, params->row_align, block, gridDim.x);
      end = linear_first_row(matrix.rows, params->row_align, block + 1, gridDim.x);
      step = stage_rows(matrix.type);
    } while (row >= end);
  }
};

__device__ __forceinline__ void init_barrier(std::uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive_at(std::uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

/// Waits until the phase of this parity is over.
__device__ __forceinline__ void wait_at(std::uint32_t barrier, std::uint32_t parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred done;\n"
      "again_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over_%=;\n"
      "bra again_%=;\n"
      "over_%=: }" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{ .reg .pred done;\n"
      "again_%=: mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over_%=;\n"
      "bra again_%=;\n"
      "over_%=: }" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

/// Arrivals that fill a slot: the one that names the bytes of a bulk copy, or each lane's copies.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr int kFullArrivals = 1;
#else
inline constexpr int kFullArrivals = 32;
#endif

/// The producer warp starts the copies of a stage into its slot.
__device__ __forceinline__ void copy_stage(const StageCursor& at, std::uint32_t slot, std::uint32_t barrier) {
  const LinearMatrix& matrix = at.matrix;
  const auto bytes = static_cast<std::uint32_t>(chunk_bytes(matrix.type, at.groups()));
  const std::uint8_t* const from =
      matrix.data + at.row * matrix.row_bytes + std::int64_t{at.chunk} * matrix.chunk_bytes;
  const int lane = threadIdx.x & 31, n_row = at.n_row();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const bool contiguous = at.params->n_chunk == 1;
  const int n_copy = contiguous ? 1 : n_row;
  const std::uint32_t copy_bytes = contiguous ? n_row * bytes : bytes;
  if (lane == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(n_row * bytes)
                 : "memory");
  }
  __syncwarp();
  if (lane < n_copy) {
    std::uint64_t policy;  // weights are not read again before everything else has been
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
        "%4;" ::"r"(slot + lane * bytes),
        "l"(from + lane * matrix.row_bytes), "r"(copy_bytes), "r"(barrier), "l"(policy)
        : "memory");
  }
#else
  for (int row = 0; row < n_row; ++row) {
    for (std::uint32_t at_byte = 16 * lane; at_byte < bytes; at_byte += 512) {
      copy_async_16(slot + row * bytes + at_byte, from + row * matrix.row_bytes + at_byte, true);
    }
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

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

/// One task: this lane's group of every row of a stage, for all tokens.
/// @param partials [kTokens, kMaxStageRows], of the task
template <TensorType kType, int kTokens>
__device__ __forceinline__ void multiply_stage(const std::uint8_t* slot, int groups, int group, int n_row,
                                               const LaneActivation (&x)[kTokens], float* partials) {
  using Format = LinearFormat<kType>;
  constexpr int kRows = kTokens == 1 ? stage_rows(kType) : kTaskRows;
  const int lane = threadIdx.x & 31;
  const int bytes = static_cast<int>(chunk_bytes(kType, groups));
#pragma unroll
  for (int first = 0; first < stage_rows(kType); first += kRows) {
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

/// The producer warp ends the rows of a stage: adds the tasks' sums to those of the chunks before, and after the last
/// chunk stores. Lane l holds row l % 8 of tokens l / 8, l / 8 + 4, ...
template <int kTokens>
__device__ __forceinline__ void finish_stage(const StageCursor& at, const float* partials,
                                             float (&sum)[(kTokens + 3) / 4]) {
  const LinearParams& params = *at.params;
  const LinearMatrix& matrix = at.matrix;
  const int lane = threadIdx.x & 31, row = lane % kMaxStageRows, n_task = (at.groups() + 31) / 32;
#pragma unroll
  for (int i = 0; i < (kTokens + 3) / 4; ++i) {
    const int token = lane / kMaxStageRows + 4 * i;
    float value = at.chunk == 0 ? 0.0f : sum[i];
    if (token < kTokens) {
      float part[kMaxTasks];  // all loads before the first addition
#pragma unroll
      for (int task = 0; task < kMaxTasks; ++task) {
        part[task] = task < n_task ? partials[(task * kTokens + token) * kMaxStageRows + row] : 0.0f;
      }
#pragma unroll
      for (int task = 0; task < kMaxTasks; ++task) {
        if (task < n_task) value = __fadd_rn(value, part[task]);
      }
    }
    sum[i] = value;
    if (!at.is_last_chunk()) continue;
    const float up = __shfl_down_sync(~0u, value, 1);
    if (row >= at.n_row() || token >= params.n_token) continue;
    const std::int64_t first = token * matrix.out_stride;
    if (params.epilogue == LinearEpilogue::kGeluUp) {
      if (row % 2 == 0) store_value(matrix.out, first + (at.row + row) / 2, gelu_times(value, up), params.out_is_bf16);
    } else {
      if (params.epilogue == LinearEpilogue::kSoftcap) value = softcapped(value, params.softcap);
      store_value(matrix.out, first + at.row + row, value, params.out_is_bf16);
    }
  }
}

template <int kTokens>
__device__ __forceinline__ void produce_and_finish(const LinearParams& params, unsigned char* smem) {
  const std::uint32_t ring = shared_address(smem), full = shared_address(smem + params.smem.barriers);
  const std::uint32_t empty = full + 8 * params.n_slot;
  const float* const partials = reinterpret_cast<const float*>(smem + params.smem.partials);
  StageCursor ahead(params), behind(params);
  for (int i = 0; i < params.n_slot && !ahead.done(); ++i, ahead.advance()) {
    copy_stage(ahead, ring + ahead.slot * params.slot_bytes, full + 8 * ahead.slot);
  }
  wait_for_previous_kernel();  // nothing is stored before it has ended
  float sum[(kTokens + 3) / 4];
  for (; !behind.done(); behind.advance()) {
    wait_at(empty + 8 * behind.slot, behind.phase);
    if (!ahead.done()) {
      copy_stage(ahead, ring + ahead.slot * params.slot_bytes, full + 8 * ahead.slot);
      ahead.advance();
    }
    // Two sets of partial sums in turn: the next tasks on this slot may begin before these have been added.
    const int set = behind.slot + static_cast<int>(behind.phase) * params.n_slot;
    finish_stage<kTokens>(behind, partials + set * params.n_task * kTokens * kMaxStageRows, sum);
  }
}

template <int kTokens>
__device__ __forceinline__ void quantize_tokens(const LinearParams& params, unsigned char* activations) {
  for (int t = 0; t < kTokens; ++t) {
    std::uint8_t* const to = activations + t * params.n_group * kActivationBytesPerGroup;
    const bool exists = t < params.n_token;
    if (params.x_is_bf16) {
      const Bf16* const x = exists ? static_cast<const Bf16*>(params.x) + t * params.x_stride : nullptr;
      quantize_row<32 * kLinearWarps>(x, to, params.n_group, params.n_piece, threadIdx.x);
    } else {
      const float* const x = exists ? static_cast<const float*>(params.x) + t * params.x_stride : nullptr;
      quantize_row<32 * kLinearWarps>(x, to, params.n_group, params.n_piece, threadIdx.x);
    }
  }
}

template <int kTokens>
__device__ __forceinline__ void multiply(const LinearParams& params, unsigned char* smem) {
  // No early start of the next kernel: at this place it cost more (4 % of gate_up, 2 % of a step on the H200) than it
  // hid.
  wait_for_previous_kernel();
  quantize_tokens<kTokens>(params, smem + params.smem.activations);
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kLinearWarps) : "memory");
  const int n_group = params.n_group, n_task = params.n_task;
  const std::uint32_t full = shared_address(smem + params.smem.barriers), empty = full + 8 * params.n_slot;
  float* const partials = reinterpret_cast<float*>(smem + params.smem.partials);
  const int lane = threadIdx.x & 31;
  StageCursor at(params);
  for (int task = threadIdx.x / 32;; task += kLinearWarps) {
    for (; task >= n_task && !at.done(); task -= n_task) at.advance();
    if (at.done()) return;
    const int groups = at.groups();
    const bool valid = 32 * task + lane < groups;
    const int group = valid ? 32 * task + lane : 0;
    LaneActivation x[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      x[t].load(smem + params.smem.activations + t * n_group * kActivationBytesPerGroup, n_group,
                at.chunk * params.full_groups + group, valid);
    }
    const int set = at.slot + static_cast<int>(at.phase) * params.n_slot;
    float* const to = partials + (set * n_task + task) * kTokens * kMaxStageRows;
    const std::uint8_t* const slot = smem + at.slot * params.slot_bytes;
    wait_at(full + 8 * at.slot, at.phase);
    if (32 * task < groups) {
      switch (at.matrix.type) {
        case TensorType::kQ4K:
          multiply_stage<TensorType::kQ4K, kTokens>(slot, groups, group, at.n_row(), x, to);
          break;
        case TensorType::kQ5K:
          multiply_stage<TensorType::kQ5K, kTokens>(slot, groups, group, at.n_row(), x, to);
          break;
        case TensorType::kQ6K:
          multiply_stage<TensorType::kQ6K, kTokens>(slot, groups, group, at.n_row(), x, to);
          break;
        default:
          multiply_stage<TensorType::kQ8_0, kTokens>(slot, groups, group, at.n_row(), x, to);
      }
    }
    __syncwarp();
    if (lane == 0) arrive_at(empty + 8 * at.slot);
  }
}

/// @tparam kTokens tokens as compiled, 1, 2, 4 or 8; those beyond params.n_token are zeros and not stored
template <int kTokens>
__global__ void __launch_bounds__(kLinearThreads, kTokens <= 2 ? 2 : 1)
    linear_decode_kernel(const __grid_constant__ LinearParams params) {
  extern __shared__ __align__(128) unsigned char linear_smem_bytes[];
  if (threadIdx.x == 0) {
    const std::uint32_t full = shared_address(linear_smem_bytes + params.smem.barriers);
    for (int slot = 0; slot < params.n_slot; ++slot) {
      init_barrier(full + 8 * slot, kFullArrivals);
      init_barrier(full + 8 * (params.n_slot + slot), params.n_task);
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  __syncthreads();
  if (threadIdx.x >= 32 * kLinearWarps) {
    produce_and_finish<kTokens>(params, linear_smem_bytes);
  } else {
    multiply<kTokens>(params, linear_smem_bytes);
  }
}

}  // namespace detail

}  // namespace gemma4::cuda

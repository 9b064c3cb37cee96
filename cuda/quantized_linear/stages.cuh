// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cache_hint.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/shared_memory.cuh"
#include "cuda/quantized_linear/input.cuh"
#include "cuda/weights/layout.cuh"

/// How the kernel of few_tokens.cuh gets its weights: which rows a block owns, the stages in which they come through a
/// ring in shared memory, and the producer warp that asks for them.
///
/// Dynamic row scheduling: blocks take the last fifth of the rows from a common counter, a stage at a time, when they
/// have done their own share. "Ticket" is what they take, LinearTickets the counter.
namespace gemma4::cuda {

/// What becomes of the sum v of a row.
enum class LinearEpilogue : std::int32_t {
  kNone,     ///< out[row] = v
  kGeluUp,   ///< rows 2i and 2i + 1 are gate and up: out[i] = gelu(v[2i]) * v[2i + 1]
  kSoftcap,  ///< out[row] = cap * tanh(v / cap)
};

/// The counter of dynamic row scheduling, which the blocks of a launch share, in device memory: zeros before a launch,
/// and zeros after it. Launches of one stream may share it.
struct LinearTickets {
  std::uint32_t next;     ///< ticket
  std::uint32_t n_ended;  ///< blocks
};

namespace detail {

inline constexpr int kLinearWarps = 8;                          ///< that multiply
inline constexpr int kLinearThreads = 32 * (kLinearWarps + 2);  ///< one more copies, and one ends the rows
inline constexpr int kMaxLinearMatrices = 4;
inline constexpr int kMaxLinearSlots = 8;
inline constexpr int kMaxStageRows = 8;
inline constexpr int kTaskRows = 4;  ///< rows that a lane has under way at a time, for more than one token
inline constexpr int kMaxTasks = (kMaxChunkGroups + 31) / 32;

/// Whether the kernel that has only four formats knows this type: the K-quants of 4 bits and more, and Q8_0. The other
/// kernel has all, so that matrices of any types go in one launch, and three times the code.
[[nodiscard]] GEMMA4_HD constexpr bool is_of_four_formats(TensorType type) {
  return type == TensorType::kQ4K || type == TensorType::kQ5K || type == TensorType::kQ6K || type == TensorType::kQ8_0;
}

/// Rows of a stage: eight where that is 14 to 27 KB of the widest chunk (Q2_K to Q4_1), four of the wider formats, 15
/// to 23 KB. Stages of Q6_K may be tall: 35 KB, which leaves room for little else, and pays for one token where rows
/// are one chunk and all of this type: the output matrix of the 31B (lm_head in `linear`).
/// @tparam kEvery  false: for the four formats of is_of_four_formats() alone
template <bool kEvery = true>
[[nodiscard]] GEMMA4_HD constexpr int stage_rows(TensorType type, bool is_tall) {
  if (type == TensorType::kQ4K || (type == TensorType::kQ6K && is_tall)) return 8;
  if (kEvery && !is_of_four_formats(type) && type != TensorType::kQ5_0 && type != TensorType::kQ5_1) return 8;
  return 4;
}

struct LinearMatrix {
  const std::uint8_t* data;
  void* out;
  std::int64_t out_stride;
  std::int64_t row_bytes;
  std::int32_t chunk_bytes;  ///< of a full chunk
  std::int32_t last_bytes;   ///< of the last chunk
  std::int32_t chunk_pitch;  ///< of rows of a full chunk in a slot; ByRows has them one behind the other
  std::int32_t last_pitch;   ///< of rows of the last chunk
  std::int32_t rows;
  TensorType type;
};

/// Where things lie in shared memory, in bytes.
struct LinearSmem {
  std::int32_t activations, partials, barriers, notes, total;
  std::int32_t sums;  ///< of the chunks before, of ByPasses
};

/// @param n_token as compiled: 1, 2, 4 or 8
[[nodiscard]] constexpr LinearSmem linear_smem(std::int64_t cols, int n_token, int n_slot, int slot_bytes) {
  const std::int64_t ring = std::int64_t{n_slot} * slot_bytes;
  const std::int64_t partials = ring + activation_groups(cols) * kActivationBytesPerGroup * n_token;
  const std::int64_t n_task = (chunk_groups(cols) + 31) / 32;
  const std::int64_t barriers = partials + n_slot * n_task * n_token * kMaxStageRows * 4;
  const std::int64_t notes = barriers + 2 * 8 * n_slot;
  return {static_cast<std::int32_t>(ring),
          static_cast<std::int32_t>(partials),
          static_cast<std::int32_t>(barriers),
          static_cast<std::int32_t>(notes),
          static_cast<std::int32_t>(notes + 2 * 4 * n_slot),
          0};
}

/// What divides is divided on the host: a 64-bit division in the loop over tasks once halved the rate of the kernel.
struct LinearParams {
  LinearMatrix matrix[kMaxLinearMatrices];
  std::int32_t n_matrix;
  std::int32_t row_align;  ///< rows that stay in one block: 2 for pairs of gate and up
  LinearInput input;
  std::int32_t n_token;
  std::int32_t n_piece;      ///< of a row, 8 values each
  std::int32_t n_group;      ///< of a token in shared memory
  std::int32_t n_chunk;      ///< of a row
  std::int32_t full_groups;  ///< of every chunk but the last
  std::int32_t last_groups;
  std::int32_t n_task;  ///< of a full chunk
  std::int32_t n_slot;
  std::int32_t slot_bytes;
  bool is_tall;              ///< see stage_rows()
  std::int32_t most_rows;    ///< of a stage of ByRows
  LinearTickets* tickets;    ///< null: each block has an equal share of every matrix
  std::int32_t share_rows;   ///< of the last matrix that each block has; the others are dealt
  std::int32_t ticket_rows;  ///< of a ticket, which is one stage
  std::int32_t n_set;        ///< of eight columns, of int8_tokens.cuh
  std::int32_t pass_rows;    ///< of ByPasses: rows whose chunks are walked before the next rows are begun
  bool is_by_chunk;          ///< of ByPasses: activations are there chunk by chunk
  LinearSmem smem;
  bool out_is_bf16;
  LinearEpilogue epilogue;
  float softcap;
};
static_assert(std::is_trivially_copyable_v<LinearParams>);

/// First row of a matrix that belongs to block `block` or one after it: equal shares, to a row.
[[nodiscard]] GEMMA4_HD constexpr std::int32_t linear_first_row(std::int32_t rows, std::int32_t align,
                                                                std::uint32_t block, std::uint32_t n_block) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(rows / align) * block / n_block) * align;
}

/// Some rows of one chunk, in one slot of the ring.
struct LinearStage {
  int row, n_row, chunk, slot;
  int pass_row;         ///< of ByPasses: first row of the pass
  std::uint32_t phase;  ///< of the slot's barriers
  bool is_last_chunk;
};

/// The value of a warp's lanes, which is one, where the compiler sees that it is: what depends on it alone then takes
/// the registers and instructions that a warp has once.
[[nodiscard]] __device__ __forceinline__ int warp_value(int value) {
  return static_cast<int>(__reduce_or_sync(~0u, static_cast<unsigned>(value)));
}

/// The ring. A slot holds a stage; each warp of a block passes all stages in the same order through TOrder::for_each(),
/// so that slot and phase of a stage are the same for all. Two mbarriers a slot, whose phase p is that of the slot's
/// p-th use; a wait tells only neighbouring phases apart, so that no warp may be a round ahead of another, or behind:
///
///   barrier  waits for phase p             arrives in phase p                             arrivals
///   full     consumers: before they read   producer: the bytes of the copy are there,     full_arrivals(): 1 with bulk
///            the slot; producer, round 0:  with the expect of one lane, or all lanes'     copies, 32 without, and 32
///            of before the next stage         copies; finisher: it has read the sums of      the finisher
///                                          use p - 1 (before use 0: at once)
///   empty    producer: for p - 1, before   consumers: every lane of those warps, when     32 a warp:
///            it fills the slot again;      it has read the slot and left its sums           256 (448)
///            finisher: for p, before it
///            reads the sums
///
/// Consumers: multiply(), warps 0 to 7 (multiply_columns() of int8_tokens.cuh: 0 to 7, or to 13). Producer:
/// copy_stages(), the warp behind them. Finisher: finish_stages(), the last.
/// Where rows are dealt, the first stage of each ticket carries a note with its first row. The producer waits for
/// `empty` before it writes the note, the consumers read it behind `full`, the finisher behind `empty`. "No more rows"
/// is a note too: for it the producer arrives at `full` in the place of the copy, and the consumers at `empty`, so that
/// every phase has all its arrivals. Two faults came of less: a lane that skipped a round, and a warp that passed by
/// stages without a task of its own.

/// An order of stages: which rows a stage has, and how the producer, the consumers and the finisher walk a block's
/// stages. Calls body(matrix, stage) for each. Keeps a matrix in registers: parameters at an index that is not known at
/// compile time take long to come.
/// @param next(stage)  the first row of a ticket, whose first stage is `stage`; below zero: there are no more
///
/// ByRows: matrix by matrix, some rows at a time, chunk by chunk.
template <bool kEvery>
struct ByRows {
  static constexpr bool kKeepsSums = false;  ///< between chunks, in shared memory
  [[nodiscard]] static __device__ __forceinline__ int rows(const LinearParams& params, TensorType type) {
    return min(stage_rows<kEvery>(type, params.is_tall), params.most_rows);
  }
  [[nodiscard]] static __device__ __forceinline__ std::uint32_t pitch(const LinearMatrix&, const LinearStage&,
                                                                      std::uint32_t bytes) {
    return bytes;
  }
  template <class TNext, class TBody>
  static __device__ __forceinline__ void for_each(const LinearParams& params, TNext&& next, TBody&& body);
};

template <bool kEvery>
template <class TNext, class TBody>
__device__ __forceinline__ void ByRows<kEvery>::for_each(const LinearParams& params, TNext&& next, TBody&& body) {
  LinearStage stage{};
#pragma unroll 1
  for (int index = 0; index < params.n_matrix; ++index) {
    const LinearMatrix matrix = params.matrix[index];
    const bool is_dealt = params.tickets != nullptr && index + 1 == params.n_matrix;
    // Mirrored for every other matrix, so that it is not always the same blocks that get a row more.
    const std::uint32_t block = index % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int step = rows(params, matrix.type);
    int row = is_dealt ? params.share_rows * static_cast<int>(blockIdx.x)
                       : linear_first_row(matrix.rows, params.row_align, block, gridDim.x);
    int end =
        is_dealt ? row + params.share_rows : linear_first_row(matrix.rows, params.row_align, block + 1, gridDim.x);
#pragma unroll 1
    for (;; row += step) {
      if (row >= end) {
        if (!is_dealt) break;
        row = next(stage);
        if (row < 0) break;
        end = min(row + params.ticket_rows, matrix.rows);
      }
      stage.row = row;
      stage.n_row = min(step, end - row);
#pragma unroll 1
      for (stage.chunk = 0; stage.chunk < params.n_chunk; ++stage.chunk) {
        stage.is_last_chunk = stage.chunk + 1 == params.n_chunk;
        body(matrix, stage);
        if (++stage.slot == params.n_slot) stage.slot = 0, stage.phase ^= 1u;
      }
    }
  }
}

/// The first row of a ticket, beside the slot of its first stage. Two places a slot, in turn, since the finishing warp
/// reads one while the slot is filled again.
[[nodiscard]] __device__ __forceinline__ std::int32_t& note_of(const LinearParams& params, unsigned char* smem,
                                                               const LinearStage& stage) {
  return reinterpret_cast<std::int32_t*>(smem + params.smem.notes)[stage.phase * params.n_slot + stage.slot];
}

/// Arrivals of the producer's lanes that fill a slot: of the one that names the bytes of a bulk copy, which exists from
/// sm_90 on, or of each lane's copies.
[[nodiscard]] GEMMA4_HD constexpr int producer_arrivals(bool is_sm90) {
  return is_sm90 ? 1 : 32;
}
/// With those of the finishing warp.
[[nodiscard]] GEMMA4_HD constexpr int full_arrivals(bool is_sm90) {
  return producer_arrivals(is_sm90) + 32;
}

/// Whether this code runs on sm_90 or later. A device function: the host, which compiles for none, has no answer.
[[nodiscard]] __device__ constexpr bool is_sm90() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

/// The barriers of a ring: of slot s, `full` at 8 s and `empty` behind all of the first kind.
struct RingBarriers {
  std::uint32_t full, empty;
  __device__ __forceinline__ RingBarriers(const LinearParams& params, unsigned char* smem)
      : full(shared_address(smem + params.smem.barriers)), empty(full + 8 * params.n_slot) {}
};

/// One thread: before the barriers are used.
/// @param n_warp that multiply
__device__ __forceinline__ void init_ring(const LinearParams& params, unsigned char* smem, int n_warp = kLinearWarps) {
  const RingBarriers barriers(params, smem);
  for (int slot = 0; slot < params.n_slot; ++slot) {
    mbarrier_init(barriers.full + 8 * slot, full_arrivals(is_sm90()));
    mbarrier_init(barriers.empty + 8 * slot, 32 * n_warp);
  }
  mbarrier_init_fence();
}

/// The copying warp: takes a ticket for the stage to come, and notes its rows. It waits for the kernel in front, which
/// may have the same tickets; that one has ended long before, where a block's share fills the ring.
__device__ __forceinline__ int take_ticket(const LinearParams& params, unsigned char* smem, const LinearStage& stage) {
  const RingBarriers barriers(params, smem);
  const LinearMatrix& matrix = params.matrix[params.n_matrix - 1];
  const int lane = threadIdx.x & 31;
  wait_for_previous_kernel();
  const int ticket = warp_value(lane == 0 ? static_cast<int>(atomicAdd(&params.tickets->next, 1u)) : 0);
  int row = params.share_rows * static_cast<int>(gridDim.x) + params.ticket_rows * ticket;
  if (row >= matrix.rows) row = -1;
  mbarrier_wait(barriers.empty + 8 * stage.slot, stage.phase ^ 1u);
  if (lane == 0) note_of(params, smem, stage) = row;
  if (row < 0 && lane < producer_arrivals(is_sm90())) mbarrier_arrive(barriers.full + 8 * stage.slot);
  __syncwarp();
  return row;
}

/// The copying warp: all stages, as slots become free; begins before the kernel in front has ended, since no kernel
/// writes weights. It does nothing else: when one warp copied and also ended the rows, its chain of dependent
/// instructions was the rate of the whole kernel.
///
/// The first round of the ring is filled one stage after another. Asked for at once, the rings of a whole grid are 20
/// to 28 MB, a queue of 5 us before the memory, behind which the end of the kernel in front and the activations have to
/// wait.
/// Nor does it pay to go on into the L2 cache while a full ring waits for the activations: a launch that follows one
/// like itself gains, a step of a model does not, and where all rows come that way the stream is slower.
template <class TOrder>
__device__ __forceinline__ void copy_stages(const LinearParams& params, unsigned char* smem) {
  const std::uint32_t ring = shared_address(smem);
  const RingBarriers barriers(params, smem);
  const int lane = threadIdx.x & 31;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const bool is_one_chunk = params.n_chunk == 1;
  const std::uint64_t policy = evict_first_policy();  // weights are not read again before everything else has been
#endif
  int n_asked = 0;
  const auto next = [&](const LinearStage& stage) { return take_ticket(params, smem, stage); };
  TOrder::for_each(params, next, [&](const LinearMatrix& matrix, const LinearStage& stage) {
    if (n_asked > 0 && n_asked < params.n_slot) mbarrier_wait(barriers.full + 8 * (n_asked - 1), 0);
    ++n_asked;
    const std::uint32_t bytes = stage.is_last_chunk ? matrix.last_bytes : matrix.chunk_bytes;
    const std::uint8_t* const from =
        matrix.data + stage.row * matrix.row_bytes + stage.chunk * static_cast<std::int64_t>(matrix.chunk_bytes);
    const std::uint32_t pitch = TOrder::pitch(matrix, stage, bytes);
    const std::uint32_t slot = ring + stage.slot * params.slot_bytes, full = barriers.full + 8 * stage.slot;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const bool contiguous = is_one_chunk && pitch == bytes;
    const std::uint32_t total = stage.n_row * bytes;
    if (lane < (contiguous ? 1 : stage.n_row)) {
      mbarrier_wait(barriers.empty + 8 * stage.slot, stage.phase ^ 1u);
      if (lane == 0) mbarrier_expect(full, total);
      bulk_load(slot + lane * pitch, from + lane * matrix.row_bytes, contiguous ? total : bytes, full, policy);
    }
#else
    mbarrier_wait(barriers.empty + 8 * stage.slot, stage.phase ^ 1u);
    for (int row = 0; row < stage.n_row; ++row) {
      for (std::uint32_t at_byte = 16 * lane; at_byte < bytes; at_byte += 512) {
        copy_async_16(slot + row * pitch + at_byte, from + row * matrix.row_bytes + at_byte, true);
      }
    }
    copy_async_arrive(full);
#endif
    __syncwarp();  // a lane without a copy would fall behind, or run ahead, by whole rounds, whose parity is the same
  });
}

}  // namespace detail

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/kv_attention/decode_params.cuh"
#include "cuda/kv_attention/decode_query.cuh"
#include "cuda/softmax_state.cuh"
#include "cuda/tq4_attention.cuh"

/// Where the warps of a team meet over a batch of records (cuda/kv_attention/decode_batches.cuh), and what each of them
/// knows of its own tasks.
namespace gemma4::cuda::detail {

/// Where the warps of a team meet, in shared memory. A task is record * kRowTiles + tile.
template <class TTraits>
struct KvBatchMeeting {
  static constexpr int kTasks = TTraits::kHeld * TTraits::kRowTiles;
  static constexpr int kParts = TTraits::kTeamWarps + TTraits::kRParts;
  static constexpr int kPartBytes = kTasks * (512 * kParts + 288);
  static_assert(kPartBytes + (TTraits::kOwnTasks > 1 ? TTraits::kOwnTasks * TTraits::kTeamWarps * 512 : 0) ==
                TTraits::kTeamScoreBytes);
  unsigned char* memory;

  /// A lane's scores of V's part number `index`, those of R's behind them. [kTasks, kParts, 32]
  [[nodiscard]] __device__ __forceinline__ float4* part(int task, int index) const {
    return reinterpret_cast<float4*>(memory) + (task * kParts + index) * 32;
  }
  /// A lane's B fragment of p * norm. [kTasks, 32]
  [[nodiscard]] __device__ __forceinline__ uint2* weights(int task) const {
    return reinterpret_cast<uint2*>(memory + kTasks * kParts * 512) + task * 32;
  }
  /// Of the weights of each row. [kTasks, kRowTile]
  [[nodiscard]] __device__ __forceinline__ float* reference(int task) const {
    return reinterpret_cast<float*>(memory + kTasks * (kParts * 512 + 256)) + task * kRowTile;
  }
  /// What the warps keep of their tasks where they have several. [kOwnTasks, kTeamWarps, 32]
  [[nodiscard]] __device__ __forceinline__ float4* own() const {
    return reinterpret_cast<float4*>(memory + kPartBytes);
  }
};

/// What the functions of a batch share.
template <class TTraits>
struct KvBatchContext {
  static constexpr int kRecordBytes = TTraits::kRecordBytes, kNorms = kRecordBytes - 64;
  const KvDecodeParams& params;
  const Tq4DecodeThread& at;
  const unsigned char* smem;
  KvBatchMeeting<TTraits> meeting;
  int seen_by_all;

  /// The tile of rows of this warp's tasks.
  [[nodiscard]] __device__ __forceinline__ int own_tile() const {
    return TTraits::kRowTiles == 1 ? 0 : at.half % TTraits::kRowTiles;
  }
};

/// What a warp knows of one of its tasks' rows 2t and 2t + 1: the reference of the weights and the lane's share of
/// their sum. A task is the same record of every batch, so that what a tile of rows comes to does not depend on which
/// warp has the task, nor on how many tiles there are.
struct KvOwnRows {
  float reference[2], sum[2];
};

/// Those of all tasks of a warp: one stays in registers, several in shared memory, where each lane sees its own alone.
template <class TTraits>
struct KvOwnTasks {
  static constexpr int kCount = TTraits::kOwnTasks;
  KvOwnRows only;
  float4* memory;  ///< of the lane

  __device__ __forceinline__ KvOwnTasks(const KvBatchMeeting<TTraits>& meeting, const Tq4DecodeThread& at)
      : memory(meeting.own() + at.half * 32 + at.lane) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) set(i, {{kFarBelow, kFarBelow}, {0.0f, 0.0f}});
  }
  [[nodiscard]] __device__ __forceinline__ KvOwnRows get(int i) const {
    if constexpr (kCount == 1) return only;
    const float4 x = memory[i * TTraits::kTeamWarps * 32];
    return {{x.x, x.y}, {x.z, x.w}};
  }
  __device__ __forceinline__ void set(int i, const KvOwnRows& rows) {
    if constexpr (kCount == 1) {
      only = rows;
    } else {
      memory[i * TTraits::kTeamWarps * 32] =
          make_float4(rows.reference[0], rows.reference[1], rows.sum[0], rows.sum[1]);
    }
  }
};

}  // namespace gemma4::cuda::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/flash/record_decode.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/rotation.cuh"
#include "cuda/tq4_attention/record_ring.cuh"
#include "cuda/tq4_cache.cuh"

/// The compiled configurations of TQ4 decode attention, its parameters, and what follows from both: sizes, and where
/// things lie in shared memory. The kernel is in cuda/tq4_attention/decode.cuh.
namespace gemma4::cuda {

/// One compiled configuration of the decode kernel.
struct Tq4DecodeTile {
  int head_dim;
  int pairs;          ///< of warps
  int n_stage;        ///< records in flight or in use a pair
  int blocks_per_sm;  ///< that the registers are cut for
  bool operator==(const Tq4DecodeTile&) const = default;

  [[nodiscard]] constexpr int ring_bytes() const {
    return pairs * n_stage * static_cast<int>(tq4_record_bytes(head_dim));
  }
  /// Ring, q fragments (8 rows fp16), exchanged scores, barriers, (m, l) of every pair and row, scale of every row.
  [[nodiscard]] constexpr int smem_bytes() const {
    return ring_bytes() + 16 * head_dim + 2048 * pairs + 8 * pairs * n_stage + 64 * pairs + 32;
  }
};

/// For each head_dim the first that fits is taken; the last of each needs at most 99 KB.
inline constexpr std::array kTq4DecodeTiles{
    Tq4DecodeTile{.head_dim = 512, .pairs = 8, .n_stage = 3, .blocks_per_sm = 1},
    Tq4DecodeTile{.head_dim = 512, .pairs = 3, .n_stage = 3, .blocks_per_sm = 1},
    Tq4DecodeTile{.head_dim = 256, .pairs = 8, .n_stage = 3, .blocks_per_sm = 1},
    Tq4DecodeTile{.head_dim = 256, .pairs = 5, .n_stage = 3, .blocks_per_sm = 1},
    Tq4DecodeTile{.head_dim = 128, .pairs = 8, .n_stage = 3, .blocks_per_sm = 1},
    Tq4DecodeTile{.head_dim = 64, .pairs = 8, .n_stage = 3, .blocks_per_sm = 1},
};

/// Those that take rows at once, with byte levels.
inline constexpr std::array kTq4RowsTiles{kTq4DecodeTiles[0], kTq4DecodeTiles[2], kTq4DecodeTiles[4],
                                          kTq4DecodeTiles[5]};

namespace detail {

/// The levels of both sides as decode takes them.
struct Tq4DecodeLevels {
  LevelTable k, v;                             ///< fp16 and bf16; without byte levels
  std::uint32_t k_bytes[2], v_bytes[2];        ///< with byte levels
  std::uint32_t two_16 = 65536, sixteen = 16;  ///< see decode_word_bytes
  float k_scale = 1.0f;                        ///< of a score: the unit of K levels
  float v_weight = 1.0f;                       ///< factor of a weight before it becomes bf16
  float v_scale = 1.0f;                        ///< of the output: the unit of V levels over v_weight
};

struct Tq4DecodeParams {
  const Bf16* q = nullptr;
  Bf16* out = nullptr;
  std::int64_t q_stride[3] = {};  ///< of batch, token, head
  std::int64_t out_stride[3] = {};
  ConstTq4Records cache;
  RotationParams rotation;
  Tq4DecodeLevels levels;
  const std::int32_t* kv_len = nullptr;  ///< null: kv_len_host
  int kv_len_host = 0;
  const std::uint8_t* mask = nullptr;  ///< [batch, 1, n_query, mask_extent], nonzero = visible
  std::int64_t mask_extent = 0;
  int n_query = 1, n_head_kv = 1, group = 1;
  bool causal = true, causal_skip = true;
  float scale_log2 = 1.0f;
  int n_split = 1;
  int n_row_tile = 1;
  float* partial_o = nullptr;    ///< [n_unit, n_split, kRowTile, head_dim]
  float2* partial_ml = nullptr;  ///< [n_unit, n_split, kRowTile]: reference (base 2) and sum of the weights
  unsigned long long* record_count = nullptr;  ///< of visited records; tests only
  int n_token = 1;  ///< of a call of rows (rows.cuh here and of kv_attention): they stand for batch, over one sequence
};
static_assert(std::is_trivially_copyable_v<Tq4DecodeParams>);

/// @tparam kRows a call of rows (cuda/tq4_attention/rows.cuh)
template <Tq4DecodeTile kTile, bool kBytes, bool kRows = false>
struct Tq4DecodeTraits {
  static constexpr bool kOfRows = kRows;
  static constexpr int kHeadDim = kTile.head_dim, kPairs = kTile.pairs, kStages = kTile.n_stage;
  static constexpr bool kByteLevels = kBytes;
  static constexpr int kBlocksPerSm = kTile.blocks_per_sm;
  static constexpr int kTeamWarps = 2;  ///< that share a record
  static constexpr int kThreads = 64 * kPairs;
  static constexpr int kValues = kHeadDim / 32;  ///< of a vector in a lane
  static constexpr int kRecordBytes = static_cast<int>(tq4_record_bytes(kHeadDim));
  static constexpr int kKWords = kHeadDim / 64;  ///< words of K codes of one token in a lane of one warp
  static constexpr int kVWords = kHeadDim / 32;  ///< words of V codes in a lane of one warp: 16 dims each
  static constexpr int kQOffset = kTile.ring_bytes();
  static constexpr int kScoreOffset = kQOffset + 16 * kHeadDim;
  static constexpr int kBarrierOffset = kScoreOffset + 2048 * kPairs;
  static constexpr int kMlOffset = kBarrierOffset + 8 * kPairs * kStages;
  static constexpr int kScaleOffset = kMlOffset + 64 * kPairs;
  static constexpr int kSmemBytes = kTile.smem_bytes();
  static constexpr int kMergeStride = kHeadDim + 4;  ///< floats; the pad spreads rows over the banks
  static constexpr int kTeamBarrier = 1;             ///< named barrier of the first pair
  static_assert(kTeamBarrier + kPairs <= kNamedBarriers, "a pair needs a named barrier");
  static_assert(kMergeStride * kRowTile * 4 <= kStages * kRecordBytes,
                "the output of a pair must fit into its own ring");
  static_assert(kScaleOffset + 32 == kSmemBytes);
  using Ring = RecordRing<kRecordBytes, kStages, 64>;
};

}  // namespace detail

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/kv_cache.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/tq4_attention.cuh"
#include "gemma4/kv_format.hpp"

/// The compiled configurations of decode attention over one vector for K and V, its parameters, and what follows from
/// both: sizes, and where things lie in shared memory. The kernel is in cuda/kv_attention/decode.cuh.
namespace gemma4::cuda {

/// One compiled configuration of the decode kernel.
struct KvDecodeTile {
  int head_dim;
  int v_bits, r_bits;  ///< 0: any, told when it runs
  int team_warps;      ///< that share a record
  int teams;           ///< each with records of its own
  int n_stage;         ///< records in flight or in use a team, whole batches
  int row_tiles;       ///< of eight query rows of a KV head, which share a decoded record
  bool by_product;     ///< decoded tiles are turned by products with the identity, else by movmatrix
  int batch = 1;       ///< records that a team takes at a time; more than one: cuda/kv_attention/decode_batches.cuh
  int parts = 1;       ///< that a batch is taken in: one's decoded records are held at a time
  bool operator==(const KvDecodeTile&) const = default;

  [[nodiscard]] constexpr bool takes(int v, int r) const {
    return v <= KvOptions::kMaxBits && (v_bits == 0 || (v_bits == v && r_bits == r));
  }
  /// Whether a row comes out with the same bits: records and dims are dealt alike, and weights made alike. (Whatever it
  /// is turned by, a tile comes out as it went in, and who has which tile of rows is nothing to the row.)
  [[nodiscard]] constexpr bool adds_like(const KvDecodeTile& other) const {
    return head_dim == other.head_dim && v_bits == other.v_bits && r_bits == other.r_bits &&
           team_warps == other.team_warps && teams == other.teams && batch == other.batch;
  }
  /// Of a record's place in the ring.
  [[nodiscard]] constexpr int record_bytes() const {
    constexpr int kMost = KvOptions::kMaxBits;
    return static_cast<int>(v_bits == 0 ? kv_record_bytes(head_dim, kMost, kMost)
                                        : kv_record_bytes(head_dim, v_bits, r_bits));
  }
  [[nodiscard]] constexpr int ring_bytes() const { return teams * n_stage * record_bytes(); }
  /// Of eight queries as fragments of fp16, V's part and R's part in whole columns of 32 dims.
  [[nodiscard]] constexpr int q_tile_bytes() const { return 16 * head_dim + std::max(4 * head_dim, 512); }
  /// Columns of 32 dims of R that a warp takes of a batch, all of one record, and how many warps share a record's.
  [[nodiscard]] constexpr int r_share() const { return std::max(1, batch * (head_dim / 128) / team_warps); }
  [[nodiscard]] constexpr int r_parts() const { return head_dim / 128 / r_share(); }
  /// Tasks of a warp of a batch: each record's weights of each tile of rows are one warp's.
  [[nodiscard]] constexpr int own_tasks() const {
    return parts * ((batch / parts * row_tiles + team_warps - 1) / team_warps);
  }
  /// A team's, of a part of a batch: for each record and row tile what each warp posts, V's part and R's, and the
  /// weights and references that one of them makes of it; and what is known of several tasks. One at a time: two turns
  /// of what each warp posts.
  [[nodiscard]] constexpr int team_score_bytes() const {
    if (batch == 1) return 2 * team_warps * row_tiles * 512;
    const int own = own_tasks() > 1 ? own_tasks() * team_warps * 512 : 0;
    return batch / parts * row_tiles * (512 * (team_warps + r_parts()) + 288) + own;
  }
  [[nodiscard]] constexpr int score_bytes() const { return teams * team_score_bytes(); }
  /// Of the ring's, so many that what follows is aligned to 16 bytes.
  [[nodiscard]] constexpr int barrier_bytes() const { return (teams * n_stage + 1) / 2 * 16; }
  /// Ring, q, scores, barriers, (m, l) of every team and row, two scales of every row.
  [[nodiscard]] constexpr int smem_bytes() const {
    return ring_bytes() + row_tiles * (q_tile_bytes() + 64) + score_bytes() + barrier_bytes() + 64 * teams;
  }
};

/// For each head_dim and width the first that takes it and fits is taken, among those of one row tile for up to eight
/// rows of a KV head, of several for more; without one of those, one of the others. The last of each head_dim needs at
/// most 99 KB. `attention --one-vector-tile` times those that are here. What lost is not; on an H100, 32 / 4 heads, in
/// us of one query at 512, 32768 and 131072 keys:
///   warps x teams, records at a time     kv5r4                  kv4r4
///   4 x 2, four                          11.2   36.4    97.2    10.8   32.2    85.5
///   4 x 3, two                           11.2   37.8   102.1    10.9   32.7    88.6
///   4 x 4, one                           11.6   36.1   103.4    11.8   33.3    95.5
///   8 x 2, two                           10.6   38.9   119.0
/// Four queries of kv5r4 at 32768 keys, four row tiles a block: 4 x 2 teams, two records at a time 75.5, one 86.0;
/// eight row tiles, 8 x 1, 124.9. Of five bits movmatrix is the faster way to turn a tile.
inline constexpr std::array kKvDecodeTiles{
    // head_dim, v_bits, r_bits, team_warps, teams, n_stage, row_tiles, by_product, batch
    KvDecodeTile{512, 5, 4, 4, 2, 12, 1, false, 4}, KvDecodeTile{512, 4, 4, 4, 2, 12, 1, false, 4},
    KvDecodeTile{512, 5, 4, 4, 2, 8, 4, false, 2},  KvDecodeTile{512, 4, 4, 4, 2, 14, 4, true},
    KvDecodeTile{512, 0, 0, 4, 4, 6, 1, true},      KvDecodeTile{512, 0, 0, 4, 3, 3, 1, true},
    KvDecodeTile{256, 0, 0, 4, 4, 5, 1, true},      KvDecodeTile{128, 0, 0, 4, 4, 6, 1, true},
    KvDecodeTile{64, 0, 0, 2, 4, 6, 1, true},
};

namespace detail {

/// The levels of both sides as decode takes them.
struct KvDecodeLevels {
  KvDecodeTable v, r;
  KvShifts shifts;
  float v_unit, r_unit;  ///< of the scores: what a product of fp16 numbers stands for
  float v_weight;        ///< factor of a weight before it becomes bf16
};

/// `base` is what TQ4 decode takes, and its combine kernel: the shape, q, mask, splits and partials; its cache has
/// extents alone and its levels the scale of the output.
struct KvDecodeParams {
  Tq4DecodeParams base;
  const std::byte* records = nullptr;
  int v_bits = 0, r_bits = 0;
  const float* k_weight = nullptr;  ///< [head_dim]
  RotationParams r_rotation;
  KvDecodeLevels levels;
};
static_assert(std::is_trivially_copyable_v<KvDecodeParams>);

/// @tparam kRows a call of rows (cuda/kv_attention/rows.cuh)
template <KvDecodeTile kTile, bool kRows = false>
struct KvDecodeTraits {
  static constexpr KvDecodeTile kConfiguration = kTile;
  static constexpr int kHeadDim = kTile.head_dim, kRotated = kHeadDim / 4, kStages = kTile.n_stage;
  static constexpr int kVBits = kTile.v_bits, kRBits = kTile.r_bits;
  static constexpr int kTeamWarps = kTile.team_warps, kRowTiles = kTile.row_tiles;
  static constexpr bool kOfRows = kRows;
  static constexpr int kBatch = kTile.batch, kHeld = kBatch / kTile.parts;  ///< records of a batch, and of its part
  static constexpr int kOwnTasks = kTile.own_tasks();                       ///< of a batch, by a warp
  static constexpr int kTaskRuns = kOwnTasks / kTile.parts;
  static constexpr int kRShare = kTile.r_share(), kRParts = kTile.r_parts();
  static constexpr int kPairs = kTile.teams;  ///< the name that the machinery of TQ4 decode has for teams
  static constexpr int kThreads = 32 * kTeamWarps * kPairs;
  static constexpr int kValues = kHeadDim / 32;  ///< of a vector in a lane
  static constexpr int kRecordBytes = kTile.record_bytes();
  static constexpr int kWords = kHeadDim / (32 * kTeamWarps);        ///< of V codes of one token in a lane of one warp
  static constexpr int kVWords = 2 * kWords;                         ///< tiles of 16 dims of a warp
  static constexpr int kRWords = kRotated < 32 ? 1 : kRotated / 32;  ///< columns of 32 dims of R
  static constexpr int kQOffset = kTile.ring_bytes();
  static constexpr int kQTileBytes = kTile.q_tile_bytes(), kScoreOffset = kQOffset + kRowTiles * kQTileBytes;
  static constexpr int kTeamScoreBytes = kTile.team_score_bytes();
  static constexpr int kBarrierOffset = kScoreOffset + kTile.score_bytes();
  static constexpr int kMlOffset = kBarrierOffset + kTile.barrier_bytes();
  static constexpr int kScaleOffset = kMlOffset + 64 * kPairs;
  static constexpr int kSmemBytes = kTile.smem_bytes();
  static constexpr int kMergeStride = kHeadDim + 4;  ///< floats; the pad spreads rows over the banks
  static constexpr int kTeamBarrier = 1;             ///< named barrier of the first team
  static_assert(kTeamBarrier + kPairs <= kNamedBarriers, "a team needs a named barrier");
  static_assert(kWords == 1 || kWords % 2 == 0, "a team has too many warps");
  static_assert(kMergeStride * kRowTile * 4 <= kStages * kRecordBytes,
                "the output of a team must fit into its own ring");
  static_assert(kScaleOffset + 64 * kRowTiles == kSmemBytes && kScaleOffset % 16 == 0);
  using Bytes = std::conditional_t<kVBits == 0, ToldRecordBytes, FixedRecordBytes<kRecordBytes>>;
  static_assert(kStages % kBatch == 0, "the ring holds whole batches");
  static_assert(kHeld * kTile.parts == kBatch, "a batch has equal parts");
  using Ring = RecordRing<kRecordBytes, kStages / kBatch, 32 * kTeamWarps, Bytes, kBatch>;
};

}  // namespace detail
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "gemma4/gguf/gguf.hpp"
#include "gemma4/platform.hpp"

/// Sizes of quantised rows as they lie in device memory; what lies where in them says
/// cuda/weights/layout.cuh. They are here because a memory plan counts them without a device.
///
/// A row is a run of chunks of `chunk_groups(cols)` groups of 32 weights, the last one possibly shorter; each chunk has
/// a multiple of 16 bytes, so that one bulk copy brings it. BF16, F16 and F32 rows stay as they are in the file.
namespace gemma4 {

inline constexpr int kGroup = 32;            ///< weights that a lane takes at a time
inline constexpr int kMaxChunkGroups = 168;  ///< 5376 weights, the hidden size of the 31B: its rows are one chunk

/// Groups of a row.
[[nodiscard]] GEMMA4_HD constexpr std::int64_t row_groups(std::int64_t cols) {
  return (cols + kGroup - 1) / kGroup;
}

/// Groups of every chunk of a row but the last: whole super-blocks of 8, in as few chunks as kMaxChunkGroups allows and
/// as even as they divide.
[[nodiscard]] GEMMA4_HD constexpr int chunk_groups(std::int64_t cols) {
  const std::int64_t super_blocks = (row_groups(cols) + 7) / 8;
  const std::int64_t chunks = (row_groups(cols) + kMaxChunkGroups - 1) / kMaxChunkGroups;
  return static_cast<int>((super_blocks + chunks - 1) / chunks * 8);
}

/// Chunks of a row.
[[nodiscard]] GEMMA4_HD constexpr std::int64_t row_chunks(std::int64_t cols) {
  return (row_groups(cols) + chunk_groups(cols) - 1) / chunk_groups(cols);
}

/// Groups of chunk `chunk`, at least 1.
[[nodiscard]] GEMMA4_HD constexpr int groups_of_chunk(std::int64_t cols, std::int64_t chunk) {
  const std::int64_t left = row_groups(cols) - chunk * chunk_groups(cols);
  return left < chunk_groups(cols) ? static_cast<int>(left) : chunk_groups(cols);
}

/// Bytes of a chunk of `groups` groups: those of its blocks in the file and padding; 0 for types that are not permuted.
[[nodiscard]] GEMMA4_HD constexpr std::int64_t chunk_bytes(TensorType type, std::int64_t groups) {
  const auto padded = [](std::int64_t bytes) { return (bytes + 15) / 16 * 16; };
  switch (type) {
    case TensorType::kQ4K:
      return 18 * groups;
    case TensorType::kQ5K:
      return 22 * groups;
    case TensorType::kQ6K:
      return 26 * groups + padded(groups / 4);
    case TensorType::kQ8_0:
      return 32 * groups + padded(2 * groups);
    case TensorType::kQ4_0:
    case TensorType::kIq4Nl:
      return padded(18 * groups);
    case TensorType::kQ4_1:
      return padded(20 * groups);
    case TensorType::kQ5_0:
      return padded(22 * groups);
    case TensorType::kQ5_1:
      return padded(24 * groups);
    case TensorType::kIq4Xs:
      return padded(17 * groups);
    case TensorType::kQ3K:
      return padded(110 * (groups / 8));
    case TensorType::kQ2K:
      return padded(84 * (groups / 8));
    default:
      return 0;
  }
}

/// Whether rows of this type are permuted (and not passed through).
[[nodiscard]] GEMMA4_HD constexpr bool is_packed_type(TensorType type) {
  return chunk_bytes(type, 8) > 0;
}

/// Bytes of a row in device memory.
[[nodiscard]] constexpr std::int64_t packed_row_bytes(TensorType type, std::int64_t cols) {
  if (!is_packed_type(type)) return row_bytes(type, cols);
  const std::int64_t full = row_chunks(cols) - 1;
  return full * chunk_bytes(type, chunk_groups(cols)) + chunk_bytes(type, groups_of_chunk(cols, full));
}

}  // namespace gemma4

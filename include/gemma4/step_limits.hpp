// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Numbers of a step that caches, plans and drafting share.
namespace gemma4 {

/// Tokens that the caches can go back. A token overwrites the ring slot of the one `ring_slots` before it, so that a
/// ring needs that many slots beyond the window; full caches forget what lies beyond kv_len anyway.
inline constexpr std::int64_t kMaxRewind = 64;

/// Chunks of at most so many tokens take the path of decoding: the weights as they are, no GEMM, and each row with the
/// bits that it would have alone.
inline constexpr std::int64_t kDecodeChunk = 8;

/// Slots of a sliding layer's ring: whole tiles of 64 keys.
[[nodiscard]] constexpr std::int64_t ring_slots(std::int64_t window) {
  return (window + kMaxRewind + 63) / 64 * 64;
}

}  // namespace gemma4

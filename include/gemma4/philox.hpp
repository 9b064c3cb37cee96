// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "gemma4/platform.hpp"

namespace gemma4 {

/// 128 bits, as the generator takes and gives them.
struct PhiloxWords {
  std::uint32_t word[4];
};

/// 64 bits of key, the low word first.
struct PhiloxKey {
  std::uint32_t word[2];
};

[[nodiscard]] GEMMA4_HD constexpr PhiloxKey philox_key(std::uint64_t seed) {
  return {{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}};
}

/// Philox4x32-10: 128 random bits for each counter and key, with no state, so that any order of evaluation on any
/// device gives the same bits. Ten rounds; in each, with 32 x 32 -> 64 bit products
///   (h0, l0) = 0xD2511F53 * c0,  (h1, l1) = 0xCD9E8D57 * c2
///   c <- (h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0),  k <- (k0 + 0x9E3779B9, k1 + 0xBB67AE85)
/// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
[[nodiscard]] GEMMA4_HD constexpr PhiloxWords philox(PhiloxWords counter, PhiloxKey key) {
  constexpr int kRounds = 10;
  constexpr std::uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr std::uint32_t kGoldenRatio = 0x9E3779B9u, kSqrt3 = 0xBB67AE85u;
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t product0 = std::uint64_t{kMultiplier0} * counter.word[0];
    const std::uint64_t product1 = std::uint64_t{kMultiplier1} * counter.word[2];
    counter = {{static_cast<std::uint32_t>(product1 >> 32) ^ counter.word[1] ^ key.word[0],
                static_cast<std::uint32_t>(product1),
                static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ key.word[1],
                static_cast<std::uint32_t>(product0)}};
    key.word[0] += kGoldenRatio;
    key.word[1] += kSqrt3;
  }
  return counter;
}

/// A number in (0, 1), never 0 or 1, from the first two words: (m + 1/2) / 2^52 with their upper 52 bits m.
/// Exact in double, so the same everywhere.
[[nodiscard]] GEMMA4_HD constexpr double open_uniform(PhiloxWords words) {
  const std::uint64_t bits = std::uint64_t{words.word[1]} << 32 | words.word[0];
  constexpr double kStep = 1.0 / static_cast<double>(std::uint64_t{1} << 52);
  return (static_cast<double>(bits >> 12) + 0.5) * kStep;
}

}  // namespace gemma4

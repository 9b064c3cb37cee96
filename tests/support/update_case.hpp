// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

/// What the tests of cache updates draw and compare with, whatever the cache holds.
namespace gemma4::testkit {

/// `count` different rows of a buffer, in any order.
[[nodiscard]] inline std::vector<std::int32_t> some_positions(std::int64_t buffer_len, std::int64_t count,
                                                              std::uint64_t seed) {
  std::vector<std::int32_t> all(static_cast<std::size_t>(buffer_len));
  std::iota(all.begin(), all.end(), 0);
  for (std::size_t i = all.size(); i > 1; --i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    std::swap(all[i - 1], all[(seed >> 33) % i]);
  }
  all.resize(static_cast<std::size_t>(count));
  return all;
}

/// Half the distance between neighbouring numbers around a finite x, in a type with `n_bit` stored bits of mantissa
/// whose least normal number is 2^least: f16 has 10 and -14, bf16 7 and -126.
[[nodiscard]] inline double half_step(double x, int n_bit, int least) {
  return std::ldexp(0.5, (x == 0.0 ? least : std::max(std::ilogb(x), least)) - n_bit);
}

}  // namespace gemma4::testkit

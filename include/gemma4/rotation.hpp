// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <vector>

#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/platform.hpp"

/// What a seed means: the random numbers behind the two rotations, defined once so that both rooms rotate alike.
///
///   signed Hadamard   y = H diag(s) x / sqrt(D),  x = diag(s) H y / sqrt(D)
///       H is the Sylvester Hadamard matrix, H[i][j] = (-1)^popcount(i & j), and s[i] = hadamard_signs(seed, D)[i].
///   dense Haar        y = R x,  x = R^T y
///       R = haar_matrix(seed, D), uniformly distributed over the orthogonal group.
///
/// Every number is a pure function of (seed, stream, counter), so that order, platform and device do not matter.
/// Source of the idea: arXiv:2504.19874 (random rotation before scalar quantisation); the signed Hadamard form is that
/// of DRIVE (arXiv:2105.08339) and EDEN (arXiv:2108.08842).
namespace gemma4 {

/// Which sequence a counter counts in; two streams of one seed are unrelated.
enum class RandomStream : std::uint64_t { kHadamardSigns = 1, kHaarGaussians = 2 };

/// The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64 bits whose every output bit
/// depends on every input bit.
[[nodiscard]] GEMMA4_HD constexpr std::uint64_t mix_bits(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

/// 64 random bits: key = mix(seed + g * stream), word = mix(key + g * (counter + 1)), g = 0x9E3779B97F4A7C15
/// (2^64 / golden ratio), all modulo 2^64. Hashing the seed first keeps neighbouring seeds unrelated.
[[nodiscard]] GEMMA4_HD constexpr std::uint64_t random_word(std::uint64_t seed, RandomStream stream,
                                                            std::uint64_t counter) {
  constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15u;
  const std::uint64_t key = mix_bits(seed + kGolden * static_cast<std::uint64_t>(stream));
  return mix_bits(key + kGolden * (counter + 1));
}

/// The sign of coordinate `index`: -1 where the top bit of word `index` of the stream kHadamardSigns is set, else +1.
/// It does not depend on head_dim.
[[nodiscard]] GEMMA4_HD constexpr int hadamard_sign(std::uint64_t seed, std::int64_t index) {
  return (random_word(seed, RandomStream::kHadamardSigns, static_cast<std::uint64_t>(index)) >> 63) != 0 ? -1 : 1;
}

/// head_dim signs, +1 or -1. @throws std::invalid_argument unless head_dim is a power of two
inline std::vector<std::int8_t> hadamard_signs(std::uint64_t seed, std::int64_t head_dim) {
  require(is_power_of_two(head_dim), "hadamard_signs: head_dim ", head_dim, ", need a power of two");
  std::vector<std::int8_t> signs(static_cast<std::size_t>(head_dim));
  for (std::size_t i = 0; i < signs.size(); ++i) {
    signs[i] = static_cast<std::int8_t>(hadamard_sign(seed, static_cast<std::int64_t>(i)));
  }
  return signs;
}

/// The first `count` standard normal numbers of a seed, by Box and Muller: pair k comes from words a = 2k and b = 2k +
/// 1 of the stream kHaarGaussians,
///   u = ((a >> 11) + 1) / 2^53 in (0, 1],   w = (b >> 11) / 2^53 in [0, 1)
///   value[2k] = sqrt(-2 ln u) cos(2 pi w),  value[2k + 1] = sqrt(-2 ln u) sin(2 pi w).
/// The words are exact everywhere; log, cos and sin may differ in the last bit of the double between C libraries.
inline std::vector<double> haar_gaussians(std::uint64_t seed, std::int64_t count) {
  require(count >= 0 && count % 2 == 0, "haar_gaussians: count ", count, ", need an even number");
  std::vector<double> values(static_cast<std::size_t>(count));
  for (std::size_t k = 0; 2 * k < values.size(); ++k) {
    const std::uint64_t a = random_word(seed, RandomStream::kHaarGaussians, 2 * k);
    const std::uint64_t b = random_word(seed, RandomStream::kHaarGaussians, 2 * k + 1);
    const double u = static_cast<double>((a >> 11) + 1) * 0x1p-53;
    const double w = static_cast<double>(b >> 11) * 0x1p-53;
    const double radius = std::sqrt(-2.0 * std::log(u));
    values[2 * k] = radius * std::cos(2.0 * std::numbers::pi * w);
    values[2 * k + 1] = radius * std::sin(2.0 * std::numbers::pi * w);
  }
  return values;
}

namespace detail {

/// row -= <row, other> other, with the dot product summed in eight interleaved parts (a fixed order that the compiler
/// may vectorise).
inline void remove_component(double* row, const double* other, std::size_t length) {
  constexpr std::size_t kParts = 8;
  double part[kParts] = {};
  const std::size_t whole = length - length % kParts;
  for (std::size_t i = 0; i < whole; i += kParts) {
    for (std::size_t lane = 0; lane < kParts; ++lane) part[lane] += row[i + lane] * other[i + lane];
  }
  for (std::size_t i = whole; i < length; ++i) part[0] += row[i] * other[i];
  double dot = 0.0;
  for (const double value : part) dot += value;
  for (std::size_t j = 0; j < length; ++j) row[j] -= dot * other[j];
}

}  // namespace detail

/// The dense rotation of a seed, row-major [head_dim, head_dim]: row r is row r of the Gaussian matrix
/// (haar_gaussians in row-major order), made orthogonal to the rows above it and of unit length. That is Q^T of the QR
/// decomposition G^T = Q U with a positive diagonal of U, hence distributed by the Haar measure (F. Mezzadri,
/// arXiv:math-ph/0609050). Modified Gram-Schmidt in double, each row swept twice: one sweep leaves an error that grows
/// with the condition of G, the second brings it to rounding. This is set-up, not tensor arithmetic: both rooms take
/// the matrix from here, once a run; about 0.1 s for head_dim 512.
/// @throws std::invalid_argument unless head_dim is even and positive
inline std::vector<double> haar_matrix(std::uint64_t seed, std::int64_t head_dim) {
  require(head_dim >= 2 && head_dim % 2 == 0, "haar_matrix: head_dim ", head_dim, ", need an even positive number");
  std::vector<double> matrix = haar_gaussians(seed, head_dim * head_dim);
  const auto length = static_cast<std::size_t>(head_dim);
  for (std::size_t r = 0; r < length; ++r) {
    double* row = matrix.data() + r * length;
    for (int sweep = 0; sweep < 2; ++sweep) {
      for (std::size_t above = 0; above < r; ++above) {
        detail::remove_component(row, matrix.data() + above * length, length);
      }
    }
    double squares = 0.0;
    for (std::size_t i = 0; i < length; ++i) squares += row[i] * row[i];
    const double scale = 1.0 / std::sqrt(squares);
    for (std::size_t i = 0; i < length; ++i) row[i] *= scale;
  }
  return matrix;
}

}  // namespace gemma4

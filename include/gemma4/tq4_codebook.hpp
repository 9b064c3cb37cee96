// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numbers>
#include <span>
#include <stdexcept>

#include "gemma4/error.hpp"
#include "gemma4/tq4_format.hpp"

/// The scalar quantiser of TQ4: for every head_dim and bit width one table of levels, the Lloyd-Max solution
/// (S. P. Lloyd 1957/1982; J. Max 1960) for a normal variable of variance 1/head_dim, which is what a coordinate of a
/// rotated unit vector looks like. Solved here at construction: nothing is typed in.
///
/// A Lloyd-Max table is a fixed point of two rules:
///   boundary[i] = (centroid[i] + centroid[i + 1]) / 2                     the nearest level wins
///   centroid[i] = E[x | boundary[i - 1] < x <= boundary[i]]               a level is the mean of its cell
/// The normal density is log-concave, so there is only one (P. E. Fleischer 1964).
namespace gemma4 {

/// Levels and boundaries in ascending order, scaled to N(0, 1/head_dim) and exactly symmetric about zero.
/// Entries from n_level (boundaries: n_level - 1) on are zero and unused.
struct Codebook {
  static constexpr int kMaxLevels = 16;
  int bits = 0;
  int n_level = 0;
  std::array<float, kMaxLevels> centroids = {};
  std::array<float, kMaxLevels - 1> boundaries = {};
  bool operator==(const Codebook&) const = default;
};

/// The index of the level of `value`: the number of boundaries strictly below it, so that a tie goes to the lower
/// index and NaN to index 0. The comparison is done in the wider of Scalar and float.
template <class Scalar>
[[nodiscard]] int codebook_index(const Codebook& codebook, Scalar value) {
  int index = 0;
  for (int i = 0; i + 1 < codebook.n_level; ++i) {
    index += value > static_cast<Scalar>(codebook.boundaries[static_cast<std::size_t>(i)]) ? 1 : 0;
  }
  return index;
}

namespace detail {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline double normal_density(double x) {
  return std::exp(-0.5 * x * x) / std::sqrt(2.0 * std::numbers::pi);
}

/// P(x > t) for a unit normal; exact to rounding far into the tail, where 1 - erf would cancel.
inline double normal_upper_tail(double t) {
  return 0.5 * std::erfc(t / std::numbers::sqrt2);
}

/// P(lower < x < upper) for a unit normal. By symmetry both ends are moved to the positive side, where tails are small
/// numbers and their difference keeps its digits.
inline double normal_mass(double lower, double upper) {
  if (upper <= 0.0) return normal_upper_tail(-upper) - normal_upper_tail(-lower);
  if (lower >= 0.0) return normal_upper_tail(lower) - normal_upper_tail(upper);
  return 1.0 - normal_upper_tail(-lower) - normal_upper_tail(upper);
}

/// E[x | lower < x < upper] for a unit normal: (density(lower) - density(upper)) / mass.
inline double normal_cell_mean(double lower, double upper) {
  return (normal_density(lower) - normal_density(upper)) / normal_mass(lower, upper);
}

/// The positive half of the Lloyd-Max levels of a unit normal restricted to |x| < limit (infinity for the full one):
/// n_half levels, the first cell beginning at 0. Lloyd's two rules are applied from the midpoints of 2 n_half equal
/// cells of [-3, 3] until no level moves by more than 1e-14, but not more than max_rounds times.
inline constexpr int kMaxLloydHalf = 32;
struct LloydResult {
  std::array<double, kMaxLloydHalf> level;
  bool converged;
};
inline LloydResult solve_unit_half(int n_half, double limit, int max_rounds) {
  constexpr double kTolerance = 1e-14;
  LloydResult result = {};
  auto& level = result.level;
  const auto count = static_cast<std::size_t>(n_half);
  for (std::size_t i = 0; i < count; ++i) level[i] = 3.0 * (static_cast<double>(i) + 0.5) / n_half;
  for (int round = 0; round < max_rounds && !result.converged; ++round) {
    std::array<double, kMaxLloydHalf + 1> edge = {};
    for (std::size_t i = 0; i + 1 < count; ++i) edge[i + 1] = 0.5 * (level[i] + level[i + 1]);
    edge[count] = limit;
    double moved = 0.0;
    for (std::size_t i = 0; i < count; ++i) {
      const double mean = normal_cell_mean(edge[i], edge[i + 1]);
      moved = std::max(moved, std::abs(mean - level[i]));
      level[i] = mean;
    }
    result.converged = moved <= kTolerance;
  }
  return result;
}

}  // namespace detail

/// Lloyd's rounds of the cut table. A peer stops there, and at 4 bits that is not yet the fixed point: the levels are
/// up to 2.7e-4 standard deviations away from it. Equal tables need equal rounds.
inline constexpr int kCutCodebookRounds = 200;

/// The Lloyd-Max table of N(0, 1/head_dim) with 2^bits levels.
/// kFull is the fixed point on the whole line, right to better than 1e-12 before it is rounded to float.
/// kCutAtThreeSigma is for parity with a peer: the density is cut off at three standard deviations and Lloyd's rules
/// are applied kCutCodebookRounds times. On the whole line, which real data comes from, that table makes 5 % more
/// squared error at 4 bits.
/// @throws std::invalid_argument unless bits is 2, 3 or 4 and head_dim at least 1
inline Codebook solve_codebook(CodebookKind kind, int bits, std::int64_t head_dim) {
  require(bits >= 2 && bits <= 4, "solve_codebook: bits ", bits, ", need 2, 3 or 4");
  require(head_dim >= 1, "solve_codebook: head_dim ", head_dim, ", need at least 1");
  constexpr int kMaxRounds = 100000;  // 4 bits need about 1000
  const int n_half = 1 << (bits - 1);
  const bool full = kind == CodebookKind::kFull;
  const auto [level, converged] = full ? detail::solve_unit_half(n_half, detail::kInfinity, kMaxRounds)
                                       : detail::solve_unit_half(n_half, 3.0, kCutCodebookRounds);
  if (full && !converged) throw std::logic_error(concat("solve_codebook: no fixed point in ", kMaxRounds, " rounds"));
  Codebook codebook{.bits = bits, .n_level = 1 << bits};
  const auto half = static_cast<std::size_t>(n_half);
  const double sigma = 1.0 / std::sqrt(static_cast<double>(head_dim));
  for (std::size_t i = 0; i < half; ++i) {
    codebook.centroids[half + i] = static_cast<float>(sigma * level[i]);
    codebook.centroids[half - 1 - i] = -codebook.centroids[half + i];
  }
  for (std::size_t i = 0; i + 1 < half; ++i) {
    codebook.boundaries[half + i] = static_cast<float>(sigma * 0.5 * (level[i] + level[i + 1]));
    codebook.boundaries[half - 2 - i] = -codebook.boundaries[half + i];
  }
  return codebook;
}

/// A table that a file brings along: 4, 8 or 16 centroids and one boundary fewer, both ascending.
/// @throws std::invalid_argument naming the count or the entry that is out of order
inline Codebook codebook_from(std::span<const float> centroids, std::span<const float> boundaries) {
  const std::size_t count = centroids.size();
  require(count == 4 || count == 8 || count == 16, "codebook_from: ", count, " centroids, need 4, 8 or 16");
  require(boundaries.size() + 1 == count, "codebook_from: ", boundaries.size(), " boundaries for ", count,
          " centroids, need ", count - 1);
  Codebook codebook{.bits = count == 4 ? 2 : count == 8 ? 3 : 4, .n_level = static_cast<int>(count)};
  std::copy(centroids.begin(), centroids.end(), codebook.centroids.begin());
  std::copy(boundaries.begin(), boundaries.end(), codebook.boundaries.begin());
  for (std::size_t i = 0; i + 1 < count; ++i) {
    require(centroids[i] < boundaries[i] && boundaries[i] < centroids[i + 1], "codebook_from: boundary ", i, " is ",
            boundaries[i], ", not between centroid ", centroids[i], " and centroid ", centroids[i + 1]);
  }
  return codebook;
}

/// head_dim * E[(x - level(x))^2] for x from the whole N(0, 1/head_dim): the squared error relative to the vector's
/// squared length, in closed form. 0.00950 for the full 4-bit table (0.03455 with 3 bits, 0.11748 with 2).
inline double codebook_distortion(const Codebook& codebook, std::int64_t head_dim) {
  const double unit = std::sqrt(static_cast<double>(head_dim));
  const auto edge_term = [](double edge) { return std::isinf(edge) ? 0.0 : edge * detail::normal_density(edge); };
  double distortion = 0.0;
  double lower = -detail::kInfinity;
  for (int i = 0; i < codebook.n_level; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const double level = unit * codebook.centroids[at];
    const double upper = i + 1 < codebook.n_level ? unit * codebook.boundaries[at] : detail::kInfinity;
    const double mass = detail::normal_mass(lower, upper);
    const double first = detail::normal_density(lower) - detail::normal_density(upper);
    const double second = mass + edge_term(lower) - edge_term(upper);
    distortion += second - 2.0 * level * first + level * level * mass;
    lower = upper;
  }
  return distortion;
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <stdexcept>

#include "gemma4/error.hpp"
#include "gemma4/platform.hpp"
#include "gemma4/tq4_codebook.hpp"

/// Lloyd-Max tables of 2 to 8 bits for a unit normal, small enough to travel inside a quantiser. The table of the
/// compressed cache (tq4_codebook.hpp) ends at 4 bits, where it is this one scaled to N(0, 1/head_dim).
namespace gemma4 {

/// The positive half of a table of 2^bits levels that is symmetric about zero, in ascending order: level[i] is the mean
/// of the cell from edge[i - 1] (0 for the first) to edge[i]. Entries from n_half on (edges: n_half - 1) are zero.
struct UnitCodebook {
  static constexpr int kMaxHalf = 128;
  int n_half = 0;
  float level[kMaxHalf] = {};
  float edge[kMaxHalf - 1] = {};
  bool operator==(const UnitCodebook&) const = default;

  /// The level nearest to y. A tie goes to the lower level, zero too, as it does in codebook_index.
  [[nodiscard]] GEMMA4_HD constexpr float nearest(float y) const {
    const bool positive = y > 0.0f;
    const float magnitude = positive ? y : -y;
    int index = 0;
    for (int step = n_half / 2; step > 0; step /= 2) {
      const float boundary = edge[index + step - 1];
      if (positive ? magnitude > boundary : magnitude >= boundary) index += step;
    }
    return positive ? level[index] : -level[index];
  }
};
static_assert(sizeof(UnitCodebook) == 1024);

namespace detail {

using HalfLevels = std::array<double, UnitCodebook::kMaxHalf>;

/// x > 0 with P(X > x) = tail for a unit normal, by halving [0, 16].
inline double normal_upper_quantile(double tail) {
  double low = 0.0, high = 16.0;
  for (int round = 0; round < 60; ++round) {
    const double middle = 0.5 * (low + high);
    (normal_upper_tail(middle) > tail ? low : high) = middle;
  }
  return low;
}

/// One step of Newton's method on mean(cell i) - level[i] = 0, whose Jacobian is tridiagonal: an edge moves by half of
/// what either neighbour moves by, and the mean of a cell by density(edge) * |edge - mean| / mass times that.
/// @return by how much the farthest level moved
inline double newton_step(HalfLevels& level, int n_half) {
  const auto n = static_cast<std::size_t>(n_half);
  HalfLevels above = {}, value = {};  // the eliminated upper diagonal and right-hand side
  double lower = 0.0, from_lower = 0.0;
  for (std::size_t i = 0; i < n; ++i) {
    const bool last = i + 1 == n;
    const double upper = last ? kInfinity : 0.5 * (level[i] + level[i + 1]);
    const double mean = normal_cell_mean(lower, upper), mass = normal_mass(lower, upper);
    const double by_lower = i == 0 ? 0.0 : 0.5 * normal_density(lower) * (mean - lower) / mass;
    const double by_upper = last ? 0.0 : 0.5 * normal_density(upper) * (upper - mean) / mass;
    const double before = i == 0 ? 0.0 : value[i - 1];
    const double pivot = by_lower + by_upper - 1.0 - by_lower * from_lower;
    from_lower = above[i] = by_upper / pivot;
    value[i] = (level[i] - mean - by_lower * before) / pivot;
    lower = upper;
  }
  double moved = 0.0, behind = 0.0;
  for (std::size_t i = n; i-- > 0;) {
    behind = value[i] - above[i] * behind;
    level[i] += behind;
    moved = std::max(moved, std::abs(behind));
  }
  return moved;
}

}  // namespace detail

/// The Lloyd-Max table of a unit normal with 2^bits levels: the fixed point of Lloyd's two rules (tq4_codebook.hpp;
/// there is only one). Lloyd's own iteration needs rounds in proportion to the square of the number of levels, 1000 at
/// 4 bits and some 2.5e5 at 8, so it is found by Newton's method from the quantiles of N(0, 3), where the levels of a
/// fine table lie (P. F. Panter and W. Dite 1951): four or five steps for every width.
/// @throws std::invalid_argument unless bits is 2 to 8
inline UnitCodebook solve_unit_codebook(int bits) {
  require(bits >= 2 && bits <= 8, "solve_unit_codebook: bits ", bits, ", need 2 to 8");
  // The mean of a narrow cell is a difference of densities over a small mass: at 8 bits it carries 1e-12.
  constexpr double kTolerance = 1e-11;
  constexpr int kMaxSteps = 30;
  UnitCodebook table{.n_half = 1 << (bits - 1)};
  const auto n = static_cast<std::size_t>(table.n_half);
  detail::HalfLevels level = {};
  for (std::size_t i = 0; i < n; ++i) {
    const double tail = 0.5 * (1.0 - (static_cast<double>(i) + 0.5) / table.n_half);
    level[i] = std::sqrt(3.0) * detail::normal_upper_quantile(tail);
  }
  int step = 0;
  while (step < kMaxSteps && !(detail::newton_step(level, table.n_half) <= kTolerance)) ++step;
  const bool ascending = level[0] > 0.0 && std::is_sorted(level.begin(), level.begin() + table.n_half);
  if (step == kMaxSteps || !ascending) throw std::logic_error(concat("solve_unit_codebook: no fixed point at ", bits));
  for (std::size_t i = 0; i < n; ++i) table.level[i] = static_cast<float>(level[i]);
  for (std::size_t i = 0; i + 1 < n; ++i) table.edge[i] = static_cast<float>(0.5 * (level[i] + level[i + 1]));
  return table;
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <ranges>
#include <span>
#include <type_traits>
#include <vector>

#include "gemma4/float16.hpp"

/// The one comparator of the tests.
///
/// It accepts where |actual - expected| <= bound and rejects everything else. The other form (reject where the error is
/// above the bound) would let NaN through, because every comparison with NaN is false. A NaN on either side, an
/// infinity, a NaN or negative bound, a difference in length and an empty comparison all fail.
/// Differences are taken in double: exact for float, Bf16 and F16 inputs of similar size.
namespace gemma4::testkit {
namespace detail {

inline double as_double(Bf16 value) {
  return static_cast<double>(to_float(value));
}
inline double as_double(F16 value) {
  return static_cast<double>(to_float(value));
}
template <class TNumber>
requires std::is_arithmetic_v<TNumber>
double as_double(TNumber value) {
  return static_cast<double>(value);
}

template <class TRange>
concept Numbers = std::ranges::random_access_range<TRange> && std::ranges::sized_range<TRange> &&
    requires(std::ranges::range_value_t<TRange> value) {
  as_double(value);
};

/// How badly the element misses: error / bound for ordering, infinite where the difference is not a number.
inline double miss(double error, double bound) {
  if (!(error <= bound)) return std::isfinite(error) && bound > 0 ? error / bound : INFINITY;
  return bound > 0 ? error / bound : 0.0;
}

template <class TActual, class TExpected, class TBoundAt>
testing::AssertionResult close(const TActual& actual, const TExpected& expected, const TBoundAt& bound_at) {
  const auto n = static_cast<std::size_t>(std::ranges::size(actual));
  if (n != static_cast<std::size_t>(std::ranges::size(expected))) {
    return testing::AssertionFailure() << "lengths differ: actual " << n << ", expected "
                                       << std::ranges::size(expected);
  }
  if (n == 0) return testing::AssertionFailure() << "nothing to compare: both ranges are empty";
  std::size_t worst = 0, n_rejected = 0;
  double worst_miss = -1;
  for (std::size_t i = 0; i < n; ++i) {
    const double error = std::abs(as_double(actual[i]) - as_double(expected[i]));
    const double bound = bound_at(i);
    const bool accepted = error <= bound;
    if (!accepted) ++n_rejected;
    if (const double missed = accepted ? miss(error, bound) : std::max(1.0, miss(error, bound)); missed > worst_miss) {
      worst = i;
      worst_miss = missed;
    }
  }
  auto result = n_rejected == 0 ? testing::AssertionSuccess() : testing::AssertionFailure();
  const double a = as_double(actual[worst]), e = as_double(expected[worst]);
  return result << n_rejected << " of " << n << " elements beyond the bound; worst at index " << worst << ": actual "
                << a << ", expected " << e << ", error " << std::abs(a - e) << ", bound " << bound_at(worst);
}

}  // namespace detail

/// Success when every |actual[i] - expected[i]| <= bound. The message names the worst index and both values, on success
/// too, so that EXPECT_FALSE(close(...)) of a negative control reads well.
template <detail::Numbers TActual, detail::Numbers TExpected, class TBound>
requires std::is_arithmetic_v<TBound>
[[nodiscard]] testing::AssertionResult close(const TActual& actual, const TExpected& expected, TBound bound) {
  return detail::close(actual, expected, [bound](std::size_t) { return static_cast<double>(bound); });
}

/// The same with a bound for each element.
template <detail::Numbers TActual, detail::Numbers TExpected, detail::Numbers TBounds>
[[nodiscard]] testing::AssertionResult close(const TActual& actual, const TExpected& expected, const TBounds& bounds) {
  if (std::ranges::size(bounds) != std::ranges::size(actual)) {
    return testing::AssertionFailure() << "lengths differ: actual " << std::ranges::size(actual) << ", bounds "
                                       << std::ranges::size(bounds);
  }
  return detail::close(actual, expected, [&bounds](std::size_t i) { return detail::as_double(bounds[i]); });
}

/// Two numbers.
template <class TActual, class TExpected>
requires std::is_arithmetic_v<TActual> && std::is_arithmetic_v<TExpected>
[[nodiscard]] testing::AssertionResult close(TActual actual, TExpected expected, double bound) {
  const double a[] = {static_cast<double>(actual)}, e[] = {static_cast<double>(expected)};
  return close(a, e, bound);
}

/// How far `actual` has gone from `expected` towards `other`, as the share of the way that explains it best:
///   <actual - expected, other - expected> / |other - expected|^2
/// An error that leans on no direction comes to 1 / sqrt(length) of its size over |other - expected|, so that a wrong
/// factor shows far below a bound on each element. NaN where `other` is `expected`, or anything is NaN or infinite.
template <detail::Numbers TActual, detail::Numbers TExpected, detail::Numbers TOther>
[[nodiscard]] double share_of_way(const TActual& actual, const TExpected& expected, const TOther& other) {
  if (std::ranges::size(actual) != std::ranges::size(expected) ||
      std::ranges::size(other) != std::ranges::size(expected)) {
    return NAN;
  }
  double along = 0, square = 0;
  for (std::size_t i = 0; i < static_cast<std::size_t>(std::ranges::size(expected)); ++i) {
    const double from = detail::as_double(expected[i]), way = detail::as_double(other[i]) - from;
    along += (detail::as_double(actual[i]) - from) * way;
    square += way * way;
  }
  return along / square;
}

/// The regression coefficient <actual, expected> / <expected, expected>: the factor that makes `actual` of `expected`.
/// 1 where the two agree; a cosine does not see it.
template <detail::Numbers TActual, detail::Numbers TExpected>
[[nodiscard]] double scale_of(const TActual& actual, const TExpected& expected) {
  if (std::ranges::size(actual) != std::ranges::size(expected)) return NAN;
  double product = 0, square = 0;
  for (std::size_t i = 0; i < static_cast<std::size_t>(std::ranges::size(expected)); ++i) {
    const double value = detail::as_double(expected[i]);
    product += detail::as_double(actual[i]) * value;
    square += value * value;
  }
  return product / square;
}

/// Success when scale_of() is within `bound` of 1.
template <detail::Numbers TActual, detail::Numbers TExpected>
[[nodiscard]] testing::AssertionResult scale_close(const TActual& actual, const TExpected& expected, double bound) {
  const double scale = scale_of(actual, expected);
  auto result = std::abs(scale - 1) <= bound ? testing::AssertionSuccess() : testing::AssertionFailure();
  return result << "scale " << scale << ", need 1 within " << bound;
}

/// Success when |share_of_way()| is within `bound`: no part of the way to `other`, nor away from it.
template <detail::Numbers TActual, detail::Numbers TExpected, detail::Numbers TOther>
[[nodiscard]] testing::AssertionResult stays_at(const TActual& actual, const TExpected& expected, const TOther& other,
                                                double bound) {
  const double share = share_of_way(actual, expected, other);
  auto result = std::abs(share) <= bound ? testing::AssertionSuccess() : testing::AssertionFailure();
  return result << share << " of the way, need 0 within " << bound;
}

/// attention_bound in a rotated space bounds the length of the error of a whole head vector: that is compared here, one
/// number a vector, which is far sharper than the same bound on each of its elements.
[[nodiscard]] inline testing::AssertionResult vectors_close(std::span<const float> actual,
                                                            std::span<const double> exact,
                                                            std::span<const double> bounds, std::int64_t head_dim) {
  std::vector<double> length, bound;
  const auto step = static_cast<std::size_t>(head_dim);
  for (std::size_t first = 0; first < actual.size(); first += step) {
    double squares = 0;
    for (std::size_t i = first; i < first + step; ++i) squares += (actual[i] - exact[i]) * (actual[i] - exact[i]);
    length.push_back(std::sqrt(squares));
    bound.push_back(bounds[first]);
  }
  return close(length, std::vector<double>(length.size()), bound);
}

}  // namespace gemma4::testkit

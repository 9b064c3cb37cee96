// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

#include "gemma4/error.hpp"

/// Summaries of repeated measurements.
namespace gemma4 {

struct SampleSummary {
  std::size_t count = 0;
  double mean = 0;
  double deviation = 0;  ///< of the sample, count - 1 in the denominator; 0 for a single value
  double min = 0, p10 = 0, median = 0, p90 = 0, max = 0;
};

/// Quantiles are those values of the sample whose rank is nearest to q (count - 1).
/// @throws std::invalid_argument for an empty sample or one with a value that is not finite
[[nodiscard]] inline SampleSummary summarise_samples(std::span<const double> samples) {
  require(!samples.empty(), "summary of no samples");
  std::vector<double> sorted(samples.begin(), samples.end());
  for (const double sample : sorted) require(std::isfinite(sample), "summary of samples: one of them is ", sample);
  std::ranges::sort(sorted);
  SampleSummary summary{.count = sorted.size(), .min = sorted.front(), .max = sorted.back()};
  const auto count = static_cast<double>(sorted.size());
  for (const double sample : sorted) summary.mean += sample / count;
  double squares = 0;
  for (const double sample : sorted) squares += (sample - summary.mean) * (sample - summary.mean);
  if (sorted.size() > 1) summary.deviation = std::sqrt(squares / (count - 1));
  const auto at = [&](double q) { return sorted[static_cast<std::size_t>(q * (count - 1) + 0.5)]; };
  summary.p10 = at(0.1), summary.median = at(0.5), summary.p90 = at(0.9);
  return summary;
}

}  // namespace gemma4

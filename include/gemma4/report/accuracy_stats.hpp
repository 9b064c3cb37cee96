// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "gemma4/error.hpp"

/// What a change did to a model's predictions, measured position by position on the logits, all sums in double.
namespace gemma4 {

/// One position: the prediction of a model under test beside that of the base, for the token that really came next.
struct PositionAccuracy {
  double nll = 0;                ///< -ln p(target), nats
  double kl = 0;                 ///< KL(base || test), nats; at least 0 up to rounding
  bool same_top = false;         ///< both put the same token first (ties: the lowest index)
  double probability_delta = 0;  ///< p_test(target) - p_base(target)
  double cosine = 0;             ///< of the two logit vectors
};

/// Index of the largest value; the lowest index among equals.
[[nodiscard]] inline std::int64_t argmax(std::span<const float> values) {
  return std::max_element(values.begin(), values.end()) - values.begin();
}

/// Whether both have the same token first: never where one of them holds what is no number, which has no order.
[[nodiscard]] inline bool same_argmax(std::span<const float> a, std::span<const float> b) {
  const auto is_ordered = [](std::span<const float> values) {
    return std::none_of(values.begin(), values.end(), [](float value) { return !std::isfinite(value); });
  };
  return is_ordered(a) && is_ordered(b) && argmax(a) == argmax(b);
}

/// ln(sum(exp(logits))).
[[nodiscard]] inline double log_sum_exp(std::span<const float> logits) {
  const auto top = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - top);
  return top + std::log(sum);
}

/// @param test, base  [vocab] logits of the same position
/// @throws std::invalid_argument when the lengths differ or the target is outside the vocabulary
[[nodiscard]] inline PositionAccuracy compare_logits(std::span<const float> test, std::span<const float> base,
                                                     std::int64_t target) {
  require(!test.empty() && test.size() == base.size(), "compare_logits: ", test.size(), " logits against ",
          base.size());
  require(target >= 0 && target < static_cast<std::int64_t>(test.size()), "compare_logits: target ", target,
          " is outside the vocabulary [0, ", test.size(), ")");
  const double test_norm = log_sum_exp(test);
  const double base_norm = log_sum_exp(base);
  const auto at = static_cast<std::size_t>(target);
  PositionAccuracy result;
  result.nll = test_norm - static_cast<double>(test[at]);
  double dot = 0, test_square = 0, base_square = 0;
  for (std::size_t i = 0; i < test.size(); ++i) {
    const auto t = static_cast<double>(test[i]), b = static_cast<double>(base[i]);
    result.kl += std::exp(b - base_norm) * ((b - base_norm) - (t - test_norm));
    dot += t * b;
    test_square += t * t;
    base_square += b * b;
  }
  result.same_top = same_argmax(test, base);
  result.probability_delta =
      std::exp(static_cast<double>(test[at]) - test_norm) - std::exp(static_cast<double>(base[at]) - base_norm);
  result.cosine = dot / std::sqrt(test_square * base_square);
  return result;
}

/// The summary of a range of positions.
struct AccuracySummary {
  std::int64_t count = 0;
  double nll = 0, kl_mean = 0, kl_median = 0, kl_p99 = 0, kl_p999 = 0, kl_max = 0, same_top = 0, dp_rms = 0, cosine = 0,
         cosine_min = 0;
};

/// The smallest value that at least `per_mille` in a thousand of `values` do not exceed; the order of values changes.
[[nodiscard]] inline double per_mille_value(std::vector<double>& values, std::size_t per_mille) {
  const std::size_t rank = (per_mille * values.size() + 999) / 1000 - 1;  // in whole numbers: 0.99 is no double
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(rank), values.end());
  return values[rank];
}

/// The summary of all `positions`. kl_p99 is the smallest value that at least 99 % of the positions do not exceed;
/// kl_median and kl_p999 are the same of a half and of 99.9 %.
/// An empty range has count 0 and NaN elsewhere. A position that holds a NaN in any figure, wherever it stands, makes
/// every figure of its range NaN: logits that are no numbers have no first token and no order either.
[[nodiscard]] inline AccuracySummary summarise(std::span<const PositionAccuracy> positions) {
  AccuracySummary summary;
  summary.count = static_cast<std::int64_t>(positions.size());
  const auto is_nan = [](const PositionAccuracy& p) {
    return std::isnan(p.nll) || std::isnan(p.kl) || std::isnan(p.probability_delta) || std::isnan(p.cosine);
  };
  if (positions.empty() || std::any_of(positions.begin(), positions.end(), is_nan)) {
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    summary.nll = summary.kl_mean = summary.kl_median = summary.kl_p99 = summary.kl_p999 = summary.kl_max = kNan;
    summary.same_top = summary.dp_rms = summary.cosine = summary.cosine_min = kNan;
    return summary;
  }
  summary.cosine_min = positions.front().cosine;
  std::vector<double> kl;
  kl.reserve(positions.size());
  for (const PositionAccuracy& position : positions) {
    summary.nll += position.nll;
    summary.kl_mean += position.kl;
    summary.same_top += position.same_top;
    summary.dp_rms += position.probability_delta * position.probability_delta;
    summary.cosine += position.cosine;
    summary.cosine_min = std::min(summary.cosine_min, position.cosine);
    kl.push_back(position.kl);
  }
  const auto count = static_cast<double>(positions.size());
  for (double* mean : {&summary.nll, &summary.kl_mean, &summary.same_top, &summary.cosine}) *mean /= count;
  summary.dp_rms = std::sqrt(summary.dp_rms / count);
  summary.kl_median = per_mille_value(kl, 500);
  summary.kl_p99 = per_mille_value(kl, 990);
  summary.kl_p999 = per_mille_value(kl, 999);
  summary.kl_max = *std::max_element(kl.begin(), kl.end());
  return summary;
}

}  // namespace gemma4

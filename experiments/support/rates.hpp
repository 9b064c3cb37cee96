// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "experiments/support/cuda_model.hpp"
#include "gemma4/report/result_table.hpp"
#include "gemma4/report/statistics.hpp"

/// How drivers measure a rate of the whole model, so that their tables can be compared.
namespace gemma4::experiment {

/// Tokens per second of `repeat` runs of a prompt, each from an empty cache; one run before them is not counted.
[[nodiscard]] inline std::vector<double> prompt_rates(CudaSession& session, std::span<const std::int32_t> ids,
                                                      std::int64_t chunk, std::int64_t repeat) {
  std::vector<double> rates;
  for (std::int64_t i = 0; i <= repeat; ++i) {
    session.reset();
    const Stretch took = session.prefill(ids, chunk, {});
    if (i > 0) rates.push_back(took.tokens_per_second());
  }
  return rates;
}

/// Tokens per second of `repeat` windows of decoded tokens; each is taken back, so that all begin at the same depth. A
/// token before them loads the kernels and captures the graph.
[[nodiscard]] inline std::vector<double> decode_rates(CudaSession& session, std::int64_t window, std::int64_t repeat) {
  (void)session.decode(1, {}, {});
  session.rewind(1);
  std::vector<double> rates;
  for (std::int64_t i = 0; i < repeat; ++i) {
    rates.push_back(session.decode(window, {}, {}).tokens_per_second());
    session.rewind(window);
  }
  return rates;
}

/// avg_ts, n_sample, us_a_token and, of several, stddev_ts. @return their mean
inline double set_rates(ResultTable::Row& row, std::span<const double> rates) {
  const SampleSummary summary = summarise_samples(rates);
  row.set("avg_ts", summary.mean).set("n_sample", static_cast<std::int64_t>(summary.count));
  if (summary.count > 1) row.set("stddev_ts", summary.deviation);
  row.set("us_a_token", 1e6 / summary.mean);
  return summary.mean;
}

}  // namespace gemma4::experiment

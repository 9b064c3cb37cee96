// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "gemma4/model/model.hpp"

/// Logits of a whole sequence from any backend, and how far two of them are apart.
namespace gemma4::testkit {

/// [n_token, vocab]: a forward pass for each chunk, of the given lengths, the last one again and again.
template <Backend TBackend>
[[nodiscard]] std::vector<float> logits_of(Model<TBackend>& model, std::span<const std::int32_t> tokens,
                                           const std::vector<std::int64_t>& chunks) {
  const auto vocab = static_cast<std::size_t>(model.backend().config().vocab);
  std::vector<float> all(tokens.size() * vocab);
  for (std::size_t at = 0, i = 0; at < tokens.size(); ++i) {
    const std::size_t count =
        std::min(static_cast<std::size_t>(i < chunks.size() ? chunks[i] : chunks.back()), tokens.size() - at);
    std::vector<std::int64_t> rows(count);
    std::iota(rows.begin(), rows.end(), 0);
    model.forward(tokens.subspan(at, count), rows);
    for (std::size_t t = 0; t < count; ++t) {
      model.backend().copy_logits(static_cast<std::int64_t>(t), std::span(all).subspan((at + t) * vocab, vocab));
    }
    at += count;
  }
  return all;
}

/// The same from the beginning of a sequence.
template <Backend TBackend>
[[nodiscard]] std::vector<float> logits_of(TBackend& backend, std::span<const std::int32_t> tokens,
                                           const std::vector<std::int64_t>& chunks) {
  Model<TBackend> model(backend);
  model.reset();
  return logits_of(model, tokens, chunks);
}

/// Largest |a - e| / |e| of a row, Euclidean, and where it is; NaN where a row has one.
struct RowError {
  double worst = 0;
  std::size_t row = 0;
};
[[nodiscard]] inline RowError row_error(std::span<const float> actual, std::span<const float> expected,
                                        std::int64_t row_len) {
  const auto n = static_cast<std::size_t>(row_len);
  RowError result;
  for (std::size_t row = 0; row < actual.size() / n; ++row) {
    double square = 0, error = 0;
    for (std::size_t i = row * n; i < (row + 1) * n; ++i) {
      const double difference = static_cast<double>(actual[i]) - static_cast<double>(expected[i]);
      error += difference * difference;
      square += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
    }
    const double relative = std::sqrt(error / square);
    if (!(relative <= result.worst)) result = {relative, row};
    if (std::isnan(relative)) break;
  }
  return result;
}

/// Success when each row of `actual` is near that of `expected`: |a - e| <= bound * |e|, Euclidean. NaN fails.
[[nodiscard]] inline testing::AssertionResult rows_close(std::span<const float> actual, std::span<const float> expected,
                                                         std::int64_t row_len, double bound) {
  if (actual.size() != expected.size()) {
    return testing::AssertionFailure() << actual.size() << " values against " << expected.size();
  }
  const auto [worst, row] = row_error(actual, expected, row_len);
  if (worst <= bound) return testing::AssertionSuccess() << "worst row " << row << " is off by " << worst;
  return testing::AssertionFailure() << "row " << row << " is off by " << worst << " of its length, allowed " << bound;
}

/// Success when the logits are equal to the bit; no NaN is equal to anything.
[[nodiscard]] inline testing::AssertionResult same_rows(std::span<const float> actual,
                                                        std::span<const float> expected) {
  if (actual.size() != expected.size() || actual.empty()) {
    return testing::AssertionFailure() << actual.size() << " values against " << expected.size();
  }
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (!(actual[i] == expected[i])) {
      return testing::AssertionFailure() << "value " << i << " is " << actual[i] << ", expected " << expected[i];
    }
  }
  return testing::AssertionSuccess();
}

}  // namespace gemma4::testkit

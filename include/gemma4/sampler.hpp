// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "gemma4/error.hpp"
#include "gemma4/philox.hpp"
#include "gemma4/platform.hpp"

namespace gemma4 {

/// How the next token is chosen from the logits. This header is the contract; both rooms follow it to the same token.
///
/// temperature = 0, greedy: the largest logit, the lowest index among equals. Nothing else is read.
/// temperature > 0, in this order:
///   1. x[i] = logit[i] / temperature, in double.
///   2. Order: larger logit first, lower index first among equals. Tokens with a logit of -inf are out.
///   3. top_k > 0: the first top_k of the order stay.
///   4. top_p < 1: with the masses m[i] = sampler_mass(x[i], x[first], n) of n logits, whole numbers, the shortest
///      beginning of the order stays whose sum is at least top_p * (the sum of all that step 3 left), the sums rounded
///      to double and multiplied there. At least one token stays.
///   5. The token with the largest x[i] + g[i] is chosen, the lowest index among equals, where
///      g[i] = -log(-log(u[i])), u[i] = sampler_uniform(seed, position, i).
/// Step 5 draws from the softmax over what stayed: g[i] are independent Gumbel variables, and the argmax of x[i] + g[i]
/// is i with probability exp(x[i]) / sum_j exp(x[j]).
///
/// The same logits, settings and position give the same token, in whatever order the vocabulary is walked: masses are
/// whole, so that their sums do not depend on the order. Between two devices exp and log may differ in the last bit of
/// a double: a different token then needs two candidates (or a sum and its limit) that agree to about 1e-13.
struct SamplerSettings {
  float temperature = 0;   ///< 0: greedy
  std::int32_t top_k = 0;  ///< 0: off
  float top_p = 1;         ///< 1: off
  std::uint64_t seed = 0;
  bool operator==(const SamplerSettings&) const = default;
};

/// @throws std::invalid_argument naming the setting, what was expected and what was found
inline void validate(const SamplerSettings& settings) {
  require(std::isfinite(settings.temperature) && settings.temperature >= 0, "sampler: temperature ",
          settings.temperature, ", expected 0 (greedy) or a positive number");
  require(settings.top_k >= 0, "sampler: top_k ", settings.top_k, ", expected 0 (off) or a positive number");
  require(settings.top_p > 0 && settings.top_p <= 1, "sampler: top_p ", settings.top_p,
          ", expected a number above 0, at most 1 (off)");
}

/// The share of a token in the softmax, in whole units: exp(x - x_first) * 2^(62 - bit_width(n_logits)), truncated. The
/// largest token of 262144 has 2^43 of them, the sum of n_logits masses fits into 62 bits, and of the share of all a
/// nucleus loses at most n_logits units: 3e-8 where one token has it all.
[[nodiscard]] GEMMA4_HD inline std::uint64_t sampler_mass(double x, double x_first, std::int64_t n_logits) {
  std::uint64_t unit = std::uint64_t{1} << 62;
  for (; n_logits > 0; n_logits /= 2) unit /= 2;
  return static_cast<std::uint64_t>(std::exp(x - x_first) * static_cast<double>(unit));
}

/// The random number of one vocabulary entry at one position, in (0, 1).
/// Philox with the seed as key and the counter (index, low position, high position, 0).
[[nodiscard]] GEMMA4_HD constexpr double sampler_uniform(std::uint64_t seed, std::int64_t position,
                                                         std::int32_t index) {
  const auto place = static_cast<std::uint64_t>(position);
  return open_uniform(philox({{static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(place),
                               static_cast<std::uint32_t>(place >> 32), 0}},
                             philox_key(seed)));
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/sampler.hpp"

namespace gemma4::reference {
namespace detail {

/// @throws std::invalid_argument unless every logit is a number below infinity and one of them is finite
inline void require_logits(std::span<const float> logits) {
  require(!logits.empty() && logits.size() <= static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()),
          "sampler: ", logits.size(), " logits, expected 1 to 2^31 - 1");
  bool any_finite = false;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    require(logits[i] < std::numeric_limits<float>::infinity(), "sampler: logit ", i, " is ", logits[i],
            ", expected a finite number or -inf");
    any_finite = any_finite || std::isfinite(logits[i]);
  }
  require(any_finite, "sampler: all ", logits.size(), " logits are -inf, so no token can be chosen");
}

}  // namespace detail

/// Steps 2 to 4 of the contract: the tokens that may be chosen; in order where top_k or top_p is on.
/// @param logits [vocab], such as sample() takes; @param settings of a temperature above 0
[[nodiscard]] inline std::vector<std::int32_t> survivors(std::span<const float> logits,
                                                         const SamplerSettings& settings) {
  const auto logit = [&](std::int32_t i) { return logits[static_cast<std::size_t>(i)]; };
  std::vector<std::int32_t> kept(logits.size());
  std::iota(kept.begin(), kept.end(), 0);
  std::erase_if(kept, [&](std::int32_t i) { return logit(i) == -std::numeric_limits<float>::infinity(); });
  if (settings.top_k == 0 && settings.top_p == 1) return kept;

  const auto before = [&](std::int32_t a, std::int32_t b) {
    return logit(a) != logit(b) ? logit(a) > logit(b) : a < b;
  };
  const std::size_t limit = settings.top_k > 0 ? static_cast<std::size_t>(settings.top_k) : kept.size();
  const std::size_t count = std::min(kept.size(), limit);
  std::partial_sort(kept.begin(), kept.begin() + static_cast<std::ptrdiff_t>(count), kept.end(), before);
  kept.resize(count);
  if (settings.top_p == 1) return kept;

  const double temperature = settings.temperature;
  const auto scaled = [&](std::int32_t i) { return static_cast<double>(logit(i)) / temperature; };
  std::vector<std::uint64_t> sums;
  std::uint64_t sum = 0;
  for (const std::int32_t i : kept) {
    sums.push_back(sum += sampler_mass(scaled(i), scaled(kept.front()), static_cast<std::int64_t>(logits.size())));
  }
  const double wanted = static_cast<double>(settings.top_p) * static_cast<double>(sum);
  const auto enough = std::find_if(sums.begin(), sums.end(),
                                   [&](std::uint64_t reached) { return static_cast<double>(reached) >= wanted; });
  kept.resize(static_cast<std::size_t>(enough - sums.begin()) + 1);
  return kept;
}

/// The contract in gemma4/sampler.hpp with noise of the caller's: uniform(index) in (0, 1).
template <class TUniform>
[[nodiscard]] std::int32_t sample_with(std::span<const float> logits, const SamplerSettings& settings,
                                       std::int64_t position, TUniform&& uniform) {
  validate(settings);
  detail::require_logits(logits);
  require(position >= 0, "sampler: position ", position, ", expected at least 0");
  if (settings.temperature == 0) {
    return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  std::int32_t best = -1;
  double best_score = -std::numeric_limits<double>::infinity();
  for (const std::int32_t i : survivors(logits, settings)) {
    const double x =
        static_cast<double>(logits[static_cast<std::size_t>(i)]) / static_cast<double>(settings.temperature);
    const double score = x - std::log(-std::log(uniform(i)));
    if (score > best_score || (score == best_score && i < best)) {
      best = i;
      best_score = score;
    }
  }
  return best;
}

/// The token to follow the one at `position`, by the contract in gemma4/sampler.hpp. Mirror: cuda/sampler.cuh
/// @param position  of the token that gave the logits; another one draws other noise
/// @param logits [vocab]; -inf forbids a token
/// @throws std::invalid_argument on bad settings, a NaN or +inf logit (naming it), no finite logit, a negative position
[[nodiscard]] inline std::int32_t sample(std::span<const float> logits, const SamplerSettings& settings,
                                         std::int64_t position) {
  return sample_with(logits, settings, position,
                     [&](std::int32_t i) { return sampler_uniform(settings.seed, position, i); });
}

}  // namespace gemma4::reference

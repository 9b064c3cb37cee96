// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "gemma4/draft/acceptance.hpp"
#include "gemma4/draft/drafter.hpp"
#include "gemma4/error.hpp"
#include "gemma4/sampler.hpp"
#include "reference/sampler.hpp"

/// Which drafted tokens stay: the rule of gemma4/draft/acceptance.hpp.
namespace gemma4::reference {

/// The target's verdict on a proposal: how many of its tokens stay, and the token behind them.
struct Verdict {
  std::int64_t n_accepted = 0;
  std::int32_t next = 0;
  bool operator==(const Verdict&) const = default;
};

/// What the sampler draws from: [vocab] probabilities, 0 for tokens that temperature, top_k and top_p leave out.
/// @param settings of a temperature above 0
[[nodiscard]] inline std::vector<double> distribution(std::span<const float> logits, const SamplerSettings& settings) {
  validate(settings);
  detail::require_logits(logits);
  require(settings.temperature > 0, "distribution: temperature ", settings.temperature, ", need one above 0");
  const double temperature = settings.temperature;
  const auto scaled = [&](std::int32_t i) {
    return static_cast<double>(logits[static_cast<std::size_t>(i)]) / temperature;
  };
  const std::vector<std::int32_t> kept = survivors(logits, settings);
  double first = -std::numeric_limits<double>::infinity();
  for (const std::int32_t i : kept) first = std::max(first, scaled(i));
  std::uint64_t sum = 0;  // whole numbers: the same sum in any order
  const auto mass = [&](std::int32_t i) {
    return sampler_mass(scaled(i), first, static_cast<std::int64_t>(logits.size()));
  };
  for (const std::int32_t i : kept) sum += mass(i);
  std::vector<double> p(logits.size());
  for (const std::int32_t i : kept) {
    p[static_cast<std::size_t>(i)] = static_cast<double>(mass(i)) / static_cast<double>(sum);
  }
  return p;
}

/// A token drawn from a drafter's logits [vocab], by noise of its own: what a drafter proposes that draws.
/// @param position of the token that gave the logits
[[nodiscard]] inline std::int32_t draw_draft(std::span<const float> logits, const SamplerSettings& settings,
                                             std::int64_t position) {
  return sample_with(logits, settings, position, [&](std::int32_t i) {
    return draft::draft_uniform(settings.seed, position, draft::Noise::kDraft, i);
  });
}

namespace detail {

/// What comes in place of a rejected token: drawn from max(p - q, 0). Where rounding leaves nothing of that, p and q
/// are the same, and the sampler's token does.
[[nodiscard]] inline std::int32_t replacement(const std::vector<double>& p, const std::vector<double>& q,
                                              std::span<const float> logits, const SamplerSettings& settings,
                                              std::int64_t position) {
  std::int32_t best = -1;
  double best_score = -std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < p.size(); ++i) {
    const auto token = static_cast<std::int32_t>(i);
    if (p[i] <= q[i]) continue;
    const double score = draft::replacement_score(p[i], q[i], sampler_uniform(settings.seed, position, token));
    if (score > best_score) best = token, best_score = score;
  }
  return best >= 0 ? best : sample(logits, settings, position);
}

}  // namespace detail

/// The longest beginning of `proposal` that the target agrees with, and the target's own token behind it.
/// @param row(i) the target's logits [vocab] behind i tokens of the proposal, for i = 0 to its size; asked in order,
/// and
///               only as far as tokens stay; a span is good until the next is asked for
/// @param position of the token that gave row 0
/// @throws std::invalid_argument as sample() does, and for a drawn token that the drafter cannot have drawn
template <class TRow>
[[nodiscard]] Verdict judge(TRow&& row, const draft::Proposal& proposal, const SamplerSettings& settings,
                            std::int64_t position) {
  const std::int64_t n_draft = proposal.size();
  for (std::int64_t i = 0; i < n_draft; ++i) {
    const std::span<const float> logits = row(i);
    const std::int32_t drafted = proposal.tokens[static_cast<std::size_t>(i)];
    if (!proposal.is_drawn() || settings.temperature == 0) {
      const std::int32_t token = sample(logits, settings, position + i);
      if (token != drafted) return {i, token};
      continue;
    }
    const std::vector<double> p = distribution(logits, settings), q = distribution(proposal.row(i), settings);
    require(q.size() == p.size(), "acceptance: the drafter has ", q.size(), " logits, the target ", p.size());
    require(drafted >= 0 && drafted < static_cast<std::int32_t>(q.size()) && q[static_cast<std::size_t>(drafted)] > 0,
            "acceptance: token ", drafted, " at place ", i, " was not drawn from the drafter's distribution");
    const double uniform = draft::draft_uniform(settings.seed, position + i, draft::Noise::kAccept, 0);
    if (draft::accepts(p[static_cast<std::size_t>(drafted)], q[static_cast<std::size_t>(drafted)], uniform)) continue;
    return {i, detail::replacement(p, q, logits, settings, position + i)};
  }
  return {n_draft, sample(row(n_draft), settings, position + n_draft)};
}

}  // namespace gemma4::reference

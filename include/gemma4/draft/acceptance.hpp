// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "gemma4/philox.hpp"
#include "gemma4/platform.hpp"

/// When a drafted token is accepted, and what comes in its place. Both rooms compute it by these functions.
///
/// p is the target's distribution at a position and q the one that the drafter drew x from, both behind temperature,
/// top-k and top-p. The rule that leaves the target's distribution as it is:
///
///   x stays with probability min(1, p(x) / q(x)); else the token is drawn from max(p - q, 0), normalised.
///
/// Source: Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318.
///
/// A token that was not drawn at random has q = 1 at x, and the rule reads: x stays with probability p(x), else the
/// token is drawn from p without x. That is what sampling from p does by itself: where the sampler's token is x, x
/// stays, else the sampler's token comes in its place. So the text of such a drafter is that of plain decoding with the
/// same seed, token for token, and greedy decoding is the case of it in which nothing is random.
///
/// Noise is a function of (seed, position, what for), as in gemma4/sampler.hpp, and position is that of the token in
/// front: a position that is decided again, because a step before rejected what was drafted for it, sees the noise that
/// it had. That is sound: a draft that was thrown away with a token before it has decided nothing.
namespace gemma4::draft {

/// What noise is for. The sampler's own is 0: it decides tokens that were not drafted, those drawn in place of a
/// drafted one among them.
enum class Noise : std::uint32_t { kAccept = 1, kDraft = 2 };

/// A number in (0, 1); kAccept takes index 0, kDraft the entry of the vocabulary.
[[nodiscard]] GEMMA4_HD constexpr double draft_uniform(std::uint64_t seed, std::int64_t position, Noise noise,
                                                       std::int32_t index) {
  const auto place = static_cast<std::uint64_t>(position);
  return open_uniform(philox({{static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(place),
                               static_cast<std::uint32_t>(place >> 32), static_cast<std::uint32_t>(noise)}},
                             philox_key(seed)));
}

/// Whether a token stays: with probability min(1, p / q).
/// @param p, q of the token; q > 0
/// @param uniform in (0, 1)
[[nodiscard]] GEMMA4_HD constexpr bool accepts(double p, double q, double uniform) {
  return uniform * q < p;
}

/// How a token competes to come in place of a rejected one: the largest score wins, the lowest index among equals,
/// which draws it with probability max(p - q, 0), normalised (Gumbel, as in step 5 of the sampler). -inf: it cannot.
/// @param uniform sampler_uniform(seed, position, token)
[[nodiscard]] GEMMA4_HD inline double replacement_score(double p, double q, double uniform) {
  return p > q ? std::log(p - q) - std::log(-std::log(uniform)) : -HUGE_VAL;
}

}  // namespace gemma4::draft

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>

#include "gemma4/draft/auto_drafts.hpp"

namespace gemma4::cuda {

/// Steps of one stretch of a decode(): what the host knows of them, and those whose end it has not seen.
struct StepsUnderWay {
  std::int64_t first;                    ///< position at the beginning
  std::int64_t n_wanted;                 ///< tokens
  std::size_t n_before = 0;              ///< tokens of the same decode(), of the stretches before
  std::int64_t known = first;            ///< position behind the tokens that the host may read
  std::int64_t farthest = first;         ///< position behind all that was written, rejected drafts among it
  std::int64_t n_step = 0;               ///< enqueued
  std::deque<std::int64_t> drafts = {};  ///< of each step under way, the oldest first

  [[nodiscard]] std::int64_t n_known() const { return known - first; }
  [[nodiscard]] std::int64_t n_known(std::int64_t at) const { return at - first; }
  [[nodiscard]] std::int64_t n_under_way() const { return static_cast<std::int64_t>(drafts.size()); }
  /// Position behind what the steps under way write at most.
  [[nodiscard]] std::int64_t end() const {
    std::int64_t end = known;
    for (const std::int64_t n_draft : drafts) end += n_draft + 1;
    return end;
  }
};

/// What steps took with either kind of drafter, whether a rule went by it or not.
class StepClocks {
 public:
  /// @param draft_cost see draft::StepCosts; of the first time
  [[nodiscard]] draft::StepClock& of(bool by_assistant, double draft_cost) {
    std::optional<draft::StepClock>& clock = clocks_[by_assistant ? 1 : 0];
    if (!clock) clock.emplace(draft::StepCosts::unmeasured(draft_cost));
    return *clock;
  }

 private:
  std::array<std::optional<draft::StepClock>, 2> clocks_;
};

}  // namespace gemma4::cuda

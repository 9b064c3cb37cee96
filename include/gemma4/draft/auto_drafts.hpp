// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "gemma4/draft/drafter.hpp"
#include "gemma4/error.hpp"

/// How many tokens to draft, from what was accepted.
namespace gemma4::draft {

/// What a step takes, in plain steps of one token. The defaults are the bounds that a step on a device must keep
/// (products of the weights 1.05, 1.10 and 1.25 for 2, 4 and 8 rows, linear between), and no cost of a draft, as lookup
/// has none; a device measures its own (StepClock), and until it has takes them for dear (unmeasured()).
struct StepCosts {
  std::array<double, kMaxDrafts + 1> verify = {1, 1.05, 1.075, 1.10, 1.1375, 1.175, 1.2125, 1.25};  ///< [drafts]
  double draft = 0;                                                                                 ///< of one token

  /// Half a plain step for each row: what is tried before it is known must not be a loss that is noticed.
  [[nodiscard]] static StepCosts unmeasured(double draft) {
    StepCosts costs{.draft = draft};
    for (std::int64_t k = 0; k <= kMaxDrafts; ++k) {
      costs.verify[static_cast<std::size_t>(k)] = 1 + 0.5 * static_cast<double>(k);
    }
    return costs;
  }
  [[nodiscard]] double of(std::int64_t n_draft) const {
    return verify[static_cast<std::size_t>(n_draft)] + static_cast<double>(n_draft) * draft;
  }
};

/// What steps took on a device, and so what they cost. How many tokens are drafted then depends on a clock; the text
/// never does.
class StepClock {
 public:
  static constexpr double kMemory = 8;

  /// @param unknown costs as long as nothing is measured
  explicit StepClock(const StepCosts& unknown = {}) : unknown_(unknown) {}

  /// A step that was under way while the one before ended. The first of each number is recorded while it runs, and does
  /// not count; what takes more than twice as long as those before was held up, and counts as twice.
  void saw(std::int64_t n_draft, double us) {
    Steps& steps = steps_[static_cast<std::size_t>(n_draft)];
    if (steps.n_seen++ == 0) return;
    if (steps.n_seen == 2) {
      steps.us = us;
    } else {
      steps.us += (std::min(us, 2 * steps.us) - steps.us) / kMemory;
    }
  }

  /// Whether a plain step has been timed; until then steps are plain ones.
  [[nodiscard]] bool knows_plain() const { return is_known(0); }

  /// Numbers of drafts that have not been seen lie on the line between those that have, or through the plain step and
  /// the most that has; nothing is known before a plain step and another: the defaults. Never less for more drafts.
  [[nodiscard]] StepCosts costs() const {
    if (!knows_plain()) return unknown_;
    StepCosts costs;
    std::int64_t known = 0;
    for (std::int64_t k = 1; k <= kMaxDrafts; ++k) {
      if (!is_known(k)) continue;
      const double low = costs.of(known), high = std::max(low, us(k) / us(0));
      for (std::int64_t i = known + 1; i <= k; ++i) {
        costs.verify[static_cast<std::size_t>(i)] =
            low + (high - low) * static_cast<double>(i - known) / static_cast<double>(k - known);
      }
      known = k;
    }
    if (known == 0) return unknown_;
    const double slope = (costs.of(known) - 1) / static_cast<double>(known);
    for (std::int64_t i = known + 1; i <= kMaxDrafts; ++i) {
      costs.verify[static_cast<std::size_t>(i)] = 1 + slope * static_cast<double>(i);
    }
    return costs;
  }

 private:
  struct Steps {
    std::int64_t n_seen = 0;
    double us = 0;
  };
  [[nodiscard]] bool is_known(std::int64_t k) const { return steps_[static_cast<std::size_t>(k)].n_seen >= 2; }
  [[nodiscard]] double us(std::int64_t k) const { return steps_[static_cast<std::size_t>(k)].us; }

  StepCosts unknown_;
  std::array<Steps, kMaxDrafts + 1> steps_;
};

/// The rule of `--draft auto`:
///   1. r[i], the share of drafts at place i that were accepted among those whose places before were, over about the
///      last kMemory of them; it begins at kFirstShare.
///   2. k drafts are worth (1 + r[1] + r[1] r[2] + ... + r[1]...r[k]) / cost(k) tokens a plain step. The k with the
///   most
///      is chosen, 0 among them; the smallest among equals.
///   3. Where that is 0, one token is drafted every kProbe-th time all the same, to see whether the text has changed.
///   4. A budget says what drafting may still lose. It begins at 0 and grows with a step of cost c that gave n tokens
///   by
///      (1 + kMaxLoss) n - c, up to kMaxBudget. A k is chosen only where it would stay at or above 0 if nothing is
///      accepted.
/// By 4 the cost of all steps is never above (1 + kMaxLoss) times that of plain decoding, whatever the text; and after
/// a stretch that went well, what goes badly loses at most kMaxBudget plain steps before the same holds for the rest.
class AutoDrafts {
 public:
  static constexpr double kMaxLoss = 0.03, kMaxBudget = 2, kMemory = 16, kFirstShare = 0.75;
  static constexpr std::int64_t kProbe = 16;

  /// @param limit drafts of a step, at most
  explicit AutoDrafts(const StepCosts& costs = {}, std::int64_t limit = kMaxDrafts) : limit_(limit) {
    set_costs(costs);
    require(limit >= 1 && limit <= kMaxDrafts, "draft: auto with up to ", limit, " drafts, need 1 to ", kMaxDrafts);
    share_.fill(kFirstShare);
  }

  /// From the next step on.
  void set_costs(const StepCosts& costs) {
    for (std::int64_t k = 1; k <= kMaxDrafts; ++k) {
      require(costs.of(k) >= costs.of(k - 1), "draft: a step of ", k, " drafts costs ", costs.of(k),
              ", less than one of fewer, ", costs.of(k - 1));
    }
    costs_ = costs;
  }

  /// Drafts of the next step.
  /// @param at_stake sum of stake() over steps under way, whose outcome is not known: the budget must bear them too
  [[nodiscard]] std::int64_t next(double at_stake = 0) const {
    at_stake = std::max(0.0, at_stake);
    std::int64_t best = 0;
    double expected = 1, chain = 1, best_rate = 1;
    for (std::int64_t k = 1; k <= limit_; ++k) {
      chain *= share_[static_cast<std::size_t>(k - 1)];
      expected += chain;
      const double rate = expected / costs_.of(k);
      if (affords(k, at_stake) && rate > best_rate) best = k, best_rate = rate;
    }
    if (best == 0 && n_idle_ + 1 >= kProbe && affords(1, at_stake)) return 1;
    return best;
  }

  /// What came of a step. @param n_draft as proposed, which may be less than next()
  void saw(std::int64_t n_draft, std::int64_t n_accepted) {
    require(n_draft >= 0 && n_draft <= kMaxDrafts && n_accepted >= 0 && n_accepted <= n_draft, "draft: ", n_accepted,
            " accepted of ", n_draft, ", of at most ", kMaxDrafts);
    for (std::int64_t i = 0; i < n_draft && i <= n_accepted; ++i) {
      double& share = share_[static_cast<std::size_t>(i)];
      share += ((i < n_accepted ? 1.0 : 0.0) - share) / kMemory;
    }
    n_idle_ = n_draft > 0 ? 0 : n_idle_ + 1;
    const double gain = (1 + kMaxLoss) * static_cast<double>(n_accepted + 1) - costs_.of(n_draft);
    budget_ = std::min(kMaxBudget, budget_ + gain);
  }

  /// What a step of so many drafts takes from the budget if nothing is accepted.
  [[nodiscard]] double stake(std::int64_t n_draft) const { return costs_.of(n_draft) - (1 + kMaxLoss); }
  [[nodiscard]] double budget() const { return budget_; }
  /// r[i + 1] of the rule.
  [[nodiscard]] double share(std::int64_t i) const { return share_[static_cast<std::size_t>(i)]; }

 private:
  [[nodiscard]] bool affords(std::int64_t n_draft, double at_stake) const {
    return budget_ - at_stake >= stake(n_draft);
  }

  StepCosts costs_;
  std::int64_t limit_;
  std::array<double, kMaxDrafts> share_;
  double budget_ = 0;
  std::int64_t n_idle_ = 0;  ///< steps in a row without drafts
};

}  // namespace gemma4::draft

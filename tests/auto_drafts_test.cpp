// SPDX-License-Identifier: Apache-2.0
#include "gemma4/draft/auto_drafts.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <random>
#include <vector>

#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace {

using namespace gemma4;
using namespace gemma4::draft;

/// Cost of steps and tokens that they gave.
struct Spent {
  double cost = 0;
  std::int64_t n_token = 0, n_drafted = 0;
  [[nodiscard]] double per_token() const { return cost / static_cast<double>(n_token); }
};

/// A text whose drafts stay with probability `share` each, one after another.
Spent run(AutoDrafts& rule, const StepCosts& costs, double share, std::int64_t n_step, std::mt19937& random) {
  std::bernoulli_distribution stays(share);
  Spent total;
  for (std::int64_t i = 0; i < n_step; ++i) {
    const std::int64_t n_draft = rule.next();
    std::int64_t n_accepted = 0;
    while (n_accepted < n_draft && stays(random)) ++n_accepted;
    rule.saw(n_draft, n_accepted);
    total.cost += costs.of(n_draft);
    total.n_token += n_accepted + 1;
    total.n_drafted += n_draft;
  }
  return total;
}

double fixed(const StepCosts& costs, double share, std::int64_t n_draft) {
  double expected = 1, chain = 1;
  for (std::int64_t i = 0; i < n_draft; ++i) expected += chain *= share;
  return costs.of(n_draft) / expected;
}

/// Steps of which `n_ahead` are begun before the outcome of the first is known; stretches that go well change with
/// such in which nothing is accepted. @return the least that the budget was
double least_budget(std::size_t n_ahead, bool knows_what_is_at_stake) {
  AutoDrafts rule;
  std::deque<std::int64_t> under_way;
  double least = 0;
  for (int step = 0; step < 400; ++step) {
    while (under_way.size() < n_ahead) {
      double at_stake = 0;
      for (const std::int64_t n_draft : under_way) at_stake += rule.stake(n_draft);
      under_way.push_back(rule.next(knows_what_is_at_stake ? at_stake : 0));
    }
    const std::int64_t n_draft = under_way.front();
    under_way.pop_front();
    rule.saw(n_draft, step % 100 < 30 ? n_draft : 0);
    least = std::min(least, rule.budget());
  }
  return least;
}

TEST(AutoDrafts, StepsUnderWayShareOneBudget) {
  for (const std::size_t n_ahead : {1, 2, 5, 7}) EXPECT_GE(least_budget(n_ahead, true), -1e-9) << n_ahead;
  EXPECT_LT(least_budget(5, false), -0.01) << "the control: each step takes the budget for itself";
}

RC_GTEST_PROP(AutoDrafts, NeverLosesMoreThanItMay, ()) {  // whatever is accepted, after every step
  AutoDrafts rule;
  const StepCosts costs;
  double cost = 0;
  std::int64_t n_token = 0;
  for (int i = 0; i < 300; ++i) {
    const std::int64_t n_draft = rule.next();
    const bool generous = *rc::gen::weightedElement<bool>({{4, false}, {1, true}});
    const std::int64_t n_accepted = generous ? n_draft : *rc::gen::inRange<std::int64_t>(0, n_draft + 1);
    rule.saw(n_draft, n_accepted);
    cost += costs.of(n_draft);
    n_token += n_accepted + 1;
    RC_ASSERT(cost <= 1.03 * static_cast<double>(n_token) + 1e-9);
  }
}

TEST(AutoDrafts, WhereNothingIsAcceptedItLosesLittleAndKeepsAsking) {
  std::mt19937 random(1);
  const StepCosts costs;
  AutoDrafts rule;
  const Spent first = run(rule, costs, 0, 200, random), later = run(rule, costs, 0, 2000, random);
  EXPECT_LE(first.per_token(), 1.03);
  EXPECT_LE(later.per_token(), 1.005) << "one probe in 16 steps";
  EXPECT_GT(later.n_drafted, 2000 / 20);
  EXPECT_GT(fixed(costs, 0, 1), 1.03) << "the control: always drafting one token loses more";
}

TEST(AutoDrafts, WhereMuchIsAcceptedItIsNearTheBestFixedNumber) {
  const StepCosts costs;
  for (const double share : {0.3, 0.6, 0.8, 0.95}) {
    std::mt19937 random(2);
    AutoDrafts rule;
    (void)run(rule, costs, share, 100, random);
    double best = 1;
    for (std::int64_t k = 1; k <= kMaxDrafts; ++k) best = std::min(best, fixed(costs, share, k));
    EXPECT_LE(run(rule, costs, share, 5000, random).per_token(), 1.04 * best) << share;
  }
}

TEST(AutoDrafts, ATextThatTurnsIsFollowed) {
  std::mt19937 random(3);
  const StepCosts costs;
  AutoDrafts rule;
  (void)run(rule, costs, 0, 1000, random);
  EXPECT_LE(rule.next(), 1);
  (void)run(rule, costs, 1, 300, random);
  EXPECT_EQ(rule.next(), kMaxDrafts);
  // And back: at most the budget of the good stretch is lost, and then as little as ever.
  const Spent bad = run(rule, costs, 0, 500, random);
  EXPECT_LE(bad.cost, 1.03 * static_cast<double>(bad.n_token) + AutoDrafts::kMaxBudget);
}

TEST(AutoDrafts, DearDraftsAreFewer) {
  std::mt19937 random(4);
  StepCosts dear;
  dear.draft = 0.3;
  AutoDrafts cheap_rule, dear_rule(dear), short_rule({}, 2);
  const Spent cheap = run(cheap_rule, {}, 0.7, 1000, random), costly = run(dear_rule, dear, 0.7, 1000, random);
  EXPECT_LT(costly.n_drafted, cheap.n_drafted / 2);
  EXPECT_LE(costly.per_token(), 1.03);
  EXPECT_LE(run(short_rule, {}, 1, 1000, random).n_drafted, 2000);
}

TEST(StepClock, CostsAreWhatStepsTook) {
  StepClock clock;
  EXPECT_EQ(clock.costs().verify, StepCosts{}.verify) << "nothing is known";
  const auto see = [&](std::int64_t n_draft, double us, int n = 40) {
    for (int i = 0; i < n; ++i) clock.saw(n_draft, us);
  };
  see(3, 200);
  EXPECT_EQ(clock.costs().verify, StepCosts{}.verify) << "in what unit?";
  clock.saw(0, 5000);  // recorded, too
  see(0, 100);
  const StepCosts costs = clock.costs();
  for (std::int64_t k = 0; k <= kMaxDrafts; ++k) EXPECT_NEAR(costs.of(k), 1 + static_cast<double>(k) / 3, 1e-6) << k;
  see(1, 110);
  EXPECT_NEAR(clock.costs().of(1), 1.1, 1e-6);
  EXPECT_NEAR(clock.costs().of(2), 1.55, 1e-6) << "between those that are known";
  see(7, 90);  // measured badly: never less than fewer drafts
  EXPECT_NEAR(clock.costs().of(7), 2, 1e-6);
  EXPECT_NO_THROW((void)AutoDrafts(clock.costs()));
  clock.saw(0, 1e9);  // somebody stopped the process
  EXPECT_GT(clock.costs().of(3), 1.7);
}

/// Steps that take much more than the defaults say: with them alone the rule would lose.
TEST(AutoDrafts, WhatIsMeasuredCounts) {
  const auto lost = [](bool is_measured) {
    StepClock clock;
    AutoDrafts rule;
    double us = 0;
    std::int64_t n_token = 0;
    std::mt19937 random(5);
    std::bernoulli_distribution stays(0.3);
    for (int step = 0; step < 4000; ++step) {
      const std::int64_t n_draft = clock.knows_plain() ? rule.next() : 0;
      std::int64_t n_accepted = 0;
      while (n_accepted < n_draft && stays(random)) ++n_accepted;
      const double took = 100 * (1 + 0.5 * static_cast<double>(n_draft));
      clock.saw(n_draft, took);
      if (is_measured) rule.set_costs(clock.costs());
      rule.saw(n_draft, n_accepted);
      us += took;
      n_token += n_accepted + 1;
    }
    return us / (100 * static_cast<double>(n_token)) - 1;
  };
  EXPECT_LE(lost(true), 0.03);
  EXPECT_GT(lost(false), 0.06) << "the control";
}

/// Answers of 32 tokens, before each of which the rule begins anew, on a text where little is accepted: what steps cost
/// stays known, and before it is they count as dear. Controls: a clock that is forgotten, costs that are hoped for.
TEST(AutoDrafts, ShortAnswersLoseAsLittle) {
  const auto lost = [](const StepCosts& unknown, bool forgets) {
    StepClock clock(unknown);
    double us = 0;
    std::int64_t n_token = 0;
    std::mt19937 random(6);
    std::bernoulli_distribution stays(0.3);
    for (int answer = 0; answer < 40; ++answer) {
      if (forgets) clock = StepClock(unknown);
      AutoDrafts rule(clock.costs());
      for (const std::int64_t end = n_token + 32; n_token < end;) {
        const std::int64_t n_draft = clock.knows_plain() ? rule.next() : 0;
        std::int64_t n_accepted = 0;
        while (n_accepted < n_draft && stays(random)) ++n_accepted;
        const double took = 100 * (1 + 0.64 * static_cast<double>(n_draft));
        clock.saw(n_draft, took);
        rule.set_costs(clock.costs());
        rule.saw(n_draft, n_accepted);
        us += took;
        n_token += n_accepted + 1;
      }
    }
    return us / (100 * static_cast<double>(n_token)) - 1;
  };
  const StepCosts dear = StepCosts::unmeasured(0);
  EXPECT_LE(lost(dear, false), 0.03);
  EXPECT_GT(lost({}, true), 0.06) << "the control";
  EXPECT_GT(lost({}, true), 2 * lost(dear, true));
}

TEST(AutoDrafts, RefusesWhatCannotBe) {
  AutoDrafts rule;
  EXPECT_TRUE(testkit::refuses([&] { rule.saw(2, 3); }, {"3 accepted of 2"}));
  EXPECT_TRUE(testkit::refuses([&] { rule.saw(8, 0); }, {"0 accepted of 8", "at most 7"}));
  EXPECT_TRUE(testkit::refuses([] { (void)AutoDrafts({}, 8); }, {"up to 8 drafts", "1 to 7"}));
  EXPECT_TRUE(testkit::refuses([] { (void)AutoDrafts({}, 0); }, {"up to 0"}));
  EXPECT_TRUE(testkit::refuses([] { (void)AutoDrafts({.draft = -0.06}); }, {"1 drafts costs 0.99", "fewer, 1"}));
}

}  // namespace

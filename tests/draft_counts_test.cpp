// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "gemma4/draft/step.hpp"
#include "tests/support/property.hpp"

/// Acceptance counted in parts is acceptance counted in one.
namespace {

using namespace gemma4::draft;

struct Drawn {
  std::int64_t n_draft, n_accepted;
};

std::vector<Drawn> any_steps() {
  std::vector<Drawn> steps;
  for (int i = *rc::gen::inRange(0, 20); i > 0; --i) {
    const auto n_draft = *rc::gen::inRange<std::int64_t>(0, kMaxDrafts + 1);
    steps.push_back({n_draft, *rc::gen::inRange<std::int64_t>(0, n_draft + 1)});
  }
  return steps;
}

bool same(const Counts& a, const Counts& b) {
  return a.n_step == b.n_step && a.n_token == b.n_token && a.drafted == b.drafted && a.accepted == b.accepted;
}

RC_GTEST_PROP(DraftCounts, PartsAddUpAndComeApart, ()) {
  Counts first, second, all;
  for (const Drawn& step : any_steps())
    first.add(step.n_draft, step.n_accepted), all.add(step.n_draft, step.n_accepted);
  const Counts before = all;
  for (const Drawn& step : any_steps())
    second.add(step.n_draft, step.n_accepted), all.add(step.n_draft, step.n_accepted);
  RC_ASSERT(same(all.since(before), second));
  Counts sum = first;
  sum.add(second);
  RC_ASSERT(same(sum, all));
}

TEST(DraftCounts, AStepGivesWhatItAcceptedAndOneMore) {
  Counts counts;
  counts.add(3, 2);
  counts.add(0, 0);
  EXPECT_EQ(counts.n_step, 2);
  EXPECT_EQ(counts.n_token, 4);
  EXPECT_EQ(counts.tokens_per_step(), 2.0);
  EXPECT_EQ(counts.drafted, (decltype(counts.drafted){1, 1, 1}));
  EXPECT_EQ(counts.accepted, (decltype(counts.accepted){1, 1}));
}

}  // namespace

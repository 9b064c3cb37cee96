// SPDX-License-Identifier: Apache-2.0
#include "gemma4/session/checkpoint_policy.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "experiments/support/checkpoint_option.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

/// Which checkpoints are made and stay, as positions alone. What they are good for is in sequence_store_test.cpp.
namespace {

using namespace gemma4;
using testkit::refuses;
using Positions = std::vector<std::int64_t>;

/// What SequenceStore does behind a pass.
void note(const CheckpointPolicy& policy, Positions& kept, std::int64_t position) {
  if (!policy.is_due(kept.empty() ? 0 : kept.back(), position)) return;
  kept.push_back(position);
  kept = staying_checkpoints(policy, kept, position);
}

/// Tokens from the checkpoint at or before `to`, or from the beginning.
std::int64_t n_replay(const Positions& kept, std::int64_t to) {
  const auto after = std::ranges::upper_bound(kept, to);
  return to - (after == kept.begin() ? 0 : *(after - 1));
}

std::int64_t most_replayed(const Positions& kept, std::int64_t first, std::int64_t last) {
  std::int64_t most = 0;
  for (std::int64_t to = std::max<std::int64_t>(0, first); to <= last; ++to) most = std::max(most, n_replay(kept, to));
  return most;
}

CheckpointPolicy any_policy() {
  const auto near = *rc::gen::inRange<std::int64_t>(1, 9);
  return {.interval = near * *rc::gen::inRange<std::int64_t>(1, 9),
          .near_interval = near,
          .near_tokens = near + *rc::gen::inRange<std::int64_t>(0, 60)};
}

/// In any passes: the near zone is near, the rest as far as said, and there are no more than said.
RC_GTEST_PROP(CheckpointPolicy, WhateverThePassesItKeepsWhatItPromises, ()) {
  const CheckpointPolicy policy = any_policy();
  const auto longest = *rc::gen::inRange<std::int64_t>(1, 20);
  const auto context = *rc::gen::inRange<std::int64_t>(1, 300);
  Positions kept;
  std::int64_t position = 0;
  while (position < context) {
    position = std::min(context, position + *rc::gen::inRange<std::int64_t>(1, longest + 1));
    note(policy, kept, position);
    RC_ASSERT(static_cast<std::int64_t>(kept.size()) <= n_checkpoint(position, policy));
    const std::int64_t zone = position - policy.near_tokens - 1;
    RC_ASSERT(most_replayed(kept, zone, position) <= policy.near_interval + longest - 2);
    RC_ASSERT(most_replayed(kept, 0, zone - 1) <= policy.interval + longest - 2);
  }
}

/// And no more than a spacing where a pass ends at each multiple.
RC_GTEST_PROP(CheckpointPolicy, PassesThatEndAtMultiplesReplayLessThanASpacing, ()) {
  const CheckpointPolicy policy = any_policy();
  Positions kept;
  std::int64_t position = 0;
  while (position < 200) {
    position += *rc::gen::inRange<std::int64_t>(1, policy.n_until_due(position) + 1);
    note(policy, kept, position);
    const std::int64_t zone = position - policy.near_tokens - 1;
    RC_ASSERT(most_replayed(kept, zone, position) < policy.near_interval);
    RC_ASSERT(most_replayed(kept, 0, zone - 1) < policy.interval);
  }
}

/// The most that there are, over all that passes of up to `longest` tokens can lead to.
std::int64_t most_there_are(const CheckpointPolicy& policy, std::int64_t context, std::int64_t longest) {
  std::vector<std::set<Positions>> at(static_cast<std::size_t>(context + 1));
  at[0].insert(Positions{});
  std::size_t most = 0;
  for (std::int64_t position = 0; position < context; ++position) {
    for (const Positions& kept : at[static_cast<std::size_t>(position)]) {
      for (std::int64_t pass = 1; pass <= std::min(longest, context - position); ++pass) {
        Positions next = kept;
        note(policy, next, position + pass);
        most = std::max(most, next.size());
        at[static_cast<std::size_t>(position + pass)].insert(std::move(next));
      }
    }
  }
  return static_cast<std::int64_t>(most);
}

/// The plan is no larger than need be: some passes lead to it, or to one less where the zone is no multiple.
TEST(CheckpointPolicy, TheMostThatIsSaidIsReached) {
  const std::vector<CheckpointPolicy> policies = {{4, 0, 0},   {6, 3, 6}, {9, 3, 3}, {4, 2, 6}, {5, 5, 5},
                                                  {12, 2, 20}, {4, 2, 5}, {5, 5, 6}, {9, 3, 4}};
  for (const CheckpointPolicy& policy : policies) {
    const bool is_multiple = policy.near_interval == 0 || policy.near_tokens % policy.near_interval == 0;
    for (std::int64_t context = 1; context <= 24; ++context) {
      const std::int64_t most = most_there_are(policy, context, 3), said = n_checkpoint(context, policy);
      EXPECT_LE(most, said) << to_string(policy) << ' ' << context;
      EXPECT_GE(most + (is_multiple ? 0 : 1), said) << to_string(policy) << ' ' << context;
    }
  }
  EXPECT_EQ(n_checkpoint(24, {6, 3, 6}), 4 + 2);
}

TEST(CheckpointPolicy, KeepsManyNearAndFewFar) {
  const CheckpointPolicy policy{.interval = 40, .near_interval = 10, .near_tokens = 30};
  Positions kept;
  for (std::int64_t position = 5; position <= 130; position += 5) note(policy, kept, position);
  EXPECT_EQ(kept, (Positions{40, 80, 90, 100, 110, 120, 130}));
  EXPECT_EQ(most_replayed(kept, 99, 130), 9);
  EXPECT_EQ(n_replay(kept, 79), 39) << "the far ones alone";
  const CheckpointPolicy plain{.interval = 40};
  kept.clear();
  for (std::int64_t position = 5; position <= 130; position += 5) note(plain, kept, position);
  EXPECT_EQ(kept, (Positions{40, 80, 120})) << "the control";
  EXPECT_EQ(most_replayed(kept, 99, 130), 39);
  kept.clear();
  note({}, kept, 1000);
  EXPECT_TRUE(kept.empty()) << "off";
}

/// Of another policy's: no more than one at each multiple, and none where none are kept.
TEST(CheckpointPolicy, OfManyTheFirstAtEachMultipleStays) {
  const Positions many = {3, 6, 9, 12, 15, 18, 21, 24, 27, 30};
  EXPECT_EQ(staying_checkpoints({.interval = 10}, many, 30), (Positions{12, 21, 30}));
  EXPECT_EQ(staying_checkpoints({.interval = 20, .near_interval = 10, .near_tokens = 10}, many, 31),
            (Positions{12, 21, 30}));
  EXPECT_EQ(staying_checkpoints({.interval = 20, .near_interval = 10, .near_tokens = 10}, many, 40),
            (Positions{21, 30}));
  EXPECT_TRUE(staying_checkpoints({}, many, 30).empty());
}

TEST(CheckpointPolicy, CountsOfTheUsualContext) {
  EXPECT_EQ(n_checkpoint(131072, {}), 0);
  EXPECT_EQ(n_checkpoint(131072, {.interval = 8192}), 16);
  EXPECT_EQ(n_checkpoint(131072, {.interval = 1024}), 128);
  EXPECT_EQ(n_checkpoint(131072, {.interval = 8192, .near_interval = 1024, .near_tokens = 20480}), 22 + 13);
}

TEST(CheckpointPolicy, RefusesWhatContradictsItself) {
  const auto refused = [](const CheckpointPolicy& policy, const std::vector<std::string>& parts) {
    return refuses([&] { validate(policy); }, parts);
  };
  EXPECT_NO_THROW(validate(CheckpointPolicy{}));
  EXPECT_NO_THROW(validate(CheckpointPolicy{.interval = 8, .near_interval = 8, .near_tokens = 8}));
  EXPECT_TRUE(refused({.interval = -1}, {"interval -1"}));
  EXPECT_TRUE(refused({.interval = 8, .near_interval = -2, .near_tokens = 8}, {"near interval -2"}));
  EXPECT_TRUE(refused({.interval = 8, .near_tokens = 5}, {"5 near tokens without"}));
  EXPECT_TRUE(refused({.interval = 8, .near_interval = 3, .near_tokens = 8}, {"near interval 3", "interval 8"}));
  EXPECT_TRUE(refused({.interval = 8, .near_interval = 16, .near_tokens = 16}, {"near interval 16", "interval 8"}));
  EXPECT_TRUE(refused({.near_interval = 16, .near_tokens = 16}, {"near interval 16", "interval 0"}));
  EXPECT_TRUE(refused({.interval = 8, .near_interval = 4, .near_tokens = 3}, {"3 near tokens", "near interval 4"}));
}

TEST(CheckpointPolicy, IsWrittenAsItIsRead) {
  using experiment::parse_checkpoints;
  const CheckpointPolicy near{.interval = 8192, .near_interval = 1024, .near_tokens = 20480};
  EXPECT_EQ(parse_checkpoints("8192"), (CheckpointPolicy{.interval = 8192}));
  EXPECT_EQ(parse_checkpoints("0"), CheckpointPolicy{});
  EXPECT_EQ(parse_checkpoints("8192,1024:20480"), near);
  for (const CheckpointPolicy& policy : {near, CheckpointPolicy{}, CheckpointPolicy{.interval = 7}}) {
    EXPECT_EQ(parse_checkpoints(to_string(policy)), policy);
  }
  const std::vector<std::pair<std::string, std::string>> wrong = {
      {"", "''"},
      {"-1", "'-1' is no whole number"},
      {"1e3", "'1e3'"},
      {"16777217", "from 0 to 16777216"},
      {"8192,", "no ':'"},
      {"8192,1024", "no ':'"},
      {"8192,1024:", "''"},
      {"8192,:20480", "''"},
      {"8192,0:20480", "every 0 tokens"},
      {"8192,1000:20480", "near interval 1000"},
      {"8192,1024:1000", "1000 near tokens"},
      {"0,1024:20480", "interval 0"},
      {"8192,1024:20480,512:2048", "'20480,512:2048'"},
  };
  for (const auto& [text, said] : wrong) {
    EXPECT_TRUE(
        refuses([&] { (void)parse_checkpoints(text); }, {"--checkpoints '" + text + "'", said, "8192,1024:20480"}))
        << text;
  }
}

}  // namespace

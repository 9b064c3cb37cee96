// SPDX-License-Identifier: Apache-2.0
#include "gemma4/draft/lookup.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <vector>

#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace {

using namespace gemma4;
using namespace gemma4::draft;
using Ids = std::vector<std::int32_t>;

/// The definition: every suffix at every place.
SuffixMatch searched(const Ids& ids, std::int64_t max_suffix = kMaxSuffix) {
  const auto size = static_cast<std::int64_t>(ids.size());
  for (std::int64_t length = std::min(max_suffix, size); length >= 1; --length) {
    for (std::int64_t end = size - 2; end >= length - 1; --end) {
      bool same = true;
      for (std::int64_t i = 0; i < length && same; ++i) {
        same = ids[static_cast<std::size_t>(end - i)] == ids[static_cast<std::size_t>(size - 1 - i)];
      }
      if (same) return {length, end};
    }
  }
  return {};
}

/// Few different tokens: long runs come again, and overlap.
Ids any_ids(int limit) {
  const auto vocab = *rc::gen::inRange<std::int32_t>(1, 7);
  return *rc::gen::container<Ids>(static_cast<std::size_t>(*rc::gen::inRange(1, limit)),
                                  rc::gen::inRange<std::int32_t>(0, vocab));
}

RC_GTEST_PROP(Lookup, FindsWhatASearchFinds, ()) {
  const Ids ids = any_ids(150);
  SuffixIndex index;
  Ids seen;
  for (const std::int32_t token : ids) {
    index.append(token);
    seen.push_back(token);
    RC_ASSERT(index.longest() == searched(seen));
  }
}

TEST(Lookup, ASearchForShorterSuffixesFindsAnother) {  // the control of the property above
  const Ids ids = {1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8};
  SuffixIndex index;
  for (const std::int32_t token : ids) index.append(token);
  EXPECT_EQ(index.longest(), (SuffixMatch{8, 7}));
  EXPECT_EQ(searched(ids), (SuffixMatch{8, 7}));
  EXPECT_NE(searched(ids, 1), index.longest()) << "the last token alone stood nearer";
}

/// Any tokens, some of them taken back, again and again: as if those had never been, in what it finds and what it
/// holds.
RC_GTEST_PROP(Lookup, WhatIsTakenBackNeverWas, ()) {
  SuffixIndex index;
  Ids kept;
  for (int round = 0; round < 4; ++round) {
    for (const std::int32_t token : any_ids(60)) {
      index.append(token);
      kept.push_back(token);
    }
    const auto n_back = *rc::gen::inRange<std::int64_t>(0, index.size() + 1);
    index.take_back(n_back);
    kept.resize(kept.size() - static_cast<std::size_t>(n_back));
    SuffixIndex fresh;
    for (const std::int32_t token : kept) fresh.append(token);
    RC_ASSERT(index.longest() == fresh.longest());
    RC_ASSERT(index.longest() == searched(kept));
    for (const std::int32_t token : any_ids(20)) {  // and goes on alike
      index.append(token);
      fresh.append(token);
      kept.push_back(token);
      RC_ASSERT(index.longest() == fresh.longest());
    }
  }
  const std::int64_t n_all = index.size();
  index.take_back(n_all);
  RC_ASSERT(index.longest() == SuffixMatch{});
  RC_ASSERT(index.bytes() <= static_cast<std::int64_t>(sizeof(std::int32_t)) * 4 * 8 * (n_all + 1000));
}

Ids proposed(LookupDrafter& drafter, const Ids& ids, std::int64_t n_draft) {
  Proposal proposal;
  drafter.propose(Request{.tokens = ids, .n_draft = n_draft}, proposal);
  EXPECT_FALSE(proposal.is_drawn());
  return proposal.tokens;
}

TEST(Lookup, ProposesWhatFollowedAndGoesOnWhereThatEnds) {
  LookupDrafter drafter;
  EXPECT_EQ(proposed(drafter, {5}, 4), Ids{}) << "a token that is new";
  EXPECT_EQ(proposed(drafter, {5, 6, 7, 8, 5}, 3), (Ids{6, 7, 8}));
  EXPECT_EQ(proposed(drafter, {5, 6, 7, 8, 5}, 7), (Ids{6, 7, 8, 5, 6, 7, 8})) << "it repeats itself";
  EXPECT_EQ(proposed(drafter, {5, 6, 7, 8, 5, 5}, 3), (Ids{5, 5, 5}));
  drafter.keep(4);
  EXPECT_EQ(proposed(drafter, {5, 6, 7, 8, 9}, 3), Ids{}) << "the fives at the end never were";
  EXPECT_EQ(proposed(drafter, {5, 6, 7, 8, 9, 7}, 3), (Ids{8, 9, 7}));
  drafter.keep(100);
  EXPECT_EQ(drafter.index().size(), 6);
}

TEST(Lookup, ASequenceThatDoesNotGoOnIsRefused) {
  LookupDrafter drafter;
  (void)proposed(drafter, {1, 2, 3}, 1);
  Proposal proposal;
  const Ids shorter = {1, 2}, other = {1, 2, 4, 5};
  EXPECT_TRUE(testkit::refuses([&] { drafter.propose(Request{.tokens = shorter}, proposal); },
                               {"2 tokens does not go on", "the 3 before", "keep()"}));
  EXPECT_TRUE(testkit::refuses([&] { drafter.propose(Request{.tokens = other}, proposal); }, {"4 tokens"}));
  SuffixIndex index;
  EXPECT_TRUE(testkit::refuses([&] { index.take_back(1); }, {"take back 1", "there are 0"}));
}

TEST(Lookup, ALongContextTakesTheBytesThatWereSaid) {
  constexpr std::int64_t kContext = 131072;
  SuffixIndex index;
  std::mt19937 random(3);
  for (std::int64_t i = 0; i < kContext; ++i) index.append(static_cast<std::int32_t>(random() % 262144));
  EXPECT_LE(index.bytes(), 260 * kContext);
  EXPECT_GE(index.bytes(), 100 * kContext) << "random tokens: nearly every run is new";
  // What was there at the beginning is found at the end.
  const Ids first(index.tokens().begin() + 5, index.tokens().begin() + 25);
  for (const std::int32_t token : first) index.append(token);
  EXPECT_EQ(index.longest(), (SuffixMatch{8, 24}));
  index.take_back(20);
  SuffixMatch before = index.longest();
  index.take_back(kMaxRewind);
  EXPECT_LE(before.length, 2);
  EXPECT_EQ(index.size(), kContext - kMaxRewind);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include "gemma4/session/sequence_store.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "gemma4/gguf/gguf_reader.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/temp_dir.hpp"
#include "tests/support/toy_session.hpp"

/// Sequences that are saved, restored, branched and taken back are those that were never interrupted, to the bit: on a
/// model of whole numbers (tests/support/toy_cache.hpp) whose every logit hangs on every byte that may be looked at.
namespace {

using namespace gemma4;
using testkit::rc_require;
using testkit::refuses;
using testkit::TempDir;
using testkit::toy_tokens;
using testkit::ToyOptions;
using testkit::ToySession;
using Ids = std::vector<std::int32_t>;

ToyOptions any_options() {
  ToyOptions options;
  options.is_sliding = *rc::gen::elementOf(std::vector<std::vector<std::uint8_t>>{{1, 0, 1}, {0}, {1}, {1, 1, 0, 0}});
  options.window = *rc::gen::inRange<std::int64_t>(1, 12);
  options.spare = *rc::gen::inRange<std::int64_t>(0, 6);
  options.n_head = *rc::gen::inRange<std::int64_t>(1, 3);
  options.record = *rc::gen::element<std::int64_t>(1, 4);
  options.tail = *rc::gen::weightedElement<std::int64_t>({{3, 0}, {1, 1}, {1, 9}});
  options.tile = *rc::gen::weightedElement<std::int64_t>({{3, 1}, {1, 8}});
  options.context = 160;
  return options;
}

CheckpointPolicy any_policy() {
  return *rc::gen::elementOf(std::vector<CheckpointPolicy>{{},
                                                           {.interval = 1},
                                                           {.interval = 7},
                                                           {.interval = 16},
                                                           {.interval = 64},
                                                           {.interval = 12, .near_interval = 3, .near_tokens = 20},
                                                           {.interval = 64, .near_interval = 8, .near_tokens = 40}});
}

Ids any_tokens(std::int64_t count) {
  return *rc::gen::container<Ids>(static_cast<std::size_t>(count),
                                  rc::gen::inRange<std::int32_t>(0, testkit::ToyCache::kVocab));
}

std::int64_t n_kept(const ToySession& session) {
  return static_cast<std::int64_t>(session.store.checkpoints().size());
}

Ids positions(const ToySession& session) {
  Ids at;
  for (const RingCheckpoint& kept : session.store.checkpoints()) at.push_back(static_cast<std::int32_t>(kept.position));
  return at;
}

/// What a fresh sequence gives after the tokens that `session` holds is what `session` gives.
void require_as_afresh(ToySession& session, const ToyOptions& options) {
  ToySession fresh(options);
  fresh.prefill(session.tokens, std::min<std::int64_t>(5, options.max_chunk));
  const auto room = options.context - static_cast<std::int64_t>(session.tokens.size());
  const Ids next = toy_tokens(std::min<std::int64_t>(room, 14), 4);
  const std::vector<float> expected = fresh.go_on(next);
  RC_ASSERT(session.go_on(next) == expected);
  RC_ASSERT(session.model.position() == fresh.model.position());
}

/// The same outside a property.
void require_same(ToySession& session, const ToyOptions& options) {
  ToySession fresh(options);
  fresh.prefill(session.tokens, 5);
  const Ids next = toy_tokens(14, 4);
  EXPECT_EQ(session.go_on(next), fresh.go_on(next));
}

/// Any of what a sequence may go through.
void any_step(ToySession& session, const ToyOptions& options, const TempDir& folder) {
  const auto held = static_cast<std::int64_t>(session.tokens.size());
  const std::int64_t room = options.context - held;
  switch (*rc::gen::inRange(0, 4)) {
    case 0:
      return session.prefill(any_tokens(*rc::gen::inRange<std::int64_t>(0, std::min<std::int64_t>(room, 60) + 1)),
                             *rc::gen::inRange<std::int64_t>(1, options.max_chunk + 1));
    case 1:
      session.go_on(any_tokens(*rc::gen::inRange<std::int64_t>(0, std::min<std::int64_t>(room, 20) + 1)));
      return;
    case 2:
      return session.rewind(*rc::gen::inRange<std::int64_t>(0, held + 1));
    default:
      session.save(folder.file("s"));
      session.prefill(any_tokens(std::min<std::int64_t>(room, 5)), 5);
      session.restore(SessionFile::open(folder.file("s")));
  }
}

RC_GTEST_PROP(SequenceStore, WhateverItWentThroughItIsWhatAFreshOneWouldBe, ()) {
  const ToyOptions options = any_options();
  const TempDir folder;
  ToySession session(options, any_policy());
  const int n_step = *rc::gen::inRange(1, 9);
  for (int i = 0; i < n_step; ++i) {
    any_step(session, options, folder);
    RC_ASSERT(n_kept(session) <= n_checkpoint(options.context, session.store.policy()));
  }
  require_as_afresh(session, options);
}

/// Into a larger context, other chunks, rings with more slots or fewer, with checkpoints or without.
RC_GTEST_PROP(SequenceStore, RestoredElsewhereItGoesOn, ()) {
  const ToyOptions options = any_options();
  const TempDir folder;
  ToySession session(options, any_policy());
  const int n_step = *rc::gen::inRange(1, 5);
  for (int i = 0; i < n_step; ++i) any_step(session, options, folder);
  session.save(folder.file("s"));
  ToyOptions other = options;
  other.context += *rc::gen::element<std::int64_t>(0, 1, 50);
  other.max_chunk = *rc::gen::element<std::int64_t>(1, 5, 16);
  other.spare = *rc::gen::inRange<std::int64_t>(0, 6);
  ToySession restored(other, any_policy());
  restored.prefill(any_tokens(5), 1);
  const SessionInfo info = restored.restore(SessionFile::open(folder.file("s")));
  RC_ASSERT(info.note == "as it was" && info.sampler.seed == 9u);
  RC_ASSERT(restored.tokens == session.tokens);
  if (!session.tokens.empty()) RC_ASSERT(restored.logits() == session.logits());
  RC_ASSERT(n_kept(restored) <= n_checkpoint(other.context, restored.store.policy()));
  if (*rc::gen::arbitrary<bool>()) {
    restored.rewind(*rc::gen::inRange<std::int64_t>(0, static_cast<std::int64_t>(restored.tokens.size()) + 1));
  }
  require_as_afresh(restored, other);
}

RC_GTEST_PROP(SequenceStore, BranchesShareNothing, ()) {
  const ToyOptions options = any_options();
  const TempDir folder;
  ToySession trunk(options, any_policy());
  const int n_step = *rc::gen::inRange(1, 5);
  for (int i = 0; i < n_step; ++i) any_step(trunk, options, folder);
  ToyOptions other = options;
  other.context += *rc::gen::element<std::int64_t>(0, 40);
  other.spare = *rc::gen::inRange<std::int64_t>(0, 6);
  ToySession branch(other, any_policy());
  branch.prefill(any_tokens(9), 3);
  const auto held = static_cast<std::int64_t>(trunk.tokens.size());
  const auto at = *rc::gen::inRange<std::int64_t>(0, held + 1);
  trunk.store.fork_to(branch.store, trunk.tokens, at);
  branch.tokens.assign(trunk.tokens.begin(), trunk.tokens.begin() + at);
  branch.backend.poison();
  RC_ASSERT(n_kept(branch) <= n_checkpoint(other.context, branch.store.policy()));
  // Each goes its own way, and neither sees the other's.
  const Ids left = any_tokens(std::min<std::int64_t>(6, options.context - held)), right = any_tokens(6);
  trunk.go_on(left);
  if (at + 6 <= other.context) branch.go_on(right);
  if (*rc::gen::arbitrary<bool>()) branch.rewind(*rc::gen::inRange<std::int64_t>(0, at + 1));
  require_as_afresh(branch, other);
  require_as_afresh(trunk, options);
}

/// Numbers that hang on the pass that a token came in, as rounding does: what is replayed comes in the passes of the
/// first time, so that the bits are those.
RC_GTEST_PROP(SequenceStore, ReplaysThePassesOfTheFirstTime, ()) {
  ToyOptions options = any_options();
  options.pass_shows = true;
  ToySession session(options, any_policy());
  std::vector<Ids> passes;
  const int n_pass = *rc::gen::inRange(1, 12);
  for (int i = 0; i < n_pass; ++i) {
    passes.push_back(any_tokens(*rc::gen::inRange<std::int64_t>(1, 12)));
    session.prefill(passes.back(), options.max_chunk);
  }
  const auto n_kept = *rc::gen::inRange<std::size_t>(0, passes.size() + 1);
  ToySession fresh(options, {});
  for (std::size_t i = 0; i < n_kept; ++i) fresh.prefill(passes[i], options.max_chunk);
  const std::int64_t to = fresh.model.position();
  session.rewind(to);
  RC_ASSERT(std::ranges::equal(session.model.passes(), fresh.model.passes()));
  const Ids next = toy_tokens(14, 4);
  RC_ASSERT(session.go_on(next) == fresh.go_on(next));
}

/// How much goes through the model again.
TEST(SequenceStore, ReplaysNothingWithinTheSpareSlotsAndFromACheckpointBeyond) {
  const ToyOptions options{.context = 400, .max_chunk = 10, .window = 8, .spare = 4};
  ToySession session(options, {.interval = 50});
  session.prefill(toy_tokens(300), 10);
  EXPECT_EQ(session.store.checkpoints().size(), 6u);
  const auto replayed = [&](std::int64_t to) {
    const std::int64_t before = session.backend.n_token();
    const std::int64_t said = session.store.n_replay(to);
    session.rewind(to);
    EXPECT_EQ(session.backend.n_token() - before, said);
    EXPECT_EQ(session.model.position(), to);
    return said;
  };
  EXPECT_EQ(replayed(300), 0);
  EXPECT_EQ(replayed(296), 0) << "as many back as there are spare slots";
  EXPECT_EQ(replayed(295), 45) << "one more, from the checkpoint at 250";
  EXPECT_EQ(replayed(294), 0) << "which brought the window of 291 and on";
  EXPECT_EQ(replayed(250), 0) << "a checkpoint itself";
  EXPECT_EQ(replayed(249), 0) << "a checkpoint holds the window before it";
  EXPECT_EQ(replayed(248), 48) << "241 is gone";
  EXPECT_EQ(replayed(7), 7) << "from the beginning";
  EXPECT_EQ(session.store.checkpoints().size(), 0u);
  session.prefill(toy_tokens(300), 10);
  EXPECT_EQ(replayed(0), 0);
}

/// Appended in any pieces and taken back by as much as the near zone has, or the token more that goes through the model
/// again for its logits: what is replayed is a near interval and a pass, and gives the bits of a fresh sequence.
RC_GTEST_PROP(SequenceStore, WithinTheNearZoneItReplaysANearIntervalAtMost, ()) {
  const ToyOptions options = any_options();
  const auto near = *rc::gen::inRange<std::int64_t>(1, 8);
  const CheckpointPolicy policy{.interval = near * *rc::gen::inRange<std::int64_t>(1, 8),
                                .near_interval = near,
                                .near_tokens = near + *rc::gen::inRange<std::int64_t>(0, 60)};
  ToySession session(options, policy);
  std::vector<Ids> passes;
  std::int64_t longest = 1;
  const int n_piece = *rc::gen::inRange(1, 25);
  for (int i = 0; i < n_piece && session.model.position() + 12 + 14 <= options.context; ++i) {
    passes.push_back(any_tokens(*rc::gen::inRange<std::int64_t>(1, 13)));
    longest = std::max(longest, std::ssize(passes.back()));
    session.prefill(passes.back(), options.max_chunk);
    RC_ASSERT(n_kept(session) <= n_checkpoint(session.model.position(), policy));
  }
  const std::int64_t held = session.model.position();
  const std::int64_t to = std::max<std::int64_t>(0, held - *rc::gen::inRange<std::int64_t>(0, policy.near_tokens + 2));
  const std::int64_t before = session.backend.n_token();
  session.rewind(to);
  const std::int64_t n_replayed = session.backend.n_token() - before;
  RC_ASSERT(n_replayed <= near + longest - 2);
  RC_ASSERT(n_kept(session) <= n_checkpoint(held, policy));
  ToySession fresh(options, {});
  for (Ids& pass : passes) {
    pass.resize(std::min(pass.size(), static_cast<std::size_t>(to - fresh.model.position())));
    fresh.prefill(pass, options.max_chunk);
  }
  const Ids next = toy_tokens(14, 4);
  RC_ASSERT(session.go_on(next) == fresh.go_on(next));
}

/// Going back takes the near zone along: before it there are far ones alone, and what is replayed leaves near ones.
TEST(SequenceStore, BehindTheNearZoneTheFarOnesAloneAreThere) {
  const ToyOptions options{.context = 400, .max_chunk = 10, .window = 8, .spare = 4};
  const CheckpointPolicy near{.interval = 50, .near_interval = 10, .near_tokens = 60};
  ToySession session(options, near), plain(options, {.interval = 50});
  session.prefill(toy_tokens(300), 10);
  plain.prefill(toy_tokens(300), 10);
  EXPECT_EQ(positions(session), (Ids{50, 100, 150, 200, 230, 240, 250, 260, 270, 280, 290, 300}));
  EXPECT_EQ(n_checkpoint(300, near), 8 + 4);
  EXPECT_EQ(session.store.n_replay(249), 9);
  EXPECT_EQ(plain.store.n_replay(249), 49) << "the control: without a near zone";
  EXPECT_EQ(session.store.n_replay(239), 9) << "a token more than the zone";
  EXPECT_EQ(session.store.n_replay(229), 29) << "before it";
  session.rewind(249);
  EXPECT_EQ(positions(session), (Ids{50, 100, 150, 200, 230, 240}));
  EXPECT_EQ(session.store.n_replay(199), 49) << "once more, by what would have been near";
  session.rewind(199);
  EXPECT_EQ(positions(session), (Ids{50, 100, 150, 160, 170, 180, 190})) << "left by the replay";
  EXPECT_EQ(session.store.n_replay(189), 9);
  require_same(session, options);
}

/// By the policy of whoever takes over: what would not stay there is not even read.
TEST(SequenceStore, AFileAndABranchKeepWhatTheirOwnPolicyWants) {
  const ToyOptions options{.context = 400, .max_chunk = 10, .window = 8, .spare = 4};
  const CheckpointPolicy near{.interval = 50, .near_interval = 10, .near_tokens = 20};
  const TempDir folder;
  ToySession session(options, near);
  session.prefill(toy_tokens(200), 10);
  session.save(folder.file("s"));
  const SessionFile file = SessionFile::open(folder.file("s"));
  EXPECT_EQ(file.info().checkpoint_policy, near);
  EXPECT_TRUE(GgufFile::open(folder.file("s")).has("session.checkpoint_near_interval"));
  ToySession(options).save(folder.file("plain"));
  EXPECT_FALSE(GgufFile::open(folder.file("plain")).has("session.checkpoint_near_interval")) << "as files were before";
  for (const CheckpointPolicy& policy :
       {near, CheckpointPolicy{.interval = 100},
        CheckpointPolicy{.interval = 20, .near_interval = 20, .near_tokens = 20}, CheckpointPolicy{}}) {
    ToySession restored(options, policy), branch(options, policy);
    EXPECT_EQ(restored.restore(file).checkpoint_policy, near) << "what the file says";
    EXPECT_EQ(restored.store.policy(), policy) << "what the sequence does";
    session.store.fork_to(branch.store, session.tokens, 200);
    branch.tokens = session.tokens;
    EXPECT_EQ(positions(restored), positions(branch));
    EXPECT_EQ(positions(restored), policy == near           ? (Ids{50, 100, 150, 170, 180, 190, 200})
                                   : policy.interval == 100 ? (Ids{100, 200})
                                   : policy.interval == 20  ? (Ids{50, 100, 150, 170, 180, 200})
                                                            : Ids{});
    restored.rewind(185);
    branch.rewind(185);
    require_same(restored, options);
    require_same(branch, options);
  }
}

/// Chunks that do not divide the interval: a checkpoint falls due behind the pass that comes to a multiple.
TEST(SequenceStore, CheckpointsAreTakenBehindThePassThatReachesAMultiple) {
  ToySession session({.context = 200, .max_chunk = 16}, {.interval = 20});
  session.prefill(toy_tokens(100), 7);
  std::vector<std::int64_t> at;
  for (const RingCheckpoint& kept : session.store.checkpoints()) at.push_back(kept.position);
  EXPECT_EQ(at, (std::vector<std::int64_t>{21, 42, 63, 84, 100}));
  const std::size_t bytes = 2 * 2 * 8 * 8;  // two rings, two heads, a window of 8 rows of 8 bytes
  for (const RingCheckpoint& kept : session.store.checkpoints()) EXPECT_EQ(kept.bytes.size(), bytes);
  ToySession full({.is_sliding = {0}, .context = 200}, {.interval = 20});
  full.prefill(toy_tokens(100), 7);
  EXPECT_TRUE(full.store.checkpoints().empty()) << "a model without rings forgets nothing";
  EXPECT_EQ(full.store.n_replay(3), 0);
}

/// A model that goes back by itself, as drafting makes it: a checkpoint of what never was is none.
TEST(SequenceStore, ForgetsCheckpointsThatTheModelWentBackBehind) {
  const ToyOptions options{.context = 200, .max_chunk = 16, .window = 8, .spare = 8};
  ToySession session(options, {.interval = 20}), fresh(options, {.interval = 20});
  session.prefill(toy_tokens(41), 16);
  ASSERT_EQ(session.store.checkpoints().size(), 2u);
  EXPECT_EQ(session.store.checkpoints().back().position, 41);
  session.model.rewind(3);
  session.backend.set_position(38, 41);
  session.tokens.resize(38);
  (void)session.go_on(toy_tokens(9, 6));
  EXPECT_EQ(session.store.checkpoints().back().position, 40) << "of the tokens that came in place of them";
  session.prefill(toy_tokens(50, 2), 16);
  session.rewind(45);
  fresh.prefill(session.tokens, 16);
  EXPECT_EQ(session.go_on(toy_tokens(9)), fresh.go_on(toy_tokens(9)));
}

/// The control of all: with one byte of a ring, of a checkpoint or of a full layer spoiled, what follows differs.
TEST(SequenceStore, OneWrongByteShows) {
  const ToyOptions options{.context = 100, .window = 8, .spare = 0};
  for (const std::size_t layer : {std::size_t{0}, std::size_t{1}}) {
    ToySession session(options), fresh(options);
    session.prefill(toy_tokens(40), 5);
    fresh.prefill(toy_tokens(40), 5);
    session.backend.stored_layers()[layer].parts[0].data[8 * 39 % 64] ^= std::byte{1};
    EXPECT_NE(session.go_on(toy_tokens(3)), fresh.go_on(toy_tokens(3))) << layer;
  }
}

TEST(SequenceStore, RefusesWhatCannotBe) {
  ToySession session({.context = 60}), small({.context = 10}), other({.context = 60, .cache = parse_cache_spec("tq4")});
  ToySession heads({.context = 60, .n_head = 1});
  session.prefill(toy_tokens(30), 5);
  const Ids few = toy_tokens(10);
  EXPECT_TRUE(refuses([&] { session.store.rewind(session.tokens, 31); }, {"back to 31", "is at 30"}));
  EXPECT_TRUE(refuses([&] { session.store.rewind(session.tokens, -1); }, {"back to -1"}));
  EXPECT_TRUE(refuses([&] { session.store.rewind(few, 11); }, {"back to 11", "10 of its tokens"}));
  EXPECT_TRUE(
      refuses([&] { session.store.fork_to(small.store, session.tokens, 11); }, {"fork at 11", "context is 10"}));
  EXPECT_TRUE(refuses([&] { session.store.fork_to(other.store, session.tokens, 11); }, {"'bf16'", "'tq4'"}));
  EXPECT_TRUE(refuses([&] { session.store.fork_to(heads.store, session.tokens, 11); }, {"'rows'"}));
  EXPECT_TRUE(refuses([&] { session.store.save("/nowhere/s", {.tokens = few}); }, {"10 tokens to save", "hold 30"}));
  EXPECT_TRUE(refuses([&] { SequenceStore<testkit::ToyCache>(session.model, {.interval = -1}); }, {"interval -1"}));
  EXPECT_TRUE(refuses([&] { SequenceStore<testkit::ToyCache>(session.model, {.interval = 8, .near_interval = 5}); },
                      {"near interval 5", "interval 8"}));
}

}  // namespace

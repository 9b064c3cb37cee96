// SPDX-License-Identifier: Apache-2.0
#include "gemma4/session/sequence_store.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

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

Ids any_tokens(std::int64_t count) {
  return *rc::gen::container<Ids>(static_cast<std::size_t>(count),
                                  rc::gen::inRange<std::int32_t>(0, testkit::ToyCache::kVocab));
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
  ToySession session(options, *rc::gen::element<std::int64_t>(0, 1, 7, 16, 64));
  const int n_step = *rc::gen::inRange(1, 9);
  for (int i = 0; i < n_step; ++i) any_step(session, options, folder);
  require_as_afresh(session, options);
}

/// Into a larger context, other chunks, rings with more slots or fewer, with checkpoints or without.
RC_GTEST_PROP(SequenceStore, RestoredElsewhereItGoesOn, ()) {
  const ToyOptions options = any_options();
  const TempDir folder;
  ToySession session(options, *rc::gen::element<std::int64_t>(0, 7, 16));
  const int n_step = *rc::gen::inRange(1, 5);
  for (int i = 0; i < n_step; ++i) any_step(session, options, folder);
  session.save(folder.file("s"));
  ToyOptions other = options;
  other.context += *rc::gen::element<std::int64_t>(0, 1, 50);
  other.max_chunk = *rc::gen::element<std::int64_t>(1, 5, 16);
  other.spare = *rc::gen::inRange<std::int64_t>(0, 6);
  ToySession restored(other, *rc::gen::element<std::int64_t>(0, 7, 16));
  restored.prefill(any_tokens(5), 1);
  const SessionInfo info = restored.restore(SessionFile::open(folder.file("s")));
  RC_ASSERT(info.note == "as it was" && info.sampler.seed == 9u);
  RC_ASSERT(restored.tokens == session.tokens);
  if (!session.tokens.empty()) RC_ASSERT(restored.logits() == session.logits());
  if (*rc::gen::arbitrary<bool>()) {
    restored.rewind(*rc::gen::inRange<std::int64_t>(0, static_cast<std::int64_t>(restored.tokens.size()) + 1));
  }
  require_as_afresh(restored, other);
}

RC_GTEST_PROP(SequenceStore, BranchesShareNothing, ()) {
  const ToyOptions options = any_options();
  const TempDir folder;
  ToySession trunk(options, *rc::gen::element<std::int64_t>(0, 7, 16));
  const int n_step = *rc::gen::inRange(1, 5);
  for (int i = 0; i < n_step; ++i) any_step(trunk, options, folder);
  ToyOptions other = options;
  other.context += *rc::gen::element<std::int64_t>(0, 40);
  other.spare = *rc::gen::inRange<std::int64_t>(0, 6);
  ToySession branch(other, *rc::gen::element<std::int64_t>(0, 7));
  branch.prefill(any_tokens(9), 3);
  const auto held = static_cast<std::int64_t>(trunk.tokens.size());
  const auto at = *rc::gen::inRange<std::int64_t>(0, held + 1);
  trunk.store.fork_to(branch.store, trunk.tokens, at);
  branch.tokens.assign(trunk.tokens.begin(), trunk.tokens.begin() + at);
  branch.backend.poison();
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
  ToySession session(options, *rc::gen::element<std::int64_t>(0, 7, 16));
  std::vector<Ids> passes;
  const int n_pass = *rc::gen::inRange(1, 12);
  for (int i = 0; i < n_pass; ++i) {
    passes.push_back(any_tokens(*rc::gen::inRange<std::int64_t>(1, 12)));
    session.prefill(passes.back(), options.max_chunk);
  }
  const auto n_kept = *rc::gen::inRange<std::size_t>(0, passes.size() + 1);
  ToySession fresh(options, 0);
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
  ToySession session(options, 50);
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

/// Chunks that do not divide the interval: a checkpoint falls due behind the pass that comes to a multiple.
TEST(SequenceStore, CheckpointsAreTakenBehindThePassThatReachesAMultiple) {
  ToySession session({.context = 200, .max_chunk = 16}, 20);
  session.prefill(toy_tokens(100), 7);
  std::vector<std::int64_t> at;
  for (const RingCheckpoint& kept : session.store.checkpoints()) at.push_back(kept.position);
  EXPECT_EQ(at, (std::vector<std::int64_t>{21, 42, 63, 84, 100}));
  const std::size_t bytes = 2 * 2 * 8 * 8;  // two rings, two heads, a window of 8 rows of 8 bytes
  for (const RingCheckpoint& kept : session.store.checkpoints()) EXPECT_EQ(kept.bytes.size(), bytes);
  ToySession full({.is_sliding = {0}, .context = 200}, 20);
  full.prefill(toy_tokens(100), 7);
  EXPECT_TRUE(full.store.checkpoints().empty()) << "a model without rings forgets nothing";
  EXPECT_EQ(full.store.n_replay(3), 0);
}

/// A model that goes back by itself, as drafting makes it: a checkpoint of what never was is none.
TEST(SequenceStore, ForgetsCheckpointsThatTheModelWentBackBehind) {
  const ToyOptions options{.context = 200, .max_chunk = 16, .window = 8, .spare = 8};
  ToySession session(options, 20), fresh(options, 20);
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
  EXPECT_TRUE(refuses([&] { SequenceStore<testkit::ToyCache>(session.model, -1); }, {"interval -1"}));
}

}  // namespace

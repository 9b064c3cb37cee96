// SPDX-License-Identifier: Apache-2.0
#include "experiments/support/host_sequence.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "experiments/support/decode_setting.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/small_model.hpp"
#include "tests/support/temp_dir.hpp"

/// The reference's sequence: however a text came to be held, it goes on as if it had been read at once. Short chunks,
/// so that the same numbers are computed either way.
namespace {

using namespace gemma4;
using namespace gemma4::experiment;
using testkit::SmallModel;
using Ids = std::vector<std::int32_t>;

/// One of a few: windows that go round, and one that does not.
const SmallModel& any_small() {
  static const auto models = [] {
    std::vector<std::unique_ptr<SmallModel>> made;
    for (const std::int64_t window : {1, 7, 32, 200}) {
      ModelConfig config = gemma4_tiny();
      config.context = 4096;
      config.window = window;
      config.vocab = 300;
      config.ffn_hidden = 256;
      config.is_sliding = {1, 0};
      made.push_back(std::make_unique<SmallModel>(config, 10));
    }
    return made;
  }();
  return *models[*rc::gen::inRange<std::size_t>(0, models.size())];
}

reference::BackendOptions small_options() {
  return {.cache = parse_cache_spec("bf16"), .context = 200, .max_chunk = 8};
}

SamplerSettings any_settings() {
  return {.temperature = *rc::gen::element(0.0f, 1.5f), .seed = 7};
}

/// Drafted or not: the text is the same. Fresh sequences, which it is held against, draft nothing.
DraftSettings any_drafting() {
  return *rc::gen::element(
      DraftSettings{}, DraftSettings{.drafter = "lookup"}, DraftSettings{.drafter = "lookup", .n_draft = 1},
      DraftSettings{.drafter = "lookup", .n_draft = 3}, DraftSettings{.drafter = "lookup", .n_draft = 7});
}

/// Few different tokens, so that lookup has what to propose.
Ids any_read(int count) {
  return *rc::gen::container<Ids>(static_cast<std::size_t>(count), rc::gen::inRange<std::int32_t>(20, 26));
}

Ids written(Sequence& sequence, std::int64_t n_token, const SamplerSettings& settings, std::int64_t stop_after = 1000) {
  Ids ids;
  sequence.decode(n_token, settings, [&](std::int32_t token) {
    ids.push_back(token);
    return static_cast<std::int64_t>(ids.size()) < stop_after;
  });
  return ids;
}

/// What a fresh sequence writes after the tokens that `sequence` holds is what `sequence` writes.
void expect_as_afresh(const SmallModel& small, Sequence& sequence, const SamplerSettings& settings) {
  const Ids held(sequence.held().begin(), sequence.held().end());
  ReferenceSequence fresh(small.weights, small_options());
  fresh.prefill(held, 1, {});
  const Ids expected = written(fresh, 6, settings);
  RC_ASSERT(written(sequence, 6, settings) == expected);
  RC_ASSERT(Ids(sequence.held().begin(), sequence.held().end()) == Ids(fresh.held().begin(), fresh.held().end()));
}

RC_GTEST_PROP(Sequence, HoldsWhatWasReadAndWritten, ()) {
  const SmallModel& small = any_small();
  const SamplerSettings settings = any_settings();
  ReferenceSequence sequence(small.weights, small_options(), any_drafting());
  Ids expected;
  for (int step = 0; step < 3; ++step) {
    const Ids read = any_read(*rc::gen::inRange(1, 20));
    sequence.prefill(read, 1, {});
    expected.insert(expected.end(), read.begin(), read.end());
    const Ids wrote = written(sequence, 12, settings, *rc::gen::inRange(1, 15));
    expected.insert(expected.end(), wrote.begin(), wrote.end());
    RC_ASSERT(Ids(sequence.held().begin(), sequence.held().end()) == expected);
  }
  expect_as_afresh(small, sequence, settings);
}

RC_GTEST_PROP(Sequence, WhatIsTakenBackNeverWas, ()) {
  const SmallModel& small = any_small();
  const SamplerSettings settings = any_settings();
  ReferenceSequence sequence(small.weights, small_options(), any_drafting());
  sequence.prefill(any_read(*rc::gen::inRange(2, 50)), 1, {});
  if (*rc::gen::arbitrary<bool>()) (void)written(sequence, 5, settings);
  const std::int64_t n_back = *rc::gen::inRange<std::int64_t>(0, sequence.max_back() + 1);
  sequence.take_back(n_back);
  if (sequence.held().empty() || *rc::gen::arbitrary<bool>()) {
    sequence.prefill(any_read(30), 1, {});
  }
  expect_as_afresh(small, sequence, settings);
}

RC_GTEST_PROP(Sequence, APromptThatWasInterruptedIsHeldAsFarAsItWasRead, ()) {
  const SmallModel& small = any_small();
  const SamplerSettings settings = any_settings();
  ReferenceSequence sequence(small.weights, small_options(), any_drafting());
  sequence.prefill(any_read(10), 1, {});
  if (*rc::gen::arbitrary<bool>()) (void)written(sequence, 5, settings);
  const auto before = static_cast<std::int64_t>(sequence.held().size());
  const std::int64_t n_read = *rc::gen::inRange<std::int64_t>(1, 20);
  const auto stop = [&](std::int64_t done) {
    if (done >= n_read) throw std::runtime_error("stop");
  };
  RC_ASSERT_THROWS_AS(sequence.prefill(any_read(20), 1, stop), std::runtime_error);
  RC_ASSERT(static_cast<std::int64_t>(sequence.held().size()) == before + n_read);
  sequence.prefill(any_read(1), 1, {});
  expect_as_afresh(small, sequence, settings);
}

/// With checkpoints: whatever was held, a prompt that shares a beginning with it is read from there on.
RC_GTEST_PROP(Sequence, ReadsWhatDiffersAlone, ()) {
  const SmallModel& small = any_small();
  const SamplerSettings settings = any_settings();
  ReferenceSequence sequence(small.weights, small_options(), {},
                             *rc::gen::elementOf(std::vector<CheckpointPolicy>{{.interval = 16}, {24, 4, 30}}));
  const testkit::TempDir folder;
  const Ids prompt = testkit::any_tokens(small.weights.config, *rc::gen::inRange(1, 90));
  sequence.prefill(prompt, 8, {});
  (void)written(sequence, 5, settings);
  if (*rc::gen::arbitrary<bool>()) {
    sequence.save(folder.file("s"), {.sampler = settings});
    sequence.reset();
    sequence.restore(SessionFile::open(folder.file("s")), 0);
  }
  const Ids held(sequence.held().begin(), sequence.held().end());
  Ids wanted = held;
  wanted.resize(*rc::gen::inRange<std::size_t>(0, held.size() + 1));
  const std::size_t n_same = wanted.size();
  const Ids more = testkit::any_tokens(small.weights.config, *rc::gen::inRange(1, 30));
  wanted.insert(wanted.end(), more.begin(), more.end());
  const Stretch took = read_rest(sequence, wanted, 8, {});
  RC_ASSERT(Ids(sequence.held().begin(), sequence.held().end()) == wanted);
  RC_ASSERT(took.n_token <= static_cast<std::int64_t>(wanted.size() - n_same));
  ReferenceSequence fresh(small.weights, small_options());
  fresh.prefill(wanted, 8, {});
  RC_ASSERT(written(sequence, 4, settings) == written(fresh, 4, settings));
}

/// A stop in the middle of a step, and an error out of on_token: the sequence ends there, and goes on from there.
RC_GTEST_PROP(Sequence, AStepThatIsEndedInItsMiddleIsHeldAsFarAsItWasSeen, ()) {
  const SmallModel& small = any_small();
  ReferenceSequence sequence(small.weights, small_options(), {.drafter = "lookup", .n_draft = 5});
  sequence.prefill(Ids(20, 33), 1, {});
  (void)written(sequence, 20, {});
  const std::size_t before = sequence.held().size();
  const auto n_seen = *rc::gen::inRange<std::size_t>(1, 12);
  const bool throws = *rc::gen::arbitrary<bool>();
  std::size_t n = 0;
  const auto stop = [&](std::int32_t /*token*/) {
    if (++n < n_seen) return true;
    if (throws) throw std::runtime_error("stop");
    return false;
  };
  try {
    sequence.decode(30, {}, stop);
    RC_ASSERT(!throws);
  } catch (const std::runtime_error&) {
    RC_ASSERT(throws);
  }
  RC_ASSERT(sequence.held().size() == before + n_seen);
  expect_as_afresh(small, sequence, {});
}

TEST(Sequence, DraftsAreCountedAndDrafterAndCacheChecked) {
  const SmallModel small(gemma4_tiny(), 4);
  ReferenceSequence plain(small.weights, small_options());
  EXPECT_FALSE(plain.draft_counts().has_value());
  ReferenceSequence sequence(small.weights, small_options(), {.drafter = "lookup", .n_draft = 3});
  sequence.prefill(Ids(50, 1), 8, {});
  (void)written(sequence, 40, {});
  const draft::Counts counts = sequence.draft_counts().value();
  EXPECT_EQ(counts.n_token, 39) << "the first is chosen from the prompt's logits";
  EXPECT_GE(counts.drafted[0], counts.drafted[2]);
  EXPECT_GE(counts.accepted[0], counts.accepted[2]);
  EXPECT_EQ(counts.drafted[3], 0);
  const auto made = [&](const char* drafter, const char* cache) {
    reference::BackendOptions options = small_options();
    options.cache = parse_cache_spec(cache);
    ReferenceSequence of(small.weights, options, {.drafter = drafter});
  };
  EXPECT_NO_THROW(made("lookup", "sim-int8"));
  EXPECT_TRUE(testkit::refuses([&] { made("lookup", "sim-int8-tail16"); }, {"--drafter lookup", "sim-int8-tail16"}));
  EXPECT_NO_THROW(made("none", "sim-int8-tail16"));
  EXPECT_TRUE(testkit::refuses([&] { made("drafter.gguf", "bf16"); },
                               {"--drafter drafter.gguf", "lookup, none or the GGUF file"}));
  EXPECT_EQ(parse_n_draft("auto"), std::nullopt);
  EXPECT_EQ(parse_n_draft("7"), 7);
  for (const char* bad : {"0", "8", "3x", "", "-1"}) {
    EXPECT_TRUE(testkit::refuses([&] { (void)parse_n_draft(bad); }, {"--draft", "1 to 7"})) << bad;
  }
}

TEST(Sequence, NoMoreIsTakenBackThanTheRingsRemember) {
  const SmallModel small(gemma4_tiny(), 4);
  ReferenceSequence sequence(small.weights, small_options());
  sequence.prefill(Ids(100, 1), 8, {});
  EXPECT_EQ(sequence.max_back(), kMaxRewind - 1);
  EXPECT_TRUE(testkit::refuses([&] { sequence.take_back(64); }, {"take back 64", "at most 63"}));
  (void)written(sequence, 5, {});
  EXPECT_EQ(sequence.max_back(), kMaxRewind) << "the last one has not been through the model";
  sequence.take_back(64);
  EXPECT_EQ(sequence.held().size(), 41U);
  EXPECT_EQ(sequence.max_back(), 1) << "counted from the farthest that the sequence has been";
  sequence.prefill(Ids(64, 1), 8, {});
  EXPECT_TRUE(testkit::refuses([&] { (void)written(sequence, 96, {}); }, {"96 tokens after 105", "200"}));
  EXPECT_EQ(written(sequence, 95, {}).size(), 95U);
  EXPECT_EQ(sequence.n_free(), 0);
}

/// Counts what goes through the model.
struct CountingBackend : reference::Backend<float> {
  using reference::Backend<float>::Backend;
  void embed(std::span<const std::int32_t> tokens, std::int64_t position) {
    n_token += static_cast<std::int64_t>(tokens.size());
    reference::Backend<float>::embed(tokens, position);
  }
  std::int64_t n_token = 0;
};

/// A long text, an answer, a file, another sequence: the next turn costs its own tokens, and one that the answer left;
/// a prompt that parts from what is held costs at most what is behind the checkpoint before that.
TEST(Sequence, ATurnAfterALongTextReadsItsOwnTokensAlone) {
  const SmallModel small(gemma4_tiny(), 4);
  const testkit::TempDir folder;
  const auto make = [&](CountingBackend*& counter) {
    auto backend = std::make_unique<CountingBackend>(small.weights, small_options());
    counter = backend.get();
    return std::make_unique<HostSequence<CountingBackend>>(std::move(backend), parse_cache_spec("bf16"),
                                                           DraftSettings{}, CheckpointPolicy{.interval = 32});
  };
  CountingBackend *first_counter = nullptr, *counter = nullptr;
  const auto first = make(first_counter), second = make(counter);
  first->prefill(Ids(140, 5), 8, {});
  (void)written(*first, 9, {});
  first->save(folder.file("s"), {});
  EXPECT_GE(first_counter->n_token, 148) << "the control: it counts";
  second->restore(SessionFile::open(folder.file("s")), 0);
  EXPECT_EQ(counter->n_token, 0) << "restoring reads nothing";
  Ids wanted(second->held().begin(), second->held().end());
  wanted.insert(wanted.end(), {7, 8, 9, 10, 11});
  EXPECT_EQ(read_rest(*second, wanted, 8, {}).n_token, 5);
  EXPECT_EQ(counter->n_token, 6);
  counter->n_token = 0;
  wanted.resize(45);
  wanted.insert(wanted.end(), 20, 12);
  read_rest(*second, wanted, 8, {});
  EXPECT_LE(counter->n_token, 20 + 45 - 32) << "from the checkpoint at 32 on";
  EXPECT_EQ(Ids(second->held().begin(), second->held().end()), wanted);
}

/// By as much as the near zone has: of the text a near interval is read again, and not what the far copies are apart.
TEST(Sequence, TakenBackWithinTheNearZoneItReadsANearIntervalAtMost) {
  const SmallModel small(gemma4_tiny(), 4);
  const auto most_read = [&](const CheckpointPolicy& policy) {
    auto backend = std::make_unique<CountingBackend>(small.weights, small_options());
    const CountingBackend& counter = *backend;
    HostSequence<CountingBackend> sequence(std::move(backend), parse_cache_spec("bf16"), DraftSettings{}, policy);
    sequence.prefill(Ids(190, 5), 8, {});
    std::int64_t most = 0;
    for (const std::int64_t n : {std::int64_t{75}, std::int64_t{79}, std::int64_t{80}}) {
      const std::int64_t before = counter.n_token;
      sequence.take_back(n);
      most = std::max(most, counter.n_token - before);
      sequence.prefill(Ids(static_cast<std::size_t>(n), 5), 8, {});
    }
    return most;
  };
  EXPECT_LE(most_read({.interval = 64, .near_interval = 8, .near_tokens = 80}), 8 + 8 - 2);
  EXPECT_GT(most_read({.interval = 64}), 40) << "the control: far ones alone";
}

/// Ways to continue, as experiments/settings.cpp takes them.
TEST(DecodeSetting, SaysWhatItWasGiven) {
  const DecodeSetting greedy = parse_decode_setting("greedy", 7);
  EXPECT_EQ(greedy.sampler.temperature, 0.0f);
  EXPECT_EQ(greedy.sampler.seed, 7u);
  EXPECT_FALSE(greedy.is_drafted);
  const DecodeSetting all = parse_decode_setting("temperature=0.5+top-k=40+top-p=0.9+seed=3+draft=5+off=graph", 7);
  EXPECT_EQ(all.name, "temperature=0.5+top-k=40+top-p=0.9+seed=3+draft=5+off=graph");
  EXPECT_EQ(all.sampler.temperature, 0.5f);
  EXPECT_EQ(all.sampler.top_k, 40);
  EXPECT_EQ(all.sampler.top_p, 0.9f);
  EXPECT_EQ(all.sampler.seed, 3u);
  EXPECT_TRUE(all.is_drafted);
  EXPECT_EQ(all.n_draft, 5);
  EXPECT_EQ(all.off, std::vector<std::string>{"graph"});
  EXPECT_EQ(parse_decode_setting("draft=auto", 0).n_draft, std::nullopt);
  EXPECT_TRUE(parse_decode_setting("draft=auto", 0).is_drafted);
  const std::vector<std::pair<std::string, std::string>> wrong = {{"", "'' is not understood"},
                                                                  {"hot", "'hot' is not understood"},
                                                                  {"greedy+seed=1", "'greedy'"},
                                                                  {"temperature=", "need a number"},
                                                                  {"temperature=-1", "temperature -1"},
                                                                  {"top-k=1.5", "top-k is '1.5'"},
                                                                  {"top-p=0", "top_p 0"},
                                                                  {"draft=8", "--draft 8"},
                                                                  {"off=everything", "everything"},
                                                                  {"seed=1+", "'' is not understood"},
                                                                  {"temperature=nan", "need a number"}};
  for (const auto& [text, word] : wrong) {
    EXPECT_TRUE(testkit::refuses([&] { (void)parse_decode_setting(text, 0); }, {word})) << text;
  }
}

}  // namespace

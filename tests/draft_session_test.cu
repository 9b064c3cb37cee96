// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/session.cuh"
#include "gemma4/gguf/gguf_reader.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/session_case.cuh"
#include "tests/support/small_model.hpp"
#include "tests/support/temp_dir.hpp"

/// Steps that draft on the device: the text, the logits and the caches are those of plain steps, bit for bit, whatever
/// is drafted.
namespace {

using namespace gemma4;
using testkit::any_config;
using testkit::any_settings;
using testkit::any_tokens;
using testkit::next_logits;
using testkit::SmallModel;

const std::filesystem::path kData = GEMMA4_TEST_DATA;

cuda::BackendOptions options_with(const std::string& cache, std::int64_t max_draft, std::int64_t context = 256,
                                  bool sliding_rows = true) {
  return {.cache = parse_cache_spec(cache),
          .context = context,
          .max_chunk = 64,
          .max_draft = max_draft,
          .sliding_rows = sliding_rows};
}

/// Whether two sequences have the same tokens, and the same bits of what would be next.
testing::AssertionResult same(const cuda::Session& drafting, const cuda::Session& plain) {
  const auto found = drafting.tokens(), expected = plain.tokens();
  const auto [at, other] = std::ranges::mismatch(found, expected);
  if (at != found.end() || other != expected.end()) {
    return testing::AssertionFailure() << "texts of " << found.size() << " and " << expected.size()
                                       << " tokens differ from token " << at - found.begin() << " on";
  }
  const std::vector<float> logits = next_logits(drafting), others = next_logits(plain);
  std::size_t n_different = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) n_different += logits[i] == others[i] ? 0 : 1;
  if (n_different == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure() << n_different << " of " << logits.size() << " logits differ behind "
                                     << found.size() << " equal tokens, the first " << logits[0] << " and "
                                     << others[0];
}

/// The true tokens by position, some of them replaced by others.
std::vector<std::int32_t> spoiled(std::span<const std::int32_t> truth, std::int64_t size, unsigned percent,
                                  std::uint64_t seed, std::int64_t vocab) {
  std::mt19937_64 random(seed);
  std::vector<std::int32_t> script(truth.begin(), truth.end());
  script.resize(static_cast<std::size_t>(size), 0);
  for (std::int32_t& token : script) {
    if (random() % 100 < percent) token = static_cast<std::int32_t>((static_cast<std::int64_t>(token) + 1) % vocab);
  }
  return script;
}

/// What steps of `n_draft` drafts by a script make of a text that is known to be `truth`.
draft::Counts by_hand(std::span<const std::int32_t> truth, const std::vector<std::int32_t>& script, std::int64_t first,
                      std::int64_t n_draft) {
  draft::Counts counts;
  for (std::int64_t at = first; at < static_cast<std::int64_t>(truth.size());) {
    std::int64_t n_accepted = 0;
    const auto agrees = [&](std::int64_t place) {
      return place < static_cast<std::int64_t>(truth.size()) &&
             truth[static_cast<std::size_t>(place)] == script[static_cast<std::size_t>(place)];
    };
    while (n_accepted < n_draft && agrees(at + 1 + n_accepted)) ++n_accepted;
    counts.add(n_draft, n_accepted);
    at += n_accepted + 1;
  }
  return counts;
}

RC_GTEST_PROP(DraftSession, TheTextIsThatOfPlainStepsWhateverIsDrafted, ()) {
  const SmallModel small(any_config(), *rc::gen::inRange<std::uint64_t>(0, 1000));
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const std::string cache = *rc::gen::element<std::string>("tq4", "bf16", "kv5r4", "kv4r4");
  const std::int64_t n_draft = *rc::gen::inRange<std::int64_t>(1, draft::kMaxDrafts + 1);
  cuda::Backend plain_backend(packed, options_with(cache, 0));
  cuda::Backend backend(packed,
                        options_with(cache, n_draft, 256, *rc::gen::weightedElement<bool>({{3, true}, {1, false}})));
  cuda::Session plain(plain_backend);
  cuda::Session drafting(
      backend,
      {.use_graph = *rc::gen::arbitrary<bool>(), .lag = *rc::gen::inRange<std::int64_t>(1, 6), .n_draft = n_draft});
  const auto prompt = any_tokens(small.weights.config, *rc::gen::inRange(1, 80));
  const SamplerSettings settings = any_settings();
  const std::int64_t n_token = *rc::gen::inRange<std::int64_t>(1, 100);
  plain.prefill(prompt, 64);
  plain.decode(n_token, settings);
  const std::vector<std::int32_t> script =
      spoiled(plain.tokens(), 256 + draft::kMaxDrafts, *rc::gen::element(0u, 20u, 60u, 100u),
              *rc::gen::arbitrary<std::uint64_t>(), small.weights.config.vocab);
  const cuda::DeviceBuffer<std::int32_t> on_device(script);
  const bool by_lookup = *rc::gen::weightedElement<bool>({{1, true}, {3, false}});
  backend.drafting().set_script(by_lookup ? nullptr : on_device.data());
  drafting.prefill(prompt, 64);
  const cuda::DecodeResult result = drafting.decode(n_token, settings);
  RC_ASSERT(static_cast<std::int64_t>(result.tokens.size()) == n_token && !result.stopped);
  testkit::rc_require(same(drafting, plain));
  plain.decode(20, settings);  // and so it goes on
  drafting.decode(20, settings);
  testkit::rc_require(same(drafting, plain));
}

TEST(DraftSession, AcceptanceIsWhatACountByHandSays) {
  const SmallModel small(gemma4_tiny(), 4);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  cuda::Backend plain_backend(packed, options_with("tq4", 0)), backend(packed, options_with("tq4", 3));
  cuda::Session plain(plain_backend), drafting(backend, {.lag = 1, .n_draft = 3});
  const std::vector<std::int32_t> prompt(30, 5);
  plain.prefill(prompt, 64);
  plain.decode(120, {});
  cuda::DeviceBuffer<std::int32_t> on_device(300);
  backend.drafting().set_script(on_device.data());
  for (const unsigned percent : {0u, 30u, 100u}) {
    const std::vector<std::int32_t> script = spoiled(plain.tokens(), 300, percent, 3, small.weights.config.vocab);
    on_device.from_host(script);  // where the recorded step reads it
    cuda::check(cudaDeviceSynchronize(), "wait for the script");
    drafting.reset();
    drafting.prefill(prompt, 64);
    const draft::Counts found = drafting.decode(100, {}).drafts;
    // The last lag + 1 = 2 steps draft fewer than 3, so that up to 2 x (3 + 1) tokens come otherwise.
    const draft::Counts hand = by_hand(plain.tokens().first(130), script, 30, 3);
    EXPECT_NEAR(static_cast<double>(found.n_step), static_cast<double>(hand.n_step), 8) << percent;
    if (percent == 0) EXPECT_GT(found.tokens_per_step(), 3.0) << "the control of the next line";
    if (percent == 100) EXPECT_EQ(found.tokens_per_step(), 1.0);
    for (std::size_t place = 0; place < 3; ++place) {
      EXPECT_NEAR(static_cast<double>(found.accepted[place]), static_cast<double>(hand.accepted[place]), 8)
          << percent << " % wrong, place " << place;
    }
  }
}

RC_GTEST_PROP(DraftSession, WhatIsStoppedInTheMiddleOfAStepIsTakenBackExactly, ()) {
  const SmallModel small(any_config(), 8);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const std::string cache = *rc::gen::element<std::string>("tq4", "bf16", "kv5r4", "kv4r4");
  cuda::Backend plain_backend(packed, options_with(cache, 0)), backend(packed, options_with(cache, 7));
  cuda::Session plain(plain_backend);
  cuda::Session drafting(backend, {.n_draft = *rc::gen::inRange<std::int64_t>(1, 8)});
  const SamplerSettings settings = any_settings();
  const auto prompt = any_tokens(small.weights.config, 50), more = any_tokens(small.weights.config, 20);
  const std::int64_t n_stop = *rc::gen::inRange<std::int64_t>(1, 80);
  plain.prefill(prompt, 64);
  plain.decode(100, settings);
  const cuda::DeviceBuffer<std::int32_t> script(
      spoiled(plain.tokens(), 256 + draft::kMaxDrafts, 20, 5, small.weights.config.vocab));
  plain.reset();
  plain.prefill(prompt, 64);
  plain.decode(n_stop, settings);
  backend.drafting().set_script(script.data());
  drafting.prefill(prompt, 64);
  std::int64_t n_seen = 0;
  const cuda::DecodeResult result = drafting.decode(100, settings, [&](std::int32_t) { return ++n_seen < n_stop; });
  RC_ASSERT(result.stopped && static_cast<std::int64_t>(result.tokens.size()) == n_stop);
  testkit::rc_require(same(drafting, plain));
  plain.prefill(more, 64);  // a chunk looks back over the window
  drafting.prefill(more, 64);
  testkit::rc_require(same(drafting, plain));
}

TEST(DraftSession, WorksUpToTheLastPositionOfTheContext) {
  const SmallModel small(gemma4_tiny(), 4);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  cuda::Backend plain_backend(packed, options_with("tq4", 0, 96)), backend(packed, options_with("tq4", 7, 96));
  cuda::Session plain(plain_backend), drafting(backend, {.n_draft = 7});
  const std::vector<std::int32_t> prompt(60, 5);
  for (cuda::Session* session : {&plain, &drafting}) {
    session->prefill(prompt, 64);
    session->decode(36, {});
    EXPECT_EQ(session->position(), 96);
  }
  EXPECT_TRUE(same(drafting, plain));
}

/// The text is right whatever is drafted: that lookup walks through all of it shows in what is accepted.
TEST(DraftSession, ARestoredTextIsLookedThrough) {
  const SmallModel small(gemma4_tiny(), 4);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  cuda::Backend backend(packed, options_with("tq4", 3)), other(packed, options_with("tq4", 3));
  cuda::Session session(backend, {.lag = 1, .n_draft = 3}), restored(other, {.lag = 1, .n_draft = 3});
  std::vector<std::int32_t> prompt;
  for (std::int32_t i = 0; i < 60; ++i) prompt.push_back(static_cast<std::int32_t>(i % 20));
  const testkit::TempDir folder;
  session.prefill(prompt, 64);
  session.save(folder.file("s"), {.model_hash = 5});
  const draft::Counts expected = session.decode(60, {}).drafts;
  restored.prefill(std::vector<std::int32_t>(50, 900), 64);  // another text lies there
  restored.restore(SessionFile::open(folder.file("s")), 5);
  const draft::Counts found = restored.decode(60, {}).drafts;
  EXPECT_TRUE(same(restored, session));
  EXPECT_GT(expected.drafted[0], 0) << "the control: something is proposed";
  EXPECT_EQ(found.n_step, expected.n_step);
  EXPECT_EQ(found.drafted, expected.drafted);
  EXPECT_EQ(found.accepted, expected.accepted);
}

/// What the tests above have run by.
TEST(DraftSession, ThePlanOfAVerifiedChunkSaysHowItsRowsGoThroughRings) {
  const SmallModel small(gemma4_tiny(), 4);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  for (const bool at_once : {true, false}) {
    const cuda::Backend backend(packed, options_with("tq4", 3, 256, at_once));
    const bool takes = at_once && cuda::current_device().compute_capability >= 90;
    const StepPlan plan = backend.verify_plan(3);
    const auto row = std::ranges::find(plan.rows, "attention_sliding", &StepPlanRow::component);
    ASSERT_NE(row, plan.rows.end());
    EXPECT_EQ(row->path.find("4 rows at once") != std::string::npos, takes) << row->path;
    EXPECT_EQ(row->path.find("4 rows one by one") != std::string::npos, !takes) << row->path;
    EXPECT_EQ(row->why.empty(), takes) << row->why;
  }
}

TEST(DraftSession, RefusesMoreThanTheBackendKeepsRoomFor) {
  const SmallModel small(gemma4_tiny(), 4);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  EXPECT_TRUE(testkit::refuses([&] { cuda::Backend(packed, options_with("tq4", 8)); }, {"max_draft 8", "0 to 7"}));
  cuda::Backend backend(packed, options_with("tq4", 3));
  EXPECT_TRUE(testkit::refuses([&] { cuda::Session(backend, {.n_draft = 4}); }, {"4 drafts a step", "max_draft 3"}));
  EXPECT_TRUE(testkit::refuses([&] { cuda::Session(backend, {.lag = 30, .n_draft = 3}); }, {"fewer than 64"}));
}

TEST(DraftSession, TwentyThousandTokensOfATrainedModelAreThoseOfPlainSteps) {
  const GgufFile file = GgufFile::open(kData / "nano/nano-Q4_K_M.gguf");
  const cuda::PackedModel packed = cuda::load_model(file);
  for (const std::string cache : {"bf16", "tq4", "kv5r4"}) {
    std::vector<std::int32_t> texts[2];
    for (const std::int64_t n_draft : {0, 3}) {
      cuda::Backend backend(packed, options_with(cache, n_draft, 8192));
      cuda::Session session(backend, {.n_draft = n_draft});
      std::mt19937 random(17);
      std::vector<std::int32_t>& text = texts[n_draft > 0 ? 1 : 0];
      for (int part = 0; part < 10; ++part) {
        session.reset();
        std::vector<std::int32_t> prompt(20 + random() % 200);
        for (std::int32_t& token : prompt) token = static_cast<std::int32_t>(random() % 4096);
        session.prefill(prompt, 64);
        session.decode(2000, {.temperature = part % 2 == 0 ? 0.0f : 0.8f, .seed = 5});
        text.insert(text.end(), session.tokens().begin(), session.tokens().end());
      }
    }
    EXPECT_EQ(texts[0], texts[1]) << cache;
  }
}

}  // namespace

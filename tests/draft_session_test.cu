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
#include "reference/assistant_check.hpp"
#include "tests/support/draft_case.cuh"
#include "tests/support/model_logits.hpp"
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
using testkit::by_hand;
using testkit::draft_options;
using testkit::DraftedModel;
using testkit::Drafts;
using testkit::drafts_of;
using testkit::same;
using testkit::SmallModel;
using testkit::spoiled;

const std::filesystem::path kData = GEMMA4_TEST_DATA;

RC_GTEST_PROP(DraftSession, TheTextIsThatOfPlainStepsWhateverIsDrafted, ()) {
  const SmallModel small(any_config(), *rc::gen::inRange<std::uint64_t>(0, 1000));
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const std::string cache = *rc::gen::element<std::string>("tq4", "bf16", "kv5r4", "kv4r4");
  const std::int64_t n_draft = *rc::gen::inRange<std::int64_t>(1, draft::kMaxDrafts + 1);
  cuda::Backend plain_backend(packed, draft_options(cache, 0));
  cuda::Backend backend(packed,
                        draft_options(cache, n_draft, 256, *rc::gen::weightedElement<bool>({{3, true}, {1, false}})));
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
  cuda::Backend plain_backend(packed, draft_options("tq4", 0)), backend(packed, draft_options("tq4", 3));
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
  cuda::Backend plain_backend(packed, draft_options(cache, 0)), backend(packed, draft_options(cache, 7));
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
  cuda::Backend plain_backend(packed, draft_options("tq4", 0, 96)), backend(packed, draft_options("tq4", 7, 96));
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
  cuda::Backend backend(packed, draft_options("tq4", 3)), other(packed, draft_options("tq4", 3));
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

/// Each answer's rule begins anew, and knows what the steps of those before took. The control: before the first step.
TEST(DraftSession, WhatStepsCostIsKnownToTheNextAnswer) {
  const SmallModel small(gemma4_tiny(), 4);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  cuda::Backend backend(packed, draft_options("tq4", 3));
  cuda::Session session(backend, {.lag = 1});
  const auto unknown = draft::StepCosts::unmeasured(0).verify;
  EXPECT_EQ(session.step_costs().verify, unknown);
  session.prefill(any_tokens(small.weights.config, 30), 64);
  for (const std::int64_t n_draft : {0, 2}) {
    session.set_drafts(n_draft);
    (void)session.decode(30, {});
  }
  session.set_drafts(3, true);
  EXPECT_NE(session.step_costs().verify, unknown);
}

/// What the tests above have run by.
TEST(DraftSession, ThePlanOfAVerifiedChunkSaysHowItsRowsGoThroughRings) {
  const SmallModel small(gemma4_tiny(), 4);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  for (const bool at_once : {true, false}) {
    const cuda::Backend backend(packed, draft_options("tq4", 3, 256, at_once));
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
  EXPECT_TRUE(testkit::refuses([&] { cuda::Backend(packed, draft_options("tq4", 8)); }, {"max_draft 8", "0 to 7"}));
  cuda::Backend backend(packed, draft_options("tq4", 3));
  EXPECT_TRUE(testkit::refuses([&] { cuda::Session(backend, {.n_draft = 4}); }, {"4 drafts a step", "max_draft 3"}));
  EXPECT_TRUE(testkit::refuses([&] { cuda::Session(backend, {.lag = 30, .n_draft = 3}); }, {"fewer than 64"}));
}

TEST(DraftSession, TwentyThousandTokensOfATrainedModelAreThoseOfPlainSteps) {
  const GgufFile file = GgufFile::open(kData / "nano/nano-Q4_K_M.gguf");
  const cuda::PackedModel packed = cuda::load_model(file);
  for (const std::string cache : {"bf16", "tq4", "kv5r4"}) {
    std::vector<std::int32_t> texts[2];
    for (const std::int64_t n_draft : {0, 3}) {
      cuda::Backend backend(packed, draft_options(cache, n_draft, 8192));
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

// ---- a drafter that is a model

/// A structure that a drafter can be made for: a window of 1 is empty without the query's own key. Often so short a
/// window that a key more or less is seen.
ModelConfig any_drafted_config() {
  ModelConfig config = any_config();
  config.window = *rc::gen::element<std::int64_t>(2, 3, 5, std::max<std::int64_t>(config.window, 2));
  return config;
}

/// Acceptance figure: agreed, not derived. How roundings of 8 bits grow in nano's twelve layers and four chained steps
/// has no bound that would say anything; it lies above twice the worst row that was measured when it was set (0.0085 of
/// its length). Queries that are turned by one position too few are off by 0.03 in the first case.
constexpr double kGoldenLength = 0.02;

TEST(DraftAssistant, ProposesTheGoldenTokensFromTheGoldenLogits) {
  const GgufFile file = GgufFile::open(kData / "nano/nano-Q4_K_M.gguf");
  const cuda::PackedModel packed = cuda::load_model(file);
  const cuda::PackedAssistant assistant =
      cuda::load_assistant(GgufFile::open(kData / "nano-assistant/nano-assistant-Q8_0.gguf"), packed.config());
  const reference::GoldenDrafts golden =
      reference::read_golden_drafts(kData / "nano-assistant/nano-assistant-golden.gguf");
  const auto n_id = static_cast<std::int64_t>(golden.ids.size());
  cuda::Backend backend(packed, {.cache = Bf16Format{}, .context = n_id, .max_draft = 4, .assistant = &assistant});
  cuda::Session session(backend);
  for (std::size_t i = 0; i < golden.count(); ++i) {
    const std::int64_t position = golden.positions[i];
    session.prefill(std::span(golden.ids)
                        .subspan(static_cast<std::size_t>(session.position()),
                                 static_cast<std::size_t>(position + 1 - session.position())),
                    512);
    const std::int32_t next = golden.ids[static_cast<std::size_t>(position) + 1];
    const Drafts drafts = drafts_of(backend, golden.n_step, next);
    EXPECT_EQ(drafts.tokens[0], next);
    std::vector<float> expected;
    for (std::int64_t step = 0; step < golden.n_step; ++step) {
      EXPECT_EQ(drafts.tokens[static_cast<std::size_t>(step) + 1], golden.draft_of(i, step))
          << "behind " << position << ", step " << step;
      const auto row = golden.logits_of(i, step);
      expected.insert(expected.end(), row.begin(), row.end());
    }
    EXPECT_TRUE(testkit::rows_close(drafts.logits, expected, golden.vocab, kGoldenLength)) << "behind " << position;
  }
}

RC_GTEST_PROP(DraftAssistant, LogitsAreNearThoseOfTheReferenceAndTheLikeliestIsProposed, ()) {
  const DraftedModel model(any_drafted_config(), *rc::gen::inRange<std::uint64_t>(0, 1000), *rc::gen::element(1, 2));
  const std::string cache = *rc::gen::element<std::string>("bf16", "tq4", "kv5r4", "kv16r16", "sim-int8");
  const std::int64_t n_draft = *rc::gen::inRange<std::int64_t>(1, draft::kMaxDrafts + 1);
  const auto tokens = any_tokens(model.small.weights.config, *rc::gen::inRange(1, *rc::gen::element(5, 120)));
  const auto n_token = static_cast<std::int64_t>(tokens.size());
  cuda::Backend backend(model.packed, draft_options(cache, n_draft, 256, true, &model.assistant));
  cuda::Session session(backend);
  session.prefill(tokens, 64);
  const Drafts drafts = drafts_of(backend, n_draft);
  reference::Backend<float> target(model.small.weights,
                                   {.cache = parse_cache_spec(cache), .context = 256, .max_chunk = 64});
  Model<reference::Backend<float>> host(target);
  host.prefill(tokens, 64, [](std::int64_t) {});
  const AssistantWeights weights = assistant_weights_from_gguf(*model.drafter.file, target.config());
  const reference::Assistant<float> drafter(weights, target);
  reference::Matrix<float> hidden = target.hidden();
  // The target's logits may be off by kRounding of tests/backend_test.cu, and so its keys; the drafter has as many
  // layers again. Compressed keys are off by as much more as is said there.
  const double bound = (cache == "bf16" ? 1 : 3.5) * 2 * 0.10;
  const auto vocab = static_cast<std::size_t>(target.config().vocab);
  for (std::size_t i = 0; i < static_cast<std::size_t>(n_draft); ++i) {
    const auto row = std::span(drafts.logits).subspan(i * vocab, vocab);
    RC_ASSERT(drafts.tokens[i + 1] == std::ranges::max_element(row) - row.begin());
    const auto out = drafter.step(drafts.tokens[i], hidden, n_token);
    testkit::rc_require(testkit::rows_close(row, std::span(out.logits.data(), vocab), target.config().vocab, bound));
    hidden = out.hidden;
  }
}

RC_GTEST_PROP(DraftAssistant, RejectedTokensLeaveNoTraceInWhatIsDraftedBehindThem, ()) {
  const DraftedModel model(any_drafted_config(), *rc::gen::inRange<std::uint64_t>(0, 1000));
  const std::string cache = *rc::gen::element<std::string>("bf16", "tq4", "kv5r4");
  const std::int64_t n_draft = *rc::gen::inRange<std::int64_t>(1, draft::kMaxDrafts + 1);
  const auto options = draft_options(cache, n_draft, 256, true, &model.assistant);
  cuda::Backend plain_backend(model.packed, options), backend(model.packed, options);
  cuda::Session plain(plain_backend), drafting(backend, {.n_draft = n_draft});
  const auto prompt = any_tokens(model.small.weights.config, *rc::gen::inRange(1, 80));
  const std::int64_t n_token = *rc::gen::inRange<std::int64_t>(1, 60);
  for (cuda::Session* session : {&plain, &drafting}) session->prefill(prompt, 64);
  plain.decode(n_token, {});
  const cuda::DeviceBuffer<std::int32_t> script(spoiled(
      plain.tokens(), 256 + draft::kMaxDrafts, *rc::gen::element(0u, 30u, 100u), 5, plain_backend.config().vocab));
  backend.drafting().set_script(script.data());
  drafting.decode(n_token, {});
  backend.drafting().set_script(nullptr);
  testkit::rc_require(same(drafting, plain));
  const Drafts found = drafts_of(backend, n_draft), expected = drafts_of(plain_backend, n_draft);
  RC_ASSERT(found == expected);
  plain.reset();  // the control: another text behind the same token
  plain.prefill(std::vector<std::int32_t>(prompt.size() + 3, prompt.front()), 64);
  RC_ASSERT(drafts_of(plain_backend, n_draft, expected.tokens[0]).logits != expected.logits);
}

RC_GTEST_PROP(DraftAssistant, TheTextIsThatOfPlainStepsAndAReplayDraftsAsALaunchDoes, ()) {
  const DraftedModel model(any_drafted_config(), *rc::gen::inRange<std::uint64_t>(0, 1000));
  const std::string cache = *rc::gen::element<std::string>("tq4", "kv5r4", "bf16");
  const std::int64_t n_draft = *rc::gen::inRange<std::int64_t>(1, draft::kMaxDrafts + 1);
  const auto options = draft_options(cache, n_draft, 256, true, &model.assistant);
  cuda::Backend plain_backend(model.packed, draft_options(cache, 0)), backend(model.packed, options);
  cuda::Backend eager_backend(model.packed, options);
  cuda::Session plain(plain_backend), drafting(backend, {.n_draft = n_draft});
  cuda::Session eager(eager_backend, {.use_graph = false, .n_draft = n_draft});
  const auto prompt = any_tokens(model.small.weights.config, *rc::gen::inRange(1, 80));
  const SamplerSettings settings = any_settings();
  const std::int64_t n_token = *rc::gen::inRange<std::int64_t>(1, 60);
  for (cuda::Session* session : {&plain, &drafting, &eager}) session->prefill(prompt, 64);
  plain.decode(n_token, settings);
  const draft::Counts counts = drafting.decode(n_token, settings).drafts;
  const draft::Counts expected = eager.decode(n_token, settings).drafts;
  testkit::rc_require(same(drafting, plain));
  testkit::rc_require(same(eager, plain));
  RC_ASSERT(counts.n_step == expected.n_step && counts.accepted == expected.accepted);
  RC_ASSERT(drafts_of(backend, n_draft) == drafts_of(eager_backend, n_draft));
}

TEST(DraftAssistant, ARestoredSequenceIsDraftedForAsItWasBefore) {
  const DraftedModel model(gemma4_tiny());
  const auto options = draft_options("tq4", 3, 256, true, &model.assistant);
  cuda::Backend backend(model.packed, options), other(model.packed, options);
  cuda::Session session(backend, {.n_draft = 3}), restored(other, {.n_draft = 3});
  const testkit::TempDir folder;
  session.prefill(std::vector<std::int32_t>(40, 5), 64);
  session.decode(5, {});
  session.save(folder.file("s"), {.model_hash = 5});
  restored.prefill(std::vector<std::int32_t>(50, 900), 64);  // another state lies there
  restored.restore(SessionFile::open(folder.file("s")), 5);
  EXPECT_TRUE(same(restored, session));
  EXPECT_EQ(drafts_of(other, 3), drafts_of(backend, 3));
}

TEST(DraftAssistant, LookupBesideItIsLookup) {
  const DraftedModel model(gemma4_tiny());
  cuda::Backend backend(model.packed, draft_options("tq4", 3, 256, true, &model.assistant));
  cuda::Backend other(model.packed, draft_options("tq4", 3));
  cuda::Session session(backend, {.lag = 1, .n_draft = 3}), lookup(other, {.lag = 1, .n_draft = 3});
  for (cuda::Session* one : {&session, &lookup}) one->prefill(std::vector<std::int32_t>(40, 5), 64);
  const std::int64_t by_assistant = session.decode(20, {}).drafts.n_step;
  EXPECT_GT(backend.drafting().cost(), 0);
  backend.drafting().use_lookup(true);
  EXPECT_EQ(backend.drafting().cost(), 0);
  session.set_drafts(3);
  EXPECT_NE(lookup.decode(20, {}).drafts.n_step, by_assistant) << "the control: they draft otherwise";
  const draft::Counts found = session.decode(20, {}).drafts, expected = lookup.decode(20, {}).drafts;
  EXPECT_EQ(found.n_step, expected.n_step);
  EXPECT_EQ(found.accepted, expected.accepted);
  EXPECT_TRUE(same(session, lookup));
}

TEST(DraftAssistant, TakesWhatIsPlannedAndRefusesWhatDoesNotSuit) {
  const DraftedModel model(gemma4_tiny());
  const auto options = draft_options("tq4", 3, 256, true, &model.assistant);
  const cuda::Backend backend(model.packed, options), plain(model.packed, draft_options("tq4", 3));
  const MemoryPlan& plan = backend.plan();
  EXPECT_EQ(model.packed.bytes() + model.assistant.bytes() + backend.device_bytes(),
            plan.total_bytes() - plan.bytes("cuda_context"));
  EXPECT_EQ(backend.device_bytes() - plain.device_bytes(),
            plan.bytes("drafter_logits") + plan.bytes("drafter_activations"));
  EXPECT_EQ(model.assistant.bytes(), plan.bytes("drafter_weights"));
  const auto refused = [&](const cuda::BackendOptions& wrong, std::vector<std::string> words) {
    return testkit::refuses([&] { cuda::Backend(model.packed, wrong); }, words);
  };
  EXPECT_TRUE(refused(draft_options("tq4", 0, 256, true, &model.assistant), {"max_draft 0"}));
  EXPECT_TRUE(refused(draft_options("sim-int8-tail8", 3, 256, true, &model.assistant), {"sim-int8-tail8"}));
  ModelConfig wider = gemma4_tiny();
  wider.hidden *= 2;
  const DraftedModel other(wider);
  EXPECT_THROW(cuda::Backend(model.packed, draft_options("tq4", 3, 256, true, &other.assistant)), FormatError);
}

TEST(DraftAssistant, TextOfATrainedModelIsThatOfPlainStepsInHalfAsMany) {
  const GgufFile file = GgufFile::open(kData / "nano/nano-Q4_K_M.gguf");
  const cuda::PackedModel packed = cuda::load_model(file);
  const cuda::PackedAssistant assistant =
      cuda::load_assistant(GgufFile::open(kData / "nano-assistant/nano-assistant-Q8_0.gguf"), packed.config());
  const std::vector<std::int32_t> ids =
      reference::read_golden_drafts(kData / "nano-assistant/nano-assistant-golden.gguf").ids;
  for (const std::string cache : {"kv5r4", "tq4", "bf16"}) {
    cuda::Backend plain_backend(packed, draft_options(cache, 0, 2048));
    cuda::Backend backend(packed, draft_options(cache, 3, 2048, true, &assistant));
    cuda::Session plain(plain_backend), drafting(backend, {.n_draft = 3});
    for (const auto& [n_prompt, n_token] : {std::pair{30, 40}, std::pair{570, 1000}}) {
      for (cuda::Session* session : {&plain, &drafting}) {
        session->reset();
        session->prefill(std::span(ids).first(static_cast<std::size_t>(n_prompt)), 64);
      }
      plain.decode(n_token, {});
      const draft::Counts counts = drafting.decode(n_token, {}).drafts;
      EXPECT_TRUE(same(drafting, plain)) << cache << " behind " << n_prompt;
      EXPECT_LT(2 * counts.n_step, n_token) << cache << " behind " << n_prompt;
    }
  }
}

}  // namespace

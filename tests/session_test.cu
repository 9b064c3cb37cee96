// SPDX-License-Identifier: Apache-2.0
#include "cuda/session.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device/allocation_count.cuh"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/session/sequence_store.hpp"
#include "reference/backend.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/session_case.cuh"
#include "tests/support/small_model.hpp"
#include "tests/support/temp_dir.hpp"

/// Decoding on the device: a replayed step has the bits of a launched one, and calls that follow one another those of
/// one call, however they are cut, stopped and taken back.
namespace {

using namespace gemma4;
using testkit::any_config;
using testkit::any_settings;
using testkit::any_tokens;
using testkit::next_logits;
using testkit::Outcome;
using testkit::outcome;
using testkit::small_config;
using testkit::small_options;
using testkit::SmallModel;

const std::filesystem::path kData = GEMMA4_TEST_DATA;

RC_GTEST_PROP(Session, AReplayedStepHasTheBitsOfALaunchedOne, ()) {
  const SmallModel small(any_config(), *rc::gen::inRange<std::uint64_t>(0, 1000));
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const cuda::BackendOptions options = small_options(*rc::gen::element<std::string>("tq4", "bf16"));
  cuda::Backend graph_backend(packed, options), eager_backend(packed, options);
  cuda::Session graph(graph_backend, {.use_graph = true, .lag = *rc::gen::inRange<std::int64_t>(1, 10)});
  cuda::Session eager(eager_backend, {.use_graph = false});
  const auto prompt = any_tokens(small.weights.config, *rc::gen::inRange(1, 80));
  const SamplerSettings settings = any_settings();
  const std::int64_t n_token = *rc::gen::inRange<std::int64_t>(1, 100);
  for (cuda::Session* session : {&graph, &eager}) {
    session->prefill(prompt, 64);
    const cuda::DecodeResult result = session->decode(n_token, settings);
    RC_ASSERT(static_cast<std::int64_t>(result.tokens.size()) == n_token && !result.stopped);
    RC_ASSERT(session->position() == static_cast<std::int64_t>(prompt.size()) + n_token);
  }
  RC_ASSERT(graph.n_graph_node() > 0 && eager.n_graph_node() == 0);
  RC_ASSERT(outcome(graph) == outcome(eager));
}

TEST(Session, AnotherPositionOrSeedGivesOtherBits) {  // the control of the property above
  const SmallModel small(small_config(), 4);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  cuda::Backend backend(packed, small_options("tq4"));
  cuda::Session session(backend);
  const auto run = [&](std::int64_t n_prompt, std::uint64_t seed) {
    session.reset();
    session.prefill(std::vector<std::int32_t>(static_cast<std::size_t>(n_prompt), 8), 64);
    session.decode(30, {.temperature = 1.5f, .seed = seed});
    return next_logits(session);
  };
  const std::vector<float> first = run(20, 1);
  EXPECT_EQ(run(20, 1), first);
  EXPECT_NE(run(21, 1), first);
  EXPECT_NE(run(20, 2), first);
}

RC_GTEST_PROP(Session, ContinuingIsGoingOnInOne, ()) {
  const SmallModel small(any_config(), 6);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const cuda::BackendOptions options = small_options(*rc::gen::element<std::string>("tq4", "bf16"));
  cuda::Backend one_backend(packed, options), cut_backend(packed, options);
  cuda::Session one(one_backend), cut(cut_backend);
  const SamplerSettings settings = any_settings();
  const auto prompt = any_tokens(small.weights.config, 40), more = any_tokens(small.weights.config, 20);
  one.prefill(prompt, 64);
  one.decode(60, settings);
  one.prefill(more, 64);
  one.decode(20, settings);
  cut.prefill(prompt, 64);
  for (std::int64_t left = 60; left > 0;) {
    const std::int64_t some = *rc::gen::inRange<std::int64_t>(1, left + 1);
    cut.decode(some, settings);
    left -= some;
  }
  cut.prefill(more, 64);
  cut.decode(20, settings);
  RC_ASSERT(outcome(cut) == outcome(one));
}

RC_GTEST_PROP(Session, WhatIsStoppedIsTakenBackExactly, ()) {
  const SmallModel small(any_config(), 8);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const cuda::BackendOptions options = small_options(*rc::gen::element<std::string>("tq4", "bf16"));
  cuda::Backend one_backend(packed, options), stopped_backend(packed, options);
  cuda::Session one(one_backend);
  cuda::Session stopped(stopped_backend, {.lag = *rc::gen::inRange<std::int64_t>(1, 64)});
  const SamplerSettings settings = any_settings();
  const auto prompt = any_tokens(small.weights.config, 50), more = any_tokens(small.weights.config, 20);
  const std::int64_t n_stop = *rc::gen::inRange<std::int64_t>(1, 80);
  one.prefill(prompt, 64);
  one.decode(n_stop, settings);
  stopped.prefill(prompt, 64);
  std::int64_t n_seen = 0;
  const cuda::DecodeResult result = stopped.decode(100, settings, [&](std::int32_t) { return ++n_seen < n_stop; });
  RC_ASSERT(result.stopped && static_cast<std::int64_t>(result.tokens.size()) == n_stop);
  RC_ASSERT(outcome(stopped) == outcome(one));
  one.decode(30, settings);
  stopped.decode(30, settings);
  RC_ASSERT(outcome(stopped) == outcome(one));
  one.prefill(more, 64);  // a chunk looks back over the window
  stopped.prefill(more, 64);
  RC_ASSERT(outcome(stopped) == outcome(one));
}

RC_GTEST_PROP(Session, ARewoundSequenceGoesOnAsIfItHadNeverBeenLonger, ()) {
  const SmallModel small(any_config(), 10);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const cuda::BackendOptions options = small_options(*rc::gen::element<std::string>("tq4", "bf16"));
  cuda::Backend one_backend(packed, options), other_backend(packed, options);
  cuda::Session one(one_backend), other(other_backend);
  const SamplerSettings settings = any_settings();
  const auto prompt = any_tokens(small.weights.config, 50), more = any_tokens(small.weights.config, 40);
  for (cuda::Session* session : {&one, &other}) {
    session->prefill(prompt, 64);
    session->decode(20, settings);
  }
  const std::int64_t n_further = *rc::gen::inRange<std::int64_t>(1, 64);
  other.decode(n_further, {.temperature = 2.0f, .seed = 99});
  other.rewind(n_further);
  RC_ASSERT(outcome(other) == outcome(one));
  one.decode(10, settings);
  other.decode(10, settings);
  one.prefill(more, 64);
  other.prefill(more, 64);
  RC_ASSERT(outcome(other) == outcome(one));
}

TEST(Session, RewindsNoFartherThanTheRingsRemember) {
  const SmallModel small(small_config(), 4);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  cuda::Backend backend(packed, small_options("tq4"));
  cuda::Session session(backend);
  session.prefill(std::vector<std::int32_t>(30, 1), 64);
  EXPECT_TRUE(testkit::refuses([&] { session.rewind(30); }, {"rewind by 30", "one must stay"}));
  EXPECT_EQ(session.max_rewind(), 29);
  session.decode(100, {});
  EXPECT_EQ(session.max_rewind(), 63);
  EXPECT_TRUE(testkit::refuses([&] { session.rewind(64); }, {"rewind by 64", "the sequence has been at 130"}));
  session.rewind(40);
  EXPECT_EQ(session.max_rewind(), 23);
  EXPECT_TRUE(testkit::refuses([&] { session.rewind(24); }, {"the sequence has been at 130"})) << "both together";
  session.rewind(23);
  EXPECT_EQ(session.max_rewind(), 0);
  EXPECT_EQ(session.position(), 67);
  session.decode(70, {});
  session.rewind(60);
}

TEST(Session, AFullContextIsRefusedBeforeAnyWork) {
  const SmallModel small(small_config(), 4);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  cuda::Backend backend(packed, small_options("tq4", 40));
  cuda::Session session(backend);
  const std::vector<std::int32_t> prompt(30, 5);
  EXPECT_TRUE(testkit::refuses([&] { session.decode(1, {}); }, {"prefill() first"}));
  session.prefill(prompt, 16);
  const Outcome before = outcome(session);
  EXPECT_TRUE(testkit::refuses([&] { session.decode(11, {}); }, {"the context is full", "the caches hold 40"}));
  EXPECT_TRUE(testkit::refuses([&] { session.prefill(std::span(prompt).first(11), 8); }, {"the context is full"}));
  EXPECT_EQ(outcome(session), before);
  session.decode(10, {});
  EXPECT_EQ(session.position(), 40) << "the last place can be used";
  EXPECT_TRUE(testkit::refuses([&] { session.decode(1, {}); }, {"the context is full"}));
  EXPECT_TRUE(testkit::refuses([&] { session.decode(0, {}); }, {"0 tokens"}));
  EXPECT_TRUE(testkit::refuses([&] { session.decode(1, {.temperature = -1.0f}); }, {"temperature"}));
  session.reset();
  EXPECT_EQ(session.position(), 0);
  session.prefill(prompt, 16);
  EXPECT_EQ(outcome(session), before);
}

TEST(Session, AnErrorInTheMiddleLeavesASequenceThatGoesOn) {
  const SmallModel small(small_config(), 4);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  cuda::Backend backend(packed, small_options("bf16")), plain_backend(packed, small_options("bf16"));
  cuda::Session session(backend), plain(plain_backend);
  const std::vector<std::int32_t> prompt(30, 5);
  for (cuda::Session* each : {&session, &plain}) each->prefill(prompt, 64);
  int n_seen = 0;
  const auto fail = [&](std::int32_t) -> bool {
    return ++n_seen == 7 ? throw std::runtime_error("the listener is gone") : true;
  };
  EXPECT_THROW(session.decode(50, {}, fail), std::runtime_error);
  plain.decode(7, {});
  EXPECT_EQ(outcome(session), outcome(plain)) << "the token that was heard last stays";
  EXPECT_THROW(
      session.prefill(prompt, 8, [](std::int64_t done) { return done == 16 ? throw std::runtime_error("") : 0; }),
      std::runtime_error);
  EXPECT_EQ(session.position(), 37 + 16);
  session.prefill(std::span(prompt).subspan(16), 8);
  plain.prefill(prompt, 8);
  EXPECT_EQ(outcome(session), outcome(plain));
}

TEST(Session, LogitsThatHoldNoTokenEndTheDecoding) {
  const SmallModel small(small_config(), 4);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  for (const bool use_graph : {true, false}) {
    cuda::Backend backend(packed, small_options("bf16"));
    cuda::Session session(backend, {.use_graph = use_graph});
    const std::vector<std::int32_t> prompt(30, 5);
    session.prefill(prompt, 64);
    session.decode(5, {});
    const Outcome good = outcome(session);
    backend.poison(0xFF);  // NaN: the logits, and what the next token would look back at
    EXPECT_THROW(session.decode(5, {}), std::runtime_error);
    EXPECT_EQ(session.position(), 35);
    EXPECT_TRUE(testkit::refuses([&] { session.decode(1, {}); }, {"prefill() first"}));
    session.reset();
    session.prefill(prompt, 64);
    session.decode(5, {});
    EXPECT_EQ(outcome(session), good) << "the next sequence works";
  }
}

/// A prompt for the last positions of a long context, cheap enough for a test: small layers, windows that forget.
TEST(Session, StepsAreTheSameReplayedOrLaunchedUpToTheEndOfTheLongestContexts) {
  for (const std::int64_t context : {131072, 262144}) {
    ModelConfig config = small_config();
    config.context = context;
    const SmallModel small(config, 12);
    const cuda::PackedModel packed = cuda::load_model(*small.file);
    cuda::BackendOptions options = small_options("tq4", context);
    options.max_chunk = 2048;
    std::vector<std::int32_t> prompt(static_cast<std::size_t>(context - 100));
    std::mt19937 random(5);
    std::generate(prompt.begin(), prompt.end(), [&] { return static_cast<std::int32_t>(random() % 1024); });
    Outcome outcomes[2];
    for (const bool use_graph : {false, true}) {
      cuda::Backend backend(packed, options);
      cuda::Session session(backend, {.use_graph = use_graph});
      session.prefill(std::span(prompt).first(10), 2048);
      session.decode(5, {});  // captured near position 0, replayed at the end
      session.prefill(std::span(prompt).subspan(15), 2048);
      session.decode(100, {});
      EXPECT_EQ(session.position(), context);
      outcomes[use_graph ? 1 : 0] = outcome(session);
    }
    EXPECT_EQ(outcomes[0], outcomes[1]) << context;
  }
}

TEST(Session, TwentyThousandStepsWithRestartsAreTheSameTwiceAndTakeNoMemory) {
  const GgufFile file = GgufFile::open(kData / "nano/nano-Q4_K_M.gguf");
  const cuda::PackedModel packed = cuda::load_model(file);
  cuda::Backend backend(packed, {.context = 4096, .max_chunk = 512});
  cuda::Session session(backend);
  std::vector<std::int32_t> first_run;
  const cuda::AllocationCount taken = cuda::allocation_count();
  for (int run = 0; run < 2; ++run) {
    std::mt19937 random(17);
    std::vector<std::int32_t> all;
    session.reset();
    while (all.size() < 20000) {
      if (session.position() == 0 || session.position() > 3500 || random() % 20 == 0) {
        session.reset();
        std::vector<std::int32_t> prompt(1 + random() % 600);
        for (std::int32_t& token : prompt) token = static_cast<std::int32_t>(random() % 4096);
        session.prefill(prompt, 1 + static_cast<std::int64_t>(random() % 512));
      }
      const std::int64_t n_token = 1 + static_cast<std::int64_t>(random() % 500);
      const auto last = static_cast<std::int32_t>(random() % 4096);  // some runs stop early
      const cuda::DecodeResult result = session.decode(n_token, {.temperature = 0.8f, .top_k = 40, .seed = 3},
                                                       [&](std::int32_t token) { return token / 8 != last / 8; });
      all.insert(all.end(), result.tokens.begin(), result.tokens.end());
    }
    if (run == 0) first_run = all;
    EXPECT_TRUE(all == first_run) << "the second run differs";
  }
  EXPECT_EQ(cuda::allocation_count(), taken);
}

/// Into another backend, whose memory held something else, with a larger context and another chunk.
RC_GTEST_PROP(Session, RestoredIsNeverInterrupted, ()) {
  const SmallModel small(small_config(), 13);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const std::string cache = *rc::gen::element<std::string>("bf16", "tq4", "sim-int8-had", "sim-int8-had-tail20-sink3");
  const testkit::TempDir folder;
  const SamplerSettings settings = any_settings();
  const auto n_prompt = *rc::gen::inRange(1, 150), n_step = *rc::gen::inRange(0, 30);
  const auto turn = any_tokens(small.weights.config, 20);
  cuda::Backend backend(packed, small_options(cache));
  cuda::Session session(backend, {.checkpoints = {.interval = 32}});
  session.prefill(any_tokens(small.weights.config, n_prompt), *rc::gen::inRange<std::int64_t>(1, 65));
  if (n_step > 0) session.decode(n_step, settings);
  session.save(folder.file("s"), {.model_hash = 5});
  session.prefill(turn, 8);
  session.decode(40, settings);

  cuda::BackendOptions larger = small_options(cache, 300);
  larger.max_chunk = 32;
  cuda::Backend other(packed, larger);
  cuda::Session restored(other, {.checkpoints = {.interval = 32}});
  restored.prefill(any_tokens(small.weights.config, 50), 32);
  restored.decode(3, settings);
  other.poison(0xFF);
  restored.restore(SessionFile::open(folder.file("s")), 5);
  restored.prefill(turn, 8);  // a chat's next turn: these tokens alone
  restored.decode(40, settings);
  RC_ASSERT(outcome(restored) == outcome(session));
  // The control: a byte of what was restored.
  restored.restore(SessionFile::open(folder.file("s")), 5);
  std::byte byte{};
  std::byte* const at = other.stored_layers()[1].parts[0].data;
  other.copy_stored(at, std::span(&byte, 1));
  byte ^= std::byte{0x21};
  other.set_stored(at, std::span<const std::byte>(&byte, 1));
  restored.prefill(turn, 8);
  restored.decode(40, settings);
  RC_ASSERT(!(outcome(restored).logits == outcome(session).logits));
}

/// Beyond what the rings remember: what is replayed comes in the passes of the first time.
RC_GTEST_PROP(Session, TakenBackFarItIsAFreshRunOfTheSamePasses, ()) {
  const SmallModel small(small_config(), 14);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const std::string cache = *rc::gen::element<std::string>("bf16", "tq4", "sim-int8-had-tail20-sink3");
  const auto prompt = any_tokens(small.weights.config, 230);
  const auto to = *rc::gen::inRange<std::int64_t>(2, 100);
  const auto policy = *rc::gen::elementOf(std::vector<CheckpointPolicy>{
      {.interval = 16}, {.interval = 50}, {.interval = 48, .near_interval = 8, .near_tokens = 100}});
  cuda::Backend backend(packed, small_options(cache)), fresh_backend(packed, small_options(cache));
  cuda::Session session(backend, {.checkpoints = policy});
  session.prefill(prompt, 24);
  session.rewind(230 - to);
  RC_ASSERT(session.position() == to);
  cuda::Session fresh(fresh_backend);
  const std::span<const std::int32_t> tokens(prompt);
  fresh.prefill(tokens.first(static_cast<std::size_t>(to - 1)), 24);
  fresh.prefill(tokens.subspan(static_cast<std::size_t>(to - 1), 1), 1);  // the one that goes through once more
  RC_ASSERT(outcome(session) == outcome(fresh));
  for (cuda::Session* each : {&session, &fresh}) {
    each->prefill(tokens.subspan(10, 30), 24);
    each->decode(120, {});
  }
  // Decoding has left checkpoints on its way: not all that it wrote is replayed.
  RC_ASSERT(session.store().n_replay(session.position() - 70) < policy.spacing() + 24);
  RC_ASSERT(outcome(session) == outcome(fresh));
}

/// A session of the reference, in a format that both lay out alike: the device stores the same bytes, and goes on.
TEST(Session, TakesOverWhatTheReferenceSaved) {
  const SmallModel small(small_config(), 15);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const testkit::TempDir folder;
  reference::Backend<float> reference(small.weights, {.cache = Bf16Format{}, .context = 256, .max_chunk = 64});
  Model<reference::Backend<float>> model(reference);
  SequenceStore<reference::Backend<float>> store(model, {});
  const std::vector<std::int32_t> tokens(150, 7);
  model.prefill(tokens, 64, [](std::int64_t) {});
  std::vector<float> logits(static_cast<std::size_t>(small.weights.config.vocab));
  reference.copy_logits(0, logits);
  store.save(folder.file("a"), {.model_hash = 5, .tokens = tokens, .logits = logits});

  cuda::Backend backend(packed, small_options("bf16"));
  cuda::Session session(backend);
  session.restore(SessionFile::open(folder.file("a")), 5);
  EXPECT_EQ(next_logits(session), logits);
  session.save(folder.file("b"), {.model_hash = 5});
  const GgufFile a = GgufFile::open(folder.file("a")), b = GgufFile::open(folder.file("b"));
  ASSERT_EQ(a.tensors().size(), b.tensors().size());
  for (const GgufTensor& tensor : a.tensors()) {
    if (tensor.name == kChecksumsTensor) continue;
    const GgufTensor* const other = b.find_tensor(tensor.name);
    ASSERT_NE(other, nullptr) << tensor.name;
    EXPECT_TRUE(std::ranges::equal(tensor.data, other->data)) << tensor.name;
  }
  EXPECT_EQ(session.decode(5, {}).tokens.size(), 5u);
  EXPECT_EQ(session.position(), 155);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include "reference/assistant.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/model/model.hpp"
#include "reference/assistant_check.hpp"
#include "reference/assistant_drafter.hpp"
#include "tests/support/micro_drafter.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/retyped_model.hpp"
#include "tests/support/small_model.hpp"

/// The drafter on random models: which caches it asks, and at which position; what its drafts must not depend on; what
/// it refuses. That its numbers are right is the matter of tests/assistant_golden_test.cpp and of layer_cache_test.cpp.
namespace gemma4 {
namespace {

using reference::Assistant;
using reference::AssistantDrafter;
using reference::Matrix;
using testkit::MicroDrafter;
using testkit::SmallModel;
using Floats = reference::Backend<float>;

std::vector<std::int32_t> some_ids(const ModelConfig& config, std::uint32_t count, std::uint32_t seed = 1) {
  std::vector<std::int32_t> ids;
  for (std::uint32_t i = 0; i < count; ++i) {
    ids.push_back(
        static_cast<std::int32_t>((seed * 7919 + i * 104729 + i * i * 31) % static_cast<std::uint32_t>(config.vocab)));
  }
  return ids;
}

/// Random weights of a target and of a drafter for it.
struct Weights {
  explicit Weights(const ModelConfig& config, std::uint64_t seed = 3)
      : model(std::make_unique<SmallModel>(config, seed)),
        file(std::make_unique<MicroDrafter>(testkit::micro_drafter_config(config), SyntheticOptions{.seed = seed + 1})),
        drafter(assistant_weights_from_gguf(*file->file, config)) {}
  [[nodiscard]] const ModelWeights& target() const { return model->weights; }

  std::unique_ptr<SmallModel> model;
  std::unique_ptr<MicroDrafter> file;
  AssistantWeights drafter;
};

/// The target with a text in it.
struct Target {
  Target(const Weights& weights, std::span<const std::int32_t> ids, const std::string& cache = "bf16")
      : backend(weights.target(), {.cache = parse_cache_spec(cache), .context = 64, .max_chunk = 64}), model(backend) {
    feed(ids);
  }
  void feed(std::span<const std::int32_t> ids) {
    model.prefill(ids, 64, [](std::int64_t) {});
  }
  /// Tokens in one pass, each with its logits and state.
  void verify(std::span<const std::int32_t> ids) {
    std::vector<std::int64_t> rows(ids.size());
    std::iota(rows.begin(), rows.end(), 0);
    model.forward(ids, rows);
  }
  Floats backend;
  Model<Floats> model;
};

std::vector<std::int32_t> propose(const Weights& weights, const Target& target, std::span<const std::int32_t> tokens,
                                  std::int64_t n_draft, std::int64_t row = 0) {
  AssistantDrafter<float> drafter(weights.drafter);
  draft::Proposal proposal;
  drafter.propose(target.backend, {.tokens = tokens, .n_draft = n_draft, .hidden_row = row}, proposal);
  return proposal.tokens;
}

ModelConfig three_of_each() {
  ModelConfig config = testkit::micro_config();
  config.is_sliding = {1, 0, 1, 0, 1, 1};
  return config;
}

/// Targets of several structures, each made once: both kinds of layer, short windows, one kind alone.
const Weights& weights_of(std::size_t index) {
  static const std::vector<Weights> made = [] {
    std::vector<Weights> all;
    for (const std::vector<std::uint8_t>& pattern : std::vector<std::vector<std::uint8_t>>{{1, 0, 1}, {1, 1}, {0, 0}}) {
      ModelConfig config = testkit::micro_config();
      config.is_sliding = pattern;
      config.window = pattern[1] == 1 ? 2 : 7;
      config.sliding.n_head_kv = 2;
      config.full.n_head_kv = pattern[0] == 0 ? 4 : 1;
      all.emplace_back(config);
    }
    return all;
  }();
  return made[index];
}

// ---- what it asks

/// A target that notes what is asked of it.
struct NotingTarget {
  struct Question {
    std::int64_t layer, width, kv_len;
    bool operator==(const Question&) const = default;
  };
  const Floats* backend = nullptr;
  std::vector<Question>* asked = nullptr;

  [[nodiscard]] const ModelConfig& config() const { return backend->config(); }
  [[nodiscard]] const ModelWeights& weights() const { return backend->weights(); }
  [[nodiscard]] Matrix<float> attend_queries(std::int64_t layer, const Matrix<float>& q, std::int64_t kv_len) const {
    asked->push_back({layer, q.cols(), kv_len});
    return backend->attend_queries(layer, q, kv_len);
  }
};

TEST(Assistant, AsksTheLastLayerOfEachKindForTheSameKeys) {
  const Weights weights(three_of_each());
  const std::vector<std::int32_t> ids = some_ids(three_of_each(), 9);
  const Target target(weights, std::span(ids).first(8));
  std::vector<NotingTarget::Question> asked;
  const NotingTarget noting{&target.backend, &asked};
  const Assistant<float, NotingTarget> drafter(weights.drafter, noting);
  static_cast<void>(drafter.step(ids[8], target.backend.hidden(), 8));
  const ModelConfig& config = target.backend.config();
  const std::int64_t sliding = config.n_head * config.sliding.head_dim, full = config.n_head * config.full.head_dim;
  EXPECT_EQ(asked, (std::vector<NotingTarget::Question>{{5, sliding, 8}, {5, sliding, 8}, {3, full, 8}, {3, full, 8}}));
}

TEST(Assistant, AllDraftsOfAStepStandAtOnePositionAndFollowEachOther) {
  const Weights weights(three_of_each());
  const std::vector<std::int32_t> ids = some_ids(three_of_each(), 41);
  const Target target(weights, std::span(ids).first(40));
  const Assistant<float> drafter(weights.drafter, target.backend);
  Matrix<float> hidden = target.backend.hidden();
  std::vector<std::int32_t> by_hand;
  for (int i = 0; i < 7; ++i) {
    const auto out = drafter.step(i == 0 ? ids[40] : by_hand.back(), hidden, 40);
    by_hand.push_back(reference::likeliest(out.logits));
    hidden = out.hidden;
  }
  EXPECT_EQ(propose(weights, target, ids, 7), by_hand);
  EXPECT_EQ(propose(weights, target, ids, 3), std::vector(by_hand.begin(), by_hand.begin() + 3));
  std::vector<std::int32_t> other = ids;
  other.back() = (other.back() + 1) % 320;
  EXPECT_NE(propose(weights, target, other, 7), by_hand) << "the control: another token drafts otherwise";
}

TEST(Assistant, AtATemperatureEachTokenIsDrawnFromItsOwnLogitsAndHandedOver) {
  const Weights weights(three_of_each());
  const std::vector<std::int32_t> ids = some_ids(three_of_each(), 41);
  const Target target(weights, std::span(ids).first(40));
  const SamplerSettings settings{.temperature = 1.5f, .top_k = 40, .top_p = 0.9f, .seed = 5};
  AssistantDrafter<float> drafter(weights.drafter);
  draft::Proposal proposal;
  drafter.propose(target.backend, {.tokens = ids, .n_draft = 5, .sampler = settings}, proposal);
  ASSERT_EQ(proposal.size(), 5);
  ASSERT_TRUE(proposal.is_drawn());
  const Assistant<float> by_hand(weights.drafter, target.backend);
  Matrix<float> hidden = target.backend.hidden();
  std::int32_t token = ids[40];
  bool any_unlikely = false;
  for (std::int64_t i = 0; i < 5; ++i) {
    const auto out = by_hand.step(token, hidden, 40);
    const std::span<const float> row = proposal.row(i);
    ASSERT_EQ(row.size(), 320u);
    EXPECT_TRUE(std::equal(row.begin(), row.end(), out.logits.data())) << "step " << i;
    token = proposal.tokens[static_cast<std::size_t>(i)];
    EXPECT_EQ(token, reference::draw_draft(row, settings, 40 + i)) << "step " << i;
    EXPECT_GT(reference::distribution(row, settings)[static_cast<std::size_t>(token)], 0) << "step " << i;
    any_unlikely = any_unlikely || token != reference::likeliest(out.logits);
    hidden = out.hidden;
  }
  EXPECT_TRUE(any_unlikely) << "the control: nothing was drawn";
  draft::Proposal greedy;
  drafter.propose(target.backend, {.tokens = ids, .n_draft = 5}, greedy);
  EXPECT_FALSE(greedy.is_drawn());
}

// ---- what drafts do not depend on

RC_GTEST_PROP(Assistant, RejectedTokensLeaveNoTrace, ()) {
  const Weights& weights = weights_of(*rc::gen::inRange<std::size_t>(0, 3));
  const ModelConfig& config = weights.target().config;
  const auto n = *rc::gen::inRange<std::uint32_t>(2, 24);
  const auto k = *rc::gen::inRange<std::int64_t>(1, 8), accepted = *rc::gen::inRange<std::int64_t>(0, k);
  const std::string cache = *rc::gen::element<std::string>("f32", "bf16", "tq4", "kv5r4", "kv16r16", "sim-int8");
  const std::vector<std::int32_t> ids = testkit::any_tokens(config, static_cast<int>(n) + 10);
  const auto all = std::span(ids);
  // One pass over the last token and k drafts, of which `accepted` are kept; then a draft from the state of that row.
  Target drafting(weights, all.first(n), cache);
  drafting.verify(all.subspan(n, static_cast<std::size_t>(k) + 1));
  drafting.model.rewind(k - accepted);
  const auto kept = n + static_cast<std::size_t>(accepted) + 1;
  std::vector<std::int32_t> tokens(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(kept) + 1);
  const auto drafted = propose(weights, drafting, tokens, 4, accepted);
  // The same sequence without them.
  Target plain(weights, all.first(n), cache);
  for (std::size_t i = n; i < kept; ++i) plain.model.decode(ids[i]);
  RC_ASSERT(drafted == propose(weights, plain, tokens, 4));
  const Assistant<float> with(weights.drafter, drafting.backend), without(weights.drafter, plain.backend);
  const auto length = static_cast<std::int64_t>(kept);
  const Matrix<float> hidden = drafting.backend.hidden().row(accepted);
  RC_ASSERT(with.step(tokens.back(), hidden, length).logits ==
            without.step(tokens.back(), plain.backend.hidden(), length).logits);
}

TEST(Assistant, AWrongRowOfTheVerifiedOnesDraftsOtherwise) {  // the control of the property above
  const Weights weights(three_of_each());
  const std::vector<std::int32_t> ids = some_ids(three_of_each(), 20);
  Target target(weights, std::span(ids).first(12));
  target.verify(std::span(ids).subspan(12, 4));
  const Assistant<float> drafter(weights.drafter, target.backend);
  const auto logits = [&](std::int64_t row, std::int64_t kv_len) {
    return drafter.step(ids[14], target.backend.hidden().row(row), kv_len).logits;
  };
  EXPECT_NE(logits(1, 14), logits(2, 14));
  EXPECT_NE(logits(1, 14), logits(1, 15));
  EXPECT_EQ(logits(1, 14), logits(1, 14));
}

TEST(Assistant, DraftingChangesNothingOfItsTarget) {
  const Weights weights(three_of_each());
  const std::vector<std::int32_t> ids = some_ids(three_of_each(), 41);
  for (const char* cache : {"f32", "tq4", "kv5r4", "sim-int8-tail4"}) {
    Target drafting(weights, std::span(ids).first(40), cache), plain(weights, std::span(ids).first(40), cache);
    const Matrix<float> hidden = drafting.backend.hidden();
    static_cast<void>(propose(weights, drafting, ids, 7));
    EXPECT_EQ(drafting.backend.hidden(), hidden);
    EXPECT_EQ(drafting.model.position(), 40);
    drafting.model.decode(ids[40]);
    plain.model.decode(ids[40]);
    EXPECT_EQ(drafting.backend.logits(), plain.backend.logits()) << cache;
  }
}

// ---- caches and types

TEST(Assistant, EveryCacheIsRead) {
  const Weights weights(three_of_each());
  const std::vector<std::int32_t> ids = some_ids(three_of_each(), 41);
  const auto logits = [&](const std::string& cache, const std::string& ring) {
    Floats backend(weights.target(),
                   {.cache = parse_cache_spec(cache), .context = 64, .max_chunk = 64, .ring = parse_ring_spec(ring)});
    Model<Floats> model(backend);
    model.prefill(std::span(ids).first(40), 64, [](std::int64_t) {});
    return Assistant<float>(weights.drafter, backend).step(ids[40], backend.hidden(), 40).logits;
  };
  const Matrix<float> exact = logits("f32", "bf16");
  for (const auto& [cache, ring] : std::vector<std::pair<const char*, const char*>>{{"bf16", "bf16"},
                                                                                    {"tq4", "bf16"},
                                                                                    {"tq4-peer", "bf16"},
                                                                                    {"kv5r4", "bf16"},
                                                                                    {"kv16r16", "bf16"},
                                                                                    {"sim-int8", "bf16"},
                                                                                    {"sim-k3v3-had-tail8", "bf16"},
                                                                                    {"sim-kvarn-k4v2", "bf16"},
                                                                                    {"bf16", "sim-int8"}}) {
    const Matrix<float> read = logits(cache, ring);
    EXPECT_TRUE(read.allFinite()) << cache;
    EXPECT_NE(read, exact) << cache << ": the control, a cache that rounds nothing";
    // A fraction of what another text's caches give.
    EXPECT_LT((read - exact).norm(), 0.5f * exact.norm()) << cache << " beside " << ring;
  }
}

TEST(Assistant, MatricesOfAnyTypeAreThoseThatTheyDequantiseTo) {
  AssistantConfig config = testkit::micro_drafter_config();
  config.own.hidden = config.own.ffn_hidden = 256;  // rows of whole blocks of any type
  const SmallModel target(testkit::micro_config(), 3);
  const MicroDrafter source(config);
  const std::vector<std::int32_t> ids = some_ids(target.weights.config, 9);
  Floats backend(target.weights, {.cache = Bf16Format{}, .context = 64, .max_chunk = 64});
  Model<Floats> model(backend);
  model.prefill(std::span(ids).first(8), 64, [](std::int64_t) {});
  const auto logits = [&](const AssistantWeights& weights) {
    return Assistant<float>(weights, backend).step(ids[8], backend.hidden(), 8).logits;
  };
  for (const TensorType type : kWeightTypes) {
    const testkit::RetypedModel typed(*source.file, testkit::all_matrices(type));
    const testkit::RetypedModel plain(typed.file(), testkit::all_matrices(TensorType::kF32));
    const Matrix<float> expected = logits(assistant_weights_from_gguf(plain.file(), target.weights.config));
    EXPECT_TRUE(expected.allFinite()) << type_name(type);
    EXPECT_EQ(logits(assistant_weights_from_gguf(typed.file(), target.weights.config)), expected) << type_name(type);
  }
}

// ---- refusals

TEST(Assistant, RefusesWhatDoesNotFit) {
  const Weights weights(three_of_each());
  const std::vector<std::int32_t> ids = some_ids(three_of_each(), 9);
  const Target target(weights, std::span(ids).first(8));
  const Assistant<float> drafter(weights.drafter, target.backend);
  const Matrix<float> hidden = target.backend.hidden();
  const auto step = [&](std::int32_t token, const Matrix<float>& state, std::int64_t kv_len) {
    return [&, token, state, kv_len] { static_cast<void>(drafter.step(token, state, kv_len)); };
  };
  EXPECT_NO_THROW(step(3, hidden, 8)());
  EXPECT_TRUE(testkit::refuses(step(320, hidden, 8), {"token 320", "[0, 320)"}));
  EXPECT_TRUE(testkit::refuses(step(-1, hidden, 8), {"token -1"}));
  EXPECT_TRUE(testkit::refuses(step(3, hidden.leftCols(64), 8), {"hidden is 1 x 64", "need 1 x 256"}));
  EXPECT_TRUE(testkit::refuses(step(3, Matrix<float>(2, 256), 8), {"hidden is 2 x 256"}));
  EXPECT_TRUE(testkit::refuses(step(3, hidden, 9), {"9"}));
  EXPECT_TRUE(testkit::refuses(step(3, hidden, 0), {"0"}));
  const auto drafts = [&](std::size_t n_token, std::int64_t n_draft, std::int64_t row) {
    return [&, n_token, n_draft, row] {
      static_cast<void>(propose(weights, target, std::span(ids).first(n_token), n_draft, row));
    };
  };
  EXPECT_TRUE(testkit::refuses(drafts(9, 0, 0), {"0 drafts, need 1 to 7"}));
  EXPECT_TRUE(testkit::refuses(drafts(9, 8, 0), {"8 drafts"}));
  EXPECT_TRUE(testkit::refuses(drafts(1, 1, 0), {"a sequence of 1 tokens"}));
  EXPECT_TRUE(testkit::refuses(drafts(9, 1, 1), {"the state of row 1, the target has 1"}));
  EXPECT_TRUE(testkit::refuses(drafts(9, 1, -1), {"row -1"}));
  ModelConfig sliding_alone = testkit::micro_config();
  sliding_alone.is_sliding = {1, 1};
  const SmallModel other(sliding_alone, 3);
  const Floats backend(other.weights, {.cache = Bf16Format{}, .context = 64, .max_chunk = 64});
  EXPECT_TRUE(testkit::refuses([&] { static_cast<void>(Assistant<float>(weights.drafter, backend)); },
                               {"it has full layers, the target has none"}));
}

// ---- counting

TEST(DraftAgreement, CountsEachStepAndTheBeginningsThatAgree) {
  reference::DraftAgreement agreement(3);
  const auto add = [&](std::vector<std::int32_t> drafted) {
    agreement.add(drafted, std::vector<std::int32_t>{5, 6, 7});
  };
  add({5, 6, 7});
  add({5, 0, 7});
  add({0, 6, 7});
  add({5, 6, 0});
  EXPECT_EQ(agreement.n_draft, 4);
  EXPECT_EQ(agreement.step, (std::vector<std::int64_t>{3, 3, 3}));
  EXPECT_EQ(agreement.through, (std::vector<std::int64_t>{3, 2, 1}));
  EXPECT_THROW(add({5, 6}), std::invalid_argument);
}

}  // namespace
}  // namespace gemma4

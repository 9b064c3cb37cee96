// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gemma4/draft/lookup.hpp"
#include "gemma4/draft/step.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/text/id_file.hpp"
#include "reference/acceptance.hpp"
#include "reference/backend.hpp"
#include "tests/support/drafters.hpp"
#include "tests/support/model_logits.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/small_model.hpp"

/// Drafted text on the reference is plain text, token for token, whatever is drafted and accepted; and behind it the
/// caches hold what they would hold, bit for bit.
namespace {

using namespace gemma4;
using namespace gemma4::draft;
using testkit::SmallModel;
using Target = reference::Backend<float>;
using Ids = std::vector<std::int32_t>;

/// The judge of the reference; `n_more` tokens too many stay, for controls.
struct Judge {
  std::int64_t n_more = 0;
  std::vector<float> logits = {};

  reference::Verdict operator()(const Target& target, const Proposal& proposal, const SamplerSettings& settings,
                                std::int64_t position) {
    logits.resize(static_cast<std::size_t>(target.config().vocab));
    const auto row = [&](std::int64_t i) {
      target.copy_logits(i, logits);
      return std::span<const float>(logits);
    };
    reference::Verdict verdict = reference::judge(row, proposal, settings, position);
    verdict.n_accepted = std::min(proposal.size(), verdict.n_accepted + n_more);
    return verdict;
  }
};

/// The tokens behind a prompt, and the model as it stands then: all but the last in its caches.
struct Text {
  Text(const ModelWeights& weights, const reference::BackendOptions& options)
      : backend(std::make_unique<Target>(weights, options)), model(*backend) {}

  /// @param chunk of the prompt; all but its last token, which the first step takes
  void read(const Ids& prompt, std::int64_t chunk) {
    ids = prompt;
    if (prompt.size() > 1) model.prefill(std::span(prompt).first(prompt.size() - 1), chunk, [](std::int64_t) {});
  }
  template <class TDrafter>
  void write(std::int64_t n_token, TDrafter& drafter, std::int64_t n_draft, const SamplerSettings& settings,
             Judge judge = {}) {
    for (const std::size_t end = ids.size() + static_cast<std::size_t>(n_token); ids.size() < end;) {
      const auto n_left = static_cast<std::int64_t>(end - ids.size());
      const Step step = run_step(model, drafter, ids, std::min(n_draft, n_left - 1), settings, 0, judge);
      ids.insert(ids.end(), step.tokens.begin(), step.tokens.end());
      counts.add(step);
    }
  }

  std::unique_ptr<Target> backend;
  Model<Target> model;
  Ids ids;
  Counts counts;
};

Ids plain_text(const ModelWeights& weights, const reference::BackendOptions& options, const Ids& prompt,
               std::int64_t chunk, std::int64_t n_token, const SamplerSettings& settings) {
  Text text(weights, options);
  text.read(prompt, chunk);
  NoDrafter none;
  text.write(n_token, none, 0, settings);
  return text.ids;
}

ModelConfig any_small_config() {
  ModelConfig config = testkit::any_config();
  config.is_sliding = *rc::gen::container<std::vector<std::uint8_t>>(2, rc::gen::element<std::uint8_t>(0, 1));
  return config;
}

RC_GTEST_PROP(DraftText, IsPlainTextAndLeavesTheSameCaches, ()) {
  const SmallModel small(any_small_config(), *rc::gen::inRange<std::uint64_t>(0, 1000));
  const std::string cache = *rc::gen::element<std::string>("f32", "bf16", "tq4", "kv5r4", "kv16r16", "sim-int8");
  const std::int64_t n_prompt = *rc::gen::weightedOneOf<std::int64_t>(
      {{3, rc::gen::inRange<std::int64_t>(1, 40)}, {1, rc::gen::inRange<std::int64_t>(100, 140)}});  // the rings wrap
  const std::int64_t n_token = *rc::gen::inRange<std::int64_t>(1, 30);
  // Sometimes up to the last position.
  const std::int64_t context = n_prompt + n_token + *rc::gen::element<std::int64_t>(0, 0, 50);
  const reference::BackendOptions options{.cache = parse_cache_spec(cache), .context = context, .max_chunk = 16};
  const SamplerSettings settings{.temperature = *rc::gen::element(0.0f, 0.0f, 1.0f), .top_k = 50, .seed = 4};
  const Ids prompt = testkit::any_tokens(small.weights.config, static_cast<int>(n_prompt));
  const std::int64_t chunk = *rc::gen::inRange<std::int64_t>(1, 17);
  const Ids plain = plain_text(small.weights, options, prompt, chunk, n_token, settings);

  Text drafted(small.weights, options);
  drafted.read(prompt, chunk);
  testkit::KnownTextDrafter drafter(plain, small.weights.config.vocab, *rc::gen::element(0.3, 0.8, 1.0),
                                    *rc::gen::inRange<std::uint32_t>(0, 1000));
  drafted.write(n_token, drafter, *rc::gen::inRange<std::int64_t>(1, kMaxDrafts + 1), settings);
  RC_ASSERT(drafted.ids == plain);
  RC_ASSERT(drafted.model.position() == static_cast<std::int64_t>(plain.size()) - 1);

  // Behind it the same logits, in every bit, as of a sequence that was read.
  Text read(small.weights, options);
  read.read(prompt, chunk);
  const auto rest = std::span(plain).subspan(prompt.size() - 1);
  for (std::size_t i = 0; i + 1 < rest.size(); ++i) read.model.forward(rest.subspan(i, 1), {});
  const auto last = rest.last(1);
  RC_ASSERT(testkit::logits_of(drafted.model, last, {1}) == testkit::logits_of(read.model, last, {1}));
}

/// Text that repeats itself, so that lookup has what to propose.
Ids repeating_prompt() {
  Ids prompt;
  for (int round = 0; round < 3; ++round) {
    for (std::int32_t token = 100; token < 120; ++token) prompt.push_back(token);
  }
  return prompt;
}

TEST(DraftText, OneTokenTooManyIsSeen) {  // the control
  const SmallModel small(gemma4_tiny(), 11);
  const reference::BackendOptions options{.cache = parse_cache_spec("bf16"), .context = 200, .max_chunk = 16};
  const Ids prompt = repeating_prompt(), plain = plain_text(small.weights, options, prompt, 16, 40, {});
  for (const std::int64_t n_more : {0, 1}) {
    Text drafted(small.weights, options);
    drafted.read(prompt, 16);
    testkit::KnownTextDrafter drafter(plain, small.weights.config.vocab, 0.7, 3);
    drafted.write(40, drafter, 4, {}, Judge{.n_more = n_more});
    EXPECT_EQ(drafted.ids == plain, n_more == 0) << n_more;
  }
}

TEST(DraftText, ARejectedTokenThatStaysInTheCachesIsSeen) {  // the control of what the caches hold
  const SmallModel small(gemma4_tiny(), 11);
  const reference::BackendOptions options{.cache = parse_cache_spec("bf16"), .context = 200, .max_chunk = 16};
  const Ids prompt = repeating_prompt();
  Text right(small.weights, options), wrong(small.weights, options);
  right.read(prompt, 16);
  wrong.read(prompt, 16);
  const Ids more = {7, 8, 9}, last = {5};
  right.model.forward(more, {});
  wrong.model.forward(more, {});
  right.model.rewind(2);
  wrong.model.rewind(1);  // one of the two stays
  EXPECT_NE(testkit::logits_of(right.model, last, {1}), testkit::logits_of(wrong.model, last, {1}));
}

/// A trained model, on text that it did not learn and text that repeats itself.
TEST(DraftText, OfATrainedModelIsPlainText) {
  const std::string data = GEMMA4_TEST_DATA;
  const GgufFile file = GgufFile::open(data + "/nano/nano-Q4_K_M.gguf");
  const ModelWeights weights = weights_from_gguf(file);
  const Ids held_out = read_ids(data + "/nano/heldout-ids.u16", weights.config.vocab, 10000);
  const reference::BackendOptions options{.cache = parse_cache_spec("kv5r4"), .context = 1200, .max_chunk = 512};
  const Ids prompt(held_out.begin() + 6000, held_out.begin() + 6300);
  constexpr std::int64_t kTokens = 80;
  const Ids plain = plain_text(weights, options, prompt, 512, kTokens, {});
  for (const std::int64_t n_draft : {3, 7}) {
    Text drafted(weights, options);
    drafted.read(prompt, 512);
    LookupDrafter lookup;
    drafted.write(kTokens, lookup, n_draft, {});
    EXPECT_EQ(drafted.ids, plain) << n_draft << " drafts";
    EXPECT_GT(drafted.counts.tokens_per_step(), 1.1) << "code repeats what it said";
    EXPECT_LT(drafted.counts.accepted[0], drafted.counts.drafted[0]) << "and not all of it";
  }
}

}  // namespace

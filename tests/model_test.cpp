// SPDX-License-Identifier: Apache-2.0
#include "gemma4/model/model.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "reference/backend.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/small_model.hpp"

/// The graph on small random models: what must not depend on how a sequence is cut, and what is refused.
namespace {

using namespace gemma4;

using testkit::any_config;
using testkit::any_tokens;
using testkit::SmallModel;

/// Logits of every position, the sequence cut into chunks of the given lengths.
std::vector<double> logits_of(reference::Backend<double>& backend, std::span<const std::int32_t> tokens,
                              const std::vector<std::int64_t>& chunks) {
  Model<reference::Backend<double>> model(backend);
  model.reset();
  std::vector<double> all;
  for (std::size_t at = 0, i = 0; at < tokens.size(); ++i) {
    const std::int64_t count =
        std::min(i < chunks.size() ? chunks[i] : chunks.back(), static_cast<std::int64_t>(tokens.size() - at));
    std::vector<std::int64_t> rows(static_cast<std::size_t>(count));
    std::iota(rows.begin(), rows.end(), 0);
    model.forward(tokens.subspan(at, static_cast<std::size_t>(count)), rows);
    all.insert(all.end(), backend.logits().data(), backend.logits().data() + backend.logits().size());
    at += static_cast<std::size_t>(count);
  }
  return all;
}

/// Storage rounds float64 activations to bf16 or to TQ4 codes, so that a last-bit difference may flip a rounding; with
/// a float32 cache there is next to nothing to flip: 2^-24 relative, at most some 2^-10 after three layers.
constexpr double kRounding = 1e-3;

RC_GTEST_PROP(Model, ChunkLengthsDoNotChangeTheResult, ()) {
  const SmallModel small(any_config(), *rc::gen::inRange<std::uint64_t>(0, 1000));
  const auto tokens = any_tokens(small.weights.config, *rc::gen::inRange(1, 60));
  reference::Backend<double> backend(small.weights,
                                     {.cache = parse_cache_spec("f32"), .context = 100, .max_chunk = 90});
  const auto chunks =
      *rc::gen::nonEmpty(rc::gen::container<std::vector<std::int64_t>>(rc::gen::inRange<std::int64_t>(1, 40)));
  const std::vector<double> whole = logits_of(backend, tokens, {90});
  const std::vector<double> parts = logits_of(backend, tokens, chunks);
  testkit::rc_require(testkit::close(parts, whole, kRounding));
  if (tokens.size() > 25) return;  // token by token only where that is quick
  testkit::rc_require(testkit::close(logits_of(backend, tokens, {1}), whole, kRounding), "decode token by token");
}

TEST(Model, AWindowShortByOneKeyExceedsTheRounding) {  // the control of the property above
  ModelConfig config = gemma4_tiny();
  config.window = 5;
  SmallModel small(config, 3);
  std::vector<std::int32_t> tokens(30);
  std::iota(tokens.begin(), tokens.end(), 100);
  const reference::BackendOptions options{.cache = parse_cache_spec("f32"), .context = 30, .max_chunk = 30};
  reference::Backend<double> right(small.weights, options);
  const std::vector<double> whole = logits_of(right, tokens, {30});
  EXPECT_TRUE(testkit::close(logits_of(right, tokens, {7}), whole, kRounding));
  small.weights.config.window = 4;
  reference::Backend<double> wrong(small.weights, options);
  EXPECT_FALSE(testkit::close(logits_of(wrong, tokens, {7}), whole, 100 * kRounding));
}

RC_GTEST_PROP(Model, LaterTokensDoNotReachEarlierLogits, ()) {
  const SmallModel small(any_config(), 5);
  auto tokens = any_tokens(small.weights.config, 24);
  const std::string cache = *rc::gen::element<std::string>("f32", "bf16", "tq4", "kv5r4", "kv16r16");
  reference::Backend<double> backend(small.weights, {.cache = parse_cache_spec(cache), .context = 64, .max_chunk = 64});
  const std::vector<double> before = logits_of(backend, tokens, {64});
  const auto at = *rc::gen::inRange<std::size_t>(1, 24);
  tokens[at] = (tokens[at] + 1) % static_cast<std::int32_t>(small.weights.config.vocab);
  const std::vector<double> after = logits_of(backend, tokens, {64});
  const auto split = static_cast<std::ptrdiff_t>(at) * small.weights.config.vocab;
  RC_ASSERT(std::equal(before.begin(), before.begin() + split, after.begin()));
  RC_ASSERT(!std::equal(before.begin() + split, before.end(), after.begin() + split));  // the control
}

RC_GTEST_PROP(Model, ASecondSequenceSeesNothingOfTheFirst, ()) {
  const SmallModel small(any_config(), 9);
  const std::string cache = *rc::gen::element<std::string>("f32", "bf16", "tq4", "kv5r4", "kv16r16");
  const reference::BackendOptions options{.cache = parse_cache_spec(cache), .context = 32, .max_chunk = 16};
  const auto first = any_tokens(small.weights.config, 30), second = any_tokens(small.weights.config, 30);
  reference::Backend<double> used(small.weights, options), fresh(small.weights, options);
  (void)logits_of(used, first, {16});
  RC_ASSERT(logits_of(used, second, {16}) == logits_of(fresh, second, {16}));
}

TEST(Model, LogitsAfterAPromptAreThoseOfItsLastToken) {
  const SmallModel small(gemma4_tiny(), 11);
  const std::int64_t vocab = small.weights.config.vocab;
  std::vector<std::int32_t> tokens(13);
  std::iota(tokens.begin(), tokens.end(), 40);
  const reference::BackendOptions options{.cache = parse_cache_spec("f32"), .context = 20, .max_chunk = 16};
  reference::Backend<double> whole(small.weights, options);
  const std::vector<double> all = logits_of(whole, tokens, {16});  // of each position, in one chunk
  const auto row = [&](std::size_t position) {
    return std::span(all).subspan(position * static_cast<std::size_t>(vocab), static_cast<std::size_t>(vocab));
  };
  EXPECT_FALSE(testkit::close(row(12), row(0), 100 * kRounding)) << "the control: rows differ";
  EXPECT_FALSE(testkit::close(row(12), row(11), 100 * kRounding));
  for (const std::int64_t chunk : {1, 4, 12, 13, 16}) {  // 4 and 12 leave a ragged 1
    reference::Backend<double> backend(small.weights, options);
    Model<reference::Backend<double>> model(backend);
    std::vector<std::int64_t> done;
    model.prefill(tokens, chunk, [&](std::int64_t n_done) { done.push_back(n_done); });
    ASSERT_EQ(backend.logits().rows(), 1) << "chunk " << chunk;
    EXPECT_TRUE(testkit::close(std::span(backend.logits().data(), static_cast<std::size_t>(vocab)), row(12), kRounding))
        << "chunk " << chunk;
    EXPECT_EQ(model.position(), 13);
    EXPECT_EQ(done.back(), 13);
    EXPECT_EQ(done.size(), static_cast<std::size_t>((13 + chunk - 1) / chunk));
    // And a prompt goes on where the last one ended: the same tokens in two of them.
    model.reset();
    model.prefill(std::span(tokens).first(5), chunk, [](std::int64_t) {});
    EXPECT_TRUE(testkit::close(std::span(backend.logits().data(), static_cast<std::size_t>(vocab)), row(4), kRounding));
    model.prefill(std::span(tokens).subspan(5, 7), chunk, [](std::int64_t) {});
    model.decode(tokens[12]);
    EXPECT_TRUE(testkit::close(std::span(backend.logits().data(), static_cast<std::size_t>(vocab)), row(12), kRounding))
        << "chunk " << chunk;
  }
}

/// A backend that computes nothing and writes down what it is asked for.
class ScriptBackend {
 public:
  [[nodiscard]] const ModelConfig& config() const { return config_; }
  [[nodiscard]] std::int64_t context() const { return 12; }
  [[nodiscard]] std::int64_t max_chunk() const { return 4; }
  void embed(std::span<const std::int32_t> tokens, std::int64_t position) {
    said << "embed " << tokens.size() << " from " << tokens.front() << " at " << position << '\n';
  }
  void embed_sampled() { said << "embed_sampled\n"; }
  void sample(const SamplerSettings& settings) { said << "sample " << settings.seed << '\n'; }
  void project_qkv(std::int64_t layer) { said << "qkv " << layer; }
  void attend(std::int64_t layer) { said << " attend " << layer; }
  void project_output(std::int64_t layer) { said << " output " << layer; }
  void gate_up(std::int64_t layer) { said << " gate_up " << layer; }
  void down(std::int64_t layer) { said << " down " << layer << '\n'; }
  void lm_head(std::span<const std::int64_t> rows) {
    said << "lm_head";
    for (const std::int64_t row : rows) said << ' ' << row;
    said << '\n';
  }
  void copy_logits(std::int64_t /*row*/, std::span<float> /*out*/) const {}
  void reset() { said << "reset\n"; }
  [[nodiscard]] int range(const char* /*name*/) const { return 0; }

  /// What was said since the last call.
  std::string take() { return std::exchange(said, {}).str(); }

  std::ostringstream said;

 private:
  ModelConfig config_ = [] {
    ModelConfig config = gemma4_tiny();
    config.is_sliding = {1, 0};
    return config;
  }();
};

TEST(ModelScript, StepsRowsAndPositionsAreThoseOfTheGraph) {
  static_assert(SelfFeedingBackend<ScriptBackend>);
  ScriptBackend backend;
  Model<ScriptBackend> model(backend);
  const std::string layers = "qkv 0 attend 0 output 0 gate_up 0 down 0\nqkv 1 attend 1 output 1 gate_up 1 down 1\n";
  const std::vector<std::int32_t> tokens = {50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60};
  model.prefill(std::span(tokens).first(7), 3, [](std::int64_t) {});
  EXPECT_EQ(backend.take(), "embed 3 from 50 at 0\n" + layers + "embed 3 from 53 at 3\n" + layers +
                                "embed 1 from 56 at 6\n" + layers + "lm_head 0\n");
  model.decode(9);
  EXPECT_EQ(backend.take(), "embed 1 from 9 at 7\n" + layers + "lm_head 0\n");
  model.enqueue_step({.seed = 31});
  EXPECT_EQ(backend.take(), "sample 31\nembed_sampled\n" + layers + "lm_head 0\n");
  EXPECT_EQ(model.position(), 8) << "a step that may be replayed is counted by who replays it";
  model.advance(3);
  EXPECT_EQ(model.position(), 11);
  EXPECT_THROW(model.advance(2), std::invalid_argument);
  EXPECT_NO_THROW(model.require_room(1));
  EXPECT_THROW(model.require_room(2), std::invalid_argument);
  EXPECT_THROW(model.rewind(12), std::invalid_argument);
  EXPECT_THROW(model.rewind(-1), std::invalid_argument);
  model.rewind(5);
  EXPECT_EQ(model.position(), 6);
  std::vector<std::int64_t> layers_done;
  const std::vector<std::int64_t> rows = {2, 0};
  model.forward(std::span(tokens).first(4), rows, [&](std::int64_t layer) { layers_done.push_back(layer); });
  EXPECT_EQ(layers_done, (std::vector<std::int64_t>{0, 1}));
  EXPECT_EQ(backend.take(), "embed 4 from 50 at 6\n" + layers + "lm_head 2 0\n");
  model.reset();
  EXPECT_EQ(backend.take(), "reset\n");
  model.prefill(std::span(tokens).first(8), 4, [](std::int64_t) {});
  EXPECT_EQ(backend.take(), "embed 4 from 50 at 0\n" + layers + "embed 4 from 54 at 4\n" + layers + "lm_head 3\n");
  // Nothing is asked of the backend by a call that is refused.
  EXPECT_THROW(model.prefill(tokens, 4, [](std::int64_t) {}), std::invalid_argument);
  EXPECT_THROW(model.prefill(std::span(tokens).first(2), 5, [](std::int64_t) {}), std::invalid_argument);
  EXPECT_THROW(model.prefill(std::span(tokens).first(2), 0, [](std::int64_t) {}), std::invalid_argument);
  EXPECT_THROW(model.decode(-1), std::invalid_argument);
  const std::vector<std::int64_t> none = {-1};
  EXPECT_THROW(model.forward(std::span(tokens).first(2), none), std::invalid_argument);
  EXPECT_EQ(backend.take(), "");
}

class ModelRefuses : public testing::Test {
 protected:
  ModelRefuses() : small_(gemma4_tiny(), 1) {}

  template <class TCall>
  static std::string message(TCall&& call) {
    try {
      call();
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  }

  SmallModel small_;
};

TEST_F(ModelRefuses, AFullContextBeforeAnyWork) {
  reference::Backend<float> backend(small_.weights, {.cache = {}, .context = 10, .max_chunk = 8});
  Model<reference::Backend<float>> model(backend);
  const std::vector<std::int32_t> tokens(11, 7);
  int n_chunk = 0;
  EXPECT_NE(message([&] { model.prefill(tokens, 4, [&](std::int64_t) { ++n_chunk; }); }).find("position 0 + 11 tokens"),
            std::string::npos);
  EXPECT_EQ(n_chunk, 0);
  EXPECT_EQ(model.position(), 0);
  model.prefill(std::span(tokens).first(10), 4, [&](std::int64_t) { ++n_chunk; });
  EXPECT_EQ(n_chunk, 3) << "4, 4 and a ragged 2";
  EXPECT_NE(message([&] { model.decode(7); }).find("the caches hold 10"), std::string::npos);
  model.reset();
  model.decode(7);
  EXPECT_EQ(model.position(), 1);
}

TEST_F(ModelRefuses, TokensAndChunksOutOfRange) {
  reference::Backend<float> backend(small_.weights, {.cache = {}, .context = 100, .max_chunk = 8});
  Model<reference::Backend<float>> model(backend);
  const std::vector<std::int32_t> bad = {1, 2, 1024};
  EXPECT_NE(message([&] { model.forward(bad, {}); }).find("token 1024 at position 2"), std::string::npos);
  const std::vector<std::int32_t> many(9, 1);
  EXPECT_NE(message([&] { model.forward(many, {}); }).find("a chunk of 9 tokens, need 1 to 8"), std::string::npos);
  EXPECT_NE(message([&] { model.prefill({}, 4, [](std::int64_t) {}); }).find("empty"), std::string::npos);
  const std::vector<std::int64_t> rows = {3};
  EXPECT_NE(message([&] { model.forward(std::span(bad).first(2), rows); }).find("logits of row 3"), std::string::npos);
  EXPECT_EQ(model.position(), 0);
}

TEST_F(ModelRefuses, AContextBeyondTheModels) {
  EXPECT_NE(message([&] {
              reference::Backend<float> backend(small_.weights, {.cache = {}, .context = 200000, .max_chunk = 8});
            }).find("context 200000"),
            std::string::npos);
}

}  // namespace

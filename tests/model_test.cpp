// SPDX-License-Identifier: Apache-2.0
#include "gemma4/model/model.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <string>
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
  const std::string cache = *rc::gen::element<std::string>("f32", "bf16", "tq4");
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
  const std::string cache = *rc::gen::element<std::string>("f32", "bf16", "tq4");
  const reference::BackendOptions options{.cache = parse_cache_spec(cache), .context = 32, .max_chunk = 16};
  const auto first = any_tokens(small.weights.config, 30), second = any_tokens(small.weights.config, 30);
  reference::Backend<double> used(small.weights, options), fresh(small.weights, options);
  (void)logits_of(used, first, {16});
  RC_ASSERT(logits_of(used, second, {16}) == logits_of(fresh, second, {16}));
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

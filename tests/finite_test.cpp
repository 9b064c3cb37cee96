// SPDX-License-Identifier: Apache-2.0
#include "gemma4/model/finite.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "gemma4/model/accuracy.hpp"
#include "gemma4/model/golden.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/model/trajectory.hpp"
#include "gemma4/report/accuracy_stats.hpp"
#include "reference/backend.hpp"
#include "tests/support/spoiled_model.hpp"

/// What is not finite is an error with the position and the layer where it began, on the reference and on a backend
/// that knows the position alone, whatever was asked for. Each case has its control: the same weights unspoiled.
namespace {

using namespace gemma4;
using testkit::config_to_spoil;
using testkit::SpoiledModel;
using Reference = reference::Backend<float>;

/// The reference as a device would be: it says where, when it is asked, and not in which layer.
class Deferred {
 public:
  explicit Deferred(const ModelWeights& weights, std::int64_t context = 64)
      : backend_(weights, {.cache = parse_cache_spec("bf16"), .context = context, .max_chunk = 32}) {}
  [[nodiscard]] const ModelConfig& config() const { return backend_.config(); }
  [[nodiscard]] std::int64_t context() const { return backend_.context(); }
  [[nodiscard]] std::int64_t max_chunk() const { return backend_.max_chunk(); }
  void embed(std::span<const std::int32_t> tokens, std::int64_t position) {
    backend_.embed(tokens, position);
    ++n_pass;
  }
  void project_qkv(std::int64_t layer) { backend_.project_qkv(layer); }
  void attend(std::int64_t layer) { backend_.attend(layer); }
  void project_output(std::int64_t layer) { backend_.project_output(layer); }
  void gate_up(std::int64_t layer) { backend_.gate_up(layer); }
  void down(std::int64_t layer) { backend_.down(layer); }
  void lm_head(std::span<const std::int64_t> rows) { backend_.lm_head(rows); }
  void copy_logits(std::int64_t row, std::span<float> out) const { backend_.copy_logits(row, out); }
  void copy_residual(std::span<float> out) const { backend_.copy_residual(out); }
  void watch(std::span<const std::int64_t> rows) { backend_.watch(rows); }
  [[nodiscard]] std::optional<NotFinite> first_not_finite() const {
    const auto known = backend_.first_not_finite();
    return known ? std::optional(NotFinite{.position = known->position}) : std::nullopt;
  }
  void reset() { backend_.reset(); }
  [[nodiscard]] int range(const char* /*name*/) const { return 0; }

  int n_pass = 0;

 private:
  Reference backend_;
};

std::vector<std::int32_t> prompt(std::int64_t count) {
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
  std::iota(tokens.begin(), tokens.end(), 20);
  return tokens;
}

/// Where a prompt in chunks stops being finite; nothing: nowhere.
template <class TBackend>
std::optional<NotFinite> where_of(const ModelWeights& weights, std::span<const std::int32_t> tokens,
                                  std::int64_t chunk) {
  std::optional<TBackend> backend;
  if constexpr (std::is_same_v<TBackend, Deferred>) {
    backend.emplace(weights);
  } else {
    backend.emplace(weights,
                    reference::BackendOptions{.cache = parse_cache_spec("bf16"), .context = 64, .max_chunk = 32});
  }
  Model<TBackend> model(*backend);
  try {
    model.prefill(tokens, chunk, [](std::int64_t) {});
    model.require_finite(tokens);
  } catch (const NotFiniteError& error) {
    return error.where();
  }
  return std::nullopt;
}

void expect_everywhere(const ModelWeights& weights, std::span<const std::int32_t> tokens,
                       const std::optional<NotFinite>& expected, const char* what) {
  for (const std::int64_t chunk : {7, 32}) {
    EXPECT_EQ(where_of<Reference>(weights, tokens, chunk), expected) << what << ", reference, chunk " << chunk;
    EXPECT_EQ(where_of<Deferred>(weights, tokens, chunk), expected) << what << ", by running again, chunk " << chunk;
  }
}

TEST(Finite, AWeightThatIsNaNIsNamedByItsLayer) {
  const auto tokens = prompt(20);
  {
    SpoiledModel model(config_to_spoil(), 3);
    expect_everywhere(model.weights, tokens, std::nullopt, "control");
    model.spoil(model.weights.output_norm);
    expect_everywhere(model.weights, tokens, NotFinite{19, 3}, "output_norm, of the first logits asked for");
  }
  for (const std::int64_t layer : {0, 1}) {  // sliding, full
    const auto at = static_cast<std::size_t>(layer);
    const auto spoiled = [&](auto&& member, const char* what) {
      SpoiledModel model(config_to_spoil(), 3);
      model.spoil(member(model.weights.layers[at]));
      // The stream of the first position alone is looked at: with no key but its own a head passes its value on.
      expect_everywhere(model.weights, tokens, NotFinite{0, layer}, what);
    };
    spoiled(
        [](LayerWeights & w) -> auto& { return w.attn_norm; }, "attn_norm");
    spoiled(
        [](LayerWeights & w) -> auto& { return w.attn_q_norm; }, "attn_q_norm");
    spoiled(
        [](LayerWeights & w) -> auto& { return w.attn_k_norm; }, "attn_k_norm");
    spoiled(
        [](LayerWeights & w) -> auto& { return w.post_attention_norm; }, "post_attention_norm");
    spoiled(
        [](LayerWeights & w) -> auto& { return w.ffn_norm; }, "ffn_norm");
    spoiled(
        [](LayerWeights & w) -> auto& { return w.post_ffw_norm; }, "post_ffw_norm");
    SpoiledModel model(config_to_spoil(), 3);
    model.spoil(model.weights.layers[at].ffn_down, 2);
    expect_everywhere(model.weights, tokens, NotFinite{0, layer}, "ffn_down");
  }
}

TEST(Finite, AnEmbeddingThatIsNaNIsFoundInTheMiddleOfAPrompt) {
  SpoiledModel model(config_to_spoil(), 4);
  model.spoil(model.weights.token_embd, 31);
  auto tokens = prompt(20);  // 31 is the twelfth
  expect_everywhere(model.weights, tokens, NotFinite{11, -1}, "the token itself");
  // Without it only the tied head has it: the first logits that anybody asked for.
  tokens[11] = 99;
  expect_everywhere(model.weights, tokens, NotFinite{19, 3}, "the head");
}

TEST(Finite, APassWithoutLogitsIsLookedAtToo) {
  SpoiledModel model(config_to_spoil(), 4);
  model.spoil(model.weights.token_embd, 31);
  const auto tokens = prompt(20);
  Deferred backend(model.weights);
  Model<Deferred> graph(backend);
  graph.reset();
  graph.forward(std::span(tokens).first(11), {});
  EXPECT_NO_THROW(graph.require_finite(std::span(tokens).first(11))) << "before the token comes";
  graph.forward(std::span(tokens).subspan(11), {});
  EXPECT_THROW(graph.require_finite(tokens), NotFiniteError);
}

TEST(Finite, ItIsFoundInTheChunksThatTheSequenceCameIn) {
  SpoiledModel model(config_to_spoil(), 4);
  model.spoil(model.weights.token_embd, 31);
  const auto tokens = prompt(20);
  Deferred backend(model.weights);
  Model<Deferred> graph(backend);
  graph.reset();
  graph.forward(std::span(tokens).first(5), {});
  graph.forward(std::span(tokens).subspan(5, 8), {});
  graph.rewind(3);  // within the pass that had the token, and before it
  EXPECT_EQ(graph.position(), 10);
  graph.advance(2);
  backend.n_pass = 0;
  EXPECT_EQ(graph.locate(tokens, 11), (NotFinite{11, -1}));
  EXPECT_EQ(backend.n_pass, 4) << "5, 5, 1 and 1 tokens";
}

TEST(Finite, AMeasurementSaysWhichBackendItWas) {
  SpoiledModel good(config_to_spoil(), 3), bad(config_to_spoil(), 3);
  bad.spoil(bad.weights.layers[1].ffn_norm);
  Deferred base(good.weights), test(bad.weights), fine(good.weights);
  const auto ids = prompt(21);
  const auto measure = [&](Deferred* first, Deferred* second) {
    const std::vector<Deferred*> backends = {first, second};
    return measure_accuracy<Deferred>(backends, ids, 20, 7, [](std::int64_t) {});
  };
  EXPECT_EQ(measure(&base, &fine).size(), 2u);
  try {
    (void)measure(&base, &test);
    FAIL() << "nothing was thrown";
  } catch (const NotFiniteError& error) {
    EXPECT_EQ(error.backend, 1u);
    EXPECT_EQ(error.where(), (NotFinite{0, 1}));
    EXPECT_NE(std::string(error.what()).find("position 0"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("layer 1"), std::string::npos) << error.what();
  }
  RecallTask task{.document_len = 20, .documents = {{ids.begin(), ids.begin() + 20}}, .questions = {{0, 12, {33}, 5}}};
  EXPECT_NO_THROW((void)measure_recall(fine, task, 7, [](std::int64_t) {}));
  EXPECT_THROW((void)measure_recall(test, task, 7, [](std::int64_t) {}), NotFiniteError);
  const TrajectoryTask texts = trajectory_task(ids, 2, 9, 3);
  EXPECT_NO_THROW((void)greedy_texts(fine, texts, 7, [](std::int64_t) {}));
  EXPECT_THROW((void)greedy_texts(test, texts, 7, [](std::int64_t) {}), NotFiniteError);
  GoldenLogits golden{.ids = prompt(20), .positions = {19}, .logits = std::vector<float>(300), .vocab = 300};
  EXPECT_NO_THROW((void)compare_with_golden(fine, golden, 7, [](std::int64_t) {}));
  EXPECT_THROW((void)compare_with_golden(test, golden, 7, [](std::int64_t) {}), NotFiniteError);
}

TEST(Finite, NoOrderNoSameTop) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> good = {1, 3, 2};
  EXPECT_TRUE(compare_logits(good, good, 0).same_top);
  for (const float bad : {kNan, kInfinity, -kInfinity}) {
    for (std::size_t at = 0; at < 3; ++at) {
      std::vector<float> spoiled = good;
      spoiled[at] = bad;
      EXPECT_FALSE(compare_logits(spoiled, good, 0).same_top);
      EXPECT_FALSE(compare_logits(good, spoiled, 0).same_top);
      EXPECT_FALSE(compare_logits(spoiled, spoiled, 0).same_top);
    }
  }
}

TEST(Finite, TheMessageNamesThePlace) {
  const auto text = [](const NotFinite& where) { return std::string(NotFiniteError(where, 3).what()); };
  EXPECT_EQ(text({5, 1}), "not finite from position 5 on: it began in layer 1 (blk.1)");
  EXPECT_EQ(text({5, -1}), "not finite from position 5 on: it began before layer 0, in the embedding");
  EXPECT_NE(text({5, 3}).find("behind the last layer, 2"), std::string::npos);
  EXPECT_NE(text({.position = 5}).find("not known"), std::string::npos);
}

}  // namespace

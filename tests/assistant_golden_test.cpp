// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "gemma4/draft/step.hpp"
#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/text/id_file.hpp"
#include "reference/acceptance.hpp"
#include "reference/assistant_check.hpp"
#include "reference/assistant_drafter.hpp"

/// The trained drafter of nano against drafts that another implementation made of the same files, and what each of its
/// rules is worth: without it the drafts are others.
namespace gemma4 {
namespace {

using reference::Assistant;
using reference::DraftComparison;
using reference::Matrix;

const std::filesystem::path kData = GEMMA4_TEST_DATA;
using NanoBackend = reference::Backend<float>;

/// Acceptance figure: agreed, not derived. How the roundings of nano's twelve layers and of four chained steps grow has
/// no bound that would say anything; it lies four times above what was measured when it was set (1.3e-4, at position
/// 4000) and far below the smallest of the faults beside it.
constexpr double kAcceptance = 5e-4;
/// What a fault must show at least, a hundred times that; the smallest was measured to be above 1.
constexpr double kFault = 5e-2;

/// nano as a target in which one rule of the drafter is broken.
struct SpoiledTarget {
  const NanoBackend* backend = nullptr;
  const ModelWeights* seen = nullptr;            ///< the embedding that the drafter sees
  std::int64_t kv_len_more = 0;                  ///< keys that it sees beyond its position
  std::vector<std::int64_t> layer_instead = {};  ///< of each layer, whose cache is read; empty: its own

  [[nodiscard]] const ModelConfig& config() const { return backend->config(); }
  [[nodiscard]] const ModelWeights& weights() const { return *seen; }
  [[nodiscard]] Matrix<float> attend_queries(std::int64_t layer, const Matrix<float>& q, std::int64_t kv_len) const {
    if (!layer_instead.empty()) layer = layer_instead[static_cast<std::size_t>(layer)];
    return backend->attend_queries(layer, q, kv_len + kv_len_more);
  }
};

/// nano's weights with an embedding that is smaller by sqrt(hidden), which is what forgetting the factor gives.
struct UnscaledEmbedding {
  explicit UnscaledEmbedding(const ModelWeights& from) : weights(from) {
    const QuantizedMatrix& matrix = from.token_embd;
    values.resize(static_cast<std::size_t>(matrix.rows * matrix.cols));
    for (std::int64_t row = 0; row < matrix.rows; ++row) {
      const auto out =
          std::span(values).subspan(static_cast<std::size_t>(row * matrix.cols), static_cast<std::size_t>(matrix.cols));
      dequantise_row(matrix.type, matrix.row(row), out);
      for (float& value : out) value /= from.config.embedding_scale();
    }
    weights.token_embd = {TensorType::kF32, matrix.rows, matrix.cols, std::as_bytes(std::span(values))};
  }
  ModelWeights weights;
  std::vector<float> values;
};

/// Where the faults are looked at: the ring has wrapped, and its oldest key is out of the window.
constexpr std::int32_t kControlPosition = 513;

class AssistantGolden : public testing::Test {
 protected:
  /// The target goes through the text once; at each golden position everybody drafts.
  static void SetUpTestSuite() {
    const GgufFile file = GgufFile::open(kData / "nano/nano-Q4_K_M.gguf");
    const ModelWeights weights = weights_from_gguf(file);
    const GgufFile drafter_file = GgufFile::open(kData / "nano-assistant/nano-assistant-Q8_0.gguf");
    const AssistantWeights drafter = assistant_weights_from_gguf(drafter_file, weights.config);
    const reference::GoldenDrafts golden =
        reference::read_golden_drafts(kData / "nano-assistant/nano-assistant-golden.gguf");
    const UnscaledEmbedding unscaled(weights);
    NanoBackend backend(
        weights,
        {.cache = parse_cache_spec("f32"), .context = static_cast<std::int64_t>(golden.ids.size()), .max_chunk = 500});
    const std::map<std::string, SpoiledTarget> spoiled = {
        {"as it is", {&backend, &weights}},
        {"no factor sqrt(hidden)", {&backend, &unscaled.weights}},
        {"the sliding layer before", {&backend, &weights, 0, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 11}}},
        {"the full layer before", {&backend, &weights, 0, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 5}}},
        {"the newest key not seen", {&backend, &weights, -1}},
    };
    const SpoiledTarget one_key_more{&backend, &weights, 1};
    const Assistant<float> plain(drafter, backend);
    reference::for_each_golden_position(backend, golden, 500, [&](std::size_t i) {
      const Matrix<float> hidden = backend.hidden();
      for (Eigen::Index j = 0; j < hidden.cols(); ++j) {
        hidden_error_ =
            std::max(hidden_error_,
                     std::abs(static_cast<double>(hidden(0, j) - golden.hidden_of(i)[static_cast<std::size_t>(j)])));
      }
      reference::compare_draft(plain, golden, i, hidden, results_["plain"]);
      if (golden.positions[i] != kControlPosition) return;
      for (const auto& [name, target] : spoiled) {
        const Assistant<float, SpoiledTarget> other(drafter, target);
        reference::compare_draft(other, golden, i, hidden, results_[name]);
      }
      draft_at_p(Assistant<float, SpoiledTarget>(drafter, one_key_more), golden, i, hidden);
    });
    capped_ = capped_error(golden);
    const std::vector<std::int32_t> ids = read_ids(kData / "nano/heldout-ids.u16", 4096, kHeldOut + 4);
    NanoBackend bf16(weights, {.cache = Bf16Format{}, .context = kHeldOut + 4, .max_chunk = 8});
    SpoiledTarget other = spoiled.at("no factor sqrt(hidden)");
    other.backend = &bf16;
    const auto measure = [&](const auto& assistant) {
      return reference::measure_agreement(assistant, bf16, ids, kHeldOut, 4, [](std::int64_t) {});
    };
    agreement_ = measure(Assistant<float>(drafter, bf16));
    spoiled_agreement_ = measure(Assistant<float, SpoiledTarget>(drafter, other));
    plain_ = write_text(weights, drafter, 0);
    drafted_ = write_text(weights, drafter, 3);
  }

  /// Greedy text of nano behind the beginning of the held-out text, with k drafts a step; 0: none.
  struct Text {
    std::vector<std::int32_t> ids;
    draft::Counts counts;
  };
  static Text write_text(const ModelWeights& weights, const AssistantWeights& drafter, std::int64_t n_draft) {
    constexpr std::size_t kPrompt = 30, kToken = 40;
    Text text{.ids = read_ids(kData / "nano/heldout-ids.u16", 4096, kPrompt), .counts = {}};
    NanoBackend backend(weights, {.cache = parse_cache_spec("kv5r4"), .context = 128, .max_chunk = 30});
    Model<NanoBackend> model(backend);
    model.prefill(std::span(text.ids), 30, [](std::int64_t) {});
    text.ids.push_back(reference::likeliest(backend.logits()));
    reference::AssistantDrafter<float> propose(drafter);
    std::vector<float> logits(4096);
    const auto judge = [&](const NanoBackend& target, const draft::Proposal& proposal, const SamplerSettings& settings,
                           std::int64_t position) {
      const auto row = [&](std::int64_t i) {
        target.copy_logits(i, logits);
        return std::span<const float>(logits);
      };
      return reference::judge(row, proposal, settings, position);
    };
    std::int64_t hidden_row = 0;
    while (text.ids.size() < kPrompt + kToken) {
      const auto n_left = static_cast<std::int64_t>(kPrompt + kToken - text.ids.size());
      const draft::Step step = draft::run_step(model, propose, text.ids, std::min(n_draft, n_left - 1),
                                               {.temperature = 0}, hidden_row, judge);
      text.ids.insert(text.ids.end(), step.tokens.begin(), step.tokens.end());
      text.counts.add(step);
      hidden_row = step.n_accepted();
    }
    return text;
  }

  static constexpr std::int64_t kHeldOut = 64;

  /// Queries turned to p instead of p + 1, over the same keys: a step at p of a target that shows one key more.
  static void draft_at_p(const Assistant<float, SpoiledTarget>& drafter, const reference::GoldenDrafts& golden,
                         std::size_t i, const Matrix<float>& hidden) {
    const std::int64_t p = golden.positions[i];
    const auto out = drafter.step(golden.ids[static_cast<std::size_t>(p) + 1], hidden, p);
    const auto expected = Eigen::Map<const Matrix<float>>(golden.logits_of(i, 0).data(), 1, golden.vocab);
    at_p_ = std::max(at_p_, static_cast<double>((out.logits - expected).cwiseAbs().maxCoeff()));
  }

  /// What a softcap would make of the golden logits.
  static double capped_error(const reference::GoldenDrafts& golden) {
    double worst = 0;
    for (const float logit : golden.logits) {
      worst =
          std::max(worst, std::abs(30.0 * std::tanh(static_cast<double>(logit) / 30.0) - static_cast<double>(logit)));
    }
    return worst;
  }

  static inline std::map<std::string, DraftComparison> results_;
  static inline double hidden_error_ = 0, at_p_ = 0, capped_ = 0;
  static inline reference::DraftAgreement agreement_{0}, spoiled_agreement_{0};
  static inline Text plain_, drafted_;
};

TEST_F(AssistantGolden, TheSameTokensAndLogitsOfEveryStep) {
  const DraftComparison& result = results_["plain"];
  EXPECT_EQ(result.n_compared, 36);
  EXPECT_EQ(result.n_same, 36);
  EXPECT_LE(result.max_abs, kAcceptance) << "worst at position " << result.worst_position;
  EXPECT_EQ(results_["as it is"].n_same, 4) << "the controls' target spoils nothing by itself";
  EXPECT_LE(results_["as it is"].max_abs, kAcceptance);
}

TEST_F(AssistantGolden, TheStateBehindTheFinalNormIsTheTargets) {
  EXPECT_LE(hidden_error_, kAcceptance);
}

TEST_F(AssistantGolden, EveryRuleThatIsBrokenShows) {
  for (const char* name :
       {"no factor sqrt(hidden)", "the sliding layer before", "the full layer before", "the newest key not seen"}) {
    EXPECT_GT(results_[name].max_abs, kFault) << name;
  }
  EXPECT_GT(at_p_, kFault) << "queries at p instead of p + 1";
  EXPECT_GT(capped_, kFault) << "a softcap";
}

/// The first 64 of the held-out tokens, which are harder than those behind them: of 8192 the drafter's first step
/// names nano's token at 0.795 (`golden --agreement`; 0.796 in tests/data/nano-assistant/reference.json).
TEST_F(AssistantGolden, ItOftenSaysWhatItsTargetSays) {
  ASSERT_EQ(agreement_.n_draft, kHeldOut);
  for (std::size_t j = 0; j < 4; ++j) {
    EXPECT_GT(2 * agreement_.step[j], kHeldOut) << "step " << j + 1;
    EXPECT_LT(4 * spoiled_agreement_.step[j], kHeldOut) << "the control, step " << j + 1;
    EXPECT_LE(agreement_.through[j], agreement_.step[j]);
  }
  EXPECT_GT(agreement_.through[0], agreement_.through[3]);
}

TEST_F(AssistantGolden, DraftedTextIsPlainTextInFewerSteps) {
  EXPECT_EQ(drafted_.ids, plain_.ids);
  EXPECT_EQ(plain_.counts.n_step, 39) << "the control: a token a step";
  EXPECT_LT(2 * drafted_.counts.n_step, plain_.counts.n_step);
}

}  // namespace
}  // namespace gemma4

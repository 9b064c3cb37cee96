// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "gemma4/model/accuracy.hpp"
#include "gemma4/text/id_file.hpp"
#include "reference/backend.hpp"
#include "tests/support/close.hpp"

/// What the project claims of the trained model at 8192 tokens, measured once for all tests: the figures that another
/// implementation gives for a bf16 cache, and what a TQ4 cache and one vector for K and V cost.
namespace {

using namespace gemma4;

const std::filesystem::path kNano = std::filesystem::path(GEMMA4_TEST_DATA) / "nano";
using NanoBackend = reference::Backend<float>;

/// Acceptance figures of the project: agreed, not derived. Beside each what was measured when it was set
/// (results/accuracy, the reference at 8192 tokens).
constexpr double kLossAcceptance = 0.01;         ///< |nll - the other implementation's|, its activations bf16: 0.0006
constexpr double kTq4KlAcceptance = 0.0025;      ///< mean KL of tq4 from bf16, nats a token: 0.0013
constexpr double kTq4SameTopAcceptance = 0.982;  ///< share of the same first token: 0.986
constexpr double kTq4LossAcceptance = 0.005;     ///< nll of tq4 above that of bf16: 0.0017
constexpr double kPeerKlRatioAcceptance = 1.8;   ///< mean KL of the peer's format over that of tq4: 2.2

constexpr double kOneVectorKlRatioAcceptance = 0.5;  ///< mean KL of kv5r4, three quarters of the bytes, over tq4's: 0.3
constexpr double kSmallOneVectorKlRatioAcceptance = 1.25;  ///< of kv4r4, 0.63 of the bytes: 1.0

class NanoAccuracy : public testing::Test {
 protected:
  static constexpr std::int64_t kContext = 8192;

  static void SetUpTestSuite() {
    file_ = std::make_unique<GgufFile>(GgufFile::open(kNano / "nano-Q4_K_M.gguf"));
    weights_ = std::make_unique<ModelWeights>(weights_from_gguf(*file_));
    const std::vector<std::string> caches = {"bf16", "tq4", "tq4-peer", "kv5r4", "kv4r4"};
    std::vector<std::unique_ptr<NanoBackend>> backends;
    std::vector<NanoBackend*> borrowed;
    for (const std::string& cache : caches) {
      backends.push_back(make_backend(cache));
      borrowed.push_back(backends.back().get());
    }
    const auto ids = read_ids(kNano / "heldout-ids.u16", weights_->config.vocab, kContext + 1);
    const auto traces = measure_accuracy<NanoBackend>(borrowed, ids, kContext, 512, [](std::int64_t) {});
    for (std::size_t i = 0; i < caches.size(); ++i) traces_[caches[i]] = traces[i];
  }
  static void TearDownTestSuite() {
    traces_.clear();
    weights_.reset();
    file_.reset();
  }

  static std::unique_ptr<NanoBackend> make_backend(const std::string& cache) {
    return std::make_unique<NanoBackend>(
        *weights_, reference::BackendOptions{.cache = parse_cache_spec(cache), .context = kContext, .max_chunk = 512});
  }

  static AccuracySummary summary(const std::string& cache, std::int64_t begin, std::int64_t end) {
    return summarise(std::span(traces_.at(cache).positions)
                         .subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin)));
  }
  static AccuracySummary summary(const std::string& cache) { return summary(cache, 0, kContext); }

  static RecallResult recall(const std::string& cache) {
    const RecallTask task = read_recall_task(kNano / "recall-public-8192.gguf", gemma4_nano().vocab);
    return measure_recall(*make_backend(cache), task, 512, [](std::int64_t) {});
  }

  static inline std::unique_ptr<GgufFile> file_;
  static inline std::unique_ptr<ModelWeights> weights_;
  static inline std::map<std::string, AccuracyTrace> traces_;
};

TEST_F(NanoAccuracy, LossOfTheBf16CacheEqualsTheOtherImplementations) {
  // tests/data/nano/reference.json, nll_by_position.
  EXPECT_TRUE(testkit::close(summary("bf16", 0, 2048).nll, 1.5004549, kLossAcceptance));
  EXPECT_TRUE(testkit::close(summary("bf16", 2048, 8192).nll, 1.7703531, kLossAcceptance));
}

TEST_F(NanoAccuracy, Tq4CostsLittle) {
  const AccuracySummary tq4 = summary("tq4");
  EXPECT_LE(tq4.kl_mean, kTq4KlAcceptance);
  EXPECT_GE(tq4.same_top, kTq4SameTopAcceptance);
  EXPECT_LE(tq4.nll - summary("bf16").nll, kTq4LossAcceptance);
  EXPECT_GT(tq4.kl_mean, 1e-5) << "the control: a cache that costs nothing is not compressed";
}

TEST_F(NanoAccuracy, ThePeersFormatCostsTwiceAsMuch) {
  EXPECT_GE(summary("tq4-peer").kl_mean, kPeerKlRatioAcceptance * summary("tq4").kl_mean);
  EXPECT_LT(summary("tq4-peer").same_top, summary("tq4").same_top);
}

TEST_F(NanoAccuracy, OneVectorForKAndVCostsLessThanTq4) {
  const double tq4 = summary("tq4").kl_mean;
  EXPECT_LE(summary("kv5r4").kl_mean, kOneVectorKlRatioAcceptance * tq4);
  EXPECT_GT(summary("kv5r4").same_top, summary("tq4").same_top);
  EXPECT_LE(summary("kv5r4").nll - summary("bf16").nll, kTq4LossAcceptance);
  EXPECT_GT(summary("kv5r4").kl_mean, 1e-5) << "the control: a cache that costs nothing is not compressed";
  EXPECT_LE(summary("kv4r4").kl_mean, kSmallOneVectorKlRatioAcceptance * tq4);
  EXPECT_GT(summary("kv4r4").kl_mean, summary("kv5r4").kl_mean);
}

TEST_F(NanoAccuracy, EveryKeyIsRecalledWithEachCache) {
  for (const char* cache : {"bf16", "tq4", "kv5r4"}) {
    const RecallResult result = recall(cache);
    EXPECT_EQ(result.correct, 32) << cache;
    EXPECT_EQ(result.total, 32) << cache;
  }
}

TEST_F(NanoAccuracy, AModelThatCannotSeeTheKeysRecallsNone) {  // the control: the answers are not guessed
  RecallTask task = read_recall_task(kNano / "recall-public-8192.gguf", gemma4_nano().vocab);
  task.questions.resize(16);
  task.documents.resize(1);  // the questions of the first document
  const std::int64_t begin = task.questions.front().position - 400;
  auto& document = task.documents.front();
  document.erase(document.begin(), document.begin() + begin);
  task.document_len -= begin;
  for (RecallTask::Question& question : task.questions) {
    ASSERT_EQ(question.document, 0);
    ASSERT_GT(question.distance, question.position - begin) << "the key is in what was cut off";
    question.position -= begin;
  }
  EXPECT_LE(measure_recall(*make_backend("bf16"), task, 512, [](std::int64_t) {}).correct, 1);
}

}  // namespace

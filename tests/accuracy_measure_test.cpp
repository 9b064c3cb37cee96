// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "gemma4/model/accuracy.hpp"
#include "tests/support/refuses.hpp"

/// What is measured of which backend at which position, on backends whose logits are written in a table: which of the
/// two is the base, which token a position predicts, which row of a chunk is a question's.
namespace gemma4 {
namespace {

constexpr std::int64_t kVocab = 8;

/// Logits of the token at a position: of its id, its position and the backend's own salt.
class TableBackend {
 public:
  explicit TableBackend(int salt, std::int64_t max_chunk = 16) : salt_(salt), max_chunk_(max_chunk) {
    config_ = gemma4_tiny();
    config_.vocab = kVocab;
    config_.is_sliding = {1};
  }
  [[nodiscard]] const ModelConfig& config() const { return config_; }
  [[nodiscard]] std::int64_t context() const { return 64; }
  [[nodiscard]] std::int64_t max_chunk() const { return max_chunk_; }
  void embed(std::span<const std::int32_t> tokens, std::int64_t position) {
    tokens_.assign(tokens.begin(), tokens.end());
    position_ = position;
  }
  void project_qkv(std::int64_t /*layer*/) {}
  void attend(std::int64_t /*layer*/) {}
  void project_output(std::int64_t /*layer*/) {}
  void gate_up(std::int64_t /*layer*/) {}
  void down(std::int64_t /*layer*/) {}
  void lm_head(std::span<const std::int64_t> rows) { rows_.assign(rows.begin(), rows.end()); }
  void copy_logits(std::int64_t i, std::span<float> out) const {
    const std::int64_t row = rows_.at(static_cast<std::size_t>(i));
    const std::vector<float> logits = logits_of(tokens_.at(static_cast<std::size_t>(row)), position_ + row);
    std::copy(logits.begin(), logits.end(), out.begin());
  }
  void reset() {}
  [[nodiscard]] int range(const char* /*name*/) const { return 0; }

  /// The largest is that of the next id; the others depend on everything.
  [[nodiscard]] std::vector<float> logits_of(std::int32_t token, std::int64_t position) const {
    std::vector<float> logits(kVocab);
    for (std::int64_t v = 0; v < kVocab; ++v) {
      logits[static_cast<std::size_t>(v)] = static_cast<float>((v * 5 + position * 3 + salt_ * (v + 1)) % 7) / 4.0f;
    }
    logits[static_cast<std::size_t>((token + 1) % kVocab)] = 3.0f;
    return logits;
  }

 private:
  int salt_;
  std::int64_t max_chunk_;
  ModelConfig config_;
  std::vector<std::int32_t> tokens_;
  std::vector<std::int64_t> rows_;
  std::int64_t position_ = 0;
};

std::vector<std::int32_t> some_ids(std::int64_t count) {
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < count; ++i) ids.push_back(static_cast<std::int32_t>((i * i + 3) % kVocab));
  return ids;
}

bool same(const PositionAccuracy& a, const PositionAccuracy& b) {
  return a.nll == b.nll && a.kl == b.kl && a.same_top == b.same_top && a.probability_delta == b.probability_delta &&
         a.cosine == b.cosine;
}

TEST(AccuracyMeasure, EachBackendAgainstTheFirstForTheTokenThatComesNext) {
  TableBackend base(1), test(2), other(3);
  const std::vector<TableBackend*> backends = {&base, &test, &other};
  const std::vector<std::int32_t> ids = some_ids(41);
  const std::vector<std::int64_t> positions = {0, 3, 15, 16, 17, 39};
  std::vector<std::int64_t> done;
  const auto traces =
      measure_positions<TableBackend>(backends, ids, positions, 16, [&](std::int64_t n) { done.push_back(n); });
  ASSERT_EQ(traces.size(), 3u);
  bool order_shows = false, target_shows = false;
  for (std::size_t b = 0; b < 3; ++b) {
    ASSERT_EQ(traces[b].positions.size(), positions.size());
    ASSERT_EQ(traces[b].forward_s.size(), positions.size());
    for (std::size_t i = 0; i < positions.size(); ++i) {
      const auto at = static_cast<std::size_t>(positions[i]);
      const auto t = backends[b]->logits_of(ids[at], positions[i]), f = base.logits_of(ids[at], positions[i]);
      EXPECT_TRUE(same(traces[b].positions[i], compare_logits(t, f, ids[at + 1]))) << b << " at " << at;
      order_shows = order_shows || !same(compare_logits(t, f, ids[at + 1]), compare_logits(f, t, ids[at + 1]));
      target_shows = target_shows || !same(compare_logits(t, f, ids[at + 1]), compare_logits(t, f, ids[at]));
    }
  }
  EXPECT_TRUE(order_shows && target_shows) << "the control: another base or token is another result";
  EXPECT_EQ(done.back(), 3 * 40) << "positions times backends";
  EXPECT_EQ(done.size(), 9u);
  const auto all = measure_accuracy<TableBackend>(backends, ids, 40, 7, [](std::int64_t) {});
  ASSERT_EQ(all[1].positions.size(), 40u);
  for (std::size_t i = 0; i < positions.size(); ++i) {
    EXPECT_TRUE(same(all[1].positions[static_cast<std::size_t>(positions[i])], traces[1].positions[i]));
  }
}

/// What is in front of the first position may come from anywhere; what is looked at is the same.
TEST(AccuracyMeasure, BeginsWhereEachBackendIsBrought) {
  TableBackend base(1), test(2, 5);
  const std::vector<TableBackend*> backends = {&base, &test};
  const std::vector<std::int32_t> ids = some_ids(41);
  const std::vector<std::int64_t> positions = {33, 39};
  const auto whole = measure_positions<TableBackend>(backends, ids, positions, 16, [](std::int64_t) {});
  std::vector<std::size_t> brought;
  AccuracyStart<TableBackend> start{.position = 32, .bring = [&](std::size_t b, Model<TableBackend>& model) {
                                      EXPECT_EQ(model.position(), 0);
                                      brought.push_back(b);
                                      std::vector<std::int64_t> pieces;
                                      read_to(model, ids, 32, 16, [&](std::int64_t n) { pieces.push_back(n); });
                                      EXPECT_EQ(pieces, (std::vector<std::int64_t>{16, 16}));
                                      std::vector<float> logits(kVocab);
                                      model.backend().copy_logits(0, logits);
                                      EXPECT_EQ(logits, model.backend().logits_of(ids[31], 31));
                                    }};
  std::vector<std::int64_t> done;
  const auto on_chunk = [&](std::int64_t n) { done.push_back(n); };
  const auto traces = measure_positions<TableBackend>(backends, ids, positions, 16, on_chunk, start);
  EXPECT_EQ(brought, (std::vector<std::size_t>{0, 1}));
  EXPECT_EQ(done, (std::vector<std::int64_t>{32, 64, 72, 80}));
  for (std::size_t b = 0; b < 2; ++b) {
    for (std::size_t i = 0; i < 2; ++i) EXPECT_TRUE(same(traces[b].positions[i], whole[b].positions[i])) << b << i;
  }
  start.position = 34;
  const auto measure = [&] { (void)measure_positions<TableBackend>(backends, ids, positions, 16, on_chunk, start); };
  EXPECT_TRUE(testkit::refuses(measure, {"begins at 34", "first position 33"}));
  start.position = 33;
  EXPECT_TRUE(testkit::refuses(measure, {"backend 0 was brought to 32", "need 33"}));
}

TEST(AccuracyMeasure, ABackendOfShorterChunksTakesThemInPieces) {
  TableBackend base(1), whole(2), pieces(2, 5);
  const std::vector<TableBackend*> backends = {&base, &whole, &pieces};
  const std::vector<std::int32_t> ids = some_ids(41);
  const auto traces = measure_accuracy<TableBackend>(backends, ids, 40, 16, [](std::int64_t) {});
  const std::vector<std::int64_t> positions = {0, 4, 5, 15, 16, 21, 39};
  const auto some = measure_positions<TableBackend>(backends, ids, positions, 16, [](std::int64_t) {});
  for (std::size_t i = 0; i < 40; ++i) {
    EXPECT_TRUE(same(traces[2].positions[i], traces[1].positions[i])) << i;
    EXPECT_FALSE(same(traces[2].positions[i], traces[0].positions[i])) << i << ": the control";
  }
  for (std::size_t i = 0; i < positions.size(); ++i) {
    EXPECT_TRUE(same(some[2].positions[i], some[1].positions[i])) << positions[i];
  }
}

TEST(AccuracyMeasure, AQuestionIsAnsweredByAllOfItsTokensInItsOwnDocument) {
  // The backend says: the next id follows. Documents go up by one, but for a step at the places named.
  RecallTask task;
  task.document_len = 20;
  task.documents.resize(2);
  for (std::int64_t i = 0; i < 20; ++i) {
    task.documents[0].push_back(static_cast<std::int32_t>(i % kVocab));
    task.documents[1].push_back(static_cast<std::int32_t>((i + (i >= 10 ? 3 : 1)) % kVocab));
  }
  const auto ask = [&](std::int64_t document, std::int64_t position, std::vector<std::int32_t> answer) {
    task.questions = {{.document = document, .position = position, .answer = std::move(answer), .distance = 1}};
    std::int64_t correct = -1;
    for (const std::int64_t chunk : {1, 3, 7, 16}) {  // an answer within a chunk, and across two
      TableBackend backend(4);
      std::int64_t n_done = 0;
      const RecallResult result = measure_recall(backend, task, chunk, [&](std::int64_t n) { n_done = n; });
      EXPECT_EQ(result.total, 1);
      EXPECT_EQ(n_done, 40);
      EXPECT_TRUE(correct < 0 || correct == result.correct) << "chunk " << chunk;
      correct = result.correct;
    }
    return correct;
  };
  EXPECT_EQ(ask(0, 4, {5, 6}), 1);
  EXPECT_EQ(ask(0, 4, {4, 6}), 0) << "the first token is another";
  EXPECT_EQ(ask(0, 4, {5, 5}), 0) << "the last token is another";
  EXPECT_EQ(ask(1, 4, {6, 7, 0}), 1) << "the other document is one ahead";
  EXPECT_EQ(ask(1, 4, {5, 6, 7}), 0);
  EXPECT_EQ(ask(1, 8, {2, 5, 6}), 0) << "what the document holds behind the step, but the model does not say";
  EXPECT_EQ(ask(0, 18, {3}), 1) << "the last position but one";
  task.questions.clear();
  for (const std::int32_t answer : {5, 6, 5}) task.questions.push_back({0, 4, {answer}, 1});
  TableBackend backend(4);
  EXPECT_EQ(measure_recall(backend, task, 16, [](std::int64_t) {}).correct, 2) << "each question for itself";
}

TEST(AccuracyMeasure, RangesAreTheWholeAndItsParts) {
  const auto names = [](std::int64_t context) {
    std::string all;
    for (const PositionRange& range : position_ranges(context)) all += range.name() + ' ';
    return all;
  };
  EXPECT_EQ(names(100), "0-100 ");
  EXPECT_EQ(names(2048), "0-2048 ");
  EXPECT_EQ(names(2049), "0-2049 0-2048 2048-2049 ");
  EXPECT_EQ(names(8192), "0-8192 0-2048 2048-8192 ");
  EXPECT_EQ(names(131072), "0-131072 0-2048 2048-8192 8192-32768 32768-131072 ");
}

}  // namespace
}  // namespace gemma4

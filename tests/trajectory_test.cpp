// SPDX-License-Identifier: Apache-2.0
#include "gemma4/model/trajectory.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "gemma4/model/weights.hpp"
#include "reference/backend.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4 {
namespace {

using testkit::refuses;
using Texts = std::vector<std::vector<std::int32_t>>;

TEST(Trajectory, PromptsAreSpreadOverTheText) {
  std::vector<std::int32_t> ids;
  for (std::int32_t i = 0; i < 100; ++i) ids.push_back(i);
  const TrajectoryTask task = trajectory_task(ids, 3, 20, 7);
  ASSERT_EQ(task.prompts.size(), 3u);
  EXPECT_EQ(task.prompts[0].front(), 0);
  EXPECT_EQ(task.prompts[1].front(), 40);
  EXPECT_EQ(task.prompts[2].back(), 99);
  EXPECT_EQ(task.prompts[1].size(), 20u);
  EXPECT_EQ(task.context(), 27);
  EXPECT_EQ(trajectory_task(ids, 1, 100, 1).prompts[0], ids);
  EXPECT_TRUE(refuses([&] { (void)trajectory_task(ids, 1, 101, 1); }, {"101", "has 100"}));
  EXPECT_TRUE(refuses([&] { (void)trajectory_task(ids, 0, 10, 1); }, {"0 prompts"}));
  EXPECT_TRUE(refuses([&] { (void)trajectory_task(ids, 1, 10, 0); }, {"texts of 0"}));
}

TEST(Trajectory, AgreementIsByPlaceAndTheFirstDifferenceByText) {
  const Texts base = {{1, 2, 3, 4}, {5, 6, 7, 8}, {9, 9, 9, 9}};
  const Texts texts = {{1, 2, 3, 4}, {5, 0, 7, 8}, {9, 9, 9, 0}};
  const TrajectoryAgreement result = compare_texts(texts, base);
  EXPECT_EQ(result.first_difference, (std::vector<std::int64_t>{4, 1, 3})) << "4: none";
  ASSERT_EQ(result.agreement.size(), 4u);
  EXPECT_DOUBLE_EQ(result.agreement[0], 1.0);
  EXPECT_DOUBLE_EQ(result.agreement[1], 2.0 / 3.0) << "a text may come back to the base's";
  EXPECT_DOUBLE_EQ(result.agreement[2], 1.0);
  EXPECT_DOUBLE_EQ(result.agreement[3], 2.0 / 3.0);
  EXPECT_EQ(result.median_difference(), 3);
  EXPECT_DOUBLE_EQ(result.mean_agreement(0, 4), 10.0 / 12.0);
  EXPECT_DOUBLE_EQ(result.mean_agreement(1, 2), 2.0 / 3.0);
  const Texts two = {base[0], texts[1]};
  EXPECT_EQ(compare_texts(two, Texts{base[0], base[1]}).median_difference(), 1) << "of two the lower";
  EXPECT_TRUE(refuses([&] { (void)compare_texts(texts, Texts{base[0]}); }, {"3 texts against 1"}));
  EXPECT_TRUE(refuses([&] { (void)compare_texts(Texts{{1, 2}}, Texts{{1}}); }, {"text 0 has 2", "1"}));
}

/// Texts are what the model says when it is given its own words: each token is the largest logit behind the prompt and
/// the text so far, in one pass.
TEST(Trajectory, ATextIsWhatTheModelSaysOfItself) {
  const GgufFile file = GgufFile::open(std::filesystem::path(GEMMA4_TEST_DATA) / "tiny/tiny-a-Q4_K_M.gguf");
  const ModelWeights weights = weights_from_gguf(file);
  std::vector<std::int32_t> ids;
  for (std::int32_t i = 0; i < 60; ++i) ids.push_back((i * 37 + 11) % 1024);
  const TrajectoryTask task = trajectory_task(ids, 2, 25, 6);
  const reference::BackendOptions options{.cache = F32Format{}, .context = 31, .max_chunk = 31};
  reference::Backend<float> backend(weights, options), again(weights, options);
  std::int64_t n_done = 0;
  const Texts texts = greedy_texts(backend, task, 10, [&](std::int64_t n) { n_done = n; });
  EXPECT_EQ(n_done, 12);
  ASSERT_EQ(texts.size(), 2u);
  Model<reference::Backend<float>> model(again);
  std::vector<float> logits(1024);
  bool depends_on_text = false;
  for (std::size_t t = 0; t < 2; ++t) {
    std::vector<std::int32_t> all = task.prompts[t];
    all.insert(all.end(), texts[t].begin(), texts[t].end());
    model.reset();
    std::vector<std::int64_t> rows;
    for (std::int64_t i = 0; i < 6; ++i) rows.push_back(24 + i);
    model.forward(std::span(all).first(30), rows);
    for (std::size_t i = 0; i < 6; ++i) {
      again.copy_logits(static_cast<std::int64_t>(i), logits);
      EXPECT_EQ(argmax(logits), texts[t][i]) << t << ' ' << i;
      depends_on_text = depends_on_text || texts[t][i] != texts[t][0];
    }
  }
  EXPECT_TRUE(depends_on_text) << "the control: not one token over and over";
}

}  // namespace
}  // namespace gemma4

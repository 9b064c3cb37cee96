// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "gemma4/model/golden.hpp"
#include "reference/backend.hpp"

/// The whole model against logits that other implementations computed on the same files.
namespace {

using namespace gemma4;

const std::filesystem::path kData = GEMMA4_TEST_DATA;

/// Acceptance figures: agreed, not derived. How the roundings of a dozen layers grow has no bound that would say
/// anything, so these lie well above what was measured when they were set (0.0006 with float32 caches, the largest of
/// three models; 0.022 with bf16) and far below what a fault gives (another model's weights: 3.8). Who comes near one
/// asks why.
constexpr double kFloat32Acceptance = 3e-3;  ///< largest |logit - golden|, float32 throughout
constexpr double kBf16Acceptance = 5e-2;     ///< the same with K and V rounded to bf16

GoldenComparison run(const std::string& name, const std::string& cache, std::int64_t chunk = 500) {
  const GgufFile file = GgufFile::open(kData / (name + ".gguf"));
  const ModelWeights weights = weights_from_gguf(file);
  const GoldenLogits golden = read_golden_logits(kData / (name + "-logits.gguf"));
  reference::Backend<float> backend(
      weights,
      {.cache = parse_cache_spec(cache), .context = static_cast<std::int64_t>(golden.ids.size()), .max_chunk = chunk});
  return compare_with_golden(backend, golden, chunk, [](std::int64_t) {});
}

TEST(ModelGolden, TinyQ4KMatchesAtEveryPosition) {
  const GoldenComparison result = run("tiny/tiny-a-Q4_K_M", "f32");
  EXPECT_EQ(result.n_position, 33);
  EXPECT_EQ(result.n_same_argmax, 33);
  EXPECT_LE(result.max_abs, kFloat32Acceptance) << "worst at position " << result.worst_position;
}

TEST(ModelGolden, TinyQ6KMatchesAtEveryPosition) {
  const GoldenComparison result = run("tiny/tiny-a-Q6_K", "f32");
  EXPECT_EQ(result.n_position, 33);
  EXPECT_EQ(result.n_same_argmax, 33);
  EXPECT_LE(result.max_abs, kFloat32Acceptance) << "worst at position " << result.worst_position;
}

TEST(ModelGolden, NanoMatchesWithAFloat32Cache) {
  const GoldenComparison result = run("nano/nano-Q4_K_M", "f32");
  EXPECT_EQ(result.n_position, 16);
  EXPECT_LE(result.max_abs, kFloat32Acceptance) << "worst at position " << result.worst_position;
}

TEST(ModelGolden, NanoMatchesWithABf16CacheWithinItsRounding) {
  const GoldenComparison result = run("nano/nano-Q4_K_M", "bf16");
  EXPECT_LE(result.max_abs, kBf16Acceptance) << "worst at position " << result.worst_position;
  EXPECT_GT(result.max_abs, kFloat32Acceptance) << "the control: a bf16 cache that rounds nothing is not one";
}

TEST(ModelGolden, AnotherModelsLogitsDoNotMatch) {  // the control: the weights of the Q6_K file are others
  const GgufFile file = GgufFile::open(kData / "tiny/tiny-a-Q6_K.gguf");
  const ModelWeights weights = weights_from_gguf(file);
  GoldenLogits golden = read_golden_logits(kData / "tiny/tiny-a-Q4_K_M-logits.gguf");
  golden.ids.resize(200);
  while (golden.positions.back() >= 200) golden.positions.pop_back();
  reference::Backend<float> backend(weights, {.cache = {}, .context = 200, .max_chunk = 200});
  EXPECT_GT(compare_with_golden(backend, golden, 200, [](std::int64_t) {}).max_abs, 10 * kBf16Acceptance);
}

}  // namespace

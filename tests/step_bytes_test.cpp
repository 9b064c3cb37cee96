// SPDX-License-Identifier: Apache-2.0
#include "gemma4/plan/step_bytes.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace gemma4 {
namespace {

struct Model {
  ModelConfig config;
  std::vector<ModelTensor> tensors = model_tensors(config);
};

StepBytes bytes_of(const Model& model, const std::string& cache, std::int64_t depth) {
  return step_read_bytes(model.config, model.tensors, parse_cache_spec(cache), depth);
}

/// Q4_K has 144 B for 256 weights; a Q6_K row of 5376 weights takes 4416 B on a device, one of 21504 weights 4 of them.
TEST(StepBytes, WeightsOfTheThirtyOneBillionFromTheirShapes) {
  constexpr std::int64_t kHidden = 5376, kFfn = 21504, kQ4K = 144, kRow = 4416;
  const auto q4 = [](std::int64_t rows, std::int64_t cols) { return rows * cols / 256 * kQ4K; };
  const std::int64_t sliding = q4(8192 + 4096, kHidden) + q4(kHidden, 8192);  // q, k, output of 50 layers
  const std::int64_t full = q4(16384 + 2048, kHidden) + q4(kHidden, 16384);   // q, k (v is k), output of 10 layers
  const std::int64_t v = 25 * q4(4096, kHidden) + 25 * 4096 * kRow;
  const std::int64_t mlp = 60 * q4(2 * kFfn, kHidden) + 30 * q4(kHidden, kFfn) + 30 * kHidden * 4 * kRow;
  const std::int64_t head = 262144 * kRow;
  const std::int64_t norms = 4 * (60 * 4 * kHidden + kHidden + 50 * 2 * 256 + 10 * 2 * 512);
  const Model model{gemma4_31b()};
  EXPECT_EQ(bytes_of(model, "tq4", 0).weights, 50 * sliding + 10 * full + v + mlp + head + norms);
  EXPECT_EQ(bytes_of(model, "bf16", 4096).weights, bytes_of(model, "tq4", 0).weights) << "whatever the cache";
}

TEST(StepBytes, WeightsAreThePlansButForItsRoundingUp) {
  for (const Model& model : {Model{gemma4_31b()}, Model{gemma4_nano()}, Model{gemma4_tiny()}}) {
    const MemoryPlan plan = plan_memory(model.config, model.tensors, {});
    std::int64_t planned = 0;
    for (const PlannedBuffer& buffer : plan.buffers) planned += buffer.name.starts_with("weights_") ? buffer.bytes : 0;
    const std::int64_t weights = bytes_of(model, "tq4", 0).weights;
    EXPECT_LE(weights, planned);
    EXPECT_LT(planned - weights, kDeviceAlignment * static_cast<std::int64_t>(model.tensors.size()));
  }
}

TEST(StepBytes, FullLayersReadAllKeysAndSlidingLayersTheirWindow) {
  const Model model{gemma4_31b()};
  constexpr std::int64_t kSlidingKey = 50 * 16 * 2 * 256 * 2;  // layers, heads, K and V, values, bf16
  constexpr std::int64_t kFullBf16 = 10 * 4 * 2 * 512 * 2, kFullTq4 = 10 * 4 * 2 * (512 / 2 + 2);
  EXPECT_EQ(bytes_of(model, "tq4", 0).cache, 0) << "the first token sees itself alone";
  EXPECT_EQ(bytes_of(model, "tq4", 1).cache, kSlidingKey + kFullTq4);
  EXPECT_EQ(bytes_of(model, "bf16", 1023).cache, 1023 * (kSlidingKey + kFullBf16));
  EXPECT_EQ(bytes_of(model, "bf16", 1024).cache, 1023 * kSlidingKey + 1024 * kFullBf16)
      << "its own key is the window's";
  EXPECT_EQ(bytes_of(model, "tq4", 130048).cache, 1023 * kSlidingKey + 130048 * kFullTq4);
  EXPECT_EQ(bytes_of(model, "f32", 130048).cache, 2 * bytes_of(model, "bf16", 130048).cache);
}

TEST(StepBytes, TheMeanIsOfTheStepsOfAWindow) {
  const Model model{gemma4_31b()};
  const auto mean = [&](std::int64_t depth, std::int64_t n_token) {
    return mean_step_read_bytes(model.config, model.tensors, parse_cache_spec("tq4"), depth, n_token);
  };
  const auto total = [&](std::int64_t depth) { return static_cast<double>(bytes_of(model, "tq4", depth).total()); };
  EXPECT_EQ(mean(512, 1), total(512));
  EXPECT_EQ(mean(1022, 3), (total(1022) + total(1023) + total(1024)) / 3) << "over the end of the window";
  EXPECT_THROW((void)mean(512, 0), std::invalid_argument);
  EXPECT_THROW((void)mean(-1, 1), std::invalid_argument);
}

}  // namespace
}  // namespace gemma4

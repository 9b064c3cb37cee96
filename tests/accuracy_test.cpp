// SPDX-License-Identifier: Apache-2.0
#include "gemma4/model/accuracy.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <vector>

#include "gemma4/model/weights.hpp"
#include "reference/backend.hpp"

namespace gemma4 {
namespace {

using TinyBackend = reference::Backend<float>;

std::vector<std::int32_t> some_ids(std::int64_t count) {
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < count; ++i) ids.push_back(static_cast<std::int32_t>((i * 37 + 11) % 1024));
  return ids;
}

TEST(Accuracy, PositionsAskedForAreThoseOfAllPositions) {
  const GgufFile file = GgufFile::open(std::filesystem::path(GEMMA4_TEST_DATA) / "tiny/tiny-a-Q4_K_M.gguf");
  const ModelWeights weights = weights_from_gguf(file);
  TinyBackend base(weights, {.cache = parse_cache_spec("f32"), .context = 48, .max_chunk = 16});
  TinyBackend test(weights, {.cache = parse_cache_spec("tq4-k2v2"), .context = 48, .max_chunk = 16});
  const std::vector<TinyBackend*> backends = {&base, &test};
  const std::vector<std::int32_t> ids = some_ids(49);
  const auto all = measure_accuracy<TinyBackend>(backends, ids, 48, 16, [](std::int64_t) {});
  const std::vector<std::int64_t> positions = {0, 3, 15, 16, 40};  // a chunk without one, and both ends of another
  const auto some = measure_positions<TinyBackend>(backends, ids, positions, 16, [](std::int64_t) {});
  double largest = 0;
  for (std::size_t b = 0; b < 2; ++b) {
    ASSERT_EQ(some[b].positions.size(), positions.size());
    ASSERT_EQ(some[b].forward_s.size(), positions.size());
    for (std::size_t i = 0; i < positions.size(); ++i) {
      const PositionAccuracy& expected = all[b].positions[static_cast<std::size_t>(positions[i])];
      // One row or sixteen: the product may add in another order.
      EXPECT_NEAR(some[b].positions[i].nll, expected.nll, 1e-4) << positions[i];
      EXPECT_NEAR(some[b].positions[i].kl, expected.kl, 1e-4) << positions[i];
      largest = std::max(largest, expected.kl);
    }
  }
  EXPECT_GT(largest, 1e-3) << "control: the formats differ by more than the tolerance";
}

TEST(Accuracy, PositionsBeforeDepths) {
  EXPECT_EQ(positions_before(std::vector<std::int64_t>{4, 10}, 3), (std::vector<std::int64_t>{1, 2, 3, 7, 8, 9}));
  EXPECT_EQ(positions_before(std::vector<std::int64_t>{3, 4}, 3), (std::vector<std::int64_t>{0, 1, 2, 3}))
      << "windows may overlap";
  EXPECT_THROW((void)positions_before(std::vector<std::int64_t>{2}, 3), std::invalid_argument);
  EXPECT_THROW((void)positions_before(std::vector<std::int64_t>{2}, 0), std::invalid_argument);
}

TEST(Accuracy, RefusesPositionsThatDoNotFit) {
  const GgufFile file = GgufFile::open(std::filesystem::path(GEMMA4_TEST_DATA) / "tiny/tiny-a-Q4_K_M.gguf");
  const ModelWeights weights = weights_from_gguf(file);
  TinyBackend backend(weights, {.cache = parse_cache_spec("f32"), .context = 48, .max_chunk = 16});
  const std::vector<TinyBackend*> backends = {&backend};
  const auto measure = [&](const std::vector<std::int32_t>& ids, const std::vector<std::int64_t>& positions) {
    (void)measure_positions<TinyBackend>(backends, ids, positions, 16, [](std::int64_t) {});
  };
  EXPECT_THROW(measure(some_ids(8), {7}), std::invalid_argument) << "no token after it";
  EXPECT_THROW(measure(some_ids(8), {3, 3}), std::invalid_argument);
  EXPECT_THROW(measure(some_ids(8), {-1}), std::invalid_argument);
  EXPECT_THROW(measure(some_ids(8), {}), std::invalid_argument);
  EXPECT_THROW(measure({1, 2, 1024}, {0}), std::invalid_argument) << "outside the vocabulary";
  EXPECT_NO_THROW(measure(some_ids(8), {6}));
}

}  // namespace
}  // namespace gemma4

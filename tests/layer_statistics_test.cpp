// SPDX-License-Identifier: Apache-2.0
#include "reference/layer_statistics.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <span>
#include <stdexcept>
#include <vector>

#include "gemma4/cache_formats.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/synthetic/synthetic_weights.hpp"
#include "reference/backend.hpp"

namespace {

using gemma4::parse_cache_spec;
using gemma4::reference::layer_statistics;
using gemma4::reference::LayerStatistics;
using gemma4::reference::Matrix;

constexpr auto kIgnore = [](std::int64_t) {};

/// The trained nano model: five sliding layers, a full one, and so on twice.
class LayerStatisticsOfNano : public testing::Test {
 protected:
  LayerStatisticsOfNano()
      : file_(gemma4::GgufFile::open(std::filesystem::path(GEMMA4_TEST_DATA) / "nano/nano-Q4_K_M.gguf")),
        weights_(gemma4::weights_from_gguf(file_)) {
    gemma4::RowRandom random(1, "tokens", 0);
    for (std::int32_t& id : ids_) {
      id = static_cast<std::int32_t>(random.next() % static_cast<std::uint64_t>(weights_.config.vocab));
    }
  }

  std::vector<LayerStatistics> run(std::int64_t chunk, const char* test) const {
    return layer_statistics(weights_, ids_, chunk, 16, parse_cache_spec("bf16"), parse_cache_spec(test), kIgnore);
  }

  gemma4::GgufFile file_;
  gemma4::ModelWeights weights_;
  std::vector<std::int32_t> ids_ = std::vector<std::int32_t>(80);
};

TEST_F(LayerStatisticsOfNano, TheSameCacheHasNoErrorAndAnotherHasItWhereItIsRead) {
  for (const LayerStatistics& layer : run(80, "bf16")) {
    EXPECT_EQ(layer.stream_error, 0);
    EXPECT_EQ(layer.attention_error, 0);
    EXPECT_EQ(layer.code_error, 0);
  }
  const std::vector<LayerStatistics> layers = run(80, "tq4");
  ASSERT_EQ(layers.size(), 12u);
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    EXPECT_EQ(layers[layer].stream_error > 0, layer >= 5) << layer;
    EXPECT_EQ(layers[layer].code_error > 0, layer == 5 || layer == 11) << layer;
  }
  EXPECT_EQ(layers[5].attention_error, layers[5].code_error) << "nothing has gone wrong below";
  EXPECT_NE(layers[11].attention_error, layers[11].code_error);
}

// Float sums in another order, and codes next to a boundary; statistics are means over 16 rows.
TEST_F(LayerStatisticsOfNano, ChunksDoNotMatter) {
  const std::vector<LayerStatistics> whole = run(80, "tq4"), pieces = run(17, "tq4");
  for (std::size_t layer = 0; layer < whole.size(); ++layer) {
    const LayerStatistics &a = whole[layer], &b = pieces[layer];
    EXPECT_NEAR(b.score_deviation, a.score_deviation, 1e-3) << layer;
    EXPECT_NEAR(b.n_key, a.n_key, 1e-2 * a.n_key) << layer;
    EXPECT_NEAR(b.attention_ratio, a.attention_ratio, 1e-3) << layer;
    EXPECT_NEAR(b.mlp_ratio, a.mlp_ratio, 1e-3) << layer;
    EXPECT_NEAR(b.stream_error, a.stream_error, 0.1 * a.stream_error + 1e-6) << layer;
  }
}

TEST_F(LayerStatisticsOfNano, TheStreamIsTheModels) {
  gemma4::reference::Backend<float> backend(weights_, {.cache = parse_cache_spec("bf16"), .context = 80});
  gemma4::Model model(backend);
  const std::vector<LayerStatistics> layers = run(80, "bf16");
  std::vector<float> stream(80 * static_cast<std::size_t>(weights_.config.hidden));
  model.forward(ids_, {}, [&](std::int64_t layer) {
    backend.copy_residual(stream);
    double sum = 0;
    const auto last = std::span(stream).last(16 * static_cast<std::size_t>(weights_.config.hidden));
    for (const float value : last) sum += static_cast<double>(value) * value;
    EXPECT_NEAR(layers[static_cast<std::size_t>(layer)].stream_rms, std::sqrt(sum / static_cast<double>(last.size())),
                1e-5)
        << layer;
  });
}

TEST_F(LayerStatisticsOfNano, RefusesRowsThatAreNotInOneChunk) {
  EXPECT_THROW((void)run(15, "bf16"), std::invalid_argument);
  EXPECT_THROW((void)run(0, "bf16"), std::invalid_argument);
}

TEST(WeightSpread, IsOfMagnitudes) {
  const auto of = [](const std::vector<float>& weights) { return gemma4::reference::weight_spread(weights); };
  const auto spread = of({-4.0f, 2.0f, 0.5f, -1.0f});
  EXPECT_EQ(spread.min, 0.5);
  EXPECT_EQ(spread.max, 4.0);
  EXPECT_EQ(spread.ratio, 8.0);
  EXPECT_EQ(spread.near_zero, 0);
  const auto with_zeros = of({1.0f, -1.0f, 0.0f, 0.008f, -0.006f, 1.0f, 1.0f, 1.0f});  // RMS 0.79
  EXPECT_EQ(with_zeros.near_zero, 2);
  EXPECT_TRUE(std::isinf(with_zeros.ratio));
  EXPECT_THROW((void)of({}), std::invalid_argument);
}

TEST(CommonShare, IsThatOfTheVectorThatRowsHaveInCommon) {
  gemma4::RowRandom random(3, "rows", 0);
  for (const double share : {0.0, 0.5, 1.0}) {
    Matrix<float> rows(200, 400);
    for (Eigen::Index r = 0; r < rows.rows(); ++r) {
      for (Eigen::Index c = 0; c < rows.cols(); ++c) {
        const double common = c % 3 == 0 ? -1 : 1;
        rows(r, c) = static_cast<float>(share * common + std::sqrt(1 - share * share) * random.normal());
      }
    }
    // Chance leaves 1 / sqrt(400) of the mean square's noise, 1 / 200, to the square of the share.
    EXPECT_NEAR(gemma4::reference::common_share(rows), share, 0.03);
  }
}

}  // namespace

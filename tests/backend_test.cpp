// SPDX-License-Identifier: Apache-2.0
#include "reference/backend.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "tests/support/small_model.hpp"

/// What the reference backend gives out and takes in between the steps of the graph (the graph itself: model_test.cpp).
namespace {

using namespace gemma4;
using testkit::SmallModel;

class ReferenceBackend : public testing::Test {
 protected:
  ReferenceBackend() : small_(gemma4_tiny(), 21), backend_(small_.weights, {.cache = {}, .context = 16}) {}

  void run_layers(std::int64_t first, std::int64_t last) {
    for (std::int64_t layer = first; layer < last; ++layer) {
      backend_.project_qkv(layer);
      backend_.attend(layer);
      backend_.project_output(layer);
      backend_.gate_up(layer);
      backend_.down(layer);
    }
  }
  [[nodiscard]] std::vector<float> residual() const {
    std::vector<float> values(tokens_.size() * static_cast<std::size_t>(small_.weights.config.hidden));
    backend_.copy_residual(values);
    return values;
  }
  [[nodiscard]] std::vector<float> logits(std::int64_t i) const {
    std::vector<float> values(static_cast<std::size_t>(small_.weights.config.vocab));
    backend_.copy_logits(i, values);
    return values;
  }

  const std::vector<std::int32_t> tokens_ = {7, 300, 12, 55};
  const std::vector<std::int64_t> rows_ = {3, 1};
  SmallModel small_;
  reference::Backend<float> backend_;
};

TEST_F(ReferenceBackend, TheResidualThatIsReadIsTheOneThatGoesOn) {
  const std::int64_t n_layer = small_.weights.config.n_layer();
  backend_.embed(tokens_, 0);
  const std::vector<float> embedded = residual();
  run_layers(0, 2);
  const std::vector<float> between = residual();
  EXPECT_NE(between, embedded);
  EXPECT_EQ(residual(), between) << "reading changes nothing";
  run_layers(2, n_layer);
  backend_.lm_head(rows_);
  const std::vector<float> last = logits(0), second = logits(1);
  EXPECT_NE(last, second) << "the control: rows differ";

  // The same once more, with what was read put in by hand: nothing is pending then, and nothing is added twice.
  const auto again_with = [&](const std::vector<float>& values) {
    backend_.reset();
    backend_.embed(tokens_, 0);
    run_layers(0, 2);
    backend_.set_residual(values);
    EXPECT_EQ(residual(), values);
    run_layers(2, n_layer);
    backend_.lm_head(rows_);
  };
  again_with(between);
  EXPECT_EQ(logits(0), last);
  EXPECT_EQ(logits(1), second);
  std::vector<float> other = between;
  for (float& value : other) value = 0.5f - value;
  again_with(other);
  EXPECT_NE(logits(0), last) << "the control: what is put in counts";
}

TEST_F(ReferenceBackend, RefusesWhatDoesNotFit) {
  backend_.embed(tokens_, 0);
  std::vector<float> small(3), row(static_cast<std::size_t>(small_.weights.config.vocab));
  EXPECT_THROW(backend_.copy_residual(small), std::invalid_argument);
  EXPECT_THROW(backend_.set_residual(small), std::invalid_argument);
  backend_.lm_head(rows_);
  EXPECT_NO_THROW(backend_.copy_logits(1, row));
  EXPECT_THROW(backend_.copy_logits(2, row), std::invalid_argument);
  EXPECT_THROW(backend_.copy_logits(-1, row), std::invalid_argument);
  EXPECT_THROW(backend_.copy_logits(0, small), std::invalid_argument);
}

}  // namespace

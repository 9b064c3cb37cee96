// SPDX-License-Identifier: Apache-2.0
#include "reference/embedding.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "tests/support/property.hpp"
#include "tests/support/random_weights.hpp"

namespace {

using namespace gemma4;
using reference::Matrix;

RC_GTEST_PROP(Embedding, IsTheDequantisedRowTimesTheScaleExactly, ()) {
  const auto table = testkit::random_weights(*rc::gen::elementOf(testkit::kWeightTypes), 37, 512,
                                             *rc::gen::arbitrary<std::uint32_t>());
  const auto tokens = *rc::gen::nonEmpty(rc::gen::container<std::vector<std::int32_t>>(rc::gen::inRange(0, 37)));
  constexpr float kScale = 22.627417f;
  Matrix<float> out(static_cast<Eigen::Index>(tokens.size()), 512);
  reference::embedding<float>(tokens, table.view(), kScale, out);
  std::vector<float> row(512);
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    dequantise_row(table.type, table.view().row(tokens[t]), row);
    for (std::size_t i = 0; i < row.size(); ++i) {
      RC_ASSERT(out(static_cast<Eigen::Index>(t), static_cast<Eigen::Index>(i)) == row[i] * kScale);
    }
  }
}

TEST(Embedding, NeighbouringTokensDiffer) {  // the control: a lookup that is off by one row would be seen
  const auto table = testkit::random_weights(TensorType::kQ6K, 4, 256, 3);
  Matrix<float> out(2, 256);
  reference::embedding<float>(std::vector<std::int32_t>{1, 2}, table.view(), 1.0f, out);
  EXPECT_NE(out.row(0), out.row(1));
}

TEST(Embedding, RefusesATokenOutsideTheVocabulary) {
  const auto table = testkit::random_weights(TensorType::kQ6K, 4, 256, 3);
  Matrix<float> out(2, 256);
  for (const std::int32_t bad : {-1, 4}) {
    try {
      reference::embedding<float>(std::vector<std::int32_t>{0, bad}, table.view(), 1.0f, out);
      FAIL() << bad;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find("token " + std::to_string(bad) + " at 1"), std::string::npos);
    }
  }
}

}  // namespace

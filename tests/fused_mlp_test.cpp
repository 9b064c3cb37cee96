// SPDX-License-Identifier: Apache-2.0
#include "reference/fused_mlp.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/random_matrix.hpp"
#include "tests/support/random_weights.hpp"

namespace {

using namespace gemma4;
using reference::Matrix;

struct Mlp {
  testkit::OwnedMatrix gate, up, down;
  Matrix<float> x;
};

Mlp any_mlp() {
  const std::int64_t hidden = *rc::gen::inRange<std::int64_t>(1, 3) * 256;
  const std::int64_t ffn_hidden = *rc::gen::inRange<std::int64_t>(1, 4) * 256;
  const auto type = [] { return *rc::gen::elementOf(testkit::kWeightTypes); };
  const auto seed = *rc::gen::arbitrary<std::uint32_t>();
  return {testkit::random_weights(type(), ffn_hidden, hidden, seed, 0.1f),
          testkit::random_weights(type(), ffn_hidden, hidden, seed + 1, 0.1f),
          testkit::random_weights(type(), hidden, ffn_hidden, seed + 2, 0.1f),
          testkit::random_matrix<float>(seed, *rc::gen::inRange<std::int64_t>(1, 20), hidden)};
}

using MlpFunction = void (*)(reference::ConstMatrixRef<float>, const QuantizedMatrix&, const QuantizedMatrix&,
                             const QuantizedMatrix&, reference::MatrixRef<float>);

Matrix<float> run(MlpFunction function, const Mlp& mlp) {
  Matrix<float> out(mlp.x.rows(), mlp.x.cols());
  function(mlp.x, mlp.gate.view(), mlp.up.view(), mlp.down.view(), out);
  return out;
}

RC_GTEST_PROP(FusedMlp, IsBitIdenticalToTheUnfusedPathForEveryPairOfTypes, ()) {
  const Mlp mlp = any_mlp();
  const Matrix<float> fused = run(reference::fused_mlp<float>, mlp), unfused = run(reference::unfused_mlp<float>, mlp);
  RC_ASSERT(fused.allFinite());
  RC_ASSERT(fused == unfused);
}

TEST(FusedMlp, SwappedGateAndUpDiffer) {  // the control: the property above sees which matrix is gated
  Mlp mlp{testkit::random_weights(TensorType::kQ4K, 256, 256, 1, 0.1f),
          testkit::random_weights(TensorType::kQ4K, 256, 256, 2, 0.1f),
          testkit::random_weights(TensorType::kQ6K, 256, 256, 3, 0.1f), testkit::random_matrix<float>(4, 3, 256)};
  const Matrix<float> right = run(reference::fused_mlp<float>, mlp);
  std::swap(mlp.gate, mlp.up);
  EXPECT_NE(right, run(reference::unfused_mlp<float>, mlp));
}

TEST(FusedMlp, GeluFollowsItsFormula) {
  Matrix<double> gate(1, 41);
  for (Eigen::Index i = 0; i < 41; ++i) gate(0, i) = 0.5 * static_cast<double>(i) - 10.0;
  const Matrix<double> actual = reference::gelu_times<double>(gate, Matrix<double>::Constant(1, 41, 3.0));
  std::vector<double> expected, identity;
  for (Eigen::Index i = 0; i < 41; ++i) {
    const double x = gate(0, i);
    expected.push_back(3.0 * 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))));
    identity.push_back(3.0 * 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))));
  }
  const std::span values(actual.data(), 41);
  EXPECT_TRUE(testkit::close(values, expected, 1e-13));
  EXPECT_FALSE(testkit::close(values, identity, 1e-4)) << "the exact GELU is another function";
}

TEST(FusedMlp, RefusesAPairOfDifferentShapes) {
  const auto gate = testkit::random_weights(TensorType::kQ4K, 256, 256, 1);
  const auto up = testkit::random_weights(TensorType::kQ4K, 512, 256, 1);
  const auto down = testkit::random_weights(TensorType::kQ4K, 256, 256, 1);
  Matrix<float> x = Matrix<float>::Zero(1, 256), out(1, 256);
  EXPECT_THROW(reference::fused_mlp<float>(x, gate.view(), up.view(), down.view(), out), std::invalid_argument);
  EXPECT_THROW(reference::unfused_mlp<float>(x, gate.view(), up.view(), down.view(), out), std::invalid_argument);
}

}  // namespace

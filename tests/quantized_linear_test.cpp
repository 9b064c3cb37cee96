// SPDX-License-Identifier: Apache-2.0
#include "reference/quantized_linear.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/random_matrix.hpp"
#include "tests/support/random_weights.hpp"

namespace {

using namespace gemma4;
using reference::Matrix;

struct Case {
  testkit::OwnedMatrix weight;
  Matrix<double> x;
};

Case any_case() {
  const auto type = *rc::gen::elementOf(testkit::kWeightTypes);
  const std::int64_t cols = *rc::gen::inRange<std::int64_t>(1, 4) * 256;
  const std::int64_t rows = *rc::gen::inRange<std::int64_t>(1, 300);  // below, at and beyond the tile of 128
  const std::int64_t n_token = *rc::gen::inRange<std::int64_t>(1, 9);
  return {testkit::random_weights(type, rows, cols, *rc::gen::arbitrary<std::uint32_t>()),
          testkit::random_matrix<float>(*rc::gen::arbitrary<std::uint64_t>(), n_token, cols).cast<double>()};
}

/// The definition in double on the whole dequantised matrix, and for each output the sum of |x| |w|.
struct Expected {
  std::vector<double> value, magnitude;
};

Expected by_definition(const Case& c) {
  Expected expected;
  std::vector<float> row(static_cast<std::size_t>(c.weight.cols));
  Matrix<double> w(c.weight.rows, c.weight.cols);
  for (std::int64_t n = 0; n < c.weight.rows; ++n) {
    dequantise_row(c.weight.type, c.weight.view().row(n), row);
    for (std::int64_t k = 0; k < c.weight.cols; ++k) w(n, k) = static_cast<double>(row[static_cast<std::size_t>(k)]);
  }
  for (Eigen::Index t = 0; t < c.x.rows(); ++t) {
    for (std::int64_t n = 0; n < c.weight.rows; ++n) {
      double sum = 0, magnitude = 0;
      for (std::int64_t k = 0; k < c.weight.cols; ++k) {
        sum += c.x(t, k) * w(n, k);
        magnitude += std::abs(c.x(t, k) * w(n, k));
      }
      expected.value.push_back(sum);
      expected.magnitude.push_back(magnitude);
    }
  }
  return expected;
}

template <class Scalar>
std::vector<double> run(const Case& c) {
  Matrix<Scalar> out = Matrix<Scalar>::Constant(c.x.rows(), c.weight.rows, std::numeric_limits<Scalar>::quiet_NaN());
  reference::quantized_linear<Scalar>(c.x.cast<Scalar>().eval(), c.weight.view(), out);
  const Matrix<double> wide = out.template cast<double>();
  return {wide.data(), wide.data() + wide.size()};
}

/// A sum of K products in any order errs by at most (K + 1) u sum |x w|, u = half an ulp of Scalar.
template <class Scalar>
std::vector<double> bounds(const Case& c, const Expected& expected) {
  const double u = std::numeric_limits<Scalar>::epsilon() / 2;
  std::vector<double> bound;
  for (const double magnitude : expected.magnitude) {
    bound.push_back((static_cast<double>(c.weight.cols) + 1) * (u + 0x1p-53) * magnitude);
  }
  return bound;
}

RC_GTEST_PROP(QuantizedLinear, EqualsTheDequantisedMatrixInEveryFormat, ()) {
  const Case c = any_case();
  const Expected expected = by_definition(c);
  testkit::rc_require(testkit::close(run<float>(c), expected.value, bounds<float>(c, expected)), "float");
  testkit::rc_require(testkit::close(run<double>(c), expected.value, bounds<double>(c, expected)), "double");
}

TEST(QuantizedLinear, ABoundThatASingleWrongCodeBreaks) {  // the control: one code of one weight changed by one
  const auto place_of_a_code = [](TensorType type) -> std::int64_t {
    if (type == TensorType::kQ2K) return 16;
    if (type == TensorType::kQ3K) return 32;
    return type == TensorType::kQ6K ? 0 : block_bytes(type) - 1;
  };
  for (const TensorType type : kWeightTypes) {
    if (block_size(type) == 1) continue;
    Case c{testkit::random_weights(type, 3, 256, 7), Matrix<double>::Ones(1, 256)};
    const Expected expected = by_definition(c);
    EXPECT_TRUE(testkit::close(run<float>(c), expected.value, bounds<float>(c, expected)));
    c.weight.bytes[static_cast<std::size_t>(place_of_a_code(type))] ^= std::byte{1};
    EXPECT_FALSE(testkit::close(run<float>(c), expected.value, bounds<float>(c, expected))) << type_name(type);
  }
}

RC_GTEST_PROP(QuantizedLinear, RunTwiceIsBitIdentical, ()) {
  const Case c = any_case();
  RC_ASSERT(run<float>(c) == run<float>(c));
}

TEST(QuantizedLinear, RefusesShapesThatDoNotFit) {
  const auto weight = testkit::random_weights(TensorType::kQ4K, 8, 256, 1);
  Matrix<float> x = Matrix<float>::Zero(2, 512), out(2, 8);
  EXPECT_THROW(reference::quantized_linear<float>(x, weight.view(), out), std::invalid_argument);
  x.resize(2, 256);
  out.resize(2, 7);
  EXPECT_THROW(reference::quantized_linear<float>(x, weight.view(), out), std::invalid_argument);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include "cuda/softmax_state.cuh"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/launch.cuh"
#include "reference/softmax_state.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"

namespace gemma4::cuda {
namespace {

using testkit::rc_require;

constexpr float kHidden = -std::numeric_limits<float>::infinity();

/// One row, by one thread: each part takes its keys one by one, then the parts meet in order, as in the kernels.
/// @param begin [n_part + 1], the keys of part i are begin[i] to begin[i + 1] - 1
__global__ void weighted_mean_kernel(const float* score, const float* value, const int* begin, int n_part, float* out) {
  constexpr int kMaxPart = 32;
  SoftmaxState part[kMaxPart];
  float weighted[kMaxPart], maximum = -INFINITY;
  for (int p = 0; p < n_part; ++p) {
    weighted[p] = 0.0f;
    for (int key = begin[p]; key < begin[p + 1]; ++key) {
      const float factor = part[p].raise(score[key]);
      const float weight = exp2_approx(score[key] - part[p].reference());
      part[p].sum = fmaf(part[p].sum, factor, weight);
      weighted[p] = fmaf(weighted[p], factor, weight * value[key]);
    }
    maximum = fmaxf(maximum, part[p].maximum);
  }
  SoftmaxState all{.maximum = maximum, .sum = 0.0f};
  float sum = 0.0f;
  for (int p = 0; p < n_part; ++p) {
    const float factor = exp2_approx(part[p].maximum - all.reference());
    all.sum = fmaf(part[p].sum, factor, all.sum);
    sum = fmaf(weighted[p], factor, sum);
  }
  *out = sum * all.inverse();
}

float on_device(const std::vector<float>& scores, const std::vector<float>& values, const std::vector<int>& begin) {
  const DeviceBuffer<float> score(scores), value(values);
  const DeviceBuffer<int> parts(begin);
  DeviceBuffer<float> out(1);
  out.fill_bytes(0xFF);
  detail::Launch{.what = "weighted_mean_kernel"}(weighted_mean_kernel, score.data(), value.data(), parts.data(),
                                                 static_cast<int>(begin.size()) - 1, out.data());
  return out.to_host()[0];
}

double in_double(const std::vector<float>& scores, const std::vector<float>& values) {
  const auto n = static_cast<Eigen::Index>(scores.size());
  reference::Matrix<double> score(1, n), value(n, 1);
  for (Eigen::Index i = 0; i < n; ++i) {
    score(0, i) = static_cast<double>(scores[static_cast<std::size_t>(i)]) * std::numbers::ln2;
    value(i, 0) = static_cast<double>(values[static_cast<std::size_t>(i)]);
  }
  reference::SoftmaxState<double> state(1, 1);
  state.absorb(score, value);
  return state.finish()(0, 0);
}

struct Row {
  std::vector<float> scores, values;
  std::vector<int> begin = {0};
};

/// Up to 64 keys, some of which the row does not see, in up to 16 parts, some without a key.
Row any_row() {
  Row row;
  const auto n_key = *rc::gen::inRange(1, 65), n_part = *rc::gen::inRange(1, 17);
  row.scores = testkit::draw(*rc::gen::inRange<std::uint64_t>(0, 1000), n_key, 30.0f);
  row.values = testkit::draw(*rc::gen::inRange<std::uint64_t>(1000, 2000), n_key, 1.0f);
  const auto hidden = *rc::gen::container<std::vector<int>>(static_cast<std::size_t>(n_key), rc::gen::inRange(0, 2));
  for (std::size_t i = 0; i < hidden.size(); ++i) row.scores[i] = hidden[i] == 1 ? kHidden : row.scores[i];
  for (int part = 1; part < n_part; ++part) row.begin.push_back(*rc::gen::inRange(row.begin.back(), n_key + 1));
  row.begin.push_back(n_key);
  return row;
}

/// The logarithm of a weight is off by at most d: at each of up to n_key + 2 factors 2^-22 of ex2.approx, and the
/// rounding of a difference of scores, 2^-24 of the largest difference. That moves the mean by (e^(2 d) - 1) V;
/// numerator and denominator are sums of n_key products: 2 (n_key + 2) 2^-24 V (attention_bound.hpp).
double bound_of(const Row& row) {
  double largest = 0, value = 0;
  for (const float score : row.scores) largest = std::fmax(largest, std::isinf(score) ? 0.0 : std::abs(score));
  for (const float v : row.values) value = std::fmax(value, std::abs(v));
  const auto n = static_cast<double>(row.scores.size());
  const double d = (n + 2) * (0x1p-22 + 2 * largest * std::numbers::ln2 * 0x1p-24);
  return value * (std::expm1(2 * d) + 2 * (n + 2) * 0x1p-24);
}

RC_GTEST_PROP(SoftmaxStateGpu, AnySplitAgreesWithTheReferenceInDouble, ()) {
  const Row row = any_row();
  rc_require(testkit::close(std::vector<float>{on_device(row.scores, row.values, row.begin)},
                            std::vector<double>{in_double(row.scores, row.values)}, bound_of(row)));
}

/// Control of the bound: two keys, one of them hidden from the oracle.
TEST(SoftmaxStateGpu, AMissingKeyIsBeyondTheBound) {
  const Row row{.scores = {1.0f, 0.0f}, .values = {1.0f, -1.0f}, .begin = {0, 1, 2}};
  const double all = in_double(row.scores, row.values), some = in_double({1.0f, kHidden}, row.values);
  const double got = static_cast<double>(on_device(row.scores, row.values, row.begin));
  EXPECT_NEAR(all, 1.0 / 3.0, 1e-15);
  EXPECT_LE(std::abs(got - all), bound_of(row));
  EXPECT_GT(std::abs(got - some), bound_of(row));
}

/// A part without keys, or whose keys the row does not see, is the exact identity wherever it stands.
RC_GTEST_PROP(SoftmaxStateGpu, PartsWithoutKeysLeaveEveryBit, ()) {
  Row row = any_row();
  const float before = on_device(row.scores, row.values, row.begin);
  const auto at = *rc::gen::inRange<std::size_t>(0, row.begin.size());
  const int key = row.begin[at];
  row.begin.insert(row.begin.begin() + static_cast<std::ptrdiff_t>(at), key);
  if (*rc::gen::arbitrary<bool>()) {  // with two hidden keys
    row.scores.insert(row.scores.begin() + key, 2, kHidden);
    row.values.insert(row.values.begin() + key, 2, 1e30f);
    for (std::size_t i = at + 1; i < row.begin.size(); ++i) row.begin[i] += 2;
  }
  const float after = on_device(row.scores, row.values, row.begin);
  RC_ASSERT(std::bit_cast<std::uint32_t>(before) == std::bit_cast<std::uint32_t>(after));
}

TEST(SoftmaxStateGpu, ARowThatSeesNoKeyGivesZeros) {
  EXPECT_EQ(on_device({kHidden, kHidden, kHidden}, {1.0f, 2.0f, 3.0f}, {0, 2, 2, 3}), 0.0f);
}

/// kFarBelow takes the place of -inf without a guard: as a maximum it has no weight beside any score, and the
/// difference of two is a number.
TEST(SoftmaxStateGpu, FarBelowIsBelowEveryScore) {
  EXPECT_EQ(std::exp2(kFarBelow - -1e20f), 0.0f);
  EXPECT_EQ(kFarBelow - kFarBelow, 0.0f);
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include "cuda/rms_norm.cuh"

#include <gtest/gtest.h>

#include "cuda/device/device_buffer.cuh"
#include "reference/rms_norm.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using reference::Matrix;
using testkit::close;
using testkit::rc_require;

/// The reference in double, and a bound for each value: (width / 256 + 20) roundings of float and one of the output.
struct Expected {
  std::vector<double> values, bounds;

  Expected(const std::vector<float>& x, std::int64_t n_row, std::int64_t width, const std::vector<float>& weight,
           float epsilon, double output_unit) {
    const Matrix<double> wide = Eigen::Map<const Matrix<float>>(x.data(), n_row, width).cast<double>();
    Matrix<double> out(n_row, width);
    reference::rms_norm<double>(wide, weight, epsilon, out);
    values.assign(out.data(), out.data() + out.size());
    for (const double value : values) {
      const double roundings = static_cast<double>(width) / 32 + 20;
      bounds.push_back(std::abs(value) * (roundings * 0x1p-24 + output_unit) + 1e-40);
    }
  }
};

template <class TIn, class TOut>
std::vector<float> on_device(const std::vector<float>& x, std::int64_t n_row, std::int64_t width,
                             const std::vector<float>& weight, float epsilon) {
  std::vector<TIn> stored(x.size());
  std::transform(x.begin(), x.end(), stored.begin(), from_float<TIn>);
  const DeviceBuffer<TIn> in(stored);
  const DeviceBuffer<float> scale(weight);
  DeviceBuffer<TOut> out(n_row * width);
  out.fill_bytes(0xFF);
  rms_norm<TIn, TOut>(make_view(in.data(), n_row, width), weight.empty() ? nullptr : scale.data(), epsilon,
                      make_view(out.data(), n_row, width), nullptr);
  std::vector<float> result;
  for (const TOut value : out.to_host()) result.push_back(to_float(value));
  return result;
}

/// Rows of heads and of tokens, with and without weight, float and bf16. Control: the weight left out.
RC_GTEST_PROP(RmsNormGpu, AgreesWithTheReferenceInDouble, ()) {
  const auto width = *rc::gen::element<std::int64_t>(1, 33, 64, 256, 512, 513, 768, 5376);
  const auto n_row = *rc::gen::inRange<std::int64_t>(1, 20);
  const auto seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  const auto amplitude = *rc::gen::element(1e-3f, 1.0f, 300.0f);
  const std::vector<float> x = testkit::draw(seed, n_row * width, amplitude);
  std::vector<float> weight;
  if (*rc::gen::arbitrary<bool>()) weight = testkit::draw(seed + 1, width, 3.0f);
  const Expected exact(x, n_row, width, weight, 1e-6f, 0x1p-8), fine(x, n_row, width, weight, 1e-6f, 0);
  rc_require(close(on_device<Bf16, Bf16>(x, n_row, width, weight, 1e-6f), exact.values, exact.bounds));
  rc_require(close(on_device<float, float>(x, n_row, width, weight, 1e-6f), fine.values, fine.bounds));
  // (One weight alone may lie near 1.)
  if (!weight.empty() && width > 1)
    RC_ASSERT(!close(on_device<Bf16, Bf16>(x, n_row, width, {}, 1e-6f), exact.values, exact.bounds));
}

TEST(RmsNormGpu, ZerosStayZeros) {
  for (const float value : on_device<Bf16, Bf16>(std::vector<float>(600), 1, 600, {}, 1e-6f)) EXPECT_EQ(value, 0.0f);
}

/// In place and twice: the same bits; rows beside the given ones stay. (A row's gap: x lies in rows of twice its
/// width.)
TEST(RmsNormGpu, InPlaceKeepsWhatIsBesideTheRows) {
  for (const std::int64_t width : {64, 512, 768, 5376, 13}) {
    const std::int64_t n_row = 9;
    const std::vector<float> x = testkit::draw(3, n_row * 2 * width, 2.0f);
    const std::vector<float> weight = testkit::draw(4, width);
    const DeviceBuffer<float> scale(weight);
    const auto run = [&] {
      DeviceBuffer<float> memory(x);
      View<float, 2> rows = make_view(memory.data(), n_row, width);
      rows.stride[0] = 2 * width;
      rms_norm<float, float>(rows, scale.data(), 1e-6f, rows, nullptr);
      return memory.to_host();
    };
    const std::vector<float> first = run();
    ASSERT_TRUE(testkit::same_bits(first, run())) << width;
    std::vector<float> apart;
    for (std::int64_t row = 0; row < n_row; ++row) {
      const auto at = x.begin() + row * 2 * width;
      apart.insert(apart.end(), at, at + width);
    }
    const std::vector<float> wanted = on_device<float, float>(apart, n_row, width, weight, 1e-6f);
    for (std::size_t row = 0, w = static_cast<std::size_t>(width); row < 9; ++row) {
      ASSERT_TRUE(testkit::same_bits({&first[row * 2 * w], w}, {&wanted[row * w], w})) << width;
      ASSERT_TRUE(testkit::same_bits({&first[row * 2 * w + w], w}, {&x[row * 2 * w + w], w})) << width;
    }
  }
}

TEST(RmsNormPlan, MisuseIsRefusedBeforeAnyLaunch) {
  std::vector<float> memory(100);
  const auto x = make_view<const float>(memory.data(), 2, 10);
  EXPECT_TRUE(
      testkit::refuses([&] { rms_norm<float, float>(x, nullptr, 1e-6f, make_view(memory.data(), 2, 11), nullptr); },
                       {"out", "11", "10"}));
}

}  // namespace
}  // namespace gemma4::cuda

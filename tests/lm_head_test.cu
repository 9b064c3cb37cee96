// SPDX-License-Identifier: Apache-2.0
#include "cuda/lm_head.cuh"

#include <gtest/gtest.h>

#include <vector>

#include "reference/lm_head.hpp"
#include "tests/support/close.hpp"
#include "tests/support/device_weights.cuh"
#include "tests/support/linear_case.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

std::vector<float> logits_of(const std::vector<float>& x, const PackedMatrix& table, float softcap) {
  const std::int64_t n_row = static_cast<std::int64_t>(x.size()) / table.cols;
  const DeviceBuffer<float> in(x);
  DeviceBuffer<float> out(n_row * table.rows);
  out.fill_bytes(0xFF);
  lm_head<float>(make_view(in.data(), n_row, table.cols), table, softcap, make_view(out.data(), n_row, table.rows),
                 current_device(), nullptr);
  return out.to_host();
}

/// The cap has slope at most 1, so that the bound of the product holds behind it, with 4 roundings of the cap's size.
RC_GTEST_PROP(LmHeadGpu, AgreesWithTheReferenceInEveryFormat, ()) {
  const auto type = *rc::gen::elementOf(kWeightTypes);
  const std::int64_t cols = 256 * *rc::gen::element<std::int64_t>(1, 2, 21), n_row = *rc::gen::inRange(1, 4);
  const auto vocab = *rc::gen::inRange<std::int64_t>(20, 400);
  const OwnedMatrix table = random_weights(type, vocab, cols, *rc::gen::arbitrary<std::uint32_t>());
  const std::vector<float> x = random_activations(n_row * cols, *rc::gen::arbitrary<std::uint32_t>());
  const float cap = *rc::gen::element(1.0f, 30.0f);
  reference::Matrix<double> expected(n_row, vocab);
  const reference::Matrix<double> in = Eigen::Map<const reference::Matrix<float>>(x.data(), n_row, cols).cast<double>();
  reference::lm_head<double>(in, table.view(), cap, expected);
  const DequantisedWeights dequantised = dequantise_with_parts(table);
  std::vector<double> bound;
  for (std::int64_t row = 0; row < n_row; ++row) {
    const auto part = std::span(x).subspan(static_cast<std::size_t>(row * cols), static_cast<std::size_t>(cols));
    for (const double b : linear_bound(part, dequantised, is_packed_type(type)).likely) {
      bound.push_back(b + 4 * 0x1p-24 * static_cast<double>(cap));
    }
  }
  const DeviceWeights weights(table);
  const std::span expected_values(expected.data(), static_cast<std::size_t>(expected.size()));
  rc_require(close(logits_of(x, weights.view(), cap), expected_values, bound));
  // Control: another cap is seen.
  RC_ASSERT(!close(logits_of(x, weights.view(), 0.5f * cap), expected_values, 1e-3 * static_cast<double>(cap)));
}

TEST(LmHeadPlan, Refusals) {
  std::vector<float> memory(4096);
  const PackedMatrix table{TensorType::kQ6K, 4, 256, nullptr};
  const auto call = [&](std::int64_t n_row, float cap) {
    return [&, n_row, cap] {
      lm_head<float>(make_view(memory.data(), n_row, 256), table, cap, make_view(memory.data(), n_row, 4), DeviceInfo{},
                     nullptr, {.int8_from = kMaxInt8Tokens + 1});
    };
  };
  EXPECT_TRUE(refuses(call(1, 0.0f), {"softcap is 0"}));
  EXPECT_TRUE(refuses(call(9, 30.0f), {"9 rows", "at most 8"}));
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include "cuda/linear_prefill.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "reference/quantized_linear.hpp"
#include "tests/support/close.hpp"
#include "tests/support/device_weights.cuh"
#include "tests/support/linear_case.hpp"
#include "tests/support/property.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

std::vector<Bf16> as_bf16(const std::vector<float>& values) {
  std::vector<Bf16> stored(values.size());
  std::transform(values.begin(), values.end(), stored.begin(), to_bf16);
  return stored;
}

/// Weights rounded to bf16 err by 2^-9 of each product, the float sum by at most (K + 1) 2^-24 of their magnitudes.
/// Small scratch buffers cut the rows into slices; the bits may differ by the algorithm, the bound holds for all.
RC_GTEST_PROP(LinearPrefill, AgreesWithTheReferenceInEveryFormat, ()) {
  const auto type = *rc::gen::elementOf(kWeightTypes);
  const std::int64_t cols = 256 * *rc::gen::element<std::int64_t>(1, 2, 5, 22);
  const auto rows = *rc::gen::inRange<std::int64_t>(1, 600), n_token = *rc::gen::inRange<std::int64_t>(1, 70);
  const OwnedMatrix weight = random_weights(type, rows, cols, *rc::gen::arbitrary<std::uint32_t>());
  const std::vector<float> x = random_activations(n_token * cols, *rc::gen::arbitrary<std::uint32_t>());
  const DeviceWeights packed(weight);
  const DeviceBuffer<Bf16> in(as_bf16(x));
  DeviceBuffer<float> out(n_token * rows);
  out.fill_bytes(0xFF);
  LinearPrefill prefill(*rc::gen::element<std::int64_t>(100, 256, 700) * cols * 2);
  prefill.linear<float>(make_view(in.data(), n_token, cols), packed.view(), make_view(out.data(), n_token, rows),
                        nullptr);
  const reference::Matrix<double> wide =
      Eigen::Map<const reference::Matrix<float>>(x.data(), n_token, cols).cast<double>();
  reference::Matrix<double> expected(n_token, rows);
  reference::quantized_linear<double>(wide, weight.view(), expected);
  const DecodedWeights decoded = decode_with_parts(weight);
  std::vector<double> bound;
  for (std::int64_t t = 0; t < n_token; ++t) {
    for (std::int64_t n = 0; n < rows; ++n) {
      double magnitude = 0;
      for (std::int64_t k = 0; k < cols; ++k) {
        magnitude +=
            std::abs(wide(t, k)) * std::abs(static_cast<double>(decoded.value[static_cast<std::size_t>(n * cols + k)]));
      }
      bound.push_back((0x1p-9 + static_cast<double>(cols + 1) * 0x1p-24) * magnitude + 1e-30);
    }
  }
  const std::span values(expected.data(), static_cast<std::size_t>(expected.size()));
  const std::vector<float> once = out.to_host();
  rc_require(close(once, values, bound));
  prefill.linear<float>(make_view(in.data(), n_token, cols), packed.view(), make_view(out.data(), n_token, rows),
                        nullptr);
  const std::vector<float> twice = out.to_host();
  RC_ASSERT(std::memcmp(once.data(), twice.data(), once.size() * sizeof(float)) == 0);
  // Control: the rounding of the weights is seen (plain bf16 rows are exact, packed ones are not).
  if (is_packed_type(type) && rows * n_token > 2000) {
    for (double& b : bound) b /= 4096;
    RC_ASSERT(!close(once, values, bound));
  }
}

TEST(LinearPrefill, FusedGateUpHasTheBitsOfUnfused) {
  for (const TensorType type : {TensorType::kQ4K, TensorType::kQ6K}) {
    const OwnedMatrix gate = random_weights(type, 300, 512, 1, 0.1f), up = random_weights(type, 300, 512, 2, 0.1f);
    const DeviceWeights joined(gate, up), gate_alone(gate), up_alone(up);
    const DeviceBuffer<Bf16> in(as_bf16(random_activations(33 * 512, 3)));
    DeviceBuffer<Bf16> fused(33 * 300), unfused(33 * 300), scratch(2 * 33 * 300);
    LinearPrefill prefill(1 << 20);
    const std::span<Bf16> room(scratch.data(), static_cast<std::size_t>(scratch.size()));
    const auto x = make_view(in.data(), 33, 512);
    prefill.gate_up<Bf16>(x, {.joined = joined.view(), .gate = {}, .up = {}}, room, make_view(fused.data(), 33, 300),
                          nullptr);
    prefill.gate_up<Bf16>(x, {.joined = {}, .gate = gate_alone.view(), .up = up_alone.view()}, room,
                          make_view(unfused.data(), 33, 300), nullptr);
    EXPECT_EQ(fused.to_host(), unfused.to_host());
  }
}

}  // namespace
}  // namespace gemma4::cuda

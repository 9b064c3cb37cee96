// SPDX-License-Identifier: Apache-2.0
#include "cuda/fused_mlp.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numbers>
#include <utility>
#include <vector>

#include "gemma4/gguf/block_quantise.hpp"
#include "reference/fused_mlp.hpp"
#include "tests/support/close.hpp"
#include "tests/support/device_weights.cuh"
#include "tests/support/linear_case.hpp"
#include "tests/support/packed_types.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

std::vector<float> gated(const std::vector<float>& x, const GateUpWeights& weights) {
  const std::int64_t n_token = static_cast<std::int64_t>(x.size()) / weights.hidden();
  const DeviceBuffer<float> in(x);
  DeviceBuffer<float> out(n_token * weights.ffn_hidden()), scratch(2 * out.size());
  out.fill_bytes(0xFF);
  gate_up_decode<float, float>(make_view(in.data(), n_token, weights.hidden()), weights,
                               std::span(scratch.data(), static_cast<std::size_t>(scratch.size())),
                               make_view(out.data(), n_token, weights.ffn_hidden()), current_device(), nullptr);
  return out.to_host();
}

bool same_bytes(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

/// |gelu'| <= 1.13, so that errors eg and eu of gate and up make at most 1.13 eg (|u| + eu) + |gelu(g)| eu; the float
/// formula itself adds 16 roundings (tanhf has 2 ulp).
std::vector<double> gated_bounds(const std::vector<float>& x, const OwnedMatrix& gate, const OwnedMatrix& up) {
  const auto cols = static_cast<std::size_t>(gate.cols);
  const DequantisedWeights g = dequantise_with_parts(gate), u = dequantise_with_parts(up);
  std::vector<double> all;
  for (std::size_t t = 0; t < x.size() / cols; ++t) {
    const auto row = std::span(x).subspan(t * cols, cols);
    const LinearBound g_bound = linear_bound(row, g, true), u_bound = linear_bound(row, u, true);
    for (std::size_t n = 0; n < g_bound.likely.size(); ++n) {
      double g_value = 0, u_value = 0;
      for (std::size_t k = 0; k < cols; ++k) {
        g_value += static_cast<double>(row[k]) * static_cast<double>(g.value[n * cols + k]);
        u_value += static_cast<double>(row[k]) * static_cast<double>(u.value[n * cols + k]);
      }
      const double eg = g_bound.likely[n], eu = u_bound.likely[n];
      all.push_back(1.13 * eg * (std::abs(u_value) + eu) + (std::abs(g_value) + 0.2) * eu +
                    16 * 0x1p-24 * (std::abs(g_value) + eg) * (std::abs(u_value) + eu) + 1e-30);
    }
  }
  return all;
}

RC_GTEST_PROP(FusedMlpGpu, FusedHasTheBitsOfUnfusedAndBothAgreeWithTheReference, ()) {
  const auto type = *rc::gen::elementOf(kPackedTypes);
  const std::int64_t cols = 256 * *rc::gen::element<std::int64_t>(1, 2, 5, 21, 43);
  const auto rows = *rc::gen::inRange<std::int64_t>(20, 300), n_token = *rc::gen::inRange<std::int64_t>(1, 9);
  const auto seed = *rc::gen::arbitrary<std::uint32_t>();
  const OwnedMatrix gate = random_weights(type, rows, cols, seed, 0.1f);
  const OwnedMatrix up = random_weights(type, rows, cols, seed + 1, 0.1f);
  const std::vector<float> x = random_activations(n_token * cols, *rc::gen::arbitrary<std::uint32_t>());
  const DeviceWeights joined(gate, up), gate_alone(gate), up_alone(up);
  const std::vector<float> fused = gated(x, {.joined = joined.view(), .gate = {}, .up = {}});
  RC_ASSERT(same_bytes(fused, gated(x, {.joined = {}, .gate = gate_alone.view(), .up = up_alone.view()})));
  // Control: the order of the pair matters.
  RC_ASSERT(!same_bytes(fused, gated(x, {.joined = {}, .gate = up_alone.view(), .up = gate_alone.view()})));

  const reference::Matrix<double> in =
      Eigen::Map<const reference::Matrix<float>>(x.data(), n_token, cols).cast<double>();
  reference::Matrix<double> expected(n_token, rows);
  reference::unfused_gate_up<double>(in, gate.view(), up.view(), expected);
  rc_require(
      close(fused, std::span(expected.data(), static_cast<std::size_t>(expected.size())), gated_bounds(x, gate, up)));
}

/// A matrix [rows, 256] of Q8_0 whose row n is `first(n)`, rounded to its scale, and zeros.
template <class TFirst>
OwnedMatrix first_column(std::int64_t rows, const TFirst& first) {
  OwnedMatrix matrix{TensorType::kQ8_0, rows, 256, {}};
  std::vector<float> values(static_cast<std::size_t>(rows * 256));
  for (std::int64_t n = 0; n < rows; ++n) values[static_cast<std::size_t>(n * 256)] = first(n);
  matrix.bytes.resize(static_cast<std::size_t>(rows * row_bytes(matrix.type, matrix.cols)));
  encode_row(matrix.type, values, matrix.bytes);
  return matrix;
}

/// gelu by itself, on products without an error of quantised activations: one activation that its block's scale holds,
/// one weight a row. What is left are 5 roundings of the product, 8 of the formula and tanhf's 2 ulp, of |gate * up| at
/// most: 16 * 2^-24. Control: with 0.04 in place of 0.044715 half of the rows are beyond.
TEST(FusedMlpGpu, GeluIsExactToItsRoundings) {
  const std::int64_t rows = 241;
  const OwnedMatrix gate = first_column(rows, [](std::int64_t n) { return static_cast<float>(n - 120) / 20.0f; });
  const OwnedMatrix up = first_column(rows, [](std::int64_t n) { return n % 2 == 0 ? 1.0f : -3.0f; });
  const DeviceWeights joined(gate, up);
  std::vector<float> x(256);
  x[0] = 1.0f;
  const std::vector<float> actual = gated(x, {.joined = joined.view(), .gate = {}, .up = {}});
  const DequantisedWeights g = dequantise_with_parts(gate), u = dequantise_with_parts(up);
  const auto gelu_times = [](double value, double partner, double cubic) {
    const double inner = std::sqrt(2 / std::numbers::pi) * (value + cubic * value * value * value);
    return 0.5 * value * (1 + std::tanh(inner)) * partner;
  };
  std::int64_t n_beyond = 0;
  for (std::size_t n = 0; n < actual.size(); ++n) {
    const double value = static_cast<double>(g.value[n * 256]), partner = static_cast<double>(u.value[n * 256]);
    const double bound = 16 * 0x1p-24 * std::abs(value * partner);
    EXPECT_NEAR(static_cast<double>(actual[n]), gelu_times(value, partner, 0.044715), bound) << "gate " << value;
    n_beyond += std::abs(static_cast<double>(actual[n]) - gelu_times(value, partner, 0.04)) > bound;
  }
  EXPECT_GT(n_beyond, rows / 2);
}

/// A pair of different types is not fused, and says so.
TEST(FusedMlpGpu, MixedPairsRunUnfused) {
  EXPECT_TRUE(gate_up_is_fused(TensorType::kQ6K, TensorType::kQ6K));
  EXPECT_FALSE(gate_up_is_fused(TensorType::kQ4K, TensorType::kQ6K));
  EXPECT_FALSE(gate_up_is_fused(TensorType::kBf16, TensorType::kBf16));
  const std::vector<float> x = random_activations(3 * 512, 3);
  const reference::Matrix<double> in = Eigen::Map<const reference::Matrix<float>>(x.data(), 3, 512).cast<double>();
  for (const auto& [gate_type, up_type] : {std::pair(TensorType::kQ4K, TensorType::kQ6K),
                                           {TensorType::kQ4_0, TensorType::kQ6K},
                                           {TensorType::kIq4Xs, TensorType::kQ2K},
                                           {TensorType::kQ5_1, TensorType::kBf16}}) {
    const OwnedMatrix gate = random_weights(gate_type, 70, 512, 1, 0.1f);
    const OwnedMatrix up = random_weights(up_type, 70, 512, 2, 0.1f);
    const DeviceWeights gate_device(gate), up_device(up);
    const GateUpWeights weights{.joined = {}, .gate = gate_device.view(), .up = up_device.view()};
    EXPECT_FALSE(weights.is_fused());
    reference::Matrix<double> expected(3, 70);
    reference::unfused_gate_up<double>(in, gate.view(), up.view(), expected);
    EXPECT_TRUE(close(gated(x, weights), std::span(expected.data(), static_cast<std::size_t>(expected.size())),
                      gated_bounds(x, gate, up)))
        << type_name(gate_type) << " and " << type_name(up_type);
  }
}

TEST(FusedMlpPlan, Refusals) {
  std::vector<float> memory(2048);
  const PackedMatrix gate{TensorType::kQ4K, 4, 256, nullptr}, up{TensorType::kQ6K, 5, 256, nullptr};
  const auto call = [&](const GateUpWeights& weights, std::int64_t out_cols) {
    return [&, weights, out_cols] {
      gate_up_decode<float, float>(make_view(memory.data(), 1, 256), weights, {}, make_view(memory.data(), 1, out_cols),
                                   DeviceInfo{}, nullptr);
    };
  };
  EXPECT_TRUE(refuses(call({.joined = {}, .gate = gate, .up = up}, 4), {"gate is 4 x 256", "up is 5 x 256"}));
  EXPECT_TRUE(refuses(call({.joined = {}, .gate = gate, .up = gate}, 4), {"scratch of 0 floats", "need 8"}));
  EXPECT_TRUE(refuses(call({.joined = gate, .gate = {}, .up = {}}, 4), {"out", "extent 4", "need 2"}));
}

}  // namespace
}  // namespace gemma4::cuda

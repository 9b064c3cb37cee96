// SPDX-License-Identifier: Apache-2.0
#include "cuda/rotation.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "reference/rotation.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

std::vector<float> on_device(const Rotation& rotation, const std::vector<float>& rows, bool forward) {
  const std::int64_t head_dim = rotation.head_dim(), n = static_cast<std::int64_t>(rows.size()) / head_dim;
  const DeviceBuffer<float> in(rows);
  DeviceBuffer<float> out(in.size());
  out.fill_bytes(0xFF);
  const auto from = make_view(in.data(), 1, n, 1, head_dim);
  const auto to = make_view(out.data(), 1, n, 1, head_dim);
  forward ? rotate_forward<float, float>(rotation, from, to, nullptr)
          : rotate_inverse<float, float>(rotation, from, to, nullptr);
  return out.to_host();
}

std::vector<float> on_host(const reference::Rotation<float>& rotation, std::vector<float> rows, bool forward) {
  const std::int64_t head_dim = rotation.head_dim();
  Eigen::Map<reference::Matrix<float>> matrix(rows.data(), static_cast<Eigen::Index>(rows.size()) / head_dim, head_dim);
  forward ? rotation.forward(matrix) : rotation.inverse(matrix);
  return rows;
}

RC_GTEST_PROP(RotationGpu, SignedHadamardHasTheBitsOfTheReference, ()) {
  const auto head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 512);
  const auto seed = *rc::gen::arbitrary<std::uint64_t>();
  const auto n = *rc::gen::inRange<std::int64_t>(1, 40);
  const bool forward = *rc::gen::arbitrary<bool>();
  const std::vector<float> rows = draw(seed, n * head_dim);
  const auto expected = on_host(reference::Rotation<float>::signed_hadamard(head_dim, seed), rows, forward);
  rc_require(same_bits(on_device(Rotation::signed_hadamard(head_dim, seed), rows, forward), expected));
  // Control: the seed matters.
  RC_ASSERT(!same_bits(on_device(Rotation::signed_hadamard(head_dim, seed + 1), rows, forward), expected));
}

/// Both sides sum head_dim products of numbers below 1.7 in float, in another order.
TEST(RotationGpu, DenseHaarAgreesWithTheReference) {
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    const std::vector<float> rows = draw(3, 37 * head_dim);
    const Rotation rotation = Rotation::dense_haar(head_dim, 9);
    const auto expected = reference::Rotation<float>::dense_haar(head_dim, 9);
    const double bound = 2.0 * head_dim * 0x1p-24 * 1.7 * std::sqrt(static_cast<double>(head_dim));
    EXPECT_TRUE(close(on_device(rotation, rows, true), on_host(expected, rows, true), bound)) << head_dim;
    EXPECT_TRUE(close(on_device(rotation, rows, false), on_host(expected, rows, false), bound)) << head_dim;
    EXPECT_FALSE(close(on_device(rotation, rows, false), on_host(expected, rows, true), bound)) << "the transpose";
  }
}

TEST(RotationGpu, InverseUndoesForward) {
  for (const RotationKind kind : {RotationKind::kSignedHadamard, RotationKind::kDenseHaar}) {
    const Rotation rotation = Rotation::make(kind, 512, 4);
    const std::vector<float> rows = draw(5, 33 * 512);
    const std::vector<float> there = on_device(rotation, rows, true);
    EXPECT_TRUE(close(on_device(rotation, there, false), rows, 1e-4));
    EXPECT_FALSE(close(there, rows, 1e-4));
  }
}

/// Rows of a strided tensor, bf16 in and out; what lies between the rows keeps its bits.
TEST(RotationGpu, StridedRowsInBf16) {
  constexpr std::int64_t kDim = 256, kHeads = 3, kTokens = 5, kPitch = 2 * kHeads * kDim;
  std::vector<Bf16> memory(kTokens * kPitch);
  const std::vector<float> values = draw(8, kTokens * kPitch);
  std::transform(values.begin(), values.end(), memory.begin(), to_bf16);
  DeviceBuffer<Bf16> buffer(memory);
  View<Bf16, 4> view = make_view(buffer.data(), 1, kTokens, kHeads, kDim);
  view.stride[1] = kPitch;
  const Rotation rotation = Rotation::signed_hadamard(kDim, 1);
  rotate_forward<Bf16, Bf16>(rotation, view, view, nullptr);
  const std::vector<Bf16> after = buffer.to_host();
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const auto* row = values.data() + t * kPitch;
    const std::vector<float> expected =
        on_host(reference::Rotation<float>::signed_hadamard(kDim, 1), {row, row + kHeads * kDim}, true);
    for (std::int64_t i = 0; i < kPitch; ++i) {
      const auto at = static_cast<std::size_t>(t * kPitch + i);
      const Bf16 want = i < kHeads * kDim ? to_bf16(expected[static_cast<std::size_t>(i)]) : memory[at];
      ASSERT_EQ(after[at].bits, want.bits) << t << ", " << i;
    }
  }
}

TEST(RotationPlan, RefusesWhatItCannotRotate) {
  EXPECT_TRUE(refuses([] { (void)Rotation::signed_hadamard(96, 0); }, {"Rotation", "head_dim 96"}));
  EXPECT_TRUE(refuses([] { (void)Rotation::signed_hadamard(1024, 0); }, {"Rotation", "head_dim 1024"}));
  EXPECT_TRUE(refuses([] { (void)Rotation::dense(64, std::vector<float>(65)); }, {"65 values", "4096"}));
  const Rotation rotation = Rotation::signed_hadamard(64, 0);
  std::vector<float> memory(256);
  const auto call = [&](std::int64_t in_dim, std::int64_t n_out) {
    return [&, in_dim, n_out] {
      rotate_forward<float, float>(rotation, make_view(memory.data(), 1, 2, 1, in_dim),
                                   make_view(memory.data(), 1, n_out, 1, in_dim), nullptr);
    };
  };
  EXPECT_TRUE(refuses(call(128, 2), {"128 values", "head_dim 64"}));
  EXPECT_TRUE(refuses(call(64, 1), {"out", "extent 1", "need 2"}));
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include "cuda/weights/activation_blocks.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/launch.cuh"
#include "tests/support/linear_case.hpp"
#include "tests/support/property.hpp"

namespace gemma4::cuda {
namespace detail {

constexpr int kThreads = 256;

template <class TIn>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const TIn* x, int n_group, int n_piece, std::uint8_t* out) {
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  quantize_row<kThreads>(x, smem_bytes, n_group, 0, n_piece, static_cast<int>(threadIdx.x));
  __syncthreads();
  const int n_word = n_group * kActivationBytesPerGroup / 4;
  for (int i = static_cast<int>(threadIdx.x); i < n_word; i += kThreads) {
    reinterpret_cast<std::uint32_t*>(out)[i] = reinterpret_cast<const std::uint32_t*>(smem_bytes)[i];
  }
}

}  // namespace detail

namespace {

using testkit::rc_require;

/// Blocks of a row as numbers.
struct Blocks {
  std::vector<std::vector<int>> codes;
  std::vector<float> scale;
  std::vector<int> low_sum, high_sum;
};

template <class TIn>
Blocks quantized(const std::vector<float>& x) {
  std::vector<TIn> stored(x.size());
  std::transform(x.begin(), x.end(), stored.begin(), from_float<TIn>);
  const DeviceBuffer<TIn> in(stored);
  const auto n_group = static_cast<int>(x.size() / 32);
  DeviceBuffer<std::uint8_t> out(n_group * detail::kActivationBytesPerGroup);
  detail::Launch{.what = "quantize_kernel", .block = detail::kThreads, .smem_bytes = out.size()}(
      detail::quantize_kernel<TIn>, in.data(), n_group, 4 * n_group, out.data());
  const std::vector<std::uint8_t> bytes = out.to_host();
  Blocks blocks;
  for (int g = 0; g < n_group; ++g) {
    std::vector<int> codes(32);
    for (int k = 0; k < 32; ++k) {
      codes[static_cast<std::size_t>(k)] =
          static_cast<std::int8_t>(bytes[static_cast<std::size_t>(16 * (k / 16 * n_group + g) + k % 16)]);
    }
    detail::BlockTail tail{};
    std::memcpy(&tail, bytes.data() + 32 * n_group + 8 * g, sizeof(tail));
    blocks.codes.push_back(codes);
    blocks.scale.push_back(tail.scale);
    blocks.low_sum.push_back(static_cast<std::int16_t>(tail.sums & 0xFFFFu));
    blocks.high_sum.push_back(static_cast<std::int16_t>(tail.sums >> 16));
  }
  return blocks;
}

/// Whether code q of a block of scale s stands for x. Beyond a half: scale and reciprocal are floats, 127 * 3 * 2^-23.
bool stands_for(float x, double s, int q) {
  return std::abs(static_cast<double>(x) - s * q) <= (0.5 + 127 * 3 * 0x1p-23) * s;
}

/// Block g of x keeps every promise of activation_blocks.cuh.
testing::AssertionResult is_right(const std::vector<float>& x, const Blocks& blocks, std::size_t g) {
  const std::span<const float> values(x.data() + 32 * g, 32);
  double largest = 0;
  for (const float value : values) largest = std::max(largest, std::abs(static_cast<double>(value)));
  const double scale = static_cast<double>(blocks.scale[g]);
  const bool is_zero = largest < 0x1p-110;
  const double expected = is_zero ? 0.0 : largest / 127;
  if (!(std::abs(scale - expected) <= 0x1p-22 * expected)) {
    return testing::AssertionFailure() << "block " << g << ": scale " << scale << ", expected " << expected;
  }
  int sums[2] = {0, 0};
  for (std::size_t k = 0; k < 32; ++k) {
    const int code = blocks.codes[g][k];
    sums[k / 16] += code;
    const bool fits = is_zero ? code == 0 : stands_for(values[k], scale, code) && std::abs(code) <= 127;
    if (!fits) {
      return testing::AssertionFailure() << "block " << g << ", value " << values[k] << ": code " << code << ", scale "
                                         << scale;
    }
  }
  if (sums[0] != blocks.low_sum[g] || sums[1] != blocks.high_sum[g]) {
    return testing::AssertionFailure() << "block " << g << ": sums " << blocks.low_sum[g] << ", " << blocks.high_sum[g];
  }
  return testing::AssertionSuccess();
}

template <class TIn>
testing::AssertionResult all_right(const std::vector<float>& x) {
  const Blocks blocks = quantized<TIn>(x);
  for (std::size_t g = 0; g < blocks.scale.size(); ++g) {
    if (const auto result = is_right(x, blocks, g); !result) return result;
  }
  return testing::AssertionSuccess();
}

/// Rows of any length, each block of its own magnitude, from the smallest that counts to the largest float.
RC_GTEST_PROP(ActivationBlocksGpu, CodesStandForTheirValues, ()) {
  const auto n_group = *rc::gen::inRange<std::int64_t>(1, 700);
  std::vector<float> x = testkit::random_activations(32 * n_group, *rc::gen::arbitrary<std::uint32_t>());
  const int lowest = *rc::gen::inRange(-120, 100);
  for (std::size_t k = 0; k < x.size(); ++k) {
    x[k] = std::ldexp(x[k], std::min(lowest + static_cast<int>(k / 32 % 40), 124));
  }
  rc_require(all_right<Bf16>(x));
  rc_require(all_right<float>(x));
  // Control: a code beside the right one is seen, at the value that makes the scale, which has code 127.
  Blocks blocks = quantized<float>(x);
  const auto g = *rc::gen::inRange<std::size_t>(0, blocks.scale.size());
  RC_CLASSIFY(blocks.scale[g] > 0.0f, "the control shows");
  if (!(blocks.scale[g] > 0.0f)) return;  // no RC_PRE: small cases are mostly zeros, and a short run would give up
  const auto largest = std::ranges::max_element(blocks.codes[g], {}, [](int code) { return std::abs(code); });
  *largest -= *largest > 0 ? 1 : -1;
  RC_ASSERT(!is_right(x, blocks, g));
}

TEST(ActivationBlocksGpu, Edges) {
  const float largest = to_float(to_bf16(std::numeric_limits<float>::max() / 2));
  std::vector<float> x;
  for (const float value : {0.0f, -0.0f, 0x1p-110f, 0x1.FEp-111f, 0x1p-149f, largest, -largest, 1.0f}) {
    for (int k = 0; k < 32; ++k) x.push_back(k % 5 == 3 ? -value : value);
  }
  for (int k = 0; k < 32; ++k) x.push_back(k == 17 ? 1000.0f : 1.0f);
  EXPECT_TRUE(all_right<float>(x));
  x.erase(x.begin() + 4 * 32, x.begin() + 5 * 32);  // what no normal bf16 is
  EXPECT_TRUE(all_right<Bf16>(x));
}

/// A block that is not finite gets scale NaN, wherever in it that value stands, and no other block does.
TEST(ActivationBlocksGpu, NotFiniteBlocksSaySo) {
  for (const float bad : {INFINITY, -INFINITY, NAN}) {
    for (std::size_t at = 0; at < 32; ++at) {
      std::vector<float> x = testkit::random_activations(3 * 32, 3);
      x[32 + at] = bad;
      const Blocks blocks = quantized<float>(x);
      EXPECT_TRUE(std::isnan(blocks.scale[1])) << bad << " at " << at;
      EXPECT_TRUE(is_right(x, blocks, 0));
      EXPECT_TRUE(is_right(x, blocks, 2));
    }
  }
}

}  // namespace
}  // namespace gemma4::cuda

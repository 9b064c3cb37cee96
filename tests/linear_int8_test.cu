// SPDX-License-Identifier: Apache-2.0
// Products on int8 tensor cores have the bits of the kernel that gives each token a dot product of its own.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/quantized_linear.cuh"
#include "tests/support/device_weights.cuh"
#include "tests/support/linear_case.hpp"
#include "tests/support/packed_types.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

constexpr DeviceInfo kH200{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 227 * 1024};

/// Products of a launch, and what a launch of them writes.
struct Products {
  std::vector<PackedMatrix> weights;
  LinearEpilogue epilogue = LinearEpilogue::kNone;
  bool is_dealt = false;

  [[nodiscard]] std::int64_t cols() const { return weights[0].cols; }
  [[nodiscard]] std::int64_t width(std::size_t i) const {
    return epilogue == LinearEpilogue::kGeluUp ? weights[i].rows / 2 : weights[i].rows;
  }
};

/// Rows of all outputs, one matrix after another: [matrix][token, width]. Behind the last token's activations there are
/// NaN, and behind its results what was there before.
template <class TIn>
std::vector<float> multiply(const Products& products, std::span<const float> x, std::int64_t int8_from,
                            const DeviceInfo& device) {
  const std::int64_t cols = products.cols(), n_token = static_cast<std::int64_t>(x.size()) / cols;
  std::vector<TIn> stored(x.size() + 2 * static_cast<std::size_t>(cols), from_float<TIn>(NAN));
  std::transform(x.begin(), x.end(), stored.begin(), from_float<TIn>);
  const DeviceBuffer<TIn> in(stored);
  DeviceBuffer<LinearTickets> tickets(1);
  tickets.fill_bytes(0);
  std::vector<DeviceBuffer<float>> outs;
  std::vector<View<float, 2>> views;
  for (std::size_t i = 0; i < products.weights.size(); ++i) {
    outs.emplace_back((n_token + 1) * products.width(i));
    outs.back().fill_bytes(0xA5);
    views.push_back(make_view(outs.back().data(), n_token, products.width(i)));
  }
  const LinearOptions options{.tickets = products.is_dealt ? tickets.data() : nullptr, .int8_from = int8_from};
  detail::packed_decode<float>(detail::linear_source(make_view(in.data(), n_token, cols)), std::span(products.weights),
                               std::span<const View<float, 2>>(views),
                               {.epilogue = products.epilogue, .softcap = 30.0f, .options = options}, device, nullptr);
  std::vector<float> all;
  for (std::size_t i = 0; i < outs.size(); ++i) {
    const std::vector<float> out = outs[i].to_host();
    const auto end = out.end() - static_cast<std::ptrdiff_t>(products.width(i));
    all.insert(all.end(), out.begin(), end);
    const auto is_untouched = [](float value) {
      std::uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      return bits == 0xA5A5A5A5u;
    };
    EXPECT_TRUE(std::all_of(end, out.end(), is_untouched)) << "results behind the last token, matrix " << i;
  }
  return all;
}

/// The same of each token alone, by the kernel of dot products.
template <class TIn>
std::vector<float> one_by_one(const Products& products, std::span<const float> x, const DeviceInfo& device) {
  const auto cols = static_cast<std::size_t>(products.cols()), n_token = x.size() / cols;
  std::vector<std::vector<float>> tokens;
  for (std::size_t t = 0; t < n_token; ++t) {
    tokens.push_back(multiply<TIn>(products, x.subspan(t * cols, cols), kInt8FromTokens, device));
  }
  std::vector<float> all;
  std::size_t first = 0;
  for (std::size_t i = 0; i < products.weights.size(); ++i) {
    const auto width = static_cast<std::size_t>(products.width(i));
    for (const std::vector<float>& token : tokens) {
      const auto from = token.begin() + static_cast<std::ptrdiff_t>(first);
      all.insert(all.end(), from, from + static_cast<std::ptrdiff_t>(width));
    }
    first += width;
  }
  return all;
}

/// Where two lists of results differ first, or that they do not. NaN are alike.
testing::AssertionResult same_bits(const std::vector<float>& actual, const std::vector<float>& expected) {
  if (actual.size() != expected.size()) return testing::AssertionFailure() << actual.size() << " results";
  std::size_t n_other = 0, first = 0;
  for (std::size_t i = actual.size(); i-- > 0;) {
    const bool same =
        std::memcmp(&actual[i], &expected[i], sizeof(float)) == 0 || (std::isnan(actual[i]) && std::isnan(expected[i]));
    if (!same) ++n_other, first = i;
  }
  if (n_other == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure() << n_other << " of " << actual.size() << " results differ, the first at " << first
                                     << ": " << actual[first] << ", alone " << expected[first];
}

DeviceInfo any_device() {
  DeviceInfo device = current_device();
  device.sm_count = *rc::gen::inRange(1, 40);
  device.smem_limit_bytes =
      std::min<std::int64_t>(device.smem_limit_bytes, *rc::gen::element<std::int64_t>(99, 163, 227) * 1024);
  return device;
}

std::int64_t any_cols(TensorType type) {
  if (block_size(type) == 32) return 32 * *rc::gen::element<std::int64_t>(1, 2, 7, 8, 9, 33, 40, 63, 64, 65, 168, 200);
  return 256 * *rc::gen::element<std::int64_t>(1, 2, 3, 4, 5, 16, 21, 22, 43);
}

/// Every format, tokens 1 to 16, rows that no number divides, one chunk and several, activations whole and chunk by
/// chunk, one block a multiprocessor and two.
RC_GTEST_PROP(LinearInt8Gpu, HasTheBitsOfEachTokenAlone, ()) {
  const auto type = *rc::gen::elementOf(kPackedTypes);
  const std::int64_t cols = any_cols(type), rows = *rc::gen::inRange<std::int64_t>(1, cols > 4096 ? 60 : 300);
  const std::int64_t n_token = *rc::gen::inRange<std::int64_t>(1, kMaxInt8Tokens + 1);
  const DeviceWeights weight(random_weights(type, rows, cols, *rc::gen::arbitrary<std::uint32_t>()));
  const Products products{.weights = {weight.view()}, .is_dealt = *rc::gen::arbitrary<bool>()};
  const std::vector<float> x = random_activations(n_token * cols, *rc::gen::arbitrary<std::uint32_t>());
  const DeviceInfo device = any_device();
  RC_TAG(type_name(type));
  const std::vector<float> expected = one_by_one<Bf16>(products, x, current_device());
  const testing::AssertionResult result = same_bits(multiply<Bf16>(products, x, 1, device), expected);
  if (!result) RC_FAIL(result.message());
  const testing::AssertionResult floats = same_bits(multiply<float>(products, x, 1, device), expected);
  if (!floats) RC_FAIL(floats.message());
}

/// The same without chance, at widths that the 31B has; those of blocks of 32 three blocks wider, so that rows end
/// within eight groups.
TEST(LinearInt8Gpu, EveryFormatAtEachNumberOfTokens) {
  for (const TensorType type : kPackedTypes) {
    for (const std::int64_t width : {512, 5376, 8192}) {
      const std::int64_t cols = block_size(type) == 32 ? width + 96 : width;
      const DeviceWeights weight(random_weights(type, 21, cols, 5));
      const Products products{.weights = {weight.view()}};
      const std::vector<float> x = random_activations(16 * cols, 6);
      const std::vector<float> expected = one_by_one<Bf16>(products, x, current_device());
      for (const std::int64_t n_token : {1, 2, 3, 4, 5, 7, 8, 9, 13, 16}) {
        const auto count = static_cast<std::size_t>(n_token);
        const std::vector<float> first(expected.begin(), expected.begin() + 21 * n_token);
        EXPECT_TRUE(same_bits(
            multiply<Bf16>(products, std::span(x).first(count * static_cast<std::size_t>(cols)), 1, current_device()),
            first))
            << type_name(type) << ", " << cols << " columns, " << n_token << " tokens";
      }
    }
  }
}

/// More rows a block than are kept between chunks.
TEST(LinearInt8Gpu, PassesOfRows) {
  DeviceInfo device = current_device();
  device.sm_count = 1;
  device.smem_limit_bytes = 99 * 1024;
  for (const TensorType type : {TensorType::kQ4K, TensorType::kQ8_0}) {
    const std::int64_t cols = type == TensorType::kQ4K ? 21504 : 32 * 341;
    const std::int64_t n_token = 4;  // as many as 99 KB have room for
    const DeviceWeights weight(random_weights(type, 301, cols, 9));
    const Products products{.weights = {weight.view()}};
    const std::vector<float> x = random_activations(n_token * cols, 10);
    ASSERT_TRUE(plan_linear_int8(cols, n_token, std::span(&type, 1), device).is_by_chunk);
    EXPECT_TRUE(same_bits(multiply<Bf16>(products, x, 1, device), one_by_one<Bf16>(products, x, current_device())))
        << type_name(type);
  }
}

/// q, k and v of any types in one launch, with and without tickets.
RC_GTEST_PROP(LinearInt8Gpu, MatricesTogether, ()) {
  const std::int64_t cols = 256 * *rc::gen::element<std::int64_t>(1, 4, 21, 32);
  const std::int64_t n_token = *rc::gen::inRange<std::int64_t>(1, kMaxInt8Tokens + 1);
  std::vector<DeviceWeights> weights;
  for (int i = 0; i < *rc::gen::inRange(2, 5); ++i) {
    const auto type = *rc::gen::elementOf(kPackedTypes);
    weights.emplace_back(
        random_weights(type, *rc::gen::inRange<std::int64_t>(1, 120), cols, *rc::gen::arbitrary<std::uint32_t>()));
  }
  Products products{.weights = {}, .is_dealt = *rc::gen::arbitrary<bool>()};
  for (const DeviceWeights& weight : weights) products.weights.push_back(weight.view());
  const std::vector<float> x = random_activations(n_token * cols, *rc::gen::arbitrary<std::uint32_t>());
  const testing::AssertionResult result =
      same_bits(multiply<Bf16>(products, x, 1, any_device()), one_by_one<Bf16>(products, x, current_device()));
  if (!result) RC_FAIL(result.message());
}

/// What becomes of a row at its end: gate and up in pairs, the cap of logits.
TEST(LinearInt8Gpu, Epilogues) {
  for (const LinearEpilogue epilogue : {LinearEpilogue::kGeluUp, LinearEpilogue::kSoftcap}) {
    for (const std::int64_t n_token : {2, 4, 8, 16}) {
      const DeviceWeights weight(random_weights(TensorType::kQ6K, 402, 768, 3));
      const Products products{.weights = {weight.view()}, .epilogue = epilogue, .is_dealt = true};
      const std::vector<float> x = random_activations(n_token * 768, 4);
      EXPECT_TRUE(
          same_bits(multiply<Bf16>(products, x, 1, current_device()), one_by_one<Bf16>(products, x, current_device())))
          << n_token << " tokens";
    }
  }
}

/// Weights at their ends (all codes alike, largest and smallest steps) with activations at theirs: zeros, an outlier,
/// one sign, subnormals, huge ones, a token with a NaN beside others without.
TEST(LinearInt8Gpu, Extremes) {
  constexpr std::int64_t kCols = 512, kTokens = 7;
  const std::vector<float> noise = random_activations(kCols, 3);
  std::vector<float> x(kTokens * kCols, 0.0f);
  for (std::size_t k = 0; k < kCols; ++k) {
    const auto at = [&](std::size_t token) -> float& { return x[token * kCols + k]; };
    at(1) = k % 32 == 7 ? 1000.0f : 1.0f;
    at(2) = 0x1p-130f * noise[k];
    at(3) = 0x1p+80f * noise[k];
    at(4) = -1.0f;
    at(5) = k == 100 ? NAN : noise[k];
    at(6) = 0x1p-108f * noise[k];
  }
  for (const TensorType type : kPackedTypes) {
    const auto step = static_cast<std::size_t>(block_bytes(type));
    for (const unsigned fill : {0x00u, 0xFFu, 0x7Fu, 0x80u, 0x11u}) {
      for (const unsigned bits : {0x7BFFu, 0x0001u, 0x0000u, 0x8000u, 0xFBFFu}) {
        const F16 d{static_cast<std::uint16_t>(bits)};
        OwnedMatrix matrix = random_weights(type, 9, kCols, 1);
        for (std::byte& byte : matrix.bytes) byte = static_cast<std::byte>(fill);
        for (std::size_t at = 0; at < matrix.bytes.size(); at += step) {
          testkit::detail::put(std::span(matrix.bytes), at + place_of_step(type), d);
          if (const auto at_min = place_of_minimum(type)) {
            testkit::detail::put(std::span(matrix.bytes), at + *at_min, d);
          }
        }
        const DeviceWeights weight(matrix);
        const Products products{.weights = {weight.view()}};
        EXPECT_TRUE(same_bits(multiply<float>(products, x, 1, current_device()),
                              one_by_one<float>(products, x, current_device())))
            << type_name(type) << ", bytes " << fill << ", step " << bits;
      }
    }
  }
}

/// The comparison sees the order of a sum: with groups 0 and 1 in each other's place, of weights and activations alike,
/// some row of the dot products has other bits.
TEST(LinearInt8Gpu, AnotherOrderOfTheGroupsIsSeen) {
  constexpr std::int64_t kCols = 1024, kRows = 64;
  OwnedMatrix matrix = random_weights(TensorType::kQ8_0, kRows, kCols, 12);
  std::vector<float> x = random_activations(kCols, 13);
  const DeviceWeights before(matrix);
  const std::vector<float> expected = one_by_one<Bf16>({.weights = {before.view()}}, x, current_device());
  const auto block = static_cast<std::ptrdiff_t>(block_bytes(TensorType::kQ8_0));
  const std::ptrdiff_t row_bytes = static_cast<std::ptrdiff_t>(matrix.bytes.size()) / kRows;
  for (std::ptrdiff_t row = 0; row < kRows; ++row) {
    const auto first = matrix.bytes.begin() + row * row_bytes;
    std::swap_ranges(first, first + block, first + block);
  }
  std::swap_ranges(x.begin(), x.begin() + 32, x.begin() + 32);
  const DeviceWeights after(matrix);
  EXPECT_FALSE(same_bits(multiply<Bf16>({.weights = {after.view()}}, x, 1, current_device()), expected));
  EXPECT_FALSE(same_bits(one_by_one<Bf16>({.weights = {after.view()}}, x, current_device()), expected));
}

TEST(LinearInt8Plan, FitsTheDeviceAndKeepsEnoughInFlight) {
  for (const TensorType type : kPackedTypes) {
    for (const std::int64_t cols : {256, 5376, 8192, 16384, 21504}) {
      for (std::int64_t n_token = 1; n_token <= kMaxInt8Tokens; ++n_token) {
        const LinearPlan plan = plan_linear_int8(cols, n_token, std::span(&type, 1), kH200);
        ASSERT_EQ(plan.path, LinearPath::kInt8) << type_name(type) << ' ' << cols << ' ' << n_token;
        EXPECT_LE(plan.smem_bytes, kH200.smem_limit_bytes);
        EXPECT_GE(plan.n_slot, 2);
        EXPECT_GE(plan.n_token, std::min<std::int64_t>(n_token, 8)) << "one launch for up to eight tokens";
        if (plan.n_block == 2 * kH200.sm_count) EXPECT_LE(plan.smem_bytes, 113 * 1024);
        if (plan.n_slot < 8) {
          EXPECT_GE(plan.n_slot * plan.slot_bytes * plan.n_block, 72 * 1024 * kH200.sm_count) << type_name(type);
        }
      }
    }
  }
  const TensorType q4 = TensorType::kQ4K;
  EXPECT_EQ(plan_linear_int8(5376, 4, std::span(&q4, 1), kH200).n_block, 2 * kH200.sm_count);
  EXPECT_FALSE(plan_linear_int8(8192, 4, std::span(&q4, 1), kH200).is_by_chunk) << "rows may be dealt";
  EXPECT_TRUE(plan_linear_int8(21504, 4, std::span(&q4, 1), kH200).is_by_chunk);
  EXPECT_EQ(plan_linear_int8(5376, 16, std::span(&q4, 1), kH200).n_token, 16);
  const TensorType q8 = TensorType::kQ8_0;
  const DeviceInfo small{.sm_count = 40, .compute_capability = 89, .smem_limit_bytes = 99 * 1024};
  EXPECT_EQ(plan_linear_int8(5376, 4, std::span(&q8, 1), small).path, LinearPath::kDot) << "and the plan says so";
}

/// One number says from how many tokens on; a call may say another.
TEST(LinearInt8Plan, Threshold) {
  EXPECT_EQ(LinearOptions{}.path(kInt8FromTokens - 1), LinearPath::kDot);
  EXPECT_EQ(LinearOptions{}.path(kInt8FromTokens), LinearPath::kInt8);
  EXPECT_EQ(LinearOptions{.int8_from = 2}.path(1), LinearPath::kDot);
  EXPECT_EQ(LinearOptions{.int8_from = 2}.path(2), LinearPath::kInt8);
  std::vector<float> memory(20 * 256);
  const PackedMatrix weight{TensorType::kQ4K, 4, 256, nullptr};
  const auto call = [&](std::int64_t n_token, std::int64_t int8_from) {
    return [&, n_token, int8_from] {
      quantized_linear_decode<float, float>(make_view(static_cast<const float*>(memory.data()), n_token, 256), weight,
                                            make_view(memory.data(), n_token, 4), DeviceInfo{}, nullptr,
                                            {.int8_from = int8_from});
    };
  };
  EXPECT_TRUE(refuses(call(17, 1), {"17 tokens", "at most 16"}));
  EXPECT_TRUE(refuses(call(9, 10), {"9 tokens", "at most 8"}));
}

}  // namespace
}  // namespace gemma4::cuda

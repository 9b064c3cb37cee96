// SPDX-License-Identifier: Apache-2.0
#include "cuda/quantized_linear.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "reference/quantized_linear.hpp"
#include "tests/support/close.hpp"
#include "tests/support/device_weights.cuh"
#include "tests/support/linear_case.hpp"
#include "tests/support/packed_types.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

template <class T>
std::vector<T> to_storage(const std::vector<float>& values) {
  std::vector<T> stored(values.size());
  std::transform(values.begin(), values.end(), stored.begin(), from_float<T>);
  return stored;
}

template <class TIn = Bf16, class TOut = float>
std::vector<TOut> multiply(const std::vector<float>& x, const PackedMatrix& weight,
                           const DeviceInfo& device = current_device()) {
  const std::int64_t n_token = static_cast<std::int64_t>(x.size()) / weight.cols;
  const DeviceBuffer<TIn> in(to_storage<TIn>(x));
  DeviceBuffer<TOut> out(n_token * weight.rows);
  out.fill_bytes(0xFF);
  quantized_linear_decode<TIn, TOut>(make_view(in.data(), n_token, weight.cols), weight,
                                     make_view(out.data(), n_token, weight.rows), device, nullptr);
  return out.to_host();
}

std::vector<double> exact(const std::vector<float>& x, const OwnedMatrix& weight) {
  const std::int64_t n_token = static_cast<std::int64_t>(x.size()) / weight.cols;
  const reference::Matrix<double> in =
      Eigen::Map<const reference::Matrix<float>>(x.data(), n_token, weight.cols).cast<double>();
  reference::Matrix<double> out(n_token, weight.rows);
  reference::quantized_linear<double>(in, weight.view(), out);
  return {out.data(), out.data() + out.size()};
}

template <class TMember>
std::vector<double> bounds(const std::vector<float>& x, const OwnedMatrix& weight, TMember member) {
  const DequantisedWeights dequantised = dequantise_with_parts(weight);
  std::vector<double> all;
  const auto cols = static_cast<std::size_t>(weight.cols);
  for (std::size_t t = 0; t < x.size() / cols; ++t) {
    const LinearBound bound =
        linear_bound(std::span(x).subspan(t * cols, cols), dequantised, is_packed_type(weight.type));
    all.insert(all.end(), (bound.*member).begin(), (bound.*member).end());
  }
  return all;
}

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

struct Case {
  OwnedMatrix weight;
  std::vector<float> x;
};

/// Super-blocks of a row: one, few, exactly one chunk, two chunks, three uneven ones.
Case any_case() {
  const auto type = *rc::gen::elementOf(kWeightTypes);
  const std::int64_t blocks = *rc::gen::element<std::int64_t>(1, 1, 2, 3, 5, 16, 21, 22, 43);
  const std::int64_t cols = block_size(type) == 32 ? 32 * *rc::gen::inRange<std::int64_t>(1, 200) : 256 * blocks;
  const std::int64_t rows = *rc::gen::inRange<std::int64_t>(1, blocks > 8 ? 40 : 700);
  const std::int64_t n_token = *rc::gen::inRange<std::int64_t>(1, 9);
  return {random_weights(type, rows, cols, *rc::gen::arbitrary<std::uint32_t>()),
          random_activations(n_token * cols, *rc::gen::arbitrary<std::uint32_t>())};
}

RC_GTEST_PROP(QuantizedLinearGpu, AgreesWithTheReferenceInEveryFormat, ()) {
  const Case c = any_case();
  const DeviceWeights weight(c.weight);
  const std::vector<double> expected = exact(c.x, c.weight), bound = bounds(c.x, c.weight, &LinearBound::likely);
  const std::vector<float> out = multiply(c.x, weight.view());
  rc_require(close(out, expected, bound));
  RC_ASSERT(same_bytes(multiply(c.x, weight.view()), out));         // again
  RC_ASSERT(same_bytes(multiply<float>(c.x, weight.view()), out));  // the same numbers, stored as floats
  const std::vector<Bf16> rounded = multiply<Bf16, Bf16>(c.x, weight.view());
  RC_ASSERT(std::equal(out.begin(), out.end(), rounded.begin(), [](float a, Bf16 b) { return to_bf16(a) == b; }));
}

/// Activations whose 8-bit codes do not depend on the last bit of a float: a value within 2^-22 of a tie, relative to
/// the largest code, is made smaller by one step of bf16. (Codes of ties may differ from the host's. One of 4096 moves
/// all rows alike where weights have an offset of one sign, and the 28 ties of these values move the scale of Q4_1 by
/// 4e-4.)
std::vector<float> without_ties(std::vector<float> x) {
  for (std::size_t block = 0; block < x.size(); block += 32) {
    const std::span<float> values = std::span(x).subspan(block, 32);
    for (std::size_t i = 0; i < values.size();) {
      const double y = static_cast<double>(std::abs(values[i])) / block_step(values, i, 127);
      const bool is_tied = std::abs(y - std::floor(y) - 0.5) <= 127 * 0x1p-22;
      if (is_tied) values[i] = to_float(Bf16{static_cast<std::uint16_t>(to_bf16(values[i]).bits - 1)});
      i += is_tied ? 0 : 1;
    }
  }
  return x;
}

/// No format has a factor that its bound would hide: against the product of the same 8-bit activations, whose sums on
/// the device are exact in integers, so that float roundings are left: at most 12 + K / 32 = 44 of 2^-24 in each term,
/// whose magnitudes add up to less than 40 times the length of the result.
TEST(QuantizedLinearGpu, EveryFormatHasItsScale) {
  constexpr std::int64_t kToken = 4, kCols = 1024;
  constexpr double kBound = 44 * 40 * 0x1p-24;
  const std::vector<float> x = without_ties(random_activations(kToken * kCols, 7));
  std::vector<float> rounded;
  for (std::int64_t t = 0; t < kToken; ++t) {
    const std::vector<float> row =
        rounded_in_blocks(std::span(x).subspan(static_cast<std::size_t>(t * kCols), kCols), 127);
    rounded.insert(rounded.end(), row.begin(), row.end());
  }
  for (const TensorType type : kWeightTypes) {
    const OwnedMatrix matrix = random_weights(type, 1024, kCols, 8);
    const DeviceWeights weight(matrix);
    EXPECT_TRUE(scale_close(multiply(x, weight.view()), exact(is_packed_type(type) ? rounded : x, matrix), kBound))
        << type_name(type);
  }
}

/// A token's bits do not depend on its company, on the number of multiprocessors, or on the memory of one.
RC_GTEST_PROP(QuantizedLinearGpu, BatchAndGridDoNotChangeABit, ()) {
  const Case c = any_case();
  const DeviceWeights weight(c.weight);
  const std::vector<float> together = multiply(c.x, weight.view());
  const auto cols = static_cast<std::ptrdiff_t>(c.weight.cols), rows = static_cast<std::ptrdiff_t>(c.weight.rows);
  for (std::ptrdiff_t t = 0; t < static_cast<std::ptrdiff_t>(c.x.size()) / cols; ++t) {
    const std::vector<float> alone =
        multiply(std::vector<float>(c.x.begin() + t * cols, c.x.begin() + (t + 1) * cols), weight.view());
    RC_ASSERT(std::equal(alone.begin(), alone.end(), together.begin() + t * rows));
  }
  DeviceInfo device = current_device();
  device.sm_count = *rc::gen::inRange(1, 300);
  device.smem_limit_bytes = *rc::gen::element<std::int64_t>(99, 163, 227) * 1024;
  RC_ASSERT(same_bytes(multiply(c.x, weight.view(), device), together));
}

/// q, k and v in one launch, whatever their types, have the bits of three launches.
RC_GTEST_PROP(QuantizedLinearGpu, MatricesTogetherHaveTheBitsOfEachAlone, ()) {
  const std::int64_t cols = 256 * *rc::gen::element<std::int64_t>(1, 4, 21, 32), n_token = *rc::gen::inRange(1, 9);
  const std::vector<float> x = random_activations(n_token * cols, *rc::gen::arbitrary<std::uint32_t>());
  const DeviceBuffer<Bf16> in(to_storage<Bf16>(x));
  std::vector<DeviceWeights> weights;
  std::vector<PackedMatrix> views;
  std::vector<DeviceBuffer<float>> outs;
  std::vector<View<float, 2>> out_views;
  for (int i = 0; i < *rc::gen::inRange(2, 5); ++i) {
    const auto type = *rc::gen::elementOf(kWeightTypes);
    const auto rows = *rc::gen::inRange<std::int64_t>(1, 300);
    weights.emplace_back(random_weights(type, rows, cols, *rc::gen::arbitrary<std::uint32_t>()));
    outs.emplace_back(n_token * rows);
    outs.back().fill_bytes(0xFF);
  }
  for (std::size_t i = 0; i < weights.size(); ++i) {
    views.push_back(weights[i].view());
    out_views.push_back(make_view(outs[i].data(), n_token, weights[i].view().rows));
  }
  quantized_linear_decode<Bf16, float>(make_view(in.data(), n_token, cols), views, out_views, current_device(),
                                       nullptr);
  for (std::size_t i = 0; i < weights.size(); ++i) RC_ASSERT(same_bytes(outs[i].to_host(), multiply(x, views[i])));
}

/// The bound is that of 8-bit activations and not looser: 4-bit activations, multiplied without any other error, break
/// it in every format, and exact 8-bit ones keep it.
TEST(QuantizedLinearGpu, FourBitActivationsBreakTheBound) {
  for (const TensorType type : kPackedTypes) {
    const OwnedMatrix weight = random_weights(type, 64, 5376, 11);
    const std::vector<float> x = random_activations(weight.cols, 12);
    const std::vector<double> expected = exact(x, weight), bound = bounds(x, weight, &LinearBound::likely);
    EXPECT_TRUE(close(exact(rounded_in_blocks(x, 127), weight), expected, bound)) << type_name(type);
    EXPECT_FALSE(close(exact(rounded_in_blocks(x, 7), weight), expected, bound)) << type_name(type);
    EXPECT_TRUE(close(multiply(x, DeviceWeights(weight).view()), expected, bound)) << type_name(type);
  }
}

/// Activations at the edges of the format: zeros, an outlier in each block, subnormals, huge values, one sign.
TEST(QuantizedLinearGpu, AdversarialActivations) {
  constexpr std::int64_t kCols = 5376;
  std::vector<std::vector<float>> rows(6, std::vector<float>(kCols, 0.0f));
  const std::vector<float> noise = random_activations(kCols, 3);
  for (std::size_t k = 0; k < kCols; ++k) {
    rows[1][k] = k % 32 == 7 ? 1000.0f : 1.0f;
    rows[2][k] = 0x1p-130f * noise[k];
    rows[3][k] = 0x1p+80f * noise[k];
    rows[4][k] = 1.0f;
    rows[5][k] = k / 32 % 2 == 0 ? 0.0f : -noise[k];
  }
  std::vector<float> x;
  for (const auto& row : rows) {
    for (const float value : row) x.push_back(to_float(to_bf16(value)));
  }
  for (const TensorType type : kPackedTypes) {
    const OwnedMatrix weight = random_weights(type, 50, kCols, 21);
    EXPECT_TRUE(
        close(multiply(x, DeviceWeights(weight).view()), exact(x, weight), bounds(x, weight, &LinearBound::certain)))
        << type_name(type);
  }
}

/// Weights at the edges: largest and smallest steps, all codes at one end, steps of zero. The last two tokens have the
/// largest codes in every place, so that the integer sums are as large as they become.
TEST(QuantizedLinearGpu, AdversarialWeights) {
  std::vector<float> x = random_activations(3 * 512, 5);
  x.insert(x.end(), 512, 1.0f);
  x.insert(x.end(), 512, -1.0f);
  for (const TensorType type : kPackedTypes) {
    const auto step = static_cast<std::size_t>(block_bytes(type));
    for (const unsigned fill : {0x00u, 0xFFu, 0x7Fu, 0x80u, 0x11u}) {
      for (const std::uint16_t d : {0x7BFFu /* 65504 */, 0x0001u, 0x0000u, 0x8000u, 0xFBFFu}) {
        OwnedMatrix weight = random_weights(type, 9, 512, 1);
        for (std::byte& byte : weight.bytes) byte = static_cast<std::byte>(fill);
        for (std::size_t at = 0; at < weight.bytes.size(); at += step) {
          testkit::detail::put(std::span(weight.bytes), at + place_of_step(type), F16{d});
          if (const auto at_min = place_of_minimum(type)) {
            testkit::detail::put(std::span(weight.bytes), at + *at_min, F16{d});
          }
        }
        EXPECT_TRUE(close(multiply(x, DeviceWeights(weight).view()), exact(x, weight),
                          bounds(x, weight, &LinearBound::certain)))
            << type_name(type) << ", bytes " << fill << ", step " << d;
      }
    }
  }
}

/// The documented rule: a block that is not finite makes its token's results NaN, and no other token's.
TEST(QuantizedLinearGpu, NotFiniteActivationsShow) {
  for (const float bad : {INFINITY, -INFINITY, NAN}) {
    const OwnedMatrix weight = random_weights(TensorType::kQ4K, 20, 512, 2);
    std::vector<float> x = random_activations(2 * 512, 6);
    const std::vector<float> clean = multiply(x, DeviceWeights(weight).view());
    x[100] = bad;
    const std::vector<float> out = multiply(x, DeviceWeights(weight).view());
    EXPECT_TRUE(std::all_of(out.begin(), out.begin() + 20, [](float value) { return std::isnan(value); }));
    EXPECT_TRUE(std::equal(out.begin() + 20, out.end(), clean.begin() + 20));
  }
}

struct Shape {
  TensorType type;
  std::int64_t rows, cols;
};

/// The matrices of the 31B at their size: rows repeat a pool, whose results are known.
TEST(QuantizedLinearGpu, MatricesOfThe31B) {
  constexpr std::int64_t kPool = 97;
  const Shape shapes[] = {
      {TensorType::kQ4K, 8192, 5376},   {TensorType::kQ4K, 4096, 5376},    {TensorType::kQ6K, 4096, 5376},
      {TensorType::kQ4K, 16384, 5376},  {TensorType::kQ4K, 2048, 5376},    {TensorType::kQ4K, 5376, 8192},
      {TensorType::kQ4K, 5376, 16384},  {TensorType::kQ4K, 43008, 5376},   {TensorType::kQ4K, 5376, 21504},
      {TensorType::kQ6K, 5376, 21504},  {TensorType::kQ6K, 262144, 5376},  {TensorType::kQ4_0, 43008, 5376},
      {TensorType::kQ4_0, 5376, 21504}, {TensorType::kQ4_1, 8192, 5376},   {TensorType::kQ5_0, 5376, 8192},
      {TensorType::kQ5_1, 4096, 5376},  {TensorType::kIq4Nl, 43008, 5376}, {TensorType::kIq4Xs, 5376, 16384},
      {TensorType::kQ3K, 43008, 5376},  {TensorType::kQ3K, 5376, 21504},   {TensorType::kQ2K, 43008, 5376}};
  for (const Shape& shape : shapes) {
    const OwnedMatrix pool = random_weights(shape.type, kPool, shape.cols, 31);
    const DeviceWeights pool_weights(pool);
    const std::int64_t n_token = shape.rows > 100000 ? 1 : 8;
    const std::vector<float> x = random_activations(n_token * shape.cols, 32);
    const std::vector<float> expected = multiply(x, pool_weights.view());
    EXPECT_TRUE(close(expected, exact(x, pool), bounds(x, pool, &LinearBound::likely)));
    DeviceBuffer<std::byte> bytes(shape.rows * pool_weights.view().row_bytes());
    for (std::int64_t at = 0; at < bytes.size(); at += pool_weights.view().bytes()) {
      check(cudaMemcpyAsync(bytes.data() + at, pool_weights.view().data,
                            static_cast<std::size_t>(std::min(pool_weights.view().bytes(), bytes.size() - at)),
                            cudaMemcpyDeviceToDevice, nullptr),
            "repetition of a pool of rows");
    }
    const std::vector<float> out = multiply(x, {shape.type, shape.rows, shape.cols, bytes.data()});
    std::int64_t n_wrong = 0;
    for (std::int64_t t = 0; t < n_token; ++t) {
      for (std::int64_t row = 0; row < shape.rows; ++row) {
        n_wrong += out[static_cast<std::size_t>(t * shape.rows + row)] !=
                   expected[static_cast<std::size_t>(t * kPool + row % kPool)];
      }
    }
    EXPECT_EQ(n_wrong, 0) << type_name(shape.type) << ' ' << shape.rows << " x " << shape.cols;
  }
}

TEST(QuantizedLinearPlan, FitsTheDeviceAndKeepsEnoughInFlight) {
  const DeviceInfo h200{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 227 * 1024};
  for (const TensorType type : kPackedTypes) {
    for (const std::int64_t cols : {256, 5376, 8192, 16384, 21504}) {
      for (std::int64_t n_token = 1; n_token <= 8; ++n_token) {
        const LinearPlan plan = plan_linear_decode(cols, n_token, std::span(&type, 1), h200);
        EXPECT_LE(plan.smem_bytes, h200.smem_limit_bytes);
        EXPECT_GE(plan.n_slot, 2);
        if (n_token == 1 && cols > 256) EXPECT_GE(plan.n_slot * plan.slot_bytes, 48 * 1024) << type_name(type);
        if (n_token == 1) EXPECT_LE(plan.smem_bytes, 113 * 1024) << "two blocks share a multiprocessor";
      }
    }
  }
  const TensorType q4 = TensorType::kQ4K;
  EXPECT_EQ(plan_linear_decode(5376, 8, std::span(&q4, 1), h200).n_token, 8);
  EXPECT_EQ(plan_linear_decode(21504, 8, std::span(&q4, 1), h200).n_token, 4) << "wide rows: two launches";
  for (const auto& [cols, n_block] : {std::pair<std::int64_t, int>{5376, 2}, {8192, 2}, {16384, 1}, {21504, 1}}) {
    const LinearPlan plan = plan_linear_decode(cols, 4, std::span(&q4, 1), h200);
    EXPECT_EQ(plan.n_block, n_block * h200.sm_count) << cols << " columns, four tokens";
    if (n_block == 2) EXPECT_LE(plan.smem_bytes, 113 * 1024);
    EXPECT_GE(plan.n_slot * plan.slot_bytes * n_block, 72 * 1024) << cols << " columns, four tokens";
    const LinearVariant one{.one_block = true};
    EXPECT_EQ(plan_linear_decode(cols, 4, std::span(&q4, 1), h200, one).n_block, h200.sm_count);
  }
}

/// The kernel with all formats runs where one of the others takes part, and only there.
TEST(QuantizedLinearPlan, FourFormatsHaveAKernelOfTheirOwn) {
  const DeviceInfo h200{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 227 * 1024};
  std::vector<TensorType> four = {TensorType::kQ4K, TensorType::kQ5K, TensorType::kQ6K, TensorType::kQ8_0};
  EXPECT_FALSE(plan_linear_decode(5376, 1, four, h200).is_every);
  for (const TensorType type : kPackedTypes) {
    const bool is_other = std::find(four.begin(), four.end(), type) == four.end();
    EXPECT_EQ(plan_linear_decode(5376, 1, std::span(&type, 1), h200).is_every, is_other) << type_name(type);
    const std::vector<TensorType> mixed = {TensorType::kQ6K, type};
    EXPECT_EQ(plan_linear_decode(5376, 1, mixed, h200).is_every, is_other) << type_name(type);
    EXPECT_EQ(detail::stage_rows<false>(type, true), is_other ? 4 : detail::stage_rows(type, true));
  }
}

TEST(QuantizedLinearPlan, Refusals) {
  std::vector<float> memory(4096);
  const PackedMatrix weight{TensorType::kQ4K, 4, 256, nullptr};
  const auto call = [&](std::int64_t n_token, std::int64_t cols, std::int64_t out_cols) {
    return [&, n_token, cols, out_cols] {
      quantized_linear_decode<float, float>(make_view(memory.data(), n_token, cols), weight,
                                            make_view(memory.data(), n_token, out_cols), DeviceInfo{}, nullptr,
                                            {.int8_from = kMaxInt8Tokens + 1});
    };
  };
  EXPECT_TRUE(refuses(call(1, 512, 4), {"width 512", "256 columns"}));
  EXPECT_TRUE(refuses(call(1, 256, 5), {"out", "extent 5", "need 4"}));
  EXPECT_TRUE(refuses(call(9, 256, 4), {"9 tokens", "at most 8"}));
  const TensorType q4 = TensorType::kQ4K;
  EXPECT_TRUE(refuses([&] { (void)plan_linear_decode(1 << 20, 1, std::span(&q4, 1), DeviceInfo{}); },
                      {"1048576 columns", "shared memory"}));
}

}  // namespace
}  // namespace gemma4::cuda

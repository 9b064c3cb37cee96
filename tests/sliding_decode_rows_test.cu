// SPDX-License-Identifier: Apache-2.0
// Several neighbouring tokens of a sliding layer at once, against launches of one token each: the same bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/sliding_decode.cuh"
#include "gemma4/config.hpp"
#include "gemma4/step_limits.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/sliding_rows_layer.cuh"

namespace gemma4::cuda {
namespace {

using testkit::rc_require;
using testkit::refuses;

using testkit::all_finite;
using testkit::same_bits;
using Case = testkit::SlidingRowsCase;
using Layer = testkit::SlidingRowsLayer;
using Result = testkit::SlidingRowsResult;

Case some_case() {
  Case c;
  c.head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 256);
  c.n_head_kv = *rc::gen::inRange<std::int64_t>(1, 3);
  c.group = *rc::gen::element<std::int64_t>(1, 2, 2, 3, 4);
  c.n_row = *rc::gen::inRange<std::int64_t>(2, 9);
  c.window = *rc::gen::oneOf(rc::gen::inRange<std::int64_t>(1, 70), rc::gen::inRange<std::int64_t>(1, 1025),
                             rc::gen::element<std::int64_t>(128, 256, 512, 1024));
  c.ring_len = c.window + 3 + *rc::gen::inRange<std::int64_t>(0, 70);
  const std::int64_t wrap = (1 + *rc::gen::inRange<std::int64_t>(0, 100)) * c.ring_len;
  c.position = *rc::gen::oneOf(rc::gen::inRange<std::int64_t>(0, 5), rc::gen::inRange<std::int64_t>(0, 2 * c.window),
                               rc::gen::inRange<std::int64_t>(std::max<std::int64_t>(0, c.window - 9), c.window + 2),
                               rc::gen::inRange<std::int64_t>(wrap - 9, wrap + 2),
                               rc::gen::inRange<std::int64_t>(0, 262144 - kDecodeChunk));
  c.scale = *rc::gen::element(1e-5f, 0.02f, 0.25f);
  c.cancels = *rc::gen::arbitrary<bool>();
  c.seed = *rc::gen::inRange<std::uint64_t>(1, 1 << 20);
  return c;
}

/// The smallest number of blocks that hold a window.
int least_split(std::int64_t window) {
  return window > 512 ? 8 : window > 256 ? 4 : window > 128 ? 2 : 1;
}

/// Out and ring, NaN in its spare slots and all; and what the rows give is finite.
testing::AssertionResult agrees(const Case& c, std::optional<int> n_split) {
  const Layer layer(c);
  const Result actual = layer.at_once(n_split);
  const testing::AssertionResult same = same_bits(c, actual, layer.one_by_one(n_split));
  if (!same) return same;
  if (!all_finite(actual.out)) return testing::AssertionFailure() << "what no row sees has reached a result";
  return same_bits(c, layer.at_once(n_split, true), actual) << " of an overlapping launch";
}

RC_GTEST_PROP(SlidingDecodeRowsGpu, RowsHaveTheBitsOfLaunchesOfTheirOwn, ()) {
  const Case c = some_case();
  const int n_split = std::max(least_split(c.window), *rc::gen::element(1, 2, 4, 8));
  RC_LOG() << c << ", n_split " << n_split;
  rc_require(agrees(c, n_split));
}

/// Every number of rows where the window fills, and where the ring begins again; keys of a block in chunks that are
/// full, and not.
TEST(SlidingDecodeRowsGpu, AtTheEdgesOfWindowAndRing) {
  for (const std::int64_t window : {32, 128, 100}) {
    for (std::int64_t n_row = 2; n_row <= kDecodeChunk; ++n_row) {
      const std::int64_t ring_len = window + 8;
      for (const std::int64_t position : {std::int64_t{0}, window - n_row, window - 2, window, ring_len - 2,
                                          5 * ring_len - n_row, 5 * ring_len - 1}) {
        const Case c{.window = window, .ring_len = ring_len, .position = position, .n_row = n_row};
        EXPECT_TRUE(agrees(c, 1)) << c;
        EXPECT_TRUE(agrees(c, 8)) << c;
      }
    }
  }
}

/// A layer of a model: blocks of 128 keys, which share what they read.
void expect_real_shape(const ModelConfig& model, std::span<const std::int64_t> n_rows) {
  for (const std::int64_t n_row : n_rows) {
    for (const std::int64_t position : {0, 5, 1020, 1023, 1024, 1085, 1088, 1500, 131068, 200000}) {
      const Case c{.n_head_kv = model.sliding.n_head_kv,
                   .group = model.n_head / model.sliding.n_head_kv,
                   .head_dim = model.sliding.head_dim,
                   .window = model.window,
                   .ring_len = ring_slots(model.window),
                   .position = position,
                   .n_row = n_row,
                   .scale = 0.125f};
      EXPECT_TRUE(agrees(c, {})) << c;
    }
  }
}

TEST(SlidingDecodeRowsGpu, RealShape) {
  expect_real_shape(gemma4_31b(), std::vector<std::int64_t>{2, 3, 4, 5, 8});
}

TEST(SlidingDecodeRowsGpu, RealShapeOfThe12B) {
  expect_real_shape(gemma4_12b(), std::vector<std::int64_t>{3, 4});
}

/// The blocks of a score's sum, which odd and even keys of a row add in different orders: with eight of them, one value
/// in 300 tells.
TEST(SlidingDecodeRowsGpu, ScoresAreSummedInTheOrderOfTheirRow) {
  for (const std::int64_t n_row : {2, 3, 4, 6}) {
    const Case c{.n_head_kv = 2,
                 .head_dim = 256,
                 .window = 128,
                 .ring_len = 192,
                 .position = 700,
                 .n_row = n_row,
                 .scale = 0.02f};
    EXPECT_TRUE(agrees(c, 8)) << c;
    EXPECT_TRUE(agrees(c, 1)) << c;
  }
}

/// What the comparison would not see it could not promise.
TEST(SlidingDecodeRowsGpu, ComparisonsSeeAKeyAndAPosition) {
  for (const std::int64_t n_row : {2, 4, 7}) {
    const Case c{.n_head_kv = 2, .window = 128, .ring_len = 192, .position = 700, .n_row = n_row, .scale = 1e-5f};
    const Layer layer(c);
    const Result actual = layer.at_once(8);
    EXPECT_TRUE(same_bits(c, actual, layer.one_by_one(8))) << c;
    EXPECT_FALSE(same_bits(c, actual, layer.one_by_one(8, 1))) << c << ": a window of a key fewer";
    EXPECT_FALSE(same_bits(c, layer.at_once(8, false, 1), layer.one_by_one(8))) << c << ": a position further";
    EXPECT_FALSE(same_bits(c, actual, layer.one_by_one(4))) << c << ": another split, another order of sums";
  }
}

/// A row sees its own key and those of rows before it, and nothing of the rows behind it.
TEST(SlidingDecodeRowsGpu, ARowSeesTheRowsBeforeItAlone) {
  for (const std::int64_t position : {0, 30, 700}) {
    for (const int n_split : {1, 8}) {
      const Case c{.window = 128, .ring_len = 192, .position = position, .n_row = 4};
      Layer layer(c);
      const Result before = layer.at_once(n_split);
      layer.set_row(2, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN());
      const Result after = layer.at_once(n_split);
      EXPECT_TRUE(same_bits(c, after, layer.one_by_one(n_split))) << c;
      const auto row = static_cast<std::size_t>(c.n_head() * c.head_dim);
      for (std::size_t r = 0; r < 4; ++r) {
        const auto at = [&](const Result& result) { return std::span(result.out).subspan(r * row, row); };
        const bool same = std::ranges::equal(at(before), at(after), {}, &Bf16::bits, &Bf16::bits);
        EXPECT_EQ(same, r < 2) << c << ", n_split " << n_split << ", row " << r;
        EXPECT_EQ(all_finite(at(after)), r < 2) << c << ", n_split " << n_split << ", row " << r;
      }
    }
  }
}

/// Steps of four rows of which some stay: what later rows of a step have stored is replaced by the next step.
RC_GTEST_PROP(SlidingDecodeRowsGpu, StepsThatKeepSomeOfTheirRows, ()) {
  Case c{.window = 64, .ring_len = 72, .position = *rc::gen::inRange<std::int64_t>(0, 200), .n_row = 4};
  Result at_once, one_by_one;
  for (int step = 0; step < 4; ++step) {
    c.seed = *rc::gen::inRange<std::uint64_t>(1, 1 << 20);
    Layer layer(c), plain(c);
    if (step > 0) layer.continue_from(at_once), plain.continue_from(one_by_one);
    at_once = layer.at_once(2);
    one_by_one = plain.one_by_one(2);
    RC_LOG() << "step " << step << ": " << c << '\n';
    rc_require(same_bits(c, at_once, one_by_one));
    RC_ASSERT(all_finite(at_once.out));
    c.position += *rc::gen::inRange<std::int64_t>(1, 5);
  }
}

constexpr AttentionShape k31bShape{.n_query = 1, .n_head = 32, .n_head_kv = 16, .head_dim = 256, .buffer_len = 1088};
const DeviceInfo kH200{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};

TEST(SlidingDecodeRowsPlan, KeysAreSplitAsForOneRow) {
  const SlidingDecodePlan one = plan_sliding_decode(k31bShape, 1024, kH200);
  for (std::int64_t n_row = 2; n_row <= kDecodeChunk; ++n_row) {
    const SlidingRowsPlan plan = plan_sliding_rows(one, n_row, kH200);
    EXPECT_TRUE(plan.fits()) << plan.misfit;
    EXPECT_EQ(plan.one.n_split, one.n_split);
    EXPECT_LE(plan.smem_bytes, 115712) << "two blocks no longer share a multiprocessor";
  }
}

TEST(SlidingDecodeRowsPlan, WhatDoesNotFitIsSaid) {
  const auto misfit = [](AttentionShape shape, std::int64_t n_row, const DeviceInfo& device,
                         std::int64_t smem_limit_bytes = 232448) {
    DeviceInfo less = device;
    less.smem_limit_bytes = smem_limit_bytes;
    const SlidingRowsPlan plan = plan_sliding_rows(plan_sliding_decode(shape, 1024, device), n_row, less);
    return std::string(plan.fits() ? "" : plan.misfit);
  };
  DeviceInfo old = kH200;
  old.compute_capability = 80;
  AttentionShape tight = k31bShape;
  tight.buffer_len = 1026;
  EXPECT_FALSE(SlidingRowsPlan{}.fits());
  EXPECT_EQ(misfit(k31bShape, 4, kH200), "");
  EXPECT_EQ(misfit(k31bShape, 4, old), "the device has no clusters");
  EXPECT_EQ(misfit(k31bShape, 1, kH200), "there are not 2 to 8 rows");
  EXPECT_EQ(misfit(k31bShape, 9, kH200), "there are not 2 to 8 rows");
  EXPECT_EQ(misfit(tight, 3, kH200), "");
  EXPECT_EQ(misfit(tight, 4, kH200), "a row's slot of the ring holds a key that another row sees");
  EXPECT_EQ(misfit(k31bShape, 4, kH200, 110 * 1024), "the keys of the rows do not fit into shared memory");
}

TEST(SlidingDecodeRowsPlan, MisuseIsRefusedBeforeAnyLaunch) {
  std::vector<float> values(4 * 4 * 64);
  std::vector<Bf16> memory(4 * 4 * 64);
  const AttentionShape shape{.n_query = 1, .n_head = 4, .n_head_kv = 2, .head_dim = 64, .buffer_len = 11};
  const RopeParams rope = Case{}.rope();
  const auto call = [&](std::int64_t n_q, std::int64_t n_k, DeviceCount position, const DeviceInfo& device) {
    return [&, n_q, n_k, position, device] {
      const auto heads = [&](std::int64_t n, std::int64_t n_head) {
        return make_view(std::as_const(values).data(), n, n_head, 64);
      };
      const auto ring = make_view(memory.data(), 2, 11, 64);
      sliding_decode_rows({heads(n_q, 4),
                           heads(n_k, 2),
                           heads(n_k, 2),
                           {values.data(), values.data(), 1e-6f},
                           position,
                           rope,
                           ring,
                           ring,
                           1.0f,
                           make_view(memory.data(), n_q, 4, 64)},
                          plan_sliding_rows(plan_sliding_decode(shape, 8, device), 3, device), nullptr);
    };
  };
  DeviceInfo old = kH200;
  old.compute_capability = 80;
  const DeviceCount five = DeviceCount::on_host(5);
  EXPECT_TRUE(refuses(call(3, 3, five, old), {"sliding_decode_rows", "no clusters", "sliding_decode()"}));
  EXPECT_TRUE(refuses(call(2, 2, five, kH200), {"q", "2", "3"}));
  EXPECT_TRUE(refuses(call(3, 2, five, kH200), {"k", "2", "3"}));
  EXPECT_TRUE(refuses(call(3, 3, {}, kH200), {"position"}));
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cuda/bf16_attention.cuh"
#include "cuda/device/device_buffer.cuh"
#include "tests/support/attention_case.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/property.hpp"
#include "tests/support/rows_case.cuh"

// Rows in one launch against a call each, bit for bit.
namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

/// Scores of half a unit: no key is without weight, and one more or fewer is seen.
AttentionOptions options_of(const RowsCase& c) {
  return {.scale = 0.5f / std::sqrt(static_cast<float>(c.head_dim))};
}

/// Random keys and values of one sequence, and rows to attend over them.
class Rows {
 public:
  explicit Rows(const RowsCase& c)
      : case_(c),
        q_(narrow(draw(c.seed, c.n_row * c.n_head * c.head_dim))),
        k_(narrow(draw(c.seed + 1, c.n_head_kv * c.buffer_len() * c.head_dim))),
        v_(narrow(draw(c.seed + 2, c.n_head_kv * c.buffer_len() * c.head_dim))) {}

  [[nodiscard]] Bf16RowsPlan plan(std::optional<int> n_split = std::nullopt,
                                  std::optional<std::int64_t> partials_bytes = std::nullopt) const {
    return plan_bf16_rows(case_.shape(case_.n_row), plan_of_one(n_split), partials_bytes);
  }

  /// All rows at once: the keys of the later ones are there already, and behind the last is poison.
  /// @param from_host kv_len is known to the host
  [[nodiscard]] std::vector<Bf16> at_once(const Bf16RowsPlan& plan, bool from_host = false) const {
    const DeviceBuffer<std::int32_t> on_device(case_.lengths());
    const DeviceCount kv_len =
        from_host ? DeviceCount::on_host(case_.kv_len) : DeviceCount::on_device(on_device.data());
    const auto k = keys(k_, case_.kv_len + case_.n_row - 1), v = keys(v_, case_.kv_len + case_.n_row - 1);
    return case_.run(q_, 0, case_.n_row, plan.workspace_bytes, [&](const auto& q, const auto& out, auto room) {
      bf16_attention_rows({q, view(k), view(v), options_of(case_), kv_len, out}, plan, room, nullptr);
    });
  }

  /// One row as a call of its own, which finds poison where later rows have their keys.
  /// @param more keys than the row has
  [[nodiscard]] std::vector<Bf16> alone(std::int64_t row, std::optional<int> n_split, std::int64_t more = 0) const {
    const std::int64_t kv_len = case_.kv_len + row + more;
    const FlashPlan plan = plan_of_one(n_split);
    const auto k = keys(k_, kv_len), v = keys(v_, kv_len);
    return case_.run(q_, row, 1, plan.workspace_bytes, [&](const auto& q, const auto& out, auto room) {
      bf16_attention({q, view(k), view(v), options_of(case_), DeviceCount::on_host(kv_len), out}, plan, room, nullptr);
    });
  }

 private:
  [[nodiscard]] FlashPlan plan_of_one(std::optional<int> n_split) const {
    return plan_bf16_attention(case_.shape(1), options_of(case_), current_device(), {.n_split = n_split});
  }
  /// Behind n_valid keys they are no numbers.
  [[nodiscard]] DeviceBuffer<Bf16> keys(std::vector<Bf16> values, std::int64_t n_valid) const {
    const std::int64_t head = case_.buffer_len() * case_.head_dim;
    for (std::int64_t i = 0; i < std::ssize(values); ++i) {
      if (i % head < n_valid * case_.head_dim) continue;
      values[static_cast<std::size_t>(i)] = to_bf16(std::numeric_limits<float>::quiet_NaN());
    }
    return DeviceBuffer<Bf16>(values);
  }
  [[nodiscard]] View<const Bf16, 4> view(const DeviceBuffer<Bf16>& keys) const {
    return make_view(keys.data(), std::int64_t{1}, case_.n_head_kv, case_.buffer_len(), case_.head_dim);
  }
  RowsCase case_;
  std::vector<Bf16> q_, k_, v_;
};

/// Controls: a row that saw one key more or fewer would differ.
RC_GTEST_PROP(Bf16RowsGpu, EachRowHasTheBitsOfACallOfItsOwn, ()) {
  RowsCase c{.n_row = *rc::gen::inRange<std::int64_t>(1, kMostRows + 1),
             .n_head_kv = *rc::gen::inRange<std::int64_t>(1, 3),
             .head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 512),
             .kv_len = *rc::gen::inRange<std::int64_t>(1, *rc::gen::element<std::int64_t>(10, 300)),
             .seed = *rc::gen::inRange<std::uint64_t>(1, 1000)};
  c.n_head = c.n_head_kv * *rc::gen::element<std::int64_t>(1, 2, 6, 8, 16);
  const Rows rows(c);
  const int n_split = *rc::gen::inRange(1, 6);
  RC_LOG() << c.n_row << " rows of " << c.n_head << '/' << c.n_head_kv << " heads of " << c.head_dim << " from kv_len "
           << c.kv_len << " on, " << n_split << " splits\n";
  const Bf16RowsPlan plan = rows.plan(n_split);
  RC_ASSERT(plan.misfit == nullptr);
  const std::vector<Bf16> out = rows.at_once(plan);
  rc_require(same_bits(rows.at_once(plan, true), out), "kv_len from the host");
  for (std::int64_t row = 0; row < c.n_row; ++row) {
    rc_require(same_bits(c.row_of(out, row), rows.alone(row, n_split)), concat("row ", row));
  }
  const std::int64_t some = *rc::gen::inRange<std::int64_t>(0, c.n_row);
  RC_ASSERT(!same_bits(c.row_of(out, some), rows.alone(some, n_split, 1)));
  if (c.kv_len + some > 1) RC_ASSERT(!same_bits(c.row_of(out, some), rows.alone(some, n_split, -1)));
}

/// What a launch takes at a time is nothing to a row.
TEST(Bf16RowsGpu, AnyNumberOfRowsALaunchGivesTheSameBits) {
  const Rows rows({.n_row = 7, .n_head = 12, .n_head_kv = 2, .head_dim = 128, .kv_len = 90});
  const Bf16RowsPlan whole = rows.plan(2);
  EXPECT_EQ(whole.rows_a_launch, 7);
  const std::vector<Bf16> out = rows.at_once(whole);
  for (const std::int64_t n : {2, 3, 6}) {
    const Bf16RowsPlan some = rows.plan(2, n * whole.one.workspace_bytes);
    ASSERT_EQ(some.misfit, nullptr);
    EXPECT_EQ(some.rows_a_launch, n);
    EXPECT_TRUE(same_bits(rows.at_once(some), out)) << n << " rows a launch";
  }
}

TEST(Bf16RowsGpu, AnotherPlanThanTheCallsIsRefused) {
  const Rows rows({.n_row = 3, .head_dim = 64, .kv_len = 20});
  expect_other_plans_refused(rows.plan(), "plan_bf16_rows()",
                             [&](const Bf16RowsPlan& plan) { (void)rows.at_once(plan); });
}

TEST(Bf16RowsPlan, EachRowHasTheSplitsOfOneAndWhatDoesNotFitIsSaid) {
  const AttentionShape real{
      .batch = 1, .n_query = 4, .n_head = 32, .n_head_kv = 4, .head_dim = 512, .buffer_len = 131072};
  const DeviceInfo large{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};
  AttentionShape of_one = real;
  of_one.n_query = 1;
  FlashPlan one = plan_bf16_attention(of_one, {}, large);
  const Bf16RowsPlan plan = plan_bf16_rows(real, one, std::nullopt);
  ASSERT_EQ(plan.misfit, nullptr);
  const FlashPlan some = detail::plan_of_rows(plan, 4);
  EXPECT_EQ(some.n_split, one.n_split);
  EXPECT_EQ(some.grid.z, one.grid.z);
  EXPECT_EQ(some.grid.y, 4 * one.grid.y);
  EXPECT_EQ(plan.workspace_bytes, 4 * one.workspace_bytes);
  EXPECT_STREQ(plan_bf16_rows(real, one, one.workspace_bytes).misfit,
               "the workspace has room for what one row leaves of split keys");
  expect_rows_shapes_refused(real,
                             [&](const AttentionShape& shape) { return plan_bf16_rows(shape, one, std::nullopt); });
  one.path = FlashPath::kWgmma;
  EXPECT_STREQ(plan_bf16_rows(real, one, std::nullopt).misfit, "the wgmma kernels know one length a call");
}

}  // namespace
}  // namespace gemma4::cuda

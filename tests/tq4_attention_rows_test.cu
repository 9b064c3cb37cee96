// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/tq4_attention.cuh"
#include "tests/support/attention_case.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/property.hpp"
#include "tests/support/rows_case.cuh"
#include "tests/support/tq4_device.cuh"

// Rows in one launch against a call each, bit for bit.
namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::Tq4CacheBuffer;

std::string name_of(const RowsCase& c) {
  return concat(c.n_row, " rows of ", c.n_head, "/", c.n_head_kv, " heads of ", c.head_dim, " from kv_len ", c.kv_len,
                " on, scale ", c.scale);
}

/// Random records of one sequence and rows to attend over them.
class Rows {
 public:
  explicit Rows(const RowsCase& c)
      : case_(c), codec_(codec_of<Tq4Codec>(c.head_dim)), q_(narrow(draw(c.seed, c.n_row * c.n_head * c.head_dim))) {}

  [[nodiscard]] Tq4RowsPlan plan(std::optional<int> n_split = std::nullopt,
                                 std::optional<std::int64_t> partials_bytes = std::nullopt) const {
    const Tq4DecodePlan one = plan_tq4_decode("test", case_.shape(1), current_device(), {.n_split = n_split});
    return plan_tq4_rows(case_.shape(case_.n_row), one, true, partials_bytes);
  }

  /// All rows at once: the keys of the later ones are there already, and behind the last is poison.
  [[nodiscard]] std::vector<Bf16> at_once(const Tq4RowsPlan& plan, unsigned long long* n_record = nullptr) const {
    const DeviceBuffer<std::byte> memory = records(case_.kv_len + case_.n_row - 1);
    DeviceBuffer<unsigned long long> count(1);
    count.fill_bytes(0);
    const DeviceBuffer<std::int32_t> lengths(case_.lengths());
    std::vector<Bf16> values =
        case_.run(q_, 0, case_.n_row, plan.workspace_bytes, [&](const auto& q, const auto& out, auto workspace) {
          tq4_attention_rows(call(q, out, memory, lengths), plan, workspace, nullptr, count.data());
        });
    if (n_record != nullptr) *n_record = count.to_host()[0];
    return values;
  }

  /// One row as a call of its own, which finds poison where later rows have their keys.
  /// @param more keys than the row has
  [[nodiscard]] std::vector<Bf16> alone(std::int64_t row, std::optional<int> n_split, std::int64_t more = 0) const {
    const std::int64_t kv_len = case_.kv_len + row;
    const DeviceBuffer<std::byte> memory = records(kv_len + std::max<std::int64_t>(more, 0));
    const Tq4AttentionPlan plan = plan_tq4_attention(case_.shape(1), options(), current_device(),
                                                     {.path = Tq4Path::kDecode, .decode = {.n_split = n_split}});
    const DeviceBuffer<std::int32_t> length(std::vector<std::int32_t>{static_cast<std::int32_t>(kv_len + more)});
    return case_.run(q_, row, 1, plan.workspace_bytes, [&](const auto& q, const auto& out, auto workspace) {
      tq4_attention(call(q, out, memory, length), plan, workspace, nullptr);
    });
  }

 private:
  [[nodiscard]] AttentionOptions options() const { return {.scale = case_.scale}; }
  /// @param n_valid behind these, norms are no numbers and codes others
  [[nodiscard]] DeviceBuffer<std::byte> records(std::int64_t n_valid) const {
    Tq4CacheBuffer host(1, case_.n_head_kv, case_.buffer_len(), case_.head_dim);
    std::mt19937_64 random(case_.seed);
    for (std::uint8_t& byte : host.k_codes()) byte = static_cast<std::uint8_t>(random());
    for (std::uint8_t& byte : host.v_codes()) byte = static_cast<std::uint8_t>(random());
    for (Tq4Norm& norm : host.k_norm()) norm = to_bf16(0.1f + static_cast<float>(random() & 1023) * 1e-4f);
    for (Tq4Norm& norm : host.v_norm()) norm = to_bf16(20.0f + static_cast<float>(random() & 1023) * 1e-3f);
    const Tq4CacheView view = host.view();
    for (std::int64_t head = 0; head < case_.n_head_kv; ++head) {
      for (std::int64_t key = n_valid; key < case_.buffer_len(); ++key) {
        view.k_norm(0, head, key) = view.v_norm(0, head, key) = to_bf16(std::numeric_limits<float>::quiet_NaN());
        for (std::int64_t i = 0; i < case_.head_dim / 2; ++i) {
          view.k_codes(0, head, key, i) ^= 0x5A;
          view.v_codes(0, head, key, i) ^= 0xF0;
        }
      }
    }
    return records_of(host);
  }
  [[nodiscard]] Tq4AttentionCall call(const View<const Bf16, 4>& q, const View<Bf16, 4>& out,
                                      const DeviceBuffer<std::byte>& memory,
                                      const DeviceBuffer<std::int32_t>& kv_len) const {
    return {q,
            {memory.data(), 1, case_.n_head_kv, case_.buffer_len(), case_.head_dim},
            codec_,
            options(),
            DeviceCount::on_device(kv_len.data()),
            out};
  }

  RowsCase case_;
  const Tq4Codec& codec_;
  std::vector<Bf16> q_;
};

/// Half of the time a record ends among the rows; half of the time there are fewer records than splits and pairs.
RowsCase draw_case() {
  RowsCase c{.n_row = *rc::gen::inRange<std::int64_t>(1, kMostRows + 1),
             .head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 512)};
  c.n_head_kv = *rc::gen::inRange<std::int64_t>(1, 3);
  c.n_head = c.n_head_kv * *rc::gen::element<std::int64_t>(1, 2, 6, 8, 8, 16);
  const std::int64_t record = *rc::gen::inRange<std::int64_t>(1, *rc::gen::element<std::int64_t>(5, 40));
  c.kv_len = std::max<std::int64_t>(
      1, record * kTq4RecordTokens -
             *rc::gen::inRange<std::int64_t>(0, *rc::gen::arbitrary<bool>() ? c.n_row : kTq4RecordTokens));
  c.scale = *rc::gen::element(0.02f, 0.5f, 4.0f);
  c.seed = *rc::gen::inRange<std::uint64_t>(1, 1000);
  return c;
}

/// Controls: a row that saw one key more or fewer would differ.
RC_GTEST_PROP(Tq4RowsGpu, EachRowHasTheBitsOfACallOfItsOwn, ()) {
  const RowsCase c = draw_case();
  const Rows rows(c);
  const int n_split = *rc::gen::inRange(1, 6);
  const Tq4RowsPlan plan = rows.plan(n_split);
  RC_PRE(plan.misfit == nullptr);  // a small device's configurations take one row
  RC_LOG() << name_of(c) << ", " << n_split << " splits\n";
  unsigned long long n_record = 0, expected_records = 0;
  const std::vector<Bf16> out = rows.at_once(plan, &n_record);
  for (std::int64_t row = 0; row < c.n_row; ++row) {
    rc_require(same_bits(c.row_of(out, row), rows.alone(row, n_split)), concat("row ", row));
    const std::int64_t of_row = (c.kv_len + row + kTq4RecordTokens - 1) / kTq4RecordTokens;
    expected_records += static_cast<unsigned long long>(of_row * c.n_head_kv * plan.one.n_row_tile);
  }
  RC_ASSERT(n_record == expected_records);
  if (c.scale > 0.1f) return;  // one key may have all of a head's weight
  const std::int64_t some = *rc::gen::inRange<std::int64_t>(0, c.n_row);
  RC_ASSERT(!same_bits(c.row_of(out, some), rows.alone(some, n_split, 1)));
  if (c.kv_len + some > 1) RC_ASSERT(!same_bits(c.row_of(out, some), rows.alone(some, n_split, -1)));
}

/// What a launch takes at a time is nothing to a row.
TEST(Tq4RowsGpu, AnyNumberOfRowsALaunchGivesTheSameBits) {
  const RowsCase c{.n_row = 7, .n_head = 12, .n_head_kv = 2, .head_dim = 128, .kv_len = 90};
  const Rows rows(c);
  const Tq4RowsPlan whole = rows.plan(2);
  if (whole.misfit != nullptr) GTEST_SKIP() << whole.misfit;
  EXPECT_EQ(whole.rows_a_launch, 7);
  const std::vector<Bf16> out = rows.at_once(whole);
  for (const std::int64_t n : {2, 3, 6}) {
    const Tq4RowsPlan some = rows.plan(2, n * whole.one.workspace_bytes);
    ASSERT_EQ(some.misfit, nullptr);
    EXPECT_EQ(some.rows_a_launch, n);
    EXPECT_TRUE(same_bits(rows.at_once(some), out)) << n << " rows a launch";
  }
}

TEST(Tq4RowsGpu, AnotherPlanThanTheCallsIsRefused) {
  const RowsCase c{.n_row = 3, .head_dim = 64, .kv_len = 20};
  const Rows rows(c);
  const Tq4RowsPlan good = rows.plan();
  if (good.misfit != nullptr) GTEST_SKIP() << good.misfit;
  expect_other_plans_refused(good, "plan_tq4_rows()", [&](const Tq4RowsPlan& plan) { (void)rows.at_once(plan); });
}

TEST(Tq4RowsPlan, EachRowHasTheSharesOfOneAndWhatDoesNotFitIsSaid) {
  const AttentionShape real{
      .batch = 1, .n_query = 4, .n_head = 32, .n_head_kv = 4, .head_dim = 512, .buffer_len = 131072};
  const DeviceInfo large{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};
  AttentionShape of_one = real;
  of_one.n_query = 1;
  const Tq4DecodePlan one = plan_tq4_decode("test", of_one, large);
  const Tq4RowsPlan plan = plan_tq4_rows(real, one, true, std::nullopt);
  ASSERT_EQ(plan.misfit, nullptr);
  const Tq4DecodePlan some = detail::plan_of_rows(plan, 4);
  EXPECT_EQ(some.n_split, one.n_split);
  EXPECT_EQ(some.grid.x, 4 * one.grid.x) << "the rows of a split are neighbours";
  EXPECT_EQ(some.grid.z, 1u);
  EXPECT_EQ(some.combine_grid.z, 4u);
  EXPECT_EQ(plan.workspace_bytes, 4 * one.workspace_bytes);

  EXPECT_STREQ(plan_tq4_rows(real, one, false, std::nullopt).misfit, "the codebook has no byte levels");
  EXPECT_STREQ(plan_tq4_rows(real, one, true, one.workspace_bytes).misfit,
               "the workspace has room for what one row leaves of split keys");
  DeviceInfo small = large;
  small.smem_limit_bytes = 99 * 1024;
  EXPECT_STREQ(plan_tq4_rows(real, plan_tq4_decode("test", of_one, small), true, std::nullopt).misfit,
               "no compiled configuration of several rows adds like the one of a row");
  expect_rows_shapes_refused(
      real, [&](const AttentionShape& shape) { return plan_tq4_rows(shape, one, true, std::nullopt); });
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/kv_attention.cuh"
#include "tests/support/attention_case.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/kv_device.cuh"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/rows_case.cuh"

// Rows at once against rows one by one, bit for bit.
namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::KvCacheBuffer;

std::string name_of(const KvDecodeTile& tile) {
  return concat("d", tile.head_dim, " of ", tile.v_bits, "/", tile.r_bits, " bits, warps ", tile.team_warps, " x ",
                tile.teams, ", stages ", tile.n_stage, ", row tiles ", tile.row_tiles, ", ", tile.batch, " at a time");
}

/// Random records of one sequence and rows to attend over them.
class Rows {
 public:
  explicit Rows(const RowsCase& c)
      : case_(c),
        codec_(kv_codec_of<KvCodec>(c.head_dim, c.format)),
        q_(narrow(draw(c.seed, c.n_row * c.n_head * c.head_dim))),
        weight_(draw_k_weight(c.head_dim)) {}

  /// All rows at once: the keys of the later ones are there already, and behind the last is poison.
  [[nodiscard]] std::vector<Bf16> at_once(const KvRowsPlan& plan) const {
    const DeviceBuffer<std::byte> memory = records(case_.kv_len + case_.n_row - 1);
    const DeviceBuffer<std::int32_t> lengths(case_.lengths());
    return case_.run(q_, 0, case_.n_row, plan.workspace_bytes, [&](const auto& q, const auto& out, auto workspace) {
      kv_attention_rows(call(q, out, memory, lengths), plan, workspace, nullptr);
    });
  }

  /// One row as a call of its own, which finds poison where later rows have their keys.
  /// @param more keys than the row has
  [[nodiscard]] std::vector<Bf16> alone(std::int64_t row, const KvDecodeChoice& choice, std::int64_t more = 0) const {
    const std::int64_t kv_len = case_.kv_len + row;
    const DeviceBuffer<std::byte> memory = records(kv_len + std::max<std::int64_t>(more, 0));
    const KvAttentionPlan plan = plan_kv_attention(case_.shape(1), case_.format, options(), current_device(),
                                                   {.path = KvPath::kDecode, .decode = choice});
    const DeviceBuffer<std::int32_t> length(std::vector<std::int32_t>{static_cast<std::int32_t>(kv_len + more)});
    return case_.run(q_, row, 1, plan.workspace_bytes, [&](const auto& q, const auto& out, auto workspace) {
      kv_attention(call(q, out, memory, length), plan, workspace, nullptr);
    });
  }

 private:
  [[nodiscard]] AttentionOptions options() const { return {.scale = case_.scale}; }
  /// @param n_valid behind these, norms are no numbers and codes others
  [[nodiscard]] DeviceBuffer<std::byte> records(std::int64_t n_valid) const {
    KvCacheBuffer host(1, case_.n_head_kv, case_.buffer_len(), kv_code_bytes(case_.head_dim, case_.format.v_bits),
                       kv_code_bytes(kv_rotated_size(case_.head_dim), case_.format.r_bits));
    std::mt19937_64 random(case_.seed);
    for (std::uint8_t& byte : host.v_codes()) byte = static_cast<std::uint8_t>(random());
    for (std::uint8_t& byte : host.r_codes()) byte = static_cast<std::uint8_t>(random());
    for (KvNorm& norm : host.v_norm()) norm = to_f16(0.1f + static_cast<float>(random() & 1023) * 1e-4f);
    for (KvNorm& norm : host.r_norm()) norm = to_f16(0.05f + static_cast<float>(random() & 1023) * 1e-4f);
    const KvCacheView view = host.view();
    for (std::int64_t head = 0; head < case_.n_head_kv; ++head) {
      for (std::int64_t key = n_valid; key < case_.buffer_len(); ++key) {
        view.v_norm(0, head, key) = view.r_norm(0, head, key) = to_f16(std::numeric_limits<float>::quiet_NaN());
        for (std::int64_t i = 0; i < view.v_codes.extent[3]; ++i) view.v_codes(0, head, key, i) ^= 0x5A;
        for (std::int64_t i = 0; i < view.r_codes.extent[3]; ++i) view.r_codes(0, head, key, i) ^= 0xF0;
      }
    }
    return kv_records_of(host, case_.head_dim, case_.format);
  }
  [[nodiscard]] KvAttentionCall call(const View<const Bf16, 4>& q, const View<Bf16, 4>& out,
                                     const DeviceBuffer<std::byte>& memory,
                                     const DeviceBuffer<std::int32_t>& kv_len) const {
    return {.q = q,
            .k_weight = weight_.data(),
            .cache = {memory.data(), 1, case_.n_head_kv, case_.buffer_len(), case_.head_dim, case_.format.v_bits,
                      case_.format.r_bits},
            .codec = codec_,
            .options = options(),
            .kv_len = DeviceCount::on_device(kv_len.data()),
            .out = out};
  }

  RowsCase case_;
  const KvCodec& codec_;
  std::vector<Bf16> q_;
  DeviceBuffer<float> weight_;
};

/// The configurations of one row that add like one of several, and fit.
std::vector<KvDecodeTile> ones_for(const KvDecodeTile& rows) {
  std::vector<KvDecodeTile> ones;
  for (const KvDecodeTile& tile : kKvDecodeTiles) {
    const bool fits = tile.smem_bytes() <= current_device().smem_limit_bytes;
    if (tile.row_tiles == 1 && fits && rows.adds_like(tile)) ones.push_back(tile);
  }
  return ones;
}

/// The configurations of rows that fit.
std::vector<KvDecodeTile> rows_tiles() {
  std::vector<KvDecodeTile> tiles;
  for (const KvDecodeTile& tile : kKvRowsTiles) {
    if (tile.smem_bytes() <= current_device().smem_limit_bytes) tiles.push_back(tile);
  }
  return tiles;
}

/// Half of the time a record ends among the rows; half of the time there are fewer records than splits and teams.
std::int64_t draw_kv_len(std::int64_t n_row) {
  const std::int64_t most = *rc::gen::element<std::int64_t>(5, 24);
  const std::int64_t record = *rc::gen::inRange<std::int64_t>(1, most) * kKvRecordTokens;
  if (*rc::gen::arbitrary<bool>()) return std::max<std::int64_t>(1, record - *rc::gen::inRange<std::int64_t>(0, n_row));
  return record - *rc::gen::inRange<std::int64_t>(0, kKvRecordTokens);
}

RowsCase draw_case(const KvDecodeTile& tile) {
  RowsCase c{.n_row = *rc::gen::inRange<std::int64_t>(1, kMostRows + 1), .head_dim = tile.head_dim};
  c.n_head_kv = *rc::gen::inRange<std::int64_t>(1, 3);
  c.n_head = c.n_head_kv * *rc::gen::element<std::int64_t>(1, 2, 6, 8, 8, 8, 16);
  c.kv_len = draw_kv_len(c.n_row);
  c.format = {.v_bits = tile.v_bits, .r_bits = tile.r_bits};
  if (tile.v_bits == 0) c.format = {.v_bits = *rc::gen::inRange(3, 7), .r_bits = *rc::gen::inRange(3, 7)};
  c.scale = *rc::gen::element(0.5f, 6.0f, 40.0f);
  c.seed = *rc::gen::inRange<std::uint64_t>(1, 1000);
  return c;
}

std::string name_of(const RowsCase& c) {
  return concat(c.n_row, " rows of ", c.n_head, "/", c.n_head_kv, " heads from kv_len ", c.kv_len, " on, kv",
                c.format.v_bits, "r", c.format.r_bits, ", scale ", c.scale);
}

/// Controls: a row that saw one key more or fewer would differ.
RC_GTEST_PROP(KvRowsGpu, EachRowHasTheBitsOfACallOfItsOwn, ()) {
  const std::vector<KvDecodeTile> tiles = rows_tiles();
  RC_PRE(!tiles.empty());
  const KvDecodeTile tile = *rc::gen::elementOf(tiles);
  const RowsCase c = draw_case(tile);
  const Rows rows(c);
  for (const KvDecodeTile& one : ones_for(tile)) {
    const KvDecodeChoice choice{.tile = one, .n_split = *rc::gen::inRange(1, 5)};
    const KvDecodePlan of_one = plan_kv_decode("test", c.shape(1), c.format, current_device(), choice);
    const KvRowsPlan plan =
        plan_kv_rows(c.shape(c.n_row), of_one, current_device(), std::nullopt,
                     {.tile = tile, .rows_a_launch = *rc::gen::inRange<std::int64_t>(2, kMostRows + 1)});
    RC_ASSERT(plan.misfit == nullptr);
    RC_LOG() << name_of(tile) << " against " << name_of(one) << ": " << name_of(c) << ", " << *choice.n_split
             << " splits, " << plan.rows_a_launch << " a launch\n";
    const std::vector<Bf16> out = rows.at_once(plan);
    for (std::int64_t row = 0; row < c.n_row; ++row) {
      rc_require(same_bits(c.row_of(out, row), rows.alone(row, choice)), concat("row ", row));
    }
    if (c.scale > 1.0f) continue;  // one key may have all of a head's weight
    const std::int64_t some = *rc::gen::inRange<std::int64_t>(0, c.n_row);
    RC_ASSERT(!same_bits(c.row_of(out, some), rows.alone(some, choice, 1)));
    if (c.kv_len + some > 1) RC_ASSERT(!same_bits(c.row_of(out, some), rows.alone(some, choice, -1)));
  }
}

/// A record that ends among the rows: those behind it divide their records anew. Every configuration, with scores that
/// leave the reference of the weights behind again and again. Control: a row that kept the division of the row before
/// would differ, which one of other shares does.
TEST(KvRowsGpu, RowsBeyondARecordHaveTheSharesOfTheirOwnLength) {
  for (const KvDecodeTile& tile : rows_tiles()) {
    for (const auto& [kv_len, scale] : {std::pair<std::int64_t, float>{605, 2.0f}, {605, 40.0f}, {30, 2.0f}}) {
      RowsCase c{.n_row = 6, .n_head = 16, .n_head_kv = 2, .head_dim = tile.head_dim, .kv_len = kv_len};
      if (tile.v_bits != 0) c.format = {.v_bits = tile.v_bits, .r_bits = tile.r_bits};
      c.scale = scale;
      const Rows rows(c);
      for (const KvDecodeTile& one : ones_for(tile)) {
        KvDecodeChoice choice{.tile = one, .n_split = 3};
        const KvDecodePlan of_one = plan_kv_decode("test", c.shape(1), c.format, current_device(), choice);
        const KvRowsPlan plan = plan_kv_rows(c.shape(c.n_row), of_one, current_device(), std::nullopt, {.tile = tile});
        ASSERT_EQ(plan.misfit, nullptr);
        const std::vector<Bf16> out = rows.at_once(plan);
        for (std::int64_t row = 0; row < c.n_row; ++row) {  // 605 to 610: 38 records, from 609 on 39; 30 to 35: 2 and 3
          const std::string what = concat(name_of(tile), ": ", name_of(c), ", row ", row);
          EXPECT_TRUE(same_bits(c.row_of(out, row), rows.alone(row, choice))) << what;
          if (scale > 2.0f || kv_len < 100 || row > 0) continue;
          choice.n_split = 2;
          EXPECT_FALSE(same_bits(c.row_of(out, row), rows.alone(row, choice))) << "control, other shares: " << what;
          choice.n_split = 3;
        }
      }
    }
  }
}

/// What a launch takes at a time is nothing to a row.
TEST(KvRowsGpu, AnyNumberOfRowsALaunchGivesTheSameBits) {
  const RowsCase c{.n_row = 7, .n_head = 6, .n_head_kv = 1, .head_dim = 128, .kv_len = 90};
  const Rows rows(c);
  const DeviceInfo device = current_device();
  const KvDecodePlan one = plan_kv_decode("test", c.shape(1), c.format, device, {.n_split = 2});
  const KvRowsPlan whole = plan_kv_rows(c.shape(c.n_row), one, device, std::nullopt);
  ASSERT_EQ(whole.misfit, nullptr);
  EXPECT_EQ(whole.rows_a_launch, 7);
  EXPECT_EQ(whole.workspace_bytes, 7 * one.workspace_bytes);
  const std::vector<Bf16> out = rows.at_once(whole);
  for (const std::int64_t n : {2, 3, 4, 6}) {
    const KvRowsPlan some = plan_kv_rows(c.shape(c.n_row), one, device, n * one.workspace_bytes);
    ASSERT_EQ(some.misfit, nullptr);
    EXPECT_EQ(some.rows_a_launch, n > 4 ? 4 : n) << "whole blocks of four tiles of rows, where there are more";
    EXPECT_TRUE(same_bits(rows.at_once(some), out)) << n << " rows a launch";
  }
}

constexpr AttentionShape kReal{
    .batch = 1, .n_query = 4, .n_head = 32, .n_head_kv = 4, .head_dim = 512, .buffer_len = 131072};
constexpr DeviceInfo kLarge{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};

KvDecodePlan plan_of_one(AttentionShape shape, const KvOptions& format, const DeviceInfo& device) {
  shape.n_query = 1;
  return plan_kv_decode("test", shape, format, device);
}

TEST(KvRowsPlan, TheModelsFormatsTakeFourRowsInOnePass) {
  for (const KvOptions& format : {KvOptions{}, KvOptions{.v_bits = 4}}) {
    const KvDecodePlan one = plan_of_one(kReal, format, kLarge);
    const KvRowsPlan plan = plan_kv_rows(kReal, one, kLarge, std::nullopt);
    ASSERT_EQ(plan.misfit, nullptr);
    EXPECT_TRUE(plan.tile.adds_like(one.tile));
    EXPECT_EQ(plan.tile.row_tiles, 4);
    const KvDecodePlan some = detail::plan_of_rows(plan, 4);
    EXPECT_EQ(some.n_split, one.n_split) << "the shares of records are those of one row";
    EXPECT_EQ(some.grid.x, one.grid.x);
    EXPECT_EQ(some.grid.z, 2u) << "the rows with as many records as the first, and those with one more";
    EXPECT_EQ(some.combine_grid.z, 4u);
  }
}

/// Every configuration of rows is one that some plan of one row comes to: none is compiled for nothing.
TEST(KvRowsPlan, EveryConfigurationAddsLikeOneOfOneRowAndFitsItsDevices) {
  for (const KvDecodeTile& tile : kKvRowsTiles) {
    EXPECT_LE(tile.smem_bytes(), kLarge.smem_limit_bytes) << name_of(tile);
    EXPECT_TRUE(std::ranges::any_of(kKvDecodeTiles, [&](const KvDecodeTile& one) {
      return one.row_tiles == 1 && tile.adds_like(one);
    })) << name_of(tile);
  }
  KvDecodeTile other = kKvRowsTiles.front();
  EXPECT_TRUE(other.adds_like(kKvRowsTiles.front()));
  other.teams += 1;
  EXPECT_FALSE(other.adds_like(kKvRowsTiles.front())) << "control: another number of teams divides records otherwise";
}

TEST(KvRowsPlan, WhatDoesNotFitIsSaid) {
  const KvDecodePlan one = plan_of_one(kReal, {}, kLarge);
  const KvRowsPlan no_room = plan_kv_rows(kReal, one, kLarge, one.workspace_bytes);
  EXPECT_STREQ(no_room.misfit, "the workspace has room for what one row leaves of split keys");
  DeviceInfo small = kLarge;
  small.smem_limit_bytes = 99 * 1024;
  const KvRowsPlan no_tile = plan_kv_rows(kReal, plan_of_one(kReal, {}, small), small, std::nullopt);
  EXPECT_STREQ(no_tile.misfit, "no compiled configuration of several rows adds like the one of a row that fits");
  expect_rows_shapes_refused(
      kReal, [&](const AttentionShape& shape) { return plan_kv_rows(shape, one, kLarge, std::nullopt); });
  KvRowsChoice choice{.tile = kKvRowsTiles.back()};
  EXPECT_TRUE(refuses([&] { (void)plan_kv_rows(kReal, one, kLarge, std::nullopt, choice); }, {"adds otherwise"}));
}

TEST(KvRowsGpu, AnotherPlanThanTheCallsIsRefused) {
  const RowsCase c{.n_row = 3, .head_dim = 64, .kv_len = 20};
  const Rows rows(c);
  const auto good =
      plan_kv_rows(c.shape(3), plan_of_one(c.shape(3), {}, current_device()), current_device(), std::nullopt);
  expect_other_plans_refused(good, "plan_kv_rows()", [&](const KvRowsPlan& plan) { (void)rows.at_once(plan); });
  KvRowsPlan other = good;
  other.tile.v_bits = 3, other.tile.r_bits = 3;
  EXPECT_TRUE(refuses([&] { (void)rows.at_once(other); }, {"3 and 3 bits", "5 and 4"}));
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include "cuda/tq4_attention/prefill.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "cuda/device/device_buffer.cuh"
#include "reference/tq4_attention.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/tq4_device.cuh"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::CacheSide;
using reference::Matrix;
using reference::Tq4CacheBuffer;

/// A cache that the reference compressed, its rows in records on the device.
struct Fixture {
  AttentionCase c;
  Tq4CacheBuffer rows;

  explicit Fixture(const AttentionCase& from)
      : c(from), rows(from.shape.batch, from.shape.n_head_kv, from.shape.buffer_len, from.shape.head_dim) {
    const AttentionShape& s = c.shape;
    const std::vector<float> k = c.k(), v = c.v();
    std::vector<std::int32_t> positions(static_cast<std::size_t>(s.buffer_len));
    std::iota(positions.begin(), positions.end(), 0);
    const auto view = [&](const std::vector<float>& x) {
      return make_view(x.data(), s.batch, s.buffer_len, s.n_head_kv, s.head_dim);
    };
    reference::tq4_cache_update<float>(codec_of<reference::Tq4Codec<float>>(s.head_dim), view(k), view(v), positions,
                                       rows.view());
  }

  /// Norms of rows [first, last) become NaN.
  void spoil(std::int64_t first, std::int64_t last) {
    const Tq4CacheView view = rows.view();
    for (std::int64_t b = 0; b < c.shape.batch; ++b) {
      for (std::int64_t h = 0; h < c.shape.n_head_kv; ++h) {
        for (std::int64_t j = first; j < last; ++j) view.k_norm(b, h, j) = view.v_norm(b, h, j) = {0x7FC0};
      }
    }
  }

  [[nodiscard]] std::vector<float> run(const AttentionOptions& options, std::int64_t kv_len, std::int64_t scratch_limit,
                                       const FlashChoice& choice) const {
    const AttentionShape& s = c.shape;
    const DeviceBuffer<Bf16> q(narrow(c.q()));
    DeviceBuffer<Bf16> out(c.q_size());
    out.fill_bytes(0xFF);
    const DeviceBuffer<std::byte> memory = records_of(rows);
    const Tq4PrefillPlan plan =
        plan_tq4_attention_prefill(s, options, current_device(), s.buffer_len, scratch_limit, choice);
    DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
    workspace.fill_bytes(0xFF);  // NaN where nothing was unpacked
    const DeviceBuffer<std::int32_t> length(std::vector<std::int32_t>{static_cast<std::int32_t>(kv_len)});
    tq4_attention_prefill({make_view(q.data(), s.batch, s.n_query, s.n_head, s.head_dim),
                           {memory.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim},
                           codec_of<Tq4Codec>(s.head_dim),
                           options,
                           DeviceCount::on_device(length.data()),
                           make_view(out.data(), s.batch, s.n_query, s.n_head, s.head_dim)},
                          plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, nullptr);
    return widen(out.to_host());
  }

  /// The parts, put together: rotated queries, K and V as the reference reads them, bf16_attention, rotated back.
  [[nodiscard]] std::vector<float> from_parts(const AttentionOptions& options, std::int64_t kv_len,
                                              const FlashChoice& choice) const {
    const AttentionShape& s = c.shape;
    const DeviceBuffer<Bf16> q(narrow(c.q()));
    DeviceBuffer<Bf16> out(c.q_size());
    const auto read = [&](CacheSide side) {
      const ConstTq4CacheView view = rows.view();
      const bool is_key = side == CacheSide::kKey;
      Matrix<float> decoded(s.batch * s.n_head_kv * s.buffer_len, s.head_dim);
      for (std::int64_t b = 0; b < s.batch; ++b) {
        for (std::int64_t h = 0; h < s.n_head_kv; ++h) {
          const auto [codes, norms] = reference::tq4_rows(is_key ? view.k_codes : view.v_codes,
                                                          is_key ? view.k_norm : view.v_norm, b, h, 0, s.buffer_len);
          codec_of<reference::Tq4Codec<float>>(s.head_dim)
              .decompress_rotated(side, codes, norms,
                                  decoded.middleRows((b * s.n_head_kv + h) * s.buffer_len, s.buffer_len));
        }
      }
      return DeviceBuffer<Bf16>(narrow({decoded.data(), static_cast<std::size_t>(decoded.size())}));
    };
    const DeviceBuffer<Bf16> k = read(CacheSide::kKey), v = read(CacheSide::kValue);
    const auto out_view = make_view(out.data(), s.batch, s.n_query, s.n_head, s.head_dim);
    const Rotation& rotation = codec_of<Tq4Codec>(s.head_dim).rotation();
    rotate_forward<Bf16, Bf16>(rotation, make_view(q.data(), s.batch, s.n_query, s.n_head, s.head_dim), out_view,
                               nullptr);
    const FlashPlan plan = plan_bf16_attention(s, options, current_device(), choice);
    DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
    bf16_attention({out_view, make_view(k.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim),
                    make_view(v.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim), options,
                    DeviceCount::on_host(kv_len), out_view},
                   plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, nullptr);
    rotate_inverse<Bf16, Bf16>(rotation, out_view, out_view, nullptr);
    return widen(out.to_host());
  }
};

FlashChoice random_choice(const AttentionCase& c) {
  const bool wgmma =
      current_device().compute_capability == 90 && c.shape.head_dim >= 256 && is_power_of_two(c.shape.group());
  const int path = *rc::gen::inRange(0, wgmma ? 4 : 2);
  if (path == 0) return {.path = FlashPath::kDecode, .n_split = *rc::gen::inRange(1, 9)};
  return {.path = path == 1 ? FlashPath::kPrefill : FlashPath::kWgmma};
}

/// Every head_dim, group, batch and way through the scratch: not one bit differs from the parts, each of which is held
/// to the reference by its own tests. NaN norms behind kv_len, in the same record too, change nothing. Control: within
/// kv_len they do.
RC_GTEST_PROP(Tq4AttentionPrefillGpu, EqualsItsPartsBitForBit, (const AttentionCase& c)) {
  Fixture fixture(c);
  const FlashChoice choice = random_choice(c);
  const std::int64_t scratch_limit = *rc::gen::element<std::int64_t>(0, 1 << 20, kTq4PrefillScratch);
  const std::vector<float> expected = fixture.from_parts(c.options(), c.kv_len, choice);
  fixture.spoil(c.kv_len, c.shape.buffer_len);
  rc_require(same_bits(fixture.run(c.options(), c.kv_len, scratch_limit, choice), expected));
  fixture.spoil(c.kv_len - 1, c.kv_len);
  RC_ASSERT(!same_bits(fixture.run(c.options(), c.kv_len, scratch_limit, choice), expected));
}

/// The models' layers, 31B and 12B, against the reference in float on the same rows. Control: a seventh of the keys
/// missing shows.
TEST(Tq4AttentionPrefillGpu, RealShapesAgreeWithTheReference) {
  struct Real {
    std::int64_t n_head, n_head_kv, n_query, kv_len, buffer_len;
  };
  for (const Real& r : {Real{32, 4, 64, 64, 4096}, Real{32, 4, 200, 1500, 4096}, Real{32, 4, 16, 70001, 131072},
                        Real{16, 1, 64, 64, 4096}, Real{16, 1, 200, 1500, 4096}, Real{16, 1, 32, 70001, 131072}}) {
    const AttentionCase c{.shape = {.batch = 1,
                                    .n_query = r.n_query,
                                    .n_head = r.n_head,
                                    .n_head_kv = r.n_head_kv,
                                    .head_dim = 512,
                                    .buffer_len = r.buffer_len},
                          .kv_len = r.kv_len,
                          .scale = 3.0f / std::sqrt(512.0f),
                          .seed = 31};
    const Fixture fixture(c);
    const std::vector<float> values = c.q(), out = fixture.run(c.options(), c.kv_len, kTq4PrefillScratch, {});
    const auto expect = [&](float scale_factor) {
      std::vector<float> result(values.size());
      AttentionOptions options = c.options();
      options.scale *= scale_factor;
      reference::tq4_attention<float>(make_view(values.data(), 1, r.n_query, r.n_head, 512), fixture.rows.view(),
                                      codec_of<reference::Tq4Codec<float>>(512), options, c.kv_len,
                                      make_view(result.data(), 1, r.n_query, r.n_head, 512));
      return result;
    };
    const std::vector<float> expected = expect(1.0f);
    EXPECT_GE(cosine(out, expected), 0.9999) << c;
    // Roundings to bf16 (2^-9) have no direction: over these 2^18 values they come to 2^-18 of a factor, those of K and
    // V, which repeat for each record's 16 levels, to 2^-13 or so. A factor of K shows on the way to sharper scores.
    constexpr double kScaleBound = 1e-3;
    EXPECT_TRUE(scale_close(out, expected, kScaleBound)) << c;
    if (r.kv_len < 4096) {
      const std::vector<float> sharper = expect(1.0f + 0x1p-6f);
      EXPECT_TRUE(stays_at(out, expected, sharper, kScaleBound / 0x1p-6)) << c;
      EXPECT_FALSE(stays_at(expect(1.004f), expected, sharper, kScaleBound / 0x1p-6)) << c;
    }
    if (r.kv_len > r.n_query) {
      EXPECT_LT(cosine(fixture.run(c.options(), c.kv_len - c.kv_len / 7, kTq4PrefillScratch, {}), expected), 0.9999)
          << c;
    }
  }
}

TEST(Tq4AttentionPrefillPlan, ScratchHoldsAsManyHeadsAsFitAndAtLeastOne) {
  const DeviceInfo device{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};
  const AttentionShape shape{.n_query = 2048, .n_head = 32, .n_head_kv = 4, .head_dim = 512, .buffer_len = 131072};
  const auto heads = [&](std::int64_t max_kv_len, std::int64_t limit) {
    const Tq4PrefillPlan plan = plan_tq4_attention_prefill(shape, {}, device, max_kv_len, limit);
    EXPECT_TRUE(plan.scratch_bytes <= limit || plan.heads_per_pass == 1);
    EXPECT_EQ(plan.scratch_bytes, plan.heads_per_pass * 2048 * ((max_kv_len + 15) / 16 * 16));
    return plan.heads_per_pass;
  };
  EXPECT_EQ(heads(131072, kTq4PrefillScratch), 1);
  EXPECT_EQ(heads(32768, kTq4PrefillScratch), 4);
  EXPECT_EQ(heads(65537, kTq4PrefillScratch), 1);
  EXPECT_EQ(heads(65536, kTq4PrefillScratch), 2);
  EXPECT_EQ(heads(131072, 0), 1);
  EXPECT_TRUE(refuses([&] { (void)plan_tq4_attention_prefill(shape, {}, device, 131073); }, {"max_kv_len 131073"}));
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include "cuda/bf16_attention.cuh"

#include <gtest/gtest.h>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "reference/bf16_attention.hpp"
#include "tests/support/attention_promises.hpp"
#include "tests/support/bf16_subject.cuh"
#include "tests/support/bf16_values.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

using DeviceSubject = Bf16Subject;
using Fixed = Bf16Subject::Fixed;

/// A case, and the path that it takes.
struct Drawn {
  AttentionCase c;
  Fixed fixed = {};
};

/// Draws the path for a case and makes the case one that the path takes.
Drawn with_random_path(const AttentionCase& original, bool masked = false) {
  Drawn drawn{original};
  const DeviceInfo device = current_device();
  const bool wgmma = !masked && device.compute_capability == 90;
  const int path = *rc::gen::inRange(0, wgmma ? 4 : 2);
  if (path == 0) drawn.fixed.choice = {.path = FlashPath::kDecode, .n_split = *rc::gen::inRange(1, 40)};
  if (path == 1) drawn.fixed.choice = {.path = FlashPath::kPrefill};
  if (path < 2) drawn.fixed.smem_limit_bytes = *rc::gen::element<std::int64_t>(0, 99 * 1024);
  if (path >= 2) {
    drawn.fixed.choice.path = FlashPath::kWgmma;
    AttentionShape& shape = drawn.c.shape;
    if (shape.group() == 6) shape.n_head = shape.n_head_kv * 8;
    if (shape.head_dim < 256) shape.head_dim *= 4;
  }
  return drawn;
}

RC_GTEST_PROP(Bf16AttentionGpu, AgreesWithTheNaiveLoop, (const AttentionCase& c)) {
  const Drawn drawn = with_random_path(c);
  agrees_with_exact<DeviceSubject>(drawn.c, drawn.fixed);
}
RC_GTEST_PROP(Bf16AttentionGpu, GarbageTailNeverReachesTheResult, (const AttentionCase& c)) {
  const Drawn drawn = with_random_path(c);
  garbage_tail_is_never_read<DeviceSubject>(drawn.c, drawn.fixed);
}
/// The control of the shared promise needs keys that all count, or bf16 rounds the missing one away.
RC_GTEST_PROP(Bf16AttentionGpu, ClampEqualsSlice, (const AttentionCase& original)) {
  const auto [c, fixed] = with_random_path(original);
  const DeviceSubject subject(c, fixed);
  const std::vector<float> clamped = subject.attend(c.options(), c.kv_len);
  const DeviceSubject slice = subject.sliced(c.kv_len);
  rc_require(same_bits(slice.attend(c.options(), c.kv_len), clamped));
  rc_require(same_bits(slice.attend(c.options(), std::nullopt), clamped), "kv_len absent");
  clamp_equals_slice<DeviceSubject>(even_case(c), fixed);
}
RC_GTEST_PROP(Bf16AttentionGpu, AnyChunkSizeAgrees, (const AttentionCase& c)) {
  const Drawn drawn = with_random_path(c);
  any_chunk_size_agrees<DeviceSubject>(drawn.c, drawn.fixed);
}
RC_GTEST_PROP(Bf16AttentionGpu, MaskHidesKeys, (const AttentionCase& c)) {
  const Drawn drawn = with_random_path(c, true);
  mask_hides_keys<DeviceSubject>(drawn.c, drawn.fixed);
}
RC_GTEST_PROP(Bf16AttentionGpu, SameCallGivesSameBits, (const AttentionCase& c)) {
  const Drawn drawn = with_random_path(c);
  same_call_gives_same_bits<DeviceSubject>(drawn.c, drawn.fixed);
}

/// Keys a thousand times larger behind the queries that do not see them change no bit of those queries, with the skip
/// on and off. (Not NaN: a tile that some of its rows see is multiplied as a whole, and 0 times NaN is NaN.)
RC_GTEST_PROP(Bf16AttentionGpu, CausalSkipChangesNothing, (AttentionCase original)) {
  original.causal = true;
  original.kv_len = std::max(original.kv_len, original.shape.n_query);
  original.shape.buffer_len = std::max(original.shape.buffer_len, original.kv_len);
  const auto [c, fixed] = with_random_path(original);
  AttentionOptions with = c.options(), without = c.options();
  without.causal_skip = false;
  const DeviceSubject clean(c, fixed);
  const std::vector<float> expected = clean.attend(with, c.kv_len);
  rc_require(same_bits(clean.attend(without, c.kv_len), expected), "clean");
  const auto n_dirty = *rc::gen::inRange<std::int64_t>(1, c.shape.n_query + 1);
  DeviceSubject dirty(c, fixed);
  dirty.spoil(c.kv_len - n_dirty, c.kv_len, Spoil::kThousandTimes);
  const std::vector<float> on = dirty.attend(with, c.kv_len), off = dirty.attend(without, c.kv_len);
  rc_require(same_bits(on, off), "garbage");
  const auto row = static_cast<std::size_t>(c.shape.n_head * c.shape.head_dim);
  for (std::int64_t b = 0; b < c.shape.batch; ++b) {
    const auto first = static_cast<std::size_t>(b * c.shape.n_query) * row;
    const std::size_t n_clean = static_cast<std::size_t>(c.shape.n_query - n_dirty) * row;
    rc_require(same_bits(std::span(on).subspan(first, n_clean), std::span(expected).subspan(first, n_clean)));
  }
  dirty.spoil(c.kv_len - n_dirty, c.kv_len, Spoil::kNaN);
  RC_ASSERT(!same_bits(dirty.attend(with, c.kv_len), expected));  // the last queries do see the garbage
}

RC_GTEST_PROP(Bf16AttentionGpu, AnySplitAgreesWithOne, (const AttentionCase& c)) {
  const DeviceSubject single(c, {.choice = {.path = FlashPath::kDecode, .n_split = 1}});
  const std::vector<float> one = single.attend(c.options(), c.kv_len);
  const DeviceSubject subject =
      single.with({.choice = {.path = FlashPath::kDecode, .n_split = *rc::gen::inRange(2, 70)}});
  const std::vector<float> many = subject.attend(c.options(), c.kv_len);
  std::vector<double> bounds = subject.exact(sees_of(c)).bounds(bf16_rounding(c.kv_len, 70), c.shape.head_dim);
  for (double& bound : bounds) bound *= 2;  // each is within one bound of the exact result
  rc_require(close(many, one, bounds));
  rc_require(same_bits(subject.attend(c.options(), c.kv_len), many), "twice");
}

TEST(Bf16AttentionGpu, EveryTileAgreesWithTheNaiveLoop) {
  const DeviceInfo device = current_device();
  for (const FlashTile& tile : kFlashTiles) {
    if (tile.smem_bytes() > device.smem_limit_bytes) continue;
    for (const int n_split : {1, 3}) {
      const AttentionCase c = example_case(tile.head_dim, 6, 5, 200);
      const FlashPath path = tile.warps_m == 1 ? FlashPath::kDecode : FlashPath::kPrefill;
      const DeviceSubject subject(c, {.choice = {.path = path, .tile = tile, .n_split = n_split}});
      EXPECT_TRUE(
          close_to_exact(subject, subject.attend(c.options(), c.kv_len), subject.exact(sees_of(c)), c.shape.head_dim))
          << "head_dim " << tile.head_dim << ", tile_kv " << tile.tile_kv << ", n_stage " << tile.n_stage;
    }
  }
}

/// Lengths around the tiles of 64 keys and of 8 to 64 tokens.
TEST(Bf16AttentionGpu, EdgesOfTheWgmmaTiles) {
  if (current_device().compute_capability != 90) GTEST_SKIP() << "no wgmma on this device";
  for (const std::int64_t head_dim : {256, 512}) {
    for (const std::int64_t group : {1, 2, 8, 64}) {
      for (const std::int64_t n_query : {1, 7, 8, 9, 17, 65}) {
        for (const std::int64_t more : {0, 1, 63, 64, 128}) {
          if (group == 64 && n_query > 9) continue;
          const AttentionCase c = example_case(head_dim, group, n_query, n_query + more);
          const DeviceSubject subject(c, {.choice = {.path = FlashPath::kWgmma}});
          EXPECT_TRUE(
              close_to_exact(subject, subject.attend(c.options(), c.kv_len), subject.exact(sees_of(c)), head_dim))
              << c;
        }
      }
    }
  }
}

/// The clamp and the skip save work, counted in tiles, not in time.
TEST(Bf16AttentionGpu, ClampAndSkipVisitFewerTiles) {
  for (const FlashPath path : {FlashPath::kPrefill, FlashPath::kWgmma}) {
    if (path == FlashPath::kWgmma && current_device().compute_capability != 90) continue;
    AttentionCase c = example_case(256, 2, 1024, 1024);
    c.shape.buffer_len = 4096;
    const DeviceSubject subject(c, {.choice = {.path = path}});
    AttentionOptions without = c.options();
    without.causal_skip = false;
    (void)subject.attend(c.options(), c.kv_len);
    const auto skipped = static_cast<double>(subject.n_tile());
    (void)subject.attend(without, c.kv_len);
    const auto clamped = static_cast<double>(subject.n_tile());
    (void)subject.attend(without, std::nullopt);
    const auto all = static_cast<double>(subject.n_tile());
    EXPECT_NEAR(skipped / clamped, 0.5, 0.06) << to_string(path);  // the triangle and its diagonal of tiles
    EXPECT_EQ(clamped / all, 0.25) << to_string(path);
  }
}

TEST(Bf16AttentionGpu, NoKeysGiveZeros) {
  for (const FlashPath path : {FlashPath::kDecode, FlashPath::kPrefill, FlashPath::kWgmma}) {
    if (path == FlashPath::kWgmma && current_device().compute_capability != 90) continue;
    for (const std::int64_t head_dim : {256, 512}) {
      AttentionCase c = example_case(head_dim, 4, 30, 100);
      c.causal = false;
      const DeviceSubject subject(c, {.choice = {.path = path}});
      EXPECT_TRUE(same_bits(subject.attend(c.options(), 0), std::vector<float>(static_cast<std::size_t>(c.q_size()))));
      // Causal with fewer keys than queries: the first queries stand before the first key.
      c.causal = true;
      const std::vector<float> out = DeviceSubject(c, {.choice = {.path = path}}).attend(c.options(), 3);
      const std::size_t row = static_cast<std::size_t>(c.shape.n_head * head_dim);
      EXPECT_TRUE(same_bits(std::span(out).first(27 * row), std::vector<float>(27 * row)));
      EXPECT_NE(out[27 * row], 0.0f);
    }
  }
}

/// One graph serves every kv_len, and every replay gives the bits of an eager call.
TEST(Bf16AttentionGpu, GraphReplaysWhileTheCacheGrows) {
  const AttentionCase c = example_case(512, 8, 1, 700);
  const AttentionShape& s = c.shape;
  const DeviceBuffer<Bf16> q(narrow(c.q())), k(narrow(c.k())), v(narrow(c.v()));
  DeviceBuffer<Bf16> out(c.q_size());
  DeviceBuffer<std::int32_t> length(1);
  const FlashPlan plan = plan_bf16_attention(s, c.options(), current_device());
  DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
  const Stream stream;
  const auto call = [&](DeviceCount kv_len) {
    bf16_attention(
        {make_view(q.data(), 1, 1, s.n_head, s.head_dim), make_view(k.data(), 1, s.n_head_kv, s.buffer_len, s.head_dim),
         make_view(v.data(), 1, s.n_head_kv, s.buffer_len, s.head_dim), c.options(), kv_len,
         make_view(out.data(), 1, 1, s.n_head, s.head_dim)},
        plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, stream);
  };
  const Graph graph = Graph::capture(stream, [&] { call(DeviceCount::on_device(length.data())); });
  for (std::int32_t kv_len = 1; kv_len <= c.kv_len; kv_len += kv_len < 130 ? 1 : 37) {
    length.from_host(std::span<const std::int32_t>(&kv_len, 1), stream);
    graph.launch(stream);
    const std::vector<float> replayed = widen(out.to_host(stream));
    call(DeviceCount::on_host(kv_len));
    ASSERT_TRUE(same_bits(replayed, widen(out.to_host(stream)))) << kv_len;
  }
}

/// The shapes of the models, against the reference in float32 on the same bits.
TEST(Bf16AttentionGpu, RealShapes) {
  struct Real {
    std::int64_t n_head, n_head_kv, head_dim, n_query, kv_len, buffer_len;
  };
  for (const Real& r :
       {Real{32, 4, 512, 1, 131072, 131072}, Real{32, 4, 512, 4, 70001, 131072}, Real{32, 4, 512, 48, 2048, 4096},
        Real{32, 4, 512, 16, 131072, 131072}, Real{32, 16, 256, 1, 1024, 4096}, Real{32, 16, 256, 70, 3000, 4096},
        // The 12B: sixteen heads of queries on one of keys, whose keys are split over up to two blocks a
        // multiprocessor.
        Real{16, 1, 512, 1, 131072, 131072}, Real{16, 1, 512, 4, 70001, 131072}, Real{16, 1, 512, 40, 2048, 4096},
        Real{16, 1, 512, 200, 1500, 4096}, Real{16, 8, 256, 1, 1024, 4096}, Real{16, 8, 256, 70, 3000, 4096}}) {
    AttentionCase c{.shape = {.batch = 1,
                              .n_query = r.n_query,
                              .n_head = r.n_head,
                              .n_head_kv = r.n_head_kv,
                              .head_dim = r.head_dim,
                              .buffer_len = r.buffer_len},
                    .kv_len = r.kv_len,
                    .scale = 2.0f / std::sqrt(static_cast<float>(r.head_dim)),
                    .seed = 21};
    const DeviceSubject subject(c);
    const std::vector<float> out = subject.attend(c.options(), c.kv_len);
    const std::vector<float> q = c.q(), k = c.k(), v = c.v();
    const AttentionShape& s = c.shape;
    const auto expect = [&](float scale_factor) {
      std::vector<float> result(q.size());
      AttentionOptions options = c.options();
      options.scale *= scale_factor;
      reference::bf16_attention<float, float>(make_view(q.data(), 1, s.n_query, s.n_head, s.head_dim),
                                              make_view(k.data(), 1, s.n_head_kv, s.buffer_len, s.head_dim),
                                              make_view(v.data(), 1, s.n_head_kv, s.buffer_len, s.head_dim), options,
                                              c.kv_len, make_view(result.data(), 1, s.n_query, s.n_head, s.head_dim));
      return result;
    };
    const std::vector<float> expected = expect(1.0f);
    // |q_i k_ji| <= 1.7^2 and |v| <= 1.7 bound the magnitudes of every row.
    const double bound = attention_bound(bf16_rounding(256, 280), r.head_dim, c.scale * r.head_dim * 2.89, 1.7);
    EXPECT_TRUE(close(out, expected, bound)) << c;
    EXPECT_GE(cosine(out, expected), 0.9999) << c;
    // Weights and the result are rounded to bf16 (2^-9), without direction: over 8192 values or more that comes to less
    // than 2^-15 of a factor of the result. A factor of the scores shows on the way to sharper ones.
    constexpr double kScaleBound = 1e-3;
    EXPECT_TRUE(scale_close(out, expected, kScaleBound)) << c;
    if (r.n_query * r.kv_len <= 300000) {
      const std::vector<float> sharper = expect(1.0f + 0x1p-6f);
      EXPECT_TRUE(stays_at(out, expected, sharper, kScaleBound / 0x1p-6)) << c;
      EXPECT_FALSE(stays_at(expect(1.004f), expected, sharper, kScaleBound / 0x1p-6)) << c;
    }
  }
}

TEST(Bf16AttentionPlan, MisuseIsRefusedBeforeAnyLaunch) {
  const DeviceInfo device{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};
  const AttentionShape good{.n_query = 64, .n_head = 8, .n_head_kv = 2, .head_dim = 256, .buffer_len = 100};
  const auto plan = [&](AttentionShape shape, AttentionOptions options = {}, FlashChoice choice = {}) {
    return [=] { (void)plan_bf16_attention(shape, options, device, choice); };
  };
  AttentionShape shape = good;
  EXPECT_NO_THROW(plan(good)());
  shape.n_head = 7;
  EXPECT_TRUE(refuses(plan(shape), {"n_head 7", "n_head_kv 2"}));
  shape = good;
  shape.head_dim = 96;
  EXPECT_TRUE(refuses(plan(shape), {"head_dim 96"}));
  const char byte = 0;
  const auto masked = [&](ElementType type, std::int64_t heads) {
    return AttentionOptions{.mask = MaskView{.data = &byte, .type = type, .shape = {1, heads, 64, 100}}};
  };
  EXPECT_TRUE(refuses(plan(good, masked(ElementType::kF32, 1)), {"mask"}));
  EXPECT_TRUE(refuses(plan(good, masked(ElementType::kBool, 8)), {"mask has 8 heads"}));
  EXPECT_NO_THROW(plan(good, masked(ElementType::kBool, 1))());
  EXPECT_TRUE(refuses(plan(good, masked(ElementType::kBool, 1), {.path = FlashPath::kWgmma}), {"wgmma"}));
  EXPECT_TRUE(refuses(plan(good, {}, {.path = FlashPath::kDecode, .n_split = 0}), {"n_split 0"}));

  std::vector<Bf16> memory(64 * 8 * 256 + 8);
  const auto call = [&](std::int64_t n_query, std::int64_t kv_len, std::int64_t v_len, FlashChoice choice = {}) {
    return [&, n_query, kv_len, v_len, choice] {
      const auto q = make_view(memory.data(), 1, n_query, 8, 256);
      const auto k = make_view(memory.data(), 1, 2, 100, 256), v = make_view(memory.data(), 1, 2, v_len, 256);
      bf16_attention({q, k, v, {}, DeviceCount::on_host(kv_len), q}, plan_bf16_attention(good, {}, device, choice), {},
                     nullptr);
    };
  };
  EXPECT_TRUE(refuses(call(64, 101, 100), {"kv_len 101", "100"}));
  EXPECT_TRUE(refuses(call(64, 63, 100), {"kv_len 63", "n_query 64"}));
  EXPECT_TRUE(refuses(call(64, 100, 99), {"v", "99", "need 100"}));
  EXPECT_TRUE(refuses(call(63, 100, 100), {"another shape"}));
  EXPECT_TRUE(
      refuses(call(64, 100, 100, {.path = FlashPath::kDecode, .n_split = 5}), {"workspace 0 B", "n_split = 5"}));
}

TEST(Bf16AttentionPlan, EveryShapeFitsASmallCardAndNoPlanDependsOnTheBuffer) {
  const DeviceInfo small{.sm_count = 20, .compute_capability = 86, .smem_limit_bytes = 99 * 1024};
  const DeviceInfo large{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    for (const std::int64_t n_query : {1, 4, 2048}) {
      AttentionShape shape{
          .n_query = n_query, .n_head = 32, .n_head_kv = 4, .head_dim = head_dim, .buffer_len = 131072};
      const FlashPlan plan = plan_bf16_attention(shape, {}, small);
      EXPECT_LE(plan.smem_bytes, small.smem_limit_bytes);
      EXPECT_NE(plan.path, FlashPath::kWgmma);
      EXPECT_EQ(plan_bf16_attention(shape, {}, large).path == FlashPath::kWgmma, n_query == 2048 && head_dim >= 256);
      const int n_split = plan_bf16_attention(shape, {}, large).n_split;
      shape.buffer_len = 4096;
      EXPECT_EQ(plan_bf16_attention(shape, {}, large).n_split, n_split);
    }
  }
  // Control: less than any tile needs is refused, not truncated.
  const DeviceInfo tiny{.smem_limit_bytes = 16 * 1024};
  EXPECT_TRUE(refuses([&] { (void)plan_bf16_attention({.head_dim = 512, .buffer_len = 9}, {}, tiny); }, {"16384 B"}));
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "cuda/bf16_attention.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/kv_attention.cuh"
#include "reference/kv_attention.hpp"
#include "tests/support/attention_promises.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/kv_device.cuh"
#include "tests/support/refuses.hpp"
#include "tests/support/tq4_device.cuh"

// Attention over one vector for K and V at the shapes of the model, in a graph, and through the flash kernels.
namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::KvCacheBuffer;
using reference::Matrix;

/// One call over random records, with everything that it needs; q and cache are drawn on the host once.
struct BigCall {
  AttentionShape shape;
  KvOptions format;
  AttentionOptions options;
  KvCacheBuffer rows;
  std::vector<float> q, weight;
  DeviceBuffer<std::byte> memory;
  DeviceBuffer<Bf16> q_device, out;
  DeviceBuffer<float> weight_device;
  DeviceBuffer<std::int32_t> length{1};
  KvAttentionPlan plan;
  DeviceBuffer<std::byte> workspace;

  explicit BigCall(const AttentionShape& s, const KvOptions& format_in = {}, float scale = 1.0f,
                   const KvAttentionChoice& choice = {})
      : shape(s),
        format(format_in),
        options{.scale = scale},
        rows(s.batch, s.n_head_kv, s.buffer_len, kv_code_bytes(s.head_dim, format.v_bits),
             kv_code_bytes(kv_rotated_size(s.head_dim), format.r_bits)),
        q(draw(3, s.batch * s.n_query * s.n_head * s.head_dim)),
        weight(draw_k_weight(s.head_dim)),
        q_device(narrow(q)),
        out(q_device.size()),
        weight_device(weight),
        plan(plan_kv_attention(s, format, options, current_device(), choice)),
        workspace(plan.workspace_bytes) {
    std::uint64_t state = 12345;
    const auto next = [&] { return (state = state * 6364136223846793005u + 1442695040888963407u) >> 40; };
    for (std::uint8_t& byte : rows.v_codes()) byte = static_cast<std::uint8_t>(next());
    for (std::uint8_t& byte : rows.r_codes()) byte = static_cast<std::uint8_t>(next());
    // Random codes are 1.85 times as long as those of a unit vector, w and c near 1: scores of deviation 0.3 or so,
    // whatever head_dim is, which `scale` multiplies.
    for (KvNorm& norm : rows.v_norm()) norm = to_f16(0.1f + static_cast<float>(next() & 1023) * 1e-4f);
    for (KvNorm& norm : rows.r_norm()) norm = to_f16(0.05f + static_cast<float>(next() & 1023) * 1e-4f);
    memory = kv_records_of(rows, s.head_dim, format);
  }
  void enqueue(DeviceCount kv_len, cudaStream_t stream) {
    const AttentionShape& s = shape;
    kv_attention({make_view(std::as_const(q_device).data(), s.batch, s.n_query, s.n_head, s.head_dim),
                  weight_device.data(),
                  {memory.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim, format.v_bits, format.r_bits},
                  kv_codec_of<KvCodec>(s.head_dim, format),
                  options,
                  kv_len,
                  make_view(out.data(), s.batch, s.n_query, s.n_head, s.head_dim)},
                 plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, stream);
  }
  /// The reference in double on the same rows.
  /// @param scale_factor  of the scores
  [[nodiscard]] std::vector<double> exact(const reference::KvCodec<double>& codec, std::int64_t kv_len,
                                          float scale_factor = 1.0f) const {
    const AttentionShape& s = shape;
    const std::vector<double> wide(q.begin(), q.end());
    std::vector<double> result(wide.size());
    AttentionOptions changed = options;
    changed.scale *= scale_factor;
    reference::kv_attention<double>(make_view(wide.data(), s.batch, s.n_query, s.n_head, s.head_dim), weight,
                                    rows.view(), codec, changed, kv_len,
                                    make_view(result.data(), s.batch, s.n_query, s.n_head, s.head_dim));
    return result;
  }
  [[nodiscard]] std::vector<float> run(std::int64_t kv_len) {
    const auto value = static_cast<std::int32_t>(kv_len);
    length.from_host(std::span<const std::int32_t>(&value, 1));
    out.fill_bytes(0xFF);
    enqueue(DeviceCount::on_device(length.data()), nullptr);
    return widen(out.to_host());
  }
};

/// As for TQ4: roundings have no direction, and lean on the result by 2^-13 of it where at least 256 keys or values
/// share them. Eight deviations.
constexpr double kScaleBound = 1e-3;

/// A factor on V or K of 1.004, which a cosine does not see and a bound on each element hides under bf16: V's is that
/// of the result, K's takes it towards the one of sharper scores.
TEST(KvDecodeGpu, KeysAndValuesHaveTheirScale) {
  constexpr float kSharper = 1.0f + 0x1p-6f;
  constexpr double kShareBound = kScaleBound / 0x1p-6;
  for (const auto& [n_head, n_head_kv, head_dim, n_query] :
       {std::array<std::int64_t, 4>{32, 4, 512, 1}, {32, 4, 512, 4}, {16, 2, 256, 1}, {16, 2, 128, 2}}) {
    for (const int v_bits : {4, 5, 6}) {
      BigCall call({.batch = 1,
                    .n_query = n_query,
                    .n_head = n_head,
                    .n_head_kv = n_head_kv,
                    .head_dim = head_dim,
                    .buffer_len = 4096},
                   {.v_bits = v_bits}, 12.0f);
      const auto& codec = kv_codec_with_device_levels(head_dim, call.format);
      for (const std::int64_t kv_len : {200, 4096}) {
        const std::vector<double> expected = call.exact(codec, kv_len), sharper = call.exact(codec, kv_len, kSharper);
        const std::vector<float> out = call.run(kv_len);
        const std::string what = concat("head_dim ", head_dim, ", kv_len ", kv_len, ", ", v_bits, " bits");
        // Scores deviate by 3.6: one key may have all of a head's weight.
        EXPECT_TRUE(scale_close(out, expected, lean_of_single_keys(n_head * n_query))) << "V, " << what;
        EXPECT_TRUE(stays_at(out, expected, sharper, kShareBound)) << "K, " << what;
        // Control: keys that are too large show.
        EXPECT_FALSE(stays_at(call.exact(codec, kv_len, 1.004f), expected, sharper, kShareBound)) << what;
      }
    }
  }
}

/// Scores of deviation 17 (base 2) leave the reference of the weights behind again and again: in the first records of a
/// run and in later ones, in one record of a batch and not in the next, in one that is taken alone. Every configuration
/// of the model's formats, with as many queries as it has tiles of rows. Control: a quarter of the keys missing shows.
TEST(KvDecodeGpu, EveryTileFollowsRisingScores) {
  for (const KvDecodeTile& tile : kKvDecodeTiles) {
    if (tile.v_bits == 0 || tile.smem_bytes() > current_device().smem_limit_bytes) continue;
    const KvAttentionChoice choice{.path = KvPath::kDecode, .decode = {.tile = tile, .n_split = 2}};
    BigCall call(
        {.batch = 1, .n_query = tile.row_tiles, .n_head = 32, .n_head_kv = 4, .head_dim = 512, .buffer_len = 1600},
        {.v_bits = tile.v_bits, .r_bits = tile.r_bits}, 40.0f, choice);
    for (const std::int64_t kv_len : {1600, 1013, 70}) {
      const std::vector<double> expected = call.exact(kv_codec_with_device_levels(512, call.format), kv_len);
      const std::vector<float> out = call.run(kv_len);
      const std::string what = concat("warps ", tile.team_warps, " x ", tile.teams, ", row tiles ", tile.row_tiles,
                                      ", ", tile.batch, " at a time, ", tile.v_bits, " bits, kv_len ", kv_len);
      EXPECT_GE(cosine(out, expected), 0.9999) << what;
      // One key may have all of a head's weight, rounded to bf16 once: eight deviations of 2^-9 / sqrt(3) a head.
      EXPECT_TRUE(scale_close(out, expected, 8 * 0x1p-9 / std::sqrt(3.0 * 32.0 * tile.row_tiles))) << what;
      EXPECT_LT(cosine(call.run(kv_len - kv_len / 4 - 1), expected), 0.9999) << what;
    }
  }
}

/// The shapes of the model and of a smaller sibling, against the reference in double on the same rows.
TEST(KvDecodeGpu, RealShapesAgreeWithTheReference) {
  struct Real {
    std::int64_t n_head, n_head_kv, head_dim, n_query, buffer_len;
    std::vector<std::int64_t> kv_len;
    KvOptions format = {};
  };
  for (const Real& r : {Real{32, 4, 512, 1, 131072, {1, 17, 512, 8191, 32768, 131071, 131072}},
                        Real{32, 4, 512, 1, 131072, {513, 131072}, {.v_bits = 4}}, Real{32, 4, 512, 4, 131072, {70001}},
                        Real{32, 4, 512, 8, 32768, {32768}}, Real{16, 2, 256, 1, 131072, {1000, 131072}}}) {
    BigCall call({.batch = 1,
                  .n_query = r.n_query,
                  .n_head = r.n_head,
                  .n_head_kv = r.n_head_kv,
                  .head_dim = r.head_dim,
                  .buffer_len = r.buffer_len},
                 r.format, 4.0f);
    const auto& codec = kv_codec_of<reference::KvCodec<double>>(r.head_dim, r.format);
    for (const std::int64_t kv_len : r.kv_len) {
      const std::vector<double> expected = call.exact(codec, kv_len),
                                on_levels = call.exact(kv_codec_with_device_levels(r.head_dim, r.format), kv_len);
      const std::vector<float> out = call.run(kv_len);
      const std::string what =
          concat("kv", r.format.v_bits, "r4, head_dim ", r.head_dim, ", ", r.n_query, " queries, kv_len ", kv_len);
      EXPECT_TRUE(scale_close(out, on_levels, kScaleBound)) << what;
      EXPECT_GE(cosine(out, on_levels), 0.9999) << what;
      // The bytes move a level by at most 0.51 / 160 of the largest (KvLevelsPlan), which is 1.9 times the root mean
      // square of levels of random codes: V turns by at most 0.006, and weights by as much times the deviation of the
      // scores, 1.2. Together 0.0095, so 1 - 0.0095^2 / 2; and behind 0.9999, an angle of 0.0142, cos(0.0142 + 0.0095).
      EXPECT_GE(cosine(on_levels, expected), 0.99995) << what;
      EXPECT_GE(cosine(out, expected), 0.9997) << what;
      EXPECT_TRUE(same_bits(call.run(kv_len), out)) << "twice, " << what;
      if (kv_len > 16) {
        EXPECT_LT(cosine(call.run(kv_len - kv_len / 8 - 1), on_levels), 0.9999) << "fewer keys show, " << what;
      }
    }
  }
}

/// One graph serves every kv_len from 1 past every split boundary, and every replay gives the bits of an eager call.
TEST(KvDecodeGpu, GraphReplaysWhileTheCacheGrows) {
  BigCall call({.batch = 1, .n_query = 1, .n_head = 32, .n_head_kv = 4, .head_dim = 512, .buffer_len = 8192});
  const Stream stream;
  const Graph graph = Graph::capture(stream, [&] { call.enqueue(DeviceCount::on_device(call.length.data()), stream); });
  EXPECT_EQ(graph.n_node(), 2u);
  std::vector<float> before;
  for (std::int32_t kv_len = 1; kv_len <= 8192; kv_len += kv_len < 40 ? 1 : 16 * 17 + 1) {
    call.length.from_host(std::span<const std::int32_t>(&kv_len, 1), stream);
    graph.launch(stream);
    const std::vector<float> replayed = widen(call.out.to_host(stream));
    call.enqueue(DeviceCount::on_host(kv_len), stream);
    ASSERT_TRUE(same_bits(replayed, widen(call.out.to_host(stream)))) << kv_len;
    ASSERT_FALSE(same_bits(replayed, before)) << kv_len;
    before = replayed;
  }
}

/// K and V as kv_unpack() gives them, then bf16_attention: what prefill is made of.
std::vector<float> from_parts(const AttentionCase& c, const KvOptions& format, const KvCacheBuffer& rows,
                              const std::vector<float>& weight, const FlashChoice& choice) {
  const AttentionShape& s = c.shape;
  KvDeviceRows records(rows, s.head_dim, format);
  const KvRecords cache = records.records();
  const std::int64_t n = cache.n_record() * kKvRecordTokens, head = n * s.head_dim;
  DeviceBuffer<Bf16> k(s.batch * s.n_head_kv * head), v(k.size());
  const DeviceBuffer<float> w(weight);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    kv_unpack<Bf16>(kv_codec_of<KvCodec>(s.head_dim, format), cache, b, 0, s.n_head_kv, w.data(), {},
                    {k.data() + b * s.n_head_kv * head, v.data() + b * s.n_head_kv * head, n}, nullptr);
  }
  const DeviceBuffer<Bf16> q(narrow(c.q()));
  DeviceBuffer<Bf16> out(c.q_size());
  const auto view = [&](const Bf16* data) {
    View<const Bf16, 4> all = make_view(data, s.batch, s.n_head_kv, n, s.head_dim);
    all.extent[2] = s.buffer_len;
    return all;
  };
  const FlashPlan plan = plan_bf16_attention(s, c.options(), current_device(), choice);
  DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
  bf16_attention(
      {make_view(q.data(), s.batch, s.n_query, s.n_head, s.head_dim), view(k.data()), view(v.data()), c.options(),
       DeviceCount::on_host(c.kv_len), make_view(out.data(), s.batch, s.n_query, s.n_head, s.head_dim)},
      plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, nullptr);
  return widen(out.to_host());
}

/// A cache of the case's V and K, compressed by the reference.
KvCacheBuffer compressed(const AttentionCase& c, const KvOptions& format, const std::vector<float>& weight) {
  const AttentionShape& s = c.shape;
  KvCacheBuffer rows(s.batch, s.n_head_kv, s.buffer_len, kv_code_bytes(s.head_dim, format.v_bits),
                     kv_code_bytes(kv_rotated_size(s.head_dim), format.r_bits));
  const std::vector<float> k = c.k(), v = c.v();
  std::vector<std::int32_t> positions(static_cast<std::size_t>(s.buffer_len));
  std::iota(positions.begin(), positions.end(), 0);
  const auto view = [&](const std::vector<float>& x) {
    return make_view(x.data(), s.batch, s.buffer_len, s.n_head_kv, s.head_dim);
  };
  reference::kv_cache_update<float>(kv_codec_of<reference::KvCodec<float>>(s.head_dim, format), view(k), view(v),
                                    weight, positions, rows.view());
  return rows;
}

std::vector<float> prefill(const AttentionCase& c, const KvOptions& format, const KvCacheBuffer& rows,
                           const std::vector<float>& weight, std::int64_t scratch_limit, const FlashChoice& choice) {
  const AttentionShape& s = c.shape;
  const DeviceBuffer<Bf16> q(narrow(c.q()));
  DeviceBuffer<Bf16> out(c.q_size());
  out.fill_bytes(0xFF);
  const DeviceBuffer<std::byte> memory = kv_records_of(rows, s.head_dim, format);
  const KvAttentionPlan plan =
      plan_kv_attention(s, format, c.options(), current_device(),
                        {.path = KvPath::kPrefill, .prefill = choice, .scratch_limit = scratch_limit});
  DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
  workspace.fill_bytes(0xFF);  // NaN where nothing was unpacked
  const DeviceBuffer<float> w(weight);
  const DeviceBuffer<std::int32_t> length(std::vector<std::int32_t>{static_cast<std::int32_t>(c.kv_len)});
  kv_attention({make_view(q.data(), s.batch, s.n_query, s.n_head, s.head_dim),
                w.data(),
                {memory.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim, format.v_bits, format.r_bits},
                kv_codec_of<KvCodec>(s.head_dim, format),
                c.options(),
                DeviceCount::on_device(length.data()),
                make_view(out.data(), s.batch, s.n_query, s.n_head, s.head_dim)},
               plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, nullptr);
  return widen(out.to_host());
}

/// Every head_dim, group, batch and way through the scratch: not one bit differs from the parts, each of which is held
/// to the reference by its own tests. NaN norms behind kv_len, in the same record too, change nothing. Control: within
/// kv_len they do.
RC_GTEST_PROP(KvPrefillGpu, EqualsItsPartsBitForBit, (const AttentionCase& c)) {
  const bool wgmma =
      current_device().compute_capability == 90 && c.shape.head_dim >= 256 && is_power_of_two(c.shape.group());
  const int path = *rc::gen::inRange(0, wgmma ? 4 : 2);
  FlashChoice choice{.path = path == 0 ? FlashPath::kDecode : path == 1 ? FlashPath::kPrefill : FlashPath::kWgmma};
  if (path == 0) choice.n_split = *rc::gen::inRange(1, 9);
  const KvOptions format{.v_bits = *rc::gen::inRange(3, 7), .r_bits = *rc::gen::inRange(3, 7)};
  const std::int64_t scratch_limit = *rc::gen::element<std::int64_t>(0, 1 << 20, kTq4PrefillScratch);
  const std::vector<float> weight = draw_k_weight(c.shape.head_dim);
  KvCacheBuffer rows = compressed(c, format, weight);
  const std::vector<float> expected = from_parts(c, format, rows, weight, choice);
  const auto spoil = [&](std::int64_t first, std::int64_t last) {
    const KvCacheView view = rows.view();
    for (std::int64_t b = 0; b < c.shape.batch; ++b) {
      for (std::int64_t h = 0; h < c.shape.n_head_kv; ++h) {
        for (std::int64_t j = first; j < last; ++j) view.v_norm(b, h, j) = view.r_norm(b, h, j) = {0x7E00};
      }
    }
  };
  spoil(c.kv_len, c.shape.buffer_len);
  rc_require(same_bits(prefill(c, format, rows, weight, scratch_limit, choice), expected));
  spoil(c.kv_len - 1, c.kv_len);
  RC_ASSERT(!same_bits(prefill(c, format, rows, weight, scratch_limit, choice), expected));
}

/// The model's layer against the reference in float on the same rows. Control: a seventh of the keys missing shows.
TEST(KvPrefillGpu, RealShapesAgreeWithTheReference) {
  struct Real {
    std::int64_t n_query, kv_len, buffer_len;
    int v_bits;
  };
  for (const Real& r :
       {Real{64, 64, 4096, 5}, Real{200, 1500, 4096, 5}, Real{200, 1500, 4096, 4}, Real{16, 20001, 32768, 5}}) {
    const AttentionCase c{.shape = {.batch = 1,
                                    .n_query = r.n_query,
                                    .n_head = 32,
                                    .n_head_kv = 4,
                                    .head_dim = 512,
                                    .buffer_len = r.buffer_len},
                          .kv_len = r.kv_len,
                          .scale = 3.0f / std::sqrt(512.0f),
                          .seed = 31};
    const KvOptions format{.v_bits = r.v_bits};
    const std::vector<float> weight = draw_k_weight(512);
    const KvCacheBuffer rows = compressed(c, format, weight);
    const std::vector<float> values = c.q(), out = prefill(c, format, rows, weight, kTq4PrefillScratch, {});
    std::vector<float> expected(values.size());
    reference::kv_attention<float>(make_view(values.data(), 1, r.n_query, 32, 512), weight, rows.view(),
                                   kv_codec_of<reference::KvCodec<float>>(512, format), c.options(), c.kv_len,
                                   make_view(expected.data(), 1, r.n_query, 32, 512));
    EXPECT_GE(cosine(out, expected), 0.9999) << c;
    EXPECT_TRUE(scale_close(out, expected, kScaleBound)) << c;
    if (r.kv_len > r.n_query) {
      AttentionCase fewer = c;
      fewer.kv_len -= c.kv_len / 7;
      EXPECT_LT(cosine(prefill(fewer, format, rows, weight, kTq4PrefillScratch, {}), expected), 0.9999) << c;
    }
  }
}

TEST(KvAttentionDecodePlan, EveryShapeFitsASmallCardAndNoDecodePlanDependsOnTheBuffer) {
  const DeviceInfo small{.sm_count = 20, .compute_capability = 86, .smem_limit_bytes = 99 * 1024};
  const DeviceInfo large{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    for (const std::int64_t n_query : {1, 8}) {
      for (const KvOptions& format : {KvOptions{}, KvOptions{.v_bits = 4}, KvOptions{.v_bits = 6, .r_bits = 6}}) {
        AttentionShape shape{
            .n_query = n_query, .n_head = 32, .n_head_kv = 4, .head_dim = head_dim, .buffer_len = 131072};
        const KvAttentionPlan fits = plan_kv_attention(shape, format, {}, small);
        EXPECT_EQ(fits.path, KvPath::kDecode);
        EXPECT_LE(fits.decode.smem_bytes, small.smem_limit_bytes);
        EXPECT_FALSE(fits.decode.overlap);
        const KvAttentionPlan plan = plan_kv_attention(shape, format, {}, large);
        EXPECT_LE(plan.decode.smem_bytes, large.smem_limit_bytes);
        shape.buffer_len = 4096;
        const KvAttentionPlan shorter = plan_kv_attention(shape, format, {}, large);
        EXPECT_EQ(shorter.decode.n_split, plan.decode.n_split);
        EXPECT_EQ(shorter.workspace_bytes, plan.workspace_bytes);
      }
    }
  }
  const AttentionShape real{.n_head = 32, .n_head_kv = 4, .head_dim = 512, .buffer_len = 131072};
  const KvAttentionPlan plan = plan_kv_attention(real, {}, {}, large);
  EXPECT_EQ(plan.decode.n_split, 33);
  EXPECT_EQ(plan.decode.tile.v_bits, 5) << "the default format has a kernel of its own";
  EXPECT_EQ(plan_kv_attention(real, {.v_bits = 16, .r_bits = 16}, {}, large).path, KvPath::kPrefill);
  // Control: less than any tile needs is refused, not truncated.
  const DeviceInfo tiny{.smem_limit_bytes = 16 * 1024};
  EXPECT_TRUE(refuses([&] { (void)plan_kv_attention({.head_dim = 512, .buffer_len = 9}, {}, {}, tiny); }, {"16384 B"}));
}

}  // namespace
}  // namespace gemma4::cuda

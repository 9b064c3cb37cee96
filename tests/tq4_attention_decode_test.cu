// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/tq4_attention.cuh"
#include "gemma4/tq4_golden.hpp"
#include "reference/tq4_attention.hpp"
#include "tests/support/attention_promises.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/tq4_device.cuh"

// Decode of the TQ4 attention at the shapes of the model, in a graph, and on golden cases.
namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::Matrix;
using reference::Tq4CacheBuffer;

/// One call over random records, with everything that it needs; q and cache are drawn on the host once.
struct BigCall {
  AttentionShape shape;
  AttentionOptions options;
  Tq4CacheBuffer rows;
  std::vector<float> q;
  DeviceBuffer<std::byte> memory;
  DeviceBuffer<Bf16> q_device, out;
  DeviceBuffer<std::int32_t> length{1};
  Tq4AttentionPlan plan;
  DeviceBuffer<std::byte> workspace;

  explicit BigCall(const AttentionShape& s, float scale = 1.0f)
      : shape(s),
        options{.scale = scale},
        rows(s.batch, s.n_head_kv, s.buffer_len, s.head_dim),
        q(draw(3, s.batch * s.n_query * s.n_head * s.head_dim)),
        q_device(narrow(q)),
        out(q_device.size()),
        plan(plan_tq4_attention(s, options, current_device())),
        workspace(plan.workspace_bytes) {
    std::uint64_t state = 12345;
    const auto next = [&] { return (state = state * 6364136223846793005u + 1442695040888963407u) >> 40; };
    for (std::uint8_t& byte : rows.k_codes()) byte = static_cast<std::uint8_t>(next());
    for (std::uint8_t& byte : rows.v_codes()) byte = static_cast<std::uint8_t>(next());
    for (Tq4Norm& norm : rows.k_norm()) norm = to_bf16(0.1f + static_cast<float>(next() & 1023) * 1e-4f);
    for (Tq4Norm& norm : rows.v_norm()) norm = to_bf16(20.0f + static_cast<float>(next() & 1023) * 1e-3f);
    memory = records_of(rows);
  }
  void enqueue(DeviceCount kv_len, cudaStream_t stream) {
    const AttentionShape& s = shape;
    tq4_attention({make_view(std::as_const(q_device).data(), s.batch, s.n_query, s.n_head, s.head_dim),
                   {memory.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim},
                   codec_of<Tq4Codec>(s.head_dim),
                   options,
                   kv_len,
                   make_view(out.data(), s.batch, s.n_query, s.n_head, s.head_dim)},
                  plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, stream);
  }
  /// The reference in double on the same rows, with the levels as the device reads them.
  /// @param scale_factor  of the scores
  [[nodiscard]] std::vector<double> exact(const reference::Tq4Codec<double>& codec, std::int64_t kv_len,
                                          float scale_factor = 1.0f) const {
    const AttentionShape& s = shape;
    const std::vector<double> wide(q.begin(), q.end());
    std::vector<double> result(wide.size());
    AttentionOptions changed = options;
    changed.scale *= scale_factor;
    reference::tq4_attention<double>(make_view(wide.data(), s.batch, s.n_query, s.n_head, s.head_dim), rows.view(),
                                     codec, changed, kv_len,
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

/// How far a factor of the whole result may be from 1. What is rounded (queries to fp16, weights and the result to
/// bf16, each by at most 2^-9 of itself, without direction) leans on the result by 1 / sqrt(n) of that, n being the
/// values of a call or the keys that share its weights: 256 at least, so 2^-13 = 1.2e-4. Eight deviations.
constexpr double kScaleBound = 1e-3;

/// A factor on V or K of 1.004, which a cosine does not see and a bound on each element hides under bf16. V's is that
/// of the result. K's is that of every score, and takes the result towards the one of scores that are sharper by 2^-6:
/// 0.26 of that way. Scores deviate by 2.6 here, so that there is a way to go (with a scale of 1 they deviate by 0.2).
TEST(Tq4DecodeGpu, KeysAndValuesHaveTheirScale) {
  constexpr float kSharper = 1.0f + 0x1p-6f;
  constexpr double kShareBound = kScaleBound / 0x1p-6;
  for (const auto& [n_head, n_head_kv, head_dim, n_query] : {std::array<std::int64_t, 4>{32, 4, 512, 1},
                                                             {32, 4, 512, 4},
                                                             {16, 1, 512, 1},
                                                             {16, 1, 512, 4},
                                                             {16, 2, 256, 1},
                                                             {16, 2, 128, 2}}) {
    BigCall call({.batch = 1,
                  .n_query = n_query,
                  .n_head = n_head,
                  .n_head_kv = n_head_kv,
                  .head_dim = head_dim,
                  .buffer_len = 4096},
                 12.0f);
    const auto& codec = codec_with_device_levels(head_dim);
    for (const std::int64_t kv_len : {200, 4096}) {
      const std::vector<double> expected = call.exact(codec, kv_len), sharper = call.exact(codec, kv_len, kSharper);
      const std::vector<float> out = call.run(kv_len);
      EXPECT_TRUE(scale_close(out, expected, lean_of_single_keys(n_head * n_query)))
          << "V, head_dim " << head_dim << ", kv_len " << kv_len;
      EXPECT_TRUE(stays_at(out, expected, sharper, kShareBound)) << "K, head_dim " << head_dim << ", kv_len " << kv_len;
      // Control: keys that are too large show.
      EXPECT_FALSE(stays_at(call.exact(codec, kv_len, 1.004f), expected, sharper, kShareBound));
      EXPECT_FALSE(stays_at(call.exact(codec, kv_len, 0.996f), expected, sharper, kShareBound));
    }
  }
}

/// The shapes of the model and of a smaller sibling, against the reference in double on the same packed rows. Random
/// codes do not have unit length, so the bound takes the largest level instead.
TEST(Tq4DecodeGpu, RealShapesAgreeWithTheReference) {
  struct Real {
    std::int64_t n_head, n_head_kv, head_dim, n_query, buffer_len;
    std::vector<std::int64_t> kv_len;
  };
  for (const Real& r :
       {Real{32, 4, 512, 1, 131072, {1, 17, 512, 8191, 32768, 131071, 131072}}, Real{32, 4, 512, 4, 131072, {70001}},
        Real{16, 2, 256, 1, 131072, {1000, 131072}},
        // The 12B: two tiles of query rows on the records of one head.
        Real{16, 1, 512, 1, 131072, {1, 17, 512, 8191, 131072}}, Real{16, 1, 512, 3, 131072, {70001}}}) {
    BigCall call({.batch = 1,
                  .n_query = r.n_query,
                  .n_head = r.n_head,
                  .n_head_kv = r.n_head_kv,
                  .head_dim = r.head_dim,
                  .buffer_len = r.buffer_len});
    const auto& codec = codec_of<reference::Tq4Codec<double>>(r.head_dim);
    const double level = codec.k_codebook().centroids[15] * std::sqrt(static_cast<double>(r.head_dim));
    const double score = 1.7 * std::sqrt(static_cast<double>(r.head_dim)) * 0.21 * level, value = 21.1 * level;
    for (const std::int64_t kv_len : r.kv_len) {
      const std::vector<double> expected = call.exact(codec, kv_len),
                                on_levels = call.exact(codec_with_device_levels(r.head_dim), kv_len);
      const std::vector<float> out = call.run(kv_len);
      const AttentionRounding rounding = decode_rounding(r.head_dim, kv_len, call.plan.decode.n_split, score);
      EXPECT_TRUE(vectors_close(out, on_levels,
                                std::vector<double>(out.size(), attention_bound(rounding, r.head_dim, score, value)),
                                r.head_dim))
          << kv_len;
      EXPECT_TRUE(scale_close(out, on_levels, kScaleBound)) << r.head_dim << ", " << kv_len;
      EXPECT_GE(cosine(out, expected), 0.9999) << r.head_dim << ", " << kv_len;
      EXPECT_TRUE(same_bits(call.run(kv_len), out)) << "twice, " << kv_len;
      if (kv_len > 16) {
        EXPECT_LT(cosine(call.run(kv_len - kv_len / 8 - 1), expected), 0.9999);  // fewer keys show
      }
    }
  }
}

/// One graph serves every kv_len from 1 past every split boundary, and every replay gives the bits of an eager call.
TEST(Tq4DecodeGpu, GraphReplaysWhileTheCacheGrows) {
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

/// The golden cases of another implementation, whose norms are float32 and ours bf16: our result is that of the
/// reference on the same packed rows, within the bound, for every case that decode or prefill takes.
class Tq4DecodeGolden : public testing::TestWithParam<const char*> {};

TEST_P(Tq4DecodeGolden, AgreesWithTheReferenceOnTheSameRows) {
  const Tq4Golden golden = read_tq4_golden(std::string(GEMMA4_TEST_DATA) + "/tq4/" + GetParam() + ".gguf");
  const AttentionShape& s = golden.shape;
  const Eigen::Map<const Matrix<float>> matrix(golden.rotation.data(), s.head_dim, s.head_dim);
  const Tq4Codec device_codec(Rotation::dense(s.head_dim, golden.rotation), golden.codebook, golden.codebook,
                              NormKind::kRaw);
  const auto codec_of_levels = [&](const Codebook& k, const Codebook& v) {
    return reference::Tq4Codec<double>(reference::Rotation<double>::dense(matrix.cast<double>()), k, v, NormKind::kRaw);
  };
  const auto codec = codec_of_levels(golden.codebook, golden.codebook);
  const auto device_levels = codec_of_levels(read_levels(golden.codebook, device_codec.k_bytes()),
                                             read_levels(golden.codebook, device_codec.v_bytes()));
  Tq4CacheBuffer rows(1, s.n_head_kv, s.buffer_len, s.head_dim);
  std::copy(golden.k_codes.begin(), golden.k_codes.end(), rows.k_codes().begin());
  std::copy(golden.v_codes.begin(), golden.v_codes.end(), rows.v_codes().begin());
  std::transform(golden.k_norm.begin(), golden.k_norm.end(), rows.k_norm().begin(), to_bf16);
  std::transform(golden.v_norm.begin(), golden.v_norm.end(), rows.v_norm().begin(), to_bf16);
  const std::vector<Bf16> q16 = narrow(golden.q);
  const std::vector<float> q_float = widen(q16);
  const std::vector<double> q(q_float.begin(), q_float.end());
  const auto expect = [&](const reference::Tq4Codec<double>& levels) {
    std::vector<double> result(q.size());
    reference::tq4_attention<double>(make_view(q.data(), 1, s.n_query, s.n_head, s.head_dim), rows.view(), levels,
                                     golden.options(), golden.kv_len,
                                     make_view(result.data(), 1, s.n_query, s.n_head, s.head_dim));
    return result;
  };
  const DeviceBuffer<std::byte> memory = records_of(rows);
  const DeviceBuffer<Bf16> q_device(q16);
  DeviceBuffer<Bf16> out(q_device.size());
  out.fill_bytes(0xFF);
  const Tq4AttentionPlan plan = plan_tq4_attention(s, golden.options(), current_device(), {.path = Tq4Path::kDecode});
  DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
  tq4_attention({make_view(q_device.data(), 1, s.n_query, s.n_head, s.head_dim),
                 {memory.data(), 1, s.n_head_kv, s.buffer_len, s.head_dim},
                 device_codec,
                 golden.options(),
                 DeviceCount::on_host(golden.kv_len),
                 make_view(out.data(), 1, s.n_query, s.n_head, s.head_dim)},
                plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, nullptr);
  const std::vector<float> actual = widen(out.to_host());
  EXPECT_GE(cosine(actual, expect(codec)), 0.9999);
  EXPECT_TRUE(scale_close(actual, expect(device_levels), kScaleBound));
  EXPECT_GE(cosine(actual, golden.out_tq4), 0.9998);
  // The peer's levels and norms are float32: ours are off by at most 2^-8 and 2^-9.
  EXPECT_TRUE(scale_close(actual, golden.out_tq4, 0x1p-8 + 0x1p-9 + kScaleBound));
  EXPECT_LT(cosine(actual, golden.out_exact), 0.9998);  // compression is seen
}

INSTANTIATE_TEST_SUITE_P(Cases, Tq4DecodeGolden,
                         testing::Values("tq4-d64-h4x2-q1-kv40of64", "tq4-d128-h6x1-q7-kv33of48",
                                         "tq4-d256-h16x2-q1-kv96of128", "tq4-d512-h8x1-q5-kv72of96",
                                         "tq4-d512-h32x4-q1-kv100of128"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(Tq4AttentionDecodePlan, EveryShapeFitsASmallCardAndNoDecodePlanDependsOnTheBuffer) {
  const DeviceInfo small{.sm_count = 20, .compute_capability = 86, .smem_limit_bytes = 99 * 1024};
  const DeviceInfo large{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    for (const std::int64_t n_query : {1, 4}) {
      AttentionShape shape{
          .n_query = n_query, .n_head = 32, .n_head_kv = 4, .head_dim = head_dim, .buffer_len = 131072};
      const Tq4AttentionPlan fits = plan_tq4_attention(shape, {}, small);
      EXPECT_EQ(fits.path, Tq4Path::kDecode);
      EXPECT_LE(fits.decode.smem_bytes, small.smem_limit_bytes);
      EXPECT_FALSE(fits.decode.overlap);
      const Tq4AttentionPlan plan = plan_tq4_attention(shape, {}, large);
      shape.buffer_len = 4096;
      const Tq4AttentionPlan shorter = plan_tq4_attention(shape, {}, large);
      EXPECT_EQ(shorter.decode.n_split, plan.decode.n_split);
      EXPECT_EQ(shorter.workspace_bytes, plan.workspace_bytes);
    }
  }
  EXPECT_EQ(plan_tq4_attention({.n_head = 32, .n_head_kv = 4, .head_dim = 512, .buffer_len = 131072}, {}, large)
                .decode.n_split,
            33);
  EXPECT_EQ(plan_tq4_attention({.n_head = 16, .n_head_kv = 1, .head_dim = 512, .buffer_len = 131072}, {}, large)
                .decode.n_split,
            66)
      << "two tiles of rows of the one head share 132 multiprocessors";
  // Control: less than any tile needs is refused, not truncated.
  const DeviceInfo tiny{.smem_limit_bytes = 16 * 1024};
  EXPECT_TRUE(refuses([&] { (void)plan_tq4_attention({.head_dim = 512, .buffer_len = 9}, {}, tiny); }, {"16384 B"}));
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include "cuda/sliding_attention.cuh"

#include <gtest/gtest.h>

#include <cmath>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/ring_cache.cuh"
#include "reference/sliding_attention.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using testkit::close;
using testkit::cosine;
using testkit::NaiveAttention;
using testkit::narrow;
using testkit::rc_require;
using testkit::refuses;
using testkit::scale_close;
using testkit::stays_at;

/// A whole sequence: q [n_token, n_head, head_dim], k and v [n_token, n_head_kv, head_dim].
struct Sequence {
  std::int64_t n_token = 1, n_head = 1, n_head_kv = 1, head_dim = 64, window = 1, ring_len = 1;
  float scale = 0.125f;
  std::uint64_t seed = 0;

  [[nodiscard]] std::vector<float> q() const { return testkit::draw(seed * 3, n_token * n_head * head_dim); }
  [[nodiscard]] std::vector<float> k() const { return testkit::draw(seed * 3 + 1, n_token * n_head_kv * head_dim); }
  [[nodiscard]] std::vector<float> v() const { return testkit::draw(seed * 3 + 2, n_token * n_head_kv * head_dim); }
  /// bf16 in and out, probabilities in bf16; two bits for the tensor cores and ex2.approx.
  [[nodiscard]] AttentionRounding rounding() const {
    return {.unit = 0x1p-22,
            .weight_unit = 0x1p-8,
            .output_unit = 0x1p-8,
            .longest_sum = window + 64,
            .n_rescale = window / 16 + 40};
  }
};

/// Window attention over the flat sequence, by the naive loop.
NaiveAttention flat(const Sequence& s) {
  const AttentionShape shape{.batch = 1,
                             .n_query = s.n_token,
                             .n_head = s.n_head,
                             .n_head_kv = s.n_head_kv,
                             .head_dim = s.head_dim,
                             .buffer_len = s.n_token};
  const auto by_head = [&](const std::vector<float>& x) {
    std::vector<float> out(x.size());
    const auto old_view = make_view(x.data(), s.n_token, s.n_head_kv, s.head_dim);
    const auto new_view = make_view(out.data(), s.n_head_kv, s.n_token, s.head_dim);
    for (std::int64_t t = 0; t < s.n_token; ++t) {
      for (std::int64_t h = 0; h < s.n_head_kv; ++h) {
        for (std::int64_t i = 0; i < s.head_dim; ++i) new_view(h, t, i) = old_view(t, h, i);
      }
    }
    return out;
  };
  return testkit::naive_attention(
      shape, s.scale, s.q(), by_head(s.k()), by_head(s.v()),
      [&](std::int64_t, std::int64_t t, std::int64_t j) { return j <= t && j > t - s.window; });
}

enum class Order { kAttendThenCommit, kCommitThenAttend };

/// The ring as the chunk at `position` finds it, with NaN in every slot that none of its queries may read.
DeviceBuffer<Bf16> poisoned(const Sequence& s, View<const Bf16, 3> ring, std::int64_t position) {
  std::vector<Bf16> values(static_cast<std::size_t>(ring.size()));
  check(cudaMemcpy(values.data(), ring.data, values.size() * sizeof(Bf16), cudaMemcpyDeviceToHost), "copy of a ring");
  std::vector<bool> readable(static_cast<std::size_t>(s.ring_len));
  for (std::int64_t p = std::max<std::int64_t>(0, position - s.window + 1); p < position; ++p) {
    readable[static_cast<std::size_t>(ring_slot(p, s.ring_len))] = true;
  }
  const auto view = make_view(values.data(), s.n_head_kv, s.ring_len, s.head_dim);
  for (std::int64_t slot = 0; slot < s.ring_len; ++slot) {
    if (readable[static_cast<std::size_t>(slot)]) continue;
    for (std::int64_t h = 0; h < s.n_head_kv; ++h) {
      for (std::int64_t i = 0; i < s.head_dim; ++i) view(h, slot, i) = {0x7FC0};
    }
  }
  return DeviceBuffer<Bf16>(values);
}

/// The sequence in chunks through a ring on the device. `path`, where it is given, is taken by the chunks that it fits.
/// The ring and the position are at rest before each call, and `old_at_rest` says so.
std::vector<float> in_chunks(const Sequence& s, const std::vector<std::int64_t>& chunks, FlashChoice choice = {},
                             Order order = Order::kAttendThenCommit, bool old_at_rest = false) {
  const DeviceBuffer<Bf16> q(narrow(s.q())), k(narrow(s.k())), v(narrow(s.v()));
  DeviceBuffer<Bf16> out(q.size());
  out.fill_bytes(0xFF);
  RingCache ring(s.n_head_kv, s.ring_len, s.head_dim);
  const DeviceInfo device = current_device();
  std::int64_t position = 0;
  for (const std::int64_t n_new : chunks) {
    const auto part = [&](auto* data, std::int64_t n_head) {
      return make_view(data + position * n_head * s.head_dim, n_new, n_head, s.head_dim);
    };
    const View<const Bf16, 3> k_new = part(k.data(), s.n_head_kv), v_new = part(v.data(), s.n_head_kv);
    const DeviceBuffer<std::int32_t> first(std::vector<std::int32_t>{static_cast<std::int32_t>(position)});
    if (order == Order::kCommitThenAttend) ring.commit(k_new, v_new, DeviceCount::on_device(first.data()), nullptr);
    const DeviceBuffer<Bf16> ring_k = poisoned(s, std::as_const(ring).k(), position);
    const DeviceBuffer<Bf16> ring_v = poisoned(s, std::as_const(ring).v(), position);
    const AttentionShape shape{.n_query = n_new,
                               .n_head = s.n_head,
                               .n_head_kv = s.n_head_kv,
                               .head_dim = s.head_dim,
                               .buffer_len = s.ring_len};
    const FlashPlan plan = plan_sliding_attention(shape, device, choice);
    DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
    workspace.fill_bytes(0xFF);
    sliding_attention({part(q.data(), s.n_head), make_view(ring_k.data(), s.n_head_kv, s.ring_len, s.head_dim),
                       make_view(ring_v.data(), s.n_head_kv, s.ring_len, s.head_dim), k_new, v_new,
                       DeviceCount::on_device(first.data()), s.window, s.scale, part(out.data(), s.n_head)},
                      plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, nullptr, nullptr,
                      old_at_rest);
    if (order == Order::kAttendThenCommit) ring.commit(k_new, v_new, DeviceCount::on_host(position), nullptr);
    position += n_new;
    check(cudaDeviceSynchronize(), "wait for a chunk");
  }
  const std::vector<Bf16> bits = out.to_host();
  std::vector<float> values(bits.size());
  std::transform(bits.begin(), bits.end(), values.begin(), [](Bf16 value) { return to_float(value); });
  return values;
}

std::vector<std::int64_t> random_chunks(std::int64_t n_token, std::int64_t longest) {
  std::vector<std::int64_t> chunks;
  for (std::int64_t done = 0; done < n_token; done += chunks.back()) {
    chunks.push_back(*rc::gen::inRange<std::int64_t>(1, std::min(longest, n_token - done) + 1));
  }
  return chunks;
}

/// Holds a sequence, cut as it is, to the naive loop; and a window one longer or shorter must not pass.
void expect_window(Sequence s, const std::vector<std::int64_t>& chunks, const FlashChoice& choice) {
  const NaiveAttention exact = flat(s);
  const std::vector<float> out = in_chunks(s, chunks, choice);
  rc_require(close(out, exact.out, exact.bounds(s.rounding(), s.head_dim)));
  rc_require(close(in_chunks(s, chunks, choice, Order::kAttendThenCommit, true), out, 0.0), "keys fetched early");
  if (s.n_token <= s.window || s.window > 60) return;  // one key of many would hide within the bound
  s.scale = 0.03f / std::sqrt(static_cast<float>(s.head_dim) / 64.0f);
  const std::vector<double> bounds = flat(s).bounds(s.rounding(), s.head_dim);
  const std::vector<float> even = in_chunks(s, chunks, choice);
  Sequence longer = s, shorter = s;
  ++longer.window;
  --shorter.window;
  RC_ASSERT(!close(even, flat(longer).out, bounds));
  if (shorter.window > 0) RC_ASSERT(!close(even, flat(shorter).out, bounds));
}

RC_GTEST_PROP(SlidingAttentionGpu, AnyChunksEqualTheWindowOverTheFlatSequence, ()) {
  Sequence s;
  s.window = *rc::gen::inRange<std::int64_t>(1, 40);
  s.ring_len = std::max<std::int64_t>(1, s.window - 1 + *rc::gen::inRange<std::int64_t>(0, 9));
  s.n_token = *rc::gen::inRange<std::int64_t>(1, 5 * s.window + 20);
  s.n_head_kv = *rc::gen::inRange<std::int64_t>(1, 3);
  s.n_head = s.n_head_kv * *rc::gen::element<std::int64_t>(1, 2, 4, 6);
  s.head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 512);
  s.scale = *rc::gen::element(0.03f, 0.125f, 0.5f) / std::sqrt(static_cast<float>(s.head_dim) / 64.0f);
  s.seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  const std::vector<std::int64_t> chunks = random_chunks(s.n_token, *rc::gen::element<std::int64_t>(1, 7, s.n_token));
  FlashChoice choice;
  if (*rc::gen::arbitrary<bool>()) choice.path = *rc::gen::element(FlashPath::kDecode, FlashPath::kPrefill);
  if (choice.path == FlashPath::kDecode) choice.n_split = *rc::gen::inRange(1, 9);
  expect_window(s, chunks, choice);
}

/// The tensor copy path: rings of whole tiles, chunks that begin anywhere in them.
RC_GTEST_PROP(SlidingAttentionGpu, AnyChunksEqualTheWindowWithWgmma, ()) {
  if (current_device().compute_capability != 90) return;
  Sequence s;
  s.head_dim = 256;
  s.ring_len = 64 * *rc::gen::inRange<std::int64_t>(1, 4);
  s.window = *rc::gen::element<std::int64_t>(1, 2, 33, 63, 64, s.ring_len, s.ring_len + 1);
  s.n_token = *rc::gen::inRange<std::int64_t>(1, 400);
  s.n_head_kv = *rc::gen::inRange<std::int64_t>(1, 3);
  s.n_head = s.n_head_kv * *rc::gen::element<std::int64_t>(1, 2, 8);
  s.scale = *rc::gen::element(0.015f, 0.0625f);
  s.seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  expect_window(s, random_chunks(s.n_token, *rc::gen::element<std::int64_t>(50, 200, s.n_token)),
                {.path = FlashPath::kWgmma});
}

RC_GTEST_PROP(SlidingAttentionGpu, CommittingTheChunkFirstWouldLoseTheWindow, ()) {
  Sequence s;
  s.window = s.ring_len = *rc::gen::inRange<std::int64_t>(3, 30);
  s.scale = 0.03f;
  s.n_head = 2;
  s.seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  const auto chunk = *rc::gen::inRange<std::int64_t>(2, 2 * s.window);
  s.n_token = s.window + chunk;
  const NaiveAttention exact = flat(s);
  const std::vector<double> bounds = exact.bounds(s.rounding(), s.head_dim);
  rc_require(close(in_chunks(s, {s.window, chunk}), exact.out, bounds));
  RC_ASSERT(!close(in_chunks(s, {s.window, chunk}, {}, Order::kCommitThenAttend), exact.out, bounds));
}

/// The model's layer: 32 heads over 16, window 1024, a chunk of each kind across the wrap; against the reference.
TEST(SlidingAttentionGpu, RealShape) {
  const Sequence s{.n_token = 4700,
                   .n_head = 32,
                   .n_head_kv = 16,
                   .head_dim = 256,
                   .window = 1024,
                   .ring_len = 1024,
                   .scale = 2.0f / 16.0f,
                   .seed = 4};
  const std::vector<float> q = s.q(), k = s.k(), v = s.v();
  std::vector<float> ring(static_cast<std::size_t>(s.n_head_kv * s.ring_len * s.head_dim));
  const auto ring_view = make_view<const float>(ring.data(), s.n_head_kv, s.ring_len, s.head_dim);
  const auto expect = [&](float scale) {
    std::vector<float> result(q.size());
    reference::sliding_attention<float, float>(make_view(q.data(), s.n_token, s.n_head, s.head_dim), ring_view,
                                               ring_view, make_view(k.data(), s.n_token, s.n_head_kv, s.head_dim),
                                               make_view(v.data(), s.n_token, s.n_head_kv, s.head_dim), 0, s.window,
                                               scale, make_view(result.data(), s.n_token, s.n_head, s.head_dim));
    return result;
  };
  const std::vector<float> expected = expect(s.scale), sharper = expect(s.scale * (1.0f + 0x1p-6f));
  const double bound = attention_bound(s.rounding(), s.head_dim, s.scale * s.head_dim * 2.89, 1.7);
  for (const std::vector<std::int64_t>& chunks :
       {std::vector<std::int64_t>{4096, 1, 603}, {2048, 2048, 604}, {1025, 3, 1, 1, 1000, 2670}}) {
    const std::vector<float> actual = in_chunks(s, chunks);
    EXPECT_TRUE(close(actual, expected, bound));
    EXPECT_GE(cosine(actual, expected), 0.9999);
    // Roundings to bf16 have no direction: over 38 million values nothing of them is left in a factor of the result.
    // One of the scores shows on the way to sharper ones.
    EXPECT_TRUE(scale_close(actual, expected, 1e-3));
    EXPECT_TRUE(stays_at(actual, expected, sharper, 1e-3 / 0x1p-6));
  }
}

/// One graph decodes token after token across the wrap: the position is read on the device.
TEST(SlidingAttentionGpu, GraphReplaysAcrossTheWrap) {
  const Sequence s{
      .n_token = 200, .n_head = 4, .n_head_kv = 2, .head_dim = 256, .window = 64, .ring_len = 64, .seed = 9};
  const DeviceBuffer<Bf16> q(narrow(s.q())), k(narrow(s.k())), v(narrow(s.v()));
  DeviceBuffer<Bf16> q_now(4 * 256), k_now(2 * 256), v_now(2 * 256), out(4 * 256);
  RingCache ring(2, 64, 256);
  const FlashPlan plan = plan_sliding_attention(
      {.n_query = 1, .n_head = 4, .n_head_kv = 2, .head_dim = 256, .buffer_len = 64}, current_device());
  DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
  DeviceBuffer<std::int32_t> position(1);
  const Stream stream;
  check(cudaDeviceSynchronize(), "wait for the ring");
  const auto k_new = make_view<const Bf16>(k_now.data(), 1, 2, 256),
             v_new = make_view<const Bf16>(v_now.data(), 1, 2, 256);
  const Graph graph = Graph::capture(stream, [&] {
    sliding_attention(
        {make_view<const Bf16>(q_now.data(), 1, 4, 256), std::as_const(ring).k(), std::as_const(ring).v(), k_new, v_new,
         DeviceCount::on_device(position.data()), s.window, s.scale, make_view(out.data(), 1, 4, 256)},
        plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, stream);
    ring.commit(k_new, v_new, DeviceCount::on_device(position.data()), stream);
  });
  const std::vector<float> chunked = in_chunks(s, std::vector<std::int64_t>(200, 1));
  for (std::int32_t p = 0; p < 200; ++p) {
    position.from_host(std::span<const std::int32_t>(&p, 1), stream);
    const auto copy = [&](DeviceBuffer<Bf16>& to, const DeviceBuffer<Bf16>& from) {
      check(cudaMemcpyAsync(to.data(), from.data() + p * to.size(), static_cast<std::size_t>(to.bytes()),
                            cudaMemcpyDeviceToDevice, stream),
            "copy of a token");
    };
    copy(q_now, q);
    copy(k_now, k);
    copy(v_now, v);
    graph.launch(stream);
    const std::vector<Bf16> now = out.to_host(stream);
    for (std::size_t i = 0; i < now.size(); ++i) {
      ASSERT_EQ(to_float(now[i]), chunked[static_cast<std::size_t>(p) * now.size() + i]) << "position " << p;
    }
  }
}

TEST(SlidingAttentionPlan, MisuseIsRefusedBeforeAnyLaunch) {
  const DeviceInfo device{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};
  std::vector<Bf16> memory(8 * 8 * 1024);
  struct Call {
    std::int64_t n_query = 2, n_new = 2, ring_len = 8, window = 8;
    DeviceCount position = DeviceCount::on_host(5);
    float scale = 1.0f;
    FlashChoice choice = {.n_split = 1};
  };
  const auto call = [&](Call c) {
    return [&, c] {
      const auto ring = make_view<const Bf16>(memory.data(), 2, c.ring_len, 64);
      const auto fresh = make_view<const Bf16>(memory.data(), c.n_new, 2, 64);
      const AttentionShape shape{.n_query = 2, .n_head = 4, .n_head_kv = 2, .head_dim = 64, .buffer_len = c.ring_len};
      sliding_attention({make_view<const Bf16>(memory.data(), c.n_query, 4, 64), ring, ring, fresh, fresh, c.position,
                         c.window, c.scale, make_view(memory.data(), c.n_query, 4, 64)},
                        plan_sliding_attention(shape, device, c.choice), {}, nullptr);
    };
  };
  EXPECT_TRUE(refuses(call({.window = 10}), {"sliding_attention", "ring_len 8", "window - 1 = 9"}));
  EXPECT_TRUE(refuses(call({.window = 0}), {"window 0", "at least 1"}));
  EXPECT_TRUE(refuses(call({.position = DeviceCount::on_host(-1)}), {"position"}));
  EXPECT_TRUE(refuses(call({.n_new = 3}), {"k_new", "3", "need 2"}));
  EXPECT_TRUE(refuses(call({.n_query = 3, .n_new = 3}), {"another shape"}));
  EXPECT_TRUE(refuses(call({.scale = 0.0f}), {"scale 0"}));
  EXPECT_TRUE(refuses(call({.choice = {.n_split = 3}}), {"workspace 0 B", "n_split = 3"}));
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include "reference/sliding_attention.hpp"

#include <gtest/gtest.h>

#include "reference/bf16_attention.hpp"
#include "reference/ring_cache.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::reference {
namespace {

using testkit::close;
using testkit::NaiveAttention;
using testkit::rc_require;
using testkit::refuses;

/// A whole sequence: q [n_token, n_head, head_dim], k and v [n_token, n_head_kv, head_dim].
struct Sequence {
  std::int64_t n_token = 1, n_head = 1, n_head_kv = 1, head_dim = 64, window = 1, ring_len = 1;
  float scale = 0.125f;
  std::uint64_t seed = 0;

  [[nodiscard]] std::vector<float> q() const { return testkit::draw(seed * 3, n_token * n_head * head_dim); }
  [[nodiscard]] std::vector<float> k() const { return testkit::draw(seed * 3 + 1, n_token * n_head_kv * head_dim); }
  [[nodiscard]] std::vector<float> v() const { return testkit::draw(seed * 3 + 2, n_token * n_head_kv * head_dim); }
  [[nodiscard]] AttentionRounding rounding() const {
    const std::int64_t n_block = window / detail::kKeyBlock + 2;
    return {.longest_sum = detail::kKeyBlock + n_block, .n_rescale = n_block};
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

/// The sequence in chunks through a ring. Slots of the ring that no query of the chunk may read hold NaN.
std::vector<float> in_chunks(const Sequence& s, const std::vector<std::int64_t>& chunks,
                             Order order = Order::kAttendThenCommit) {
  const std::vector<float> q = s.q(), k = s.k(), v = s.v();
  std::vector<float> out(q.size());
  RingCache<float> ring(s.n_head_kv, s.ring_len, s.head_dim);
  std::int64_t position = 0;
  for (const std::int64_t n_new : chunks) {
    const auto part = [&](auto& x, std::int64_t n_head) {
      return make_view(x.data() + position * n_head * s.head_dim, n_new, n_head, s.head_dim);
    };
    const View<const float, 3> k_new = part(k, s.n_head_kv), v_new = part(v, s.n_head_kv);
    if (order == Order::kCommitThenAttend) ring.commit(k_new, v_new, position);
    std::vector<float> ring_k(ring.k().data, ring.k().data + ring.k().size());
    std::vector<float> ring_v(ring.v().data, ring.v().data + ring.v().size());
    const auto k_view = make_view(ring_k.data(), s.n_head_kv, s.ring_len, s.head_dim);
    const auto v_view = make_view(ring_v.data(), s.n_head_kv, s.ring_len, s.head_dim);
    std::vector<bool> readable(static_cast<std::size_t>(s.ring_len));
    for (std::int64_t p = std::max<std::int64_t>(0, position - s.window + 1); p < position; ++p) {
      readable[static_cast<std::size_t>(ring_slot(p, s.ring_len))] = true;
    }
    for (std::int64_t slot = 0; slot < s.ring_len; ++slot) {
      if (readable[static_cast<std::size_t>(slot)]) continue;
      for (std::int64_t h = 0; h < s.n_head_kv; ++h) {
        for (std::int64_t i = 0; i < s.head_dim; ++i) k_view(h, slot, i) = v_view(h, slot, i) = NAN;
      }
    }
    sliding_attention<float, float>(part(q, s.n_head), k_view, v_view, k_new, v_new, position, s.window, s.scale,
                                    part(out, s.n_head));
    if (order == Order::kAttendThenCommit) ring.commit(k_new, v_new, position);
    position += n_new;
  }
  return out;
}

/// Lengths that sum to n_token.
std::vector<std::int64_t> random_chunks(std::int64_t n_token, std::int64_t longest) {
  std::vector<std::int64_t> chunks;
  for (std::int64_t done = 0; done < n_token; done += chunks.back()) {
    chunks.push_back(*rc::gen::inRange<std::int64_t>(1, std::min(longest, n_token - done) + 1));
  }
  return chunks;
}

RC_GTEST_PROP(SlidingAttention, AnyChunksEqualTheWindowOverTheFlatSequence, ()) {
  Sequence s;
  s.window = *rc::gen::inRange<std::int64_t>(1, 40);
  s.ring_len = std::max<std::int64_t>(1, s.window - 1 + *rc::gen::inRange<std::int64_t>(0, 9));
  s.n_token = *rc::gen::inRange<std::int64_t>(1, 5 * s.window + 20);
  s.n_head_kv = *rc::gen::inRange<std::int64_t>(1, 3);
  s.n_head = s.n_head_kv * *rc::gen::element<std::int64_t>(1, 2, 4, 6);
  s.head_dim = *rc::gen::element<std::int64_t>(64, 128);
  s.scale = *rc::gen::element(0.03f, 0.125f, 0.5f);
  s.seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  const std::vector<std::int64_t> chunks = random_chunks(s.n_token, *rc::gen::element<std::int64_t>(1, 7, s.n_token));
  const NaiveAttention exact = flat(s);
  const std::vector<double> bounds = exact.bounds(s.rounding(), s.head_dim);
  rc_require(close(in_chunks(s, chunks), exact.out, bounds));
  // Controls: a window one longer or one shorter is another result, where there are enough tokens to tell.
  if (s.n_token <= s.window) return;
  s.scale = 0.03f;
  const std::vector<float> even = in_chunks(s, chunks);
  Sequence longer = s, shorter = s;
  ++longer.window;
  --shorter.window;
  RC_ASSERT(!close(even, flat(longer).out, bounds));
  if (shorter.window > 0) RC_ASSERT(!close(even, flat(shorter).out, bounds));
}

RC_GTEST_PROP(SlidingAttention, CommittingTheChunkFirstWouldLoseTheWindow, ()) {
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
  RC_ASSERT(!close(in_chunks(s, {s.window, chunk}, Order::kCommitThenAttend), exact.out, bounds));
}

RC_GTEST_PROP(SlidingAttention, WindowOfTheWholeSequenceIsFullAttention, ()) {
  const auto n_token = *rc::gen::inRange<std::int64_t>(1, 60);
  const Sequence s{.n_token = n_token, .n_head = 4, .window = n_token, .ring_len = n_token};
  const std::vector<float> q = s.q(), k = s.k(), v = s.v();
  std::vector<float> expected(q.size());
  bf16_attention<float, float>(make_view(q.data(), 1, n_token, 4, 64), make_view(k.data(), 1, 1, n_token, 64),
                               make_view(v.data(), 1, 1, n_token, 64), {.scale = s.scale}, n_token,
                               make_view(expected.data(), 1, n_token, 4, 64));
  const NaiveAttention exact = flat(s);
  const std::vector<double> bounds = exact.bounds(s.rounding(), s.head_dim);
  rc_require(close(expected, exact.out, bounds));
  rc_require(close(in_chunks(s, random_chunks(n_token, n_token)), exact.out, bounds));
}

/// The window of the nano model, across tiles, key blocks and wraps; and a chunk longer than two rings.
TEST(SlidingAttention, LongWindowsAreExactToo) {
  const Sequence s{.n_token = 1300, .n_head = 2, .window = 512, .ring_len = 512, .seed = 3};
  const NaiveAttention exact = flat(s);
  const std::vector<double> bounds = exact.bounds(s.rounding(), s.head_dim);
  EXPECT_TRUE(close(in_chunks(s, {1300}), exact.out, bounds));
  EXPECT_TRUE(close(in_chunks(s, {512, 512, 276}), exact.out, bounds));
  EXPECT_TRUE(close(in_chunks(s, {700, 1, 1, 598}), exact.out, bounds));
}

TEST(SlidingAttention, Bf16RingHoldsWhatAttentionReads) {
  const Sequence s{.n_token = 9, .n_head = 2, .window = 4, .ring_len = 4, .seed = 8};  // draw() is exact in bf16
  const std::vector<float> q = s.q();
  std::vector<Bf16> k, v;
  for (const float value : s.k()) k.push_back(to_bf16(value));
  for (const float value : s.v()) v.push_back(to_bf16(value));
  RingCache<Bf16> ring(1, 4, 64);
  std::vector<float> out(q.size());
  for (std::int64_t p = 0; p < s.n_token; ++p) {
    const View<const Bf16, 3> k_new = make_view(k.data() + p * 64, 1, 1, 64),
                              v_new = make_view(v.data() + p * 64, 1, 1, 64);
    sliding_attention<float, Bf16>(make_view(q.data() + p * 128, 1, 2, 64), ring.k(), ring.v(), k_new, v_new, p, 4,
                                   s.scale, make_view(out.data() + p * 128, 1, 2, 64));
    ring.commit(k_new, v_new, p);
  }
  const NaiveAttention exact = flat(s);
  EXPECT_TRUE(close(out, exact.out, exact.bounds(s.rounding(), 64)));
}

TEST(SlidingAttention, RefusesMisuse) {
  struct Call {
    std::int64_t n_query = 2, n_head = 4, n_head_kv = 2, head_dim = 64, ring_len = 8, n_new = 2, new_heads = 2;
    std::int64_t ring_v_len = 8, position = 5, window = 8, out_heads = 4;
  };
  const auto call = [](Call c) {
    return [c] {
      std::vector<float> memory(8 * 8 * 1024);
      const float* data = memory.data();
      sliding_attention<float, float>(
          make_view(data, c.n_query, c.n_head, c.head_dim), make_view(data, c.n_head_kv, c.ring_len, c.head_dim),
          make_view(data, c.n_head_kv, c.ring_v_len, c.head_dim), make_view(data, c.n_new, c.new_heads, c.head_dim),
          make_view(data, c.n_new, c.new_heads, c.head_dim), c.position, c.window, 1.0f,
          make_view(memory.data() + 4 * 8 * 1024, c.n_query, c.out_heads, c.head_dim));
    };
  };
  EXPECT_NO_THROW(call({})());
  EXPECT_NO_THROW(call({.window = 9})());  // window - 1 old keys fit
  EXPECT_TRUE(refuses(call({.window = 10}), {"sliding_attention", "ring_len 8", "window - 1 = 9"}));
  EXPECT_TRUE(refuses(call({.window = 0}), {"window 0", "at least 1"}));
  EXPECT_TRUE(refuses(call({.position = -1}), {"position -1", "at least 0"}));
  EXPECT_TRUE(refuses(call({.n_head = 3, .out_heads = 3}), {"n_head 3", "n_head_kv 2"}));
  EXPECT_TRUE(refuses(call({.head_dim = 96}), {"head_dim 96", "power of two"}));
  EXPECT_TRUE(refuses(call({.n_new = 3}), {"k_new", "3", "need 2"}));
  EXPECT_TRUE(refuses(call({.new_heads = 1}), {"k_new", "1", "need 2"}));
  EXPECT_TRUE(refuses(call({.ring_v_len = 7}), {"ring_v", "7", "need 8"}));
  EXPECT_TRUE(refuses(call({.out_heads = 2}), {"out", "2", "need 4"}));
}

}  // namespace
}  // namespace gemma4::reference

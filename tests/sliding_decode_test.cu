// SPDX-License-Identifier: Apache-2.0
#include "cuda/sliding_decode.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/sliding_attention.cuh"
#include "gemma4/config.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using testkit::close;
using testkit::draw;
using testkit::NaiveAttention;
using testkit::narrow;
using testkit::rc_require;
using testkit::refuses;
using testkit::scale_close;
using testkit::stays_at;
using testkit::widen;

constexpr Bf16 kNan{0x7FC0};

/// One token of a sliding layer whose ring holds what the window shows of the tokens before, and NaN elsewhere.
struct Case {
  std::int64_t n_head_kv = 1, group = 1, head_dim = 64, window = 1, ring_len = 1, position = 0, n_pair = 32;
  float scale = 0.25f, q_weight = 2.0f;
  std::uint64_t seed = 1;

  [[nodiscard]] std::int64_t n_head() const { return n_head_kv * group; }
  [[nodiscard]] AttentionShape shape() const {
    return {.n_query = 1, .n_head = n_head(), .n_head_kv = n_head_kv, .head_dim = head_dim, .buffer_len = ring_len};
  }
  [[nodiscard]] RopeParams rope() const {
    AttentionConfig attention;
    attention.head_dim = head_dim;
    attention.n_head_kv = n_head_kv;
    attention.rope_theta = 1e4;
    attention.rope_pairs = n_pair;
    return rope_params(attention);
  }
  /// Of the oldest key that is seen.
  [[nodiscard]] std::int64_t first() const { return std::max<std::int64_t>(0, position - window + 1); }
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "heads " << c.n_head() << " over " << c.n_head_kv << " of " << c.head_dim << ", window " << c.window
             << ", ring " << c.ring_len << ", position " << c.position << ", " << c.n_pair << " pairs, scale "
             << c.scale << ", seed " << c.seed;
}

Case some_case() {
  Case c;
  c.head_dim = *rc::gen::element<std::int64_t>(64, 128, 256);
  c.n_head_kv = *rc::gen::inRange<std::int64_t>(1, 4);
  c.group = *rc::gen::element<std::int64_t>(1, 2, 2, 3, 4, 7, 8);
  c.window = *rc::gen::oneOf(rc::gen::inRange<std::int64_t>(1, 70), rc::gen::inRange<std::int64_t>(1, 1025));
  c.ring_len = c.window + *rc::gen::inRange<std::int64_t>(0, 70);
  c.position = *rc::gen::oneOf(rc::gen::inRange<std::int64_t>(0, 5), rc::gen::inRange<std::int64_t>(0, 2 * c.window),
                               rc::gen::inRange<std::int64_t>(0, 262144), rc::gen::just<std::int64_t>(262143));
  c.n_pair = c.head_dim / *rc::gen::element<std::int64_t>(2, 2, 8);
  c.scale = *rc::gen::element(0.02f, 0.25f, 1.0f) / std::sqrt(static_cast<float>(c.head_dim) / 64.0f);
  c.seed = *rc::gen::inRange<std::uint64_t>(1, 1 << 20);
  return c;
}

/// A layer on the device, and what its two paths make of it.
class Layer {
 public:
  explicit Layer(const Case& c)
      : c_(c),
        q_(draw(c.seed, c.n_head() * c.head_dim, 3.0f)),
        k_(draw(c.seed + 1, c.n_head_kv * c.head_dim, 2.0f)),
        v_(draw(c.seed + 2, c.n_head_kv * c.head_dim, 0.5f)),
        q_norm_(draw(c.seed + 3, c.head_dim, c.q_weight)),
        k_norm_(draw(c.seed + 4, c.head_dim, 2.0f)),
        position_(std::vector<std::int32_t>{static_cast<std::int32_t>(c.position)}),
        old_k_(poisoned(c.seed + 5)),
        old_v_(poisoned(c.seed + 6)),
        rope_(c.rope()) {}

  struct Result {
    std::vector<Bf16> out, ring_k, ring_v;
    bool operator==(const Result& other) const {
      const auto same = [](const std::vector<Bf16>& a, const std::vector<Bf16>& b) {
        return std::ranges::equal(a, b, [](Bf16 x, Bf16 y) { return x.bits == y.bits; });
      };
      return same(out, other.out) && same(ring_k, other.ring_k) && same(ring_v, other.ring_v);
    }
  };

  [[nodiscard]] Result fused(std::optional<int> n_split, bool overlap = false) const {
    const SlidingDecodePlan plan = plan_sliding_decode(c_.shape(), c_.window, current_device(), n_split);
    return result([&](const View<Bf16, 3>& ring_k, const View<Bf16, 3>& ring_v, const View<Bf16, 3>& out) {
      sliding_decode({heads(q_), heads(k_), heads(v_), norms(), DeviceCount::on_device(position_.data()), rope_, ring_k,
                      ring_v, c_.scale, out},
                     plan, nullptr, overlap);
    });
  }

  /// qkv_prologue() and, with `attends`, sliding_attention(); else what is left are q, and k, v in the ring.
  [[nodiscard]] Result stepwise(bool attends) const {
    DeviceBuffer<Bf16> k_new(k_.size()), v_new(v_.size());
    const FlashPlan plan = plan_sliding_attention(c_.shape(), current_device());
    DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
    const auto fresh = [&](DeviceBuffer<Bf16>& x) { return make_view(x.data(), 1, c_.n_head_kv, c_.head_dim); };
    return result([&](const View<Bf16, 3>& ring_k, const View<Bf16, 3>& ring_v, const View<Bf16, 3>& out) {
      const DeviceCount position = DeviceCount::on_device(position_.data());
      qkv_prologue<float>({heads(q_), heads(k_), heads(v_), norms(), position, rope_, out},
                          RingKv{{fresh(k_new), fresh(v_new)}, ring_k, ring_v, c_.window}, nullptr);
      if (!attends) return;
      sliding_attention({out, ring_k, ring_v, fresh(k_new), fresh(v_new), position, c_.window, c_.scale, out}, plan,
                        {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, nullptr);
    });
  }

  /// The naive loop over the keys at [first, position] of a ring that holds them, for q as it was prepared.
  [[nodiscard]] NaiveAttention naive(const Result& prepared, std::int64_t first, double scale_factor = 1.0) const {
    const std::int64_t n_key = c_.position + 1 - first;
    std::vector<float> k, v;
    for (std::int64_t head = 0; head < c_.n_head_kv; ++head) {
      for (std::int64_t p = first; p <= c_.position; ++p) {
        const std::int64_t row = (head * c_.ring_len + ring_slot(p, c_.ring_len)) * c_.head_dim;
        for (std::int64_t i = 0; i < c_.head_dim; ++i) {
          k.push_back(to_float(prepared.ring_k[static_cast<std::size_t>(row + i)]));
          v.push_back(to_float(prepared.ring_v[static_cast<std::size_t>(row + i)]));
        }
      }
    }
    AttentionShape shape = c_.shape();
    shape.buffer_len = n_key;
    return testkit::naive_attention(shape, scale_factor * static_cast<double>(c_.scale), widen(prepared.out), k, v,
                                    [](std::int64_t, std::int64_t, std::int64_t) { return true; });
  }
  /// Weights in float; two bits for ex2.approx; merged over warps and over blocks.
  [[nodiscard]] AttentionRounding rounding() const {
    return {.unit = 0x1p-22, .output_unit = 0x1p-8, .longest_sum = 32, .n_rescale = 2};
  }

 private:
  [[nodiscard]] View<const float, 3> heads(const DeviceBuffer<float>& x) const {
    return make_view(x.data(), 1, x.size() / c_.head_dim, c_.head_dim);
  }
  [[nodiscard]] QkNorms norms() const { return {q_norm_.data(), k_norm_.data(), 1e-6f}; }

  [[nodiscard]] std::vector<Bf16> poisoned(std::uint64_t seed) const {
    std::vector<Bf16> ring(static_cast<std::size_t>(c_.n_head_kv * c_.ring_len * c_.head_dim), kNan);
    const std::vector<float> values = draw(seed, static_cast<std::int64_t>(ring.size()));
    for (std::int64_t head = 0; head < c_.n_head_kv; ++head) {
      for (std::int64_t p = c_.first(); p < c_.position; ++p) {
        const std::int64_t row = (head * c_.ring_len + ring_slot(p, c_.ring_len)) * c_.head_dim;
        for (auto i = static_cast<std::size_t>(row); i < static_cast<std::size_t>(row + c_.head_dim); ++i) {
          ring[i] = to_bf16(values[i]);
        }
      }
    }
    return ring;
  }

  template <class TRun>
  [[nodiscard]] Result result(const TRun& run) const {
    DeviceBuffer<Bf16> ring_k(old_k_), ring_v(old_v_), out(c_.n_head() * c_.head_dim);
    out.fill_bytes(0xFF);
    const auto ring = [&](DeviceBuffer<Bf16>& x) {
      return make_view(x.data(), c_.n_head_kv, c_.ring_len, c_.head_dim);
    };
    check(cudaDeviceSynchronize(), "wait for the layer");
    run(ring(ring_k), ring(ring_v), make_view(out.data(), 1, c_.n_head(), c_.head_dim));
    check(cudaDeviceSynchronize(), "wait for the launch");
    return {out.to_host(), ring_k.to_host(), ring_v.to_host()};
  }

  Case c_;
  DeviceBuffer<float> q_, k_, v_, q_norm_, k_norm_;
  DeviceBuffer<std::int32_t> position_;
  std::vector<Bf16> old_k_, old_v_;
  RopeParams rope_;
};

/// The ring's bits are those of the components, NaN and all, and the result is the naive loop's on their q, k and v.
/// Control: without its oldest key, or with one key fewer at the new end, a window of few keys gives another result.
testing::AssertionResult agrees(const Case& c, std::optional<int> n_split) {
  const Layer layer(c);
  const Layer::Result actual = layer.fused(n_split), prepared = layer.stepwise(false);
  const auto same = [](Bf16 a, Bf16 b) { return a.bits == b.bits; };
  if (!std::ranges::equal(actual.ring_k, prepared.ring_k, same)) return testing::AssertionFailure() << "ring of keys";
  if (!std::ranges::equal(actual.ring_v, prepared.ring_v, same)) return testing::AssertionFailure() << "ring of values";
  if (!(layer.fused(n_split) == actual)) return testing::AssertionFailure() << "a second run differs";
  if (!(layer.fused(n_split, true) == actual)) return testing::AssertionFailure() << "an overlapping launch differs";
  const NaiveAttention exact = layer.naive(prepared, c.first());
  return close(widen(actual.out), exact.out, exact.bounds(layer.rounding(), c.head_dim));
}

bool tells_windows_apart(const Case& c) {
  const Layer layer(c);
  const Layer::Result actual = layer.fused({}), prepared = layer.stepwise(false);
  const NaiveAttention fewer = layer.naive(prepared, c.first() + 1);
  return !close(widen(actual.out), fewer.out, fewer.bounds(layer.rounding(), c.head_dim));
}

RC_GTEST_PROP(SlidingDecodeGpu, AgreesWithTheComponentsAndTheNaiveLoop, ()) {
  const Case c = some_case();
  const int least = c.window > 512 ? 8 : c.window > 256 ? 4 : c.window > 128 ? 2 : 1;
  const int n_split = std::max(least, *rc::gen::element(1, 2, 4, 8));
  RC_LOG() << c << ", n_split " << n_split;
  rc_require(agrees(c, n_split));
}

/// The smoothest weights show a lost key best.
RC_GTEST_PROP(SlidingDecodeGpu, AKeyThatIsMissingIsFound, ()) {
  Case c = some_case();
  c.window = *rc::gen::inRange<std::int64_t>(2, 40);
  c.ring_len = c.window + *rc::gen::inRange<std::int64_t>(0, 70);
  c.position = *rc::gen::inRange<std::int64_t>(1, 300);
  c.scale = 0.01f / std::sqrt(static_cast<float>(c.head_dim) / 64.0f);
  RC_LOG() << c;
  RC_ASSERT(tells_windows_apart(c));
}

/// A layer of a model, from the first token to beyond the longest context; and it is the path of three launches to a
/// rounding of its bf16 weights.
void expect_real_shape(const ModelConfig& model) {
  for (const std::int64_t position : {0, 1, 127, 128, 1022, 1023, 1024, 1087, 1088, 1500, 131071, 200000}) {
    const Case c{.n_head_kv = model.sliding.n_head_kv,
                 .group = model.n_head / model.sliding.n_head_kv,
                 .head_dim = model.sliding.head_dim,
                 .window = model.window,
                 .ring_len = ring_slots(model.window),
                 .position = position,
                 .n_pair = model.sliding.rope_pairs,
                 .scale = 0.125f};
    EXPECT_TRUE(agrees(c, {})) << c;
    const Layer layer(c);
    const Layer::Result actual = layer.fused({}), before = layer.stepwise(true);
    AttentionRounding rounding = layer.rounding();
    rounding.longest_sum = c.window + 64;
    rounding.n_rescale = 40;
    rounding.weight_unit = 0x1p-8;
    const Layer::Result prepared = layer.stepwise(false);
    const NaiveAttention exact = layer.naive(prepared, c.first());
    if (position >= 127) {
      // The result's rounding to bf16 has no direction: over 8192 values it comes to 2^-9 / 90 of a factor. One of the
      // scores shows on the way to sharper ones.
      const NaiveAttention sharper = layer.naive(prepared, c.first(), 1 + 0x1p-6);
      const auto shows = [&](const auto& out) { return stays_at(out, exact.out, sharper.out, 1e-3 / 0x1p-6); };
      EXPECT_TRUE(scale_close(widen(actual.out), exact.out, 1e-3)) << c;
      EXPECT_TRUE(shows(widen(actual.out))) << c;
      EXPECT_FALSE(shows(layer.naive(prepared, c.first(), 1.004).out)) << c;
    }
    std::vector<double> bounds = exact.bounds(rounding, c.head_dim);
    for (double& bound : bounds) bound *= 2;
    EXPECT_TRUE(close(widen(actual.out), widen(before.out), bounds)) << c;
  }
}

TEST(SlidingDecodeGpu, RealShape) {
  expect_real_shape(gemma4_31b());
}

TEST(SlidingDecodeGpu, RealShapeOfThe12B) {
  expect_real_shape(gemma4_12b());
}

/// Layers behind each other: one graph, replayed token after token across the wrap, gives what calls that wait for each
/// other give.
TEST(SlidingDecodeGpu, GraphReplaysAcrossTheWrap) {
  constexpr std::int64_t kTokens = 150, kLayers = 3, kHeadDim = 64, kRing = 64, kVectors = 8;
  const Case c{.n_head_kv = 2, .group = 2, .head_dim = kHeadDim, .window = 40, .ring_len = kRing};
  const SlidingDecodePlan plan = plan_sliding_decode(c.shape(), c.window, current_device());
  const RopeParams rope = c.rope();
  const DeviceBuffer<float> weight(draw(3, kHeadDim, 2.0f)), tokens(draw(4, kTokens * kVectors * kHeadDim, 2.0f));
  const Stream stream;
  std::vector<Bf16> results[2];
  for (const bool replays : {false, true}) {
    DeviceBuffer<Bf16> ring_k(kLayers * 2 * kRing * kHeadDim), ring_v(ring_k.size()), out(kLayers * 4 * kHeadDim);
    DeviceBuffer<float> now(kVectors * kHeadDim);
    DeviceBuffer<std::int32_t> position(1);
    for (DeviceBuffer<Bf16>* buffer : {&ring_k, &ring_v, &out}) buffer->fill_bytes(0xFF, stream);
    stream.synchronize();
    const auto step = [&](bool overlap) {
      for (std::int64_t layer = 0; layer < kLayers; ++layer) {
        const auto part = [&](std::int64_t first, std::int64_t n) {
          return make_view(static_cast<const float*>(now.data()) + first * kHeadDim, 1, n, kHeadDim);
        };
        const auto ring = [&](DeviceBuffer<Bf16>& x) {
          return make_view(x.data() + layer * 2 * kRing * kHeadDim, 2, kRing, kHeadDim);
        };
        // Layer by layer another head is the first, so that layers differ.
        sliding_decode({part(layer, 4),
                        part(4 - layer, 2),
                        part(6 - layer, 2),
                        {weight.data(), weight.data(), 1e-6f},
                        DeviceCount::on_device(position.data()),
                        rope,
                        ring(ring_k),
                        ring(ring_v),
                        0.25f,
                        make_view(out.data() + layer * 4 * kHeadDim, 1, 4, kHeadDim)},
                       plan, stream, overlap);
        if (!overlap) stream.synchronize();
      }
    };
    const Graph graph = Graph::capture(stream, [&] { step(true); });
    for (std::int32_t p = 0; p < kTokens; ++p) {
      position.from_host(std::span<const std::int32_t>(&p, 1), stream);
      check(cudaMemcpyAsync(now.data(), tokens.data() + p * now.size(), static_cast<std::size_t>(now.bytes()),
                            cudaMemcpyDeviceToDevice, stream),
            "copy of a token");
      if (replays) {
        graph.launch(stream);
      } else {
        step(false);
      }
      for (const Bf16 value : out.to_host(stream)) results[replays].push_back(value);
    }
    for (const Bf16 value : ring_k.to_host(stream)) results[replays].push_back(value);
    for (const Bf16 value : ring_v.to_host(stream)) results[replays].push_back(value);
  }
  ASSERT_EQ(results[0].size(), results[1].size());
  for (std::size_t i = 0; i < results[0].size(); ++i) {
    ASSERT_EQ(results[0][i].bits, results[1][i].bits) << "value " << i;
  }
}

constexpr AttentionShape k12bShape{.n_query = 1, .n_head = 16, .n_head_kv = 8, .head_dim = 256, .buffer_len = 1088};
constexpr AttentionShape k31bShape{.n_query = 1, .n_head = 32, .n_head_kv = 16, .head_dim = 256, .buffer_len = 1088};
const DeviceInfo kH200{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};

TEST(SlidingDecodePlan, KeysAreSharedByAsManyBlocksAsTheDeviceHas) {
  const SlidingDecodePlan plan = plan_sliding_decode(k31bShape, 1024, kH200);
  EXPECT_TRUE(plan.fits());
  EXPECT_EQ(plan.n_split, 8);
  EXPECT_EQ(plan.n_pair, 1);
  EXPECT_LE(plan.smem_bytes, 115712) << "two blocks no longer share a multiprocessor";
  EXPECT_EQ(plan_sliding_decode(k12bShape, 1024, kH200).n_split, 8);
  DeviceInfo small = kH200;
  small.sm_count = 40;
  EXPECT_EQ(plan_sliding_decode(k31bShape, 256, small).n_split, 2);
}

TEST(SlidingDecodePlan, WhatDoesNotFitIsSaid) {
  const auto misfit = [](AttentionShape shape, std::int64_t window, const DeviceInfo& device,
                         std::optional<int> n_split = {}) {
    const SlidingDecodePlan plan = plan_sliding_decode(shape, window, device, n_split);
    return std::string(plan.fits() ? "" : plan.misfit);
  };
  const auto changed = [](std::int64_t AttentionShape::*member, std::int64_t value) {
    AttentionShape shape = k31bShape;
    shape.*member = value;
    return shape;
  };
  DeviceInfo old = kH200, small = kH200;
  old.compute_capability = 89;
  small.smem_limit_bytes = 99 * 1024;
  EXPECT_FALSE(SlidingDecodePlan{}.fits());
  EXPECT_EQ(misfit(k31bShape, 1024, kH200), "");
  EXPECT_EQ(misfit(k31bShape, 1024, old), "the device has no clusters");
  EXPECT_EQ(misfit(k31bShape, 1024, small), "the keys do not fit into shared memory");
  EXPECT_EQ(misfit(k31bShape, 1025, kH200), "the window is wider than 128 keys a block");
  EXPECT_EQ(misfit(k31bShape, 1024, kH200, 4), "the window is wider than 128 keys a block");
  EXPECT_EQ(misfit(changed(&AttentionShape::n_query, 2), 1024, kH200), "it is not one token");
  EXPECT_EQ(misfit(changed(&AttentionShape::head_dim, 512), 1024, kH200), "head_dim is not 64, 128 or 256");
  EXPECT_EQ(misfit(changed(&AttentionShape::buffer_len, 1023), 1024, kH200),
            "the ring has no slot beside the window's old keys");
}

TEST(SlidingDecodePlan, MisuseIsRefusedBeforeAnyLaunch) {
  std::vector<float> values(4 * 64);
  std::vector<Bf16> memory(2 * 8 * 64);
  struct Call {
    std::int64_t n_head = 4, n_kv = 2, ring_len = 8, pitch = 64, n_pair = 32, window = 8;
    std::optional<int> n_split = {};
    DeviceCount position = DeviceCount::on_host(5);
    float scale = 1.0f;
    bool in_place = false;
    DeviceInfo device = kH200;
  };
  const auto call = [&](Call c) {
    return [&, c] {
      const AttentionShape shape{.n_query = 1, .n_head = 4, .n_head_kv = 2, .head_dim = 64, .buffer_len = 8};
      Case layer{.n_head_kv = 2, .group = 2, .n_pair = c.n_pair};
      const auto heads = [&](std::int64_t n) { return make_view(std::as_const(values).data(), 1, n, 64); };
      const View<Bf16, 3> ring{.data = memory.data(), .extent = {2, c.ring_len, 64}, .stride = {512, c.pitch, 1}};
      Bf16* const out = c.in_place ? reinterpret_cast<Bf16*>(values.data()) : memory.data();
      sliding_decode({heads(c.n_head),
                      heads(c.n_kv),
                      heads(c.n_kv),
                      {values.data(), values.data(), 1e-6f},
                      c.position,
                      layer.rope(),
                      ring,
                      ring,
                      c.scale,
                      make_view(out, 1, 4, 64)},
                     plan_sliding_decode(shape, c.window, c.device, c.n_split), nullptr);
    };
  };
  DeviceInfo old = kH200;
  old.compute_capability = 80;
  EXPECT_TRUE(refuses(call({.device = old}), {"sliding_decode", "no clusters", "qkv_prologue()"}));
  EXPECT_TRUE(refuses(call({.n_split = 3}), {"n_split 3", "1, 2, 4 or 8"}));
  EXPECT_TRUE(refuses(call({.position = {}}), {"position"}));
  EXPECT_TRUE(refuses(call({.n_head = 3}), {"q", "3"}));
  EXPECT_TRUE(refuses(call({.n_kv = 1}), {"k", "1"}));
  EXPECT_TRUE(refuses(call({.ring_len = 9}), {"ring_k", "9", "8"}));
  EXPECT_TRUE(refuses(call({.pitch = 72}), {"ring_k", "72", "64"}));
  EXPECT_TRUE(refuses(call({.scale = 0.0f}), {"scale 0"}));
  EXPECT_TRUE(refuses(call({.in_place = true}), {"out", "q"}));
}

}  // namespace
}  // namespace gemma4::cuda

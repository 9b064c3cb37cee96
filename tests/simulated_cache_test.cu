// SPDX-License-Identifier: Apache-2.0
#include "cuda/simulated_cache.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "gemma4/quantisers.hpp"
#include "reference/simulated_cache.hpp"
#include "tests/recipes/e4m3_token.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using testkit::refuses;

constexpr Bf16 kPoison{0x5A5A};
constexpr std::int64_t kMargin = 1024;  // elements before and behind each cache that nothing may touch

/// K and V [batch, n_new, n_head_kv, head_dim] and where they go.
struct Update {
  std::int64_t batch, n_head, buffer_len, head_dim;
  std::vector<std::int32_t> positions;
  std::vector<float> k, v;

  [[nodiscard]] std::int64_t n_new() const { return static_cast<std::int64_t>(positions.size()); }
  [[nodiscard]] std::int64_t cache_size() const { return batch * n_head * buffer_len * head_dim; }
  template <class T>
  [[nodiscard]] View<const T, 4> view(const T* data) const {
    return make_view(data, batch, n_new(), n_head, head_dim);
  }
  [[nodiscard]] View<Bf16, 4> cache(Bf16* data) const { return make_view(data, batch, n_head, buffer_len, head_dim); }
};

/// Vectors in turn: ordinary ones, zeros, some of 2^-140, 2^120 and 2^12, and such that hold a NaN or an infinity.
std::vector<float> hard_values(std::uint64_t seed, std::int64_t n_vector, std::int64_t head_dim) {
  std::vector<float> values = testkit::draw(seed, n_vector * head_dim);
  for (std::int64_t r = 0; r < n_vector; ++r) {
    float* const row = &values[static_cast<std::size_t>(r * head_dim)];
    const auto scale = [&](float by) { std::for_each(row, row + head_dim, [by](float& x) { x *= by; }); };
    const std::int64_t at = (r * 37 + static_cast<std::int64_t>(seed)) % head_dim;
    switch (r % 11) {
      case 1:
        scale(0.0f);
        break;
      case 3:
        scale(0x1p-140f);
        break;
      case 4:
        scale(0x1p120f);
        break;
      case 6:
        row[at] = -std::nanf("");
        break;
      case 7:
        row[at] = -INFINITY;
        break;
      case 8:
        scale(0x1p12f);
        break;
      case 9:
        scale(0x1p-20f);
        break;
      default:
        scale(1.0001f);  // not exact in bf16
    }
  }
  return values;
}

Update any_update() {
  Update u{.batch = *rc::gen::inRange<std::int64_t>(1, 3),
           .n_head = *rc::gen::inRange<std::int64_t>(1, 5),
           .buffer_len = *rc::gen::inRange<std::int64_t>(2, 40),
           .head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 512),
           .positions = {},
           .k = {},
           .v = {}};
  const auto seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  u.positions.resize(static_cast<std::size_t>(u.buffer_len));
  std::iota(u.positions.begin(), u.positions.end(), 0);
  std::shuffle(u.positions.begin(), u.positions.end(), std::mt19937_64(seed));
  u.positions.resize(static_cast<std::size_t>(*rc::gen::inRange<std::int64_t>(1, u.buffer_len)));
  u.k = hard_values(seed, u.batch * u.n_new() * u.n_head, u.head_dim);
  u.v = hard_values(seed + 5, u.batch * u.n_new() * u.n_head, u.head_dim);
  return u;
}

/// The two caches with their margins after the reference's update.
template <class TQuantiser>
std::vector<Bf16> on_host(const Update& u, const Simulated<TQuantiser>& format) {
  const reference::SimulatedCodec<TQuantiser> codec(u.head_dim, format);
  std::vector<Bf16> memory(static_cast<std::size_t>(2 * u.cache_size() + 3 * kMargin), kPoison);
  Bf16* const k_cache = memory.data() + kMargin;
  reference::simulated_cache_update<float>(codec, u.view(u.k.data()), u.view(u.v.data()), u.positions, u.cache(k_cache),
                                           u.cache(k_cache + u.cache_size() + kMargin));
  return memory;
}

/// The same after the device's, from vectors of TIn.
template <class TIn, class TQuantiser>
std::vector<Bf16> on_device(const Update& u, const Simulated<TQuantiser>& format,
                            const std::vector<std::int32_t>& positions) {
  const auto to_device = [](const std::vector<float>& x) {
    std::vector<TIn> values(x.size());
    std::transform(x.begin(), x.end(), values.begin(), [](float value) { return from_float<TIn>(value); });
    return DeviceBuffer<TIn>(values);
  };
  const DeviceBuffer<TIn> k = to_device(u.k), v = to_device(u.v);
  const DeviceBuffer<std::int32_t> at(positions);
  DeviceBuffer<Bf16> memory(2 * u.cache_size() + 3 * kMargin);
  memory.fill_bytes(0x5A);
  Bf16* const k_cache = memory.data() + kMargin;
  simulated_cache_update<TIn>(SimulatedCodec<TQuantiser>(u.head_dim, format), u.view<TIn>(k.data()),
                              u.view<TIn>(v.data()), {at.data(), at.size(), {}}, u.cache(k_cache),
                              u.cache(k_cache + u.cache_size() + kMargin), nullptr);
  return memory.to_host();
}

/// A format that must leave other bits than `format` does.
Simulated<ScalarCodes> other_format(const Simulated<ScalarCodes>& format) {
  auto other = format;  // K and V change places
  std::swap(other.quantiser.k_bits, other.quantiser.v_bits);
  std::swap(other.quantiser.k_table, other.quantiser.v_table);
  return other;
}
template <class TQuantiser>
Simulated<TQuantiser> other_format(const Simulated<TQuantiser>& format) {
  auto other = format;
  other.hadamard = !format.hadamard;
  return other;
}

template <class TQuantiser>
void check_bits(const Update& u, const Simulated<TQuantiser>& format) {
  const std::vector<Bf16> expected = on_host(u, format);
  const std::vector<Bf16> actual = on_device<float>(u, format, u.positions);
  const auto [a, e] = std::mismatch(actual.begin(), actual.end(), expected.begin());
  if (a != actual.end()) {
    RC_FAIL(concat(format.name(), ": element ", a - actual.begin() - kMargin, " is ", to_float(*a), ", expected ",
                   to_float(*e)));
  }
  Update rounded = u;  // what a layer hands over: bf16
  for (auto* values : {&rounded.k, &rounded.v}) {
    for (float& x : *values) x = to_float(to_bf16(x));
  }
  RC_ASSERT(on_device<Bf16>(rounded, format, u.positions) == on_host(rounded, format));
  // Negative controls: another format leaves other bits (unless the first token is stored as it is: others may be
  // nothing but zeros), and so do other positions.
  if (u.positions.front() >= format.sink) {
    RC_ASSERT(on_device<float>(u, other_format(format), u.positions) != expected);
  }
  std::vector<std::int32_t> shifted = u.positions;
  for (std::int32_t& position : shifted) ++position;  // the largest may now lie outside: not written
  RC_ASSERT(on_device<float>(u, format, shifted) != expected);
}

/// Every functor, with the rotation and without: the bits of the reference in every row that is written, in every row
/// that is not, and around the caches.
RC_GTEST_PROP(SimulatedCacheGpu, LeavesTheBitsOfTheReference, ()) {
  const Update u = any_update();
  const int k_bits = *rc::gen::inRange(2, 9), v_bits = (k_bits - 2 + *rc::gen::inRange(1, 7)) % 7 + 2;  // apart
  const auto seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  const std::string scalar = concat("sim-k", k_bits, "v", v_bits);
  const std::string trellis = *rc::gen::element<std::string>("sim-t4l8", "sim-t3l8", "sim-t4l10", "sim-t3l10");
  const int sink = *rc::gen::element(0, 0, 1, 4);
  using Formats = SimulatedFormats<ScalarCodes, Int8Token, Q80Cache, Q40Cache, TrellisCodes, recipes::E4m3Token>;
  for (const std::string& stem : {scalar, std::string("sim-int8"), std::string("sim-q8_0"), std::string("sim-q4_0"),
                                  std::string("sim-e4m3"), trellis}) {
    for (const char* rotation : {"", "-had"}) {
      std::visit(
          [&](auto format) {
            format.seed = seed;
            format.sink = sink;
            check_bits(u, format);
          },
          *Formats::parse(stem + rotation));
    }
  }
}

/// What leaves a tail is quantised where it lies, with the bits of the reference; the rest of both caches, and what is
/// around them, keeps its own. Positions may be replayed anywhere.
template <class TQuantiser>
void check_age(const Update& u, const Simulated<TQuantiser>& format) {
  std::vector<Bf16> memory(static_cast<std::size_t>(2 * u.cache_size() + 3 * kMargin), kPoison);
  const std::vector<float> values = hard_values(format.seed, 2 * u.cache_size() / u.head_dim, u.head_dim);
  const std::int64_t v_at = kMargin + u.cache_size() + kMargin;
  for (std::int64_t i = 0; i < u.cache_size(); ++i) {
    memory[static_cast<std::size_t>(kMargin + i)] = to_bf16(values[static_cast<std::size_t>(i)]);
    memory[static_cast<std::size_t>(v_at + i)] = to_bf16(values[static_cast<std::size_t>(u.cache_size() + i)]);
  }
  const auto aged = [&](int tail) {
    Simulated<TQuantiser> other = format;
    other.tail = tail;
    DeviceBuffer<Bf16> device(memory);
    const DeviceBuffer<std::int32_t> at(u.positions);
    simulated_cache_age(SimulatedCodec<TQuantiser>(u.head_dim, other), {at.data(), at.size(), {}},
                        u.cache(device.data() + kMargin), u.cache(device.data() + v_at), nullptr);
    return device.to_host();
  };
  reference::FlatCache<Bf16> cache(u.batch, u.n_head, u.buffer_len, u.head_dim);
  std::copy_n(&memory[static_cast<std::size_t>(kMargin)], u.cache_size(), cache.k().data);
  std::copy_n(&memory[static_cast<std::size_t>(v_at)], u.cache_size(), cache.v().data);
  reference::simulated_cache_age(reference::SimulatedCodec<TQuantiser>(u.head_dim, format), u.positions, cache);
  std::vector<Bf16> expected = memory;
  std::copy_n(cache.k().data, u.cache_size(), &expected[static_cast<std::size_t>(kMargin)]);
  std::copy_n(cache.v().data, u.cache_size(), &expected[static_cast<std::size_t>(v_at)]);
  const std::vector<Bf16> actual = aged(format.tail);
  const auto [a, e] = std::mismatch(actual.begin(), actual.end(), expected.begin());
  if (a != actual.end()) {
    RC_FAIL(concat(format.name(), ": element ", a - actual.begin() - kMargin, " is ", to_float(*a), ", expected ",
                   to_float(*e)));
  }
  const std::int64_t newest = *std::max_element(u.positions.begin(), u.positions.end());
  if (newest - format.tail >= format.sink) {
    RC_ASSERT(actual != memory);                   // the controls: something aged,
    RC_ASSERT(aged(format.tail + 1) != expected);  // and another tail is another cache
  }
}

RC_GTEST_PROP(SimulatedCacheGpu, WhatLeavesATailHasTheBitsOfTheReference, ()) {
  const Update u = any_update();
  const auto seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  const int tail = *rc::gen::inRange(1, 20), sink = *rc::gen::inRange(0, 5);
  for (const char* name : {"sim-k3v5-had", "sim-int8", "sim-q4_0-had", "sim-t4l8-had"}) {
    std::visit(
        [&](auto format) {
          format.seed = seed, format.tail = tail, format.sink = sink;
          check_age(u, format);
        },
        *ShippedSimulatedFormats::parse(name));
  }
}

/// A chunk of a ring: every row of K and of V by itself, with the bits of the reference's codec.
RC_GTEST_PROP(SimulatedCacheGpu, AChunkIsReadBackInPlace, ()) {
  const auto n_token = *rc::gen::inRange<std::int64_t>(1, 40), n_head = *rc::gen::inRange<std::int64_t>(1, 5);
  const auto head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 512);
  const auto seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  std::vector<Bf16> k, v;
  for (const float x : hard_values(seed, n_token * n_head, head_dim)) k.push_back(to_bf16(x));
  for (const float x : hard_values(seed + 1, n_token * n_head, head_dim)) v.push_back(to_bf16(x));
  for (const char* name : {"sim-k6v3-had", "sim-int8", "sim-q8_0", "sim-t3l9"}) {
    std::visit(
        [&]<class TQuantiser>(Simulated<TQuantiser> format) {
          format.seed = seed;
          DeviceBuffer<Bf16> k_device(k), v_device(v);
          simulated_roundtrip(SimulatedCodec<TQuantiser>(head_dim, format),
                              make_view(k_device.data(), n_token, n_head, head_dim),
                              make_view(v_device.data(), n_token, n_head, head_dim), nullptr);
          const reference::SimulatedCodec<TQuantiser> codec(head_dim, format);
          const auto read = [&](CacheSide side, const std::vector<Bf16>& values) {
            reference::Matrix<float> rows(n_token * n_head, head_dim);
            for (std::size_t i = 0; i < values.size(); ++i) rows.data()[i] = to_float(values[i]);
            codec.roundtrip(side, rows);
            std::vector<Bf16> out;
            for (std::size_t i = 0; i < values.size(); ++i) out.push_back(to_bf16(rows.data()[i]));
            return out;
          };
          RC_ASSERT(k_device.to_host() == read(CacheSide::kKey, k));
          RC_ASSERT(v_device.to_host() == read(CacheSide::kValue, v));
          RC_ASSERT(k_device.to_host() != k);  // the control
        },
        *ShippedSimulatedFormats::parse(name));
  }
}

/// A captured update stores at the positions of its replay, each from the vectors of that moment; outside the buffer
/// it touches no byte.
TEST(SimulatedCacheGpu, GraphReplaysAnywhereAndNeverOutside) {
  const auto format = *Simulated<ScalarCodes>::parse("sim-k4v3-had");
  Update u{.batch = 1, .n_head = 2, .buffer_len = 8, .head_dim = 64, .positions = {0}, .k = {}, .v = {}};
  u.k = testkit::draw(1, 2 * 64), u.v = testkit::draw(2, 2 * 64);
  DeviceBuffer<float> k(u.k), v(u.v);
  DeviceBuffer<std::int32_t> position(1);
  DeviceBuffer<Bf16> memory(2 * u.cache_size() + 3 * kMargin);
  memory.fill_bytes(0x5A);
  check(cudaDeviceSynchronize(), "wait for the fill");
  const Stream stream;
  const SimulatedCodec<ScalarCodes> codec(64, format);
  const Graph graph = Graph::capture(stream, [&] {
    Bf16* const k_cache = memory.data() + kMargin;
    simulated_cache_update<float>(codec, u.view<float>(k.data()), u.view<float>(v.data()), {position.data(), 1, {}},
                                  u.cache(k_cache), u.cache(k_cache + u.cache_size() + kMargin), stream);
  });
  std::vector<Bf16> wanted(static_cast<std::size_t>(memory.size()), kPoison);
  const reference::SimulatedCodec<ScalarCodes> host(64, format);
  std::uint64_t seed = 10;
  for (const std::int32_t at : {-1, 8, 1000000, -2147483647, 0, 3, 7}) {
    u.k = testkit::draw(seed++, 2 * 64), u.v = testkit::draw(seed++, 2 * 64);
    k.from_host(std::span<const float>(u.k), stream);
    v.from_host(std::span<const float>(u.v), stream);
    position.from_host(std::span<const std::int32_t>(&at, 1), stream);
    graph.launch(stream);
    stream.synchronize();
    if (at >= 0 && at < 8) {
      const std::vector<std::int32_t> positions = {at};
      Bf16* const k_cache = wanted.data() + kMargin;
      reference::simulated_cache_update<float>(host, u.view<float>(u.k.data()), u.view<float>(u.v.data()), positions,
                                               u.cache(k_cache), u.cache(k_cache + u.cache_size() + kMargin));
    }
    ASSERT_TRUE(memory.to_host() == wanted) << at;
  }
  EXPECT_NE(std::count(wanted.begin(), wanted.end(), kPoison), static_cast<std::ptrdiff_t>(wanted.size()));
}

TEST(SimulatedCachePlan, MisuseIsRefusedBeforeAnyLaunch) {
  const auto format = *Simulated<Q40Cache>::parse("sim-q4_0");
  EXPECT_TRUE(refuses([&] { SimulatedCodec<Q40Cache>(96, format); }, {"head_dim 96"}));
  const SimulatedCodec<Q40Cache> codec(64, format);
  std::vector<Bf16> memory(4096);
  const auto call = [&](std::int64_t n_new, std::vector<std::int32_t> host, std::int64_t head_dim) {
    return [&, n_new, host, head_dim] {
      const auto cache = make_view(memory.data(), 1, 2, 8, head_dim);
      const auto fresh = make_view<const Bf16>(memory.data(), 1, n_new, 2, 64);
      simulated_cache_update<Bf16>(codec, fresh, fresh, {host.data(), 2, host}, cache, cache, nullptr);
    };
  };
  EXPECT_TRUE(refuses(call(3, {0, 1}, 64), {"simulated_cache_update", "k", "3", "need 2"}));
  EXPECT_TRUE(refuses(call(2, {0, 8}, 64), {"positions[1] is 8"}));
  EXPECT_TRUE(refuses(call(2, {5, 5}, 64), {"both 5"}));
  EXPECT_TRUE(refuses(call(2, {0, 1}, 128), {"k_cache", "128", "need 64"}));
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include "cuda/bf16_cache.cuh"

#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "reference/bf16_cache.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using testkit::refuses;

/// Any positions in any order leave the bits that the reference leaves, in every row of the cache; a position outside
/// the buffer is not written. Control: positions shifted by one leave others.
RC_GTEST_PROP(Bf16CacheGpu, LeavesTheBitsOfTheReference, ()) {
  const auto batch = *rc::gen::inRange<std::int64_t>(1, 3), n_head = *rc::gen::inRange<std::int64_t>(1, 4);
  const auto buffer_len = *rc::gen::inRange<std::int64_t>(2, 40);
  const auto head_dim = *rc::gen::element<std::int64_t>(64, 512);
  const auto n_new = *rc::gen::inRange<std::int64_t>(1, buffer_len);
  const auto seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  std::vector<std::int32_t> positions(static_cast<std::size_t>(buffer_len));
  std::iota(positions.begin(), positions.end(), 0);
  std::shuffle(positions.begin(), positions.end(), std::mt19937_64(seed));
  positions.resize(static_cast<std::size_t>(n_new));
  const std::int64_t count = batch * n_new * n_head * head_dim;
  std::vector<float> k = testkit::draw(seed, count), v = testkit::draw(seed + 1, count);
  for (float& value : k) value *= 1.0001f;  // not exact in bf16
  reference::FlatCache<Bf16> expected(batch, n_head, buffer_len, head_dim);
  reference::bf16_cache_update<float, Bf16>(make_view<const float>(k.data(), batch, n_new, n_head, head_dim),
                                            make_view<const float>(v.data(), batch, n_new, n_head, head_dim), positions,
                                            expected);
  const auto run = [&](std::vector<std::int32_t> at) {
    const DeviceBuffer<float> k_device(k), v_device(v);
    const DeviceBuffer<std::int32_t> device(at);
    DeviceBuffer<Bf16> cache(2 * batch * n_head * buffer_len * head_dim);
    cache.fill_bytes(0);
    bf16_cache_update<float>(make_view(k_device.data(), batch, n_new, n_head, head_dim),
                             make_view(v_device.data(), batch, n_new, n_head, head_dim), {device.data(), n_new, {}},
                             make_view(cache.data(), batch, n_head, buffer_len, head_dim),
                             make_view(cache.data() + cache.size() / 2, batch, n_head, buffer_len, head_dim), nullptr);
    return cache.to_host();
  };
  std::vector<Bf16> wanted(expected.k().data, expected.k().data + expected.k().size());
  wanted.insert(wanted.end(), expected.v().data, expected.v().data + expected.v().size());
  RC_ASSERT(run(positions) == wanted);
  for (std::int32_t& position : positions) ++position;  // the largest may now lie outside
  RC_ASSERT(run(positions) != wanted);
}

/// Positions that only the device knows: those outside the buffer touch no byte, nor does any other touch the memory
/// around the cache. One captured launch serves every position.
TEST(Bf16CacheGpu, GraphReplaysAnywhereAndNeverOutside) {
  constexpr std::int64_t kMargin = 2048, kSize = 2 * 8 * 64;
  const std::vector<float> k = testkit::draw(1, 2 * 64), v = testkit::draw(2, 2 * 64);
  const DeviceBuffer<float> k_device(k), v_device(v);
  DeviceBuffer<std::int32_t> position(1);
  DeviceBuffer<Bf16> memory(2 * kSize + 2 * kMargin);
  memory.fill_bytes(0x5A);
  const std::vector<Bf16> before = memory.to_host();
  const auto cache = [&](std::int64_t side) {
    return make_view(memory.data() + kMargin + side * kSize, std::int64_t{1}, 2, 8, 64);
  };
  const Stream stream;
  const Graph graph = Graph::capture(stream, [&] {
    bf16_cache_update<float>(make_view(k_device.data(), 1, 1, 2, 64), make_view(v_device.data(), 1, 1, 2, 64),
                             {position.data(), 1, {}}, cache(0), cache(1), stream);
  });
  std::vector<Bf16> wanted = before;
  check(cudaDeviceSynchronize(), "wait for the fill");
  for (const std::int32_t at : {-1, 8, 1000000, -2147483647, 0, 3, 7}) {
    position.from_host(std::span<const std::int32_t>(&at, 1), stream);
    graph.launch(stream);
    stream.synchronize();
    for (std::int64_t h = 0; h < 2 && at >= 0 && at < 8; ++h) {
      for (std::int64_t i = 0; i < 64; ++i) {
        const auto to = static_cast<std::size_t>(kMargin + (h * 8 + at) * 64 + i),
                   from = static_cast<std::size_t>(h * 64 + i);
        wanted[to] = to_bf16(k[from]);
        wanted[to + kSize] = to_bf16(v[from]);
      }
    }
    ASSERT_TRUE(memory.to_host() == wanted) << at;
  }
  EXPECT_FALSE(wanted == before);
}

TEST(Bf16CachePlan, MisuseIsRefusedBeforeAnyLaunch) {
  std::vector<Bf16> memory(4096);
  const auto call = [&](std::int64_t n_new, std::vector<std::int32_t> host) {
    return [&, n_new, host] {
      const auto cache = make_view(memory.data(), 1, 2, 8, 64);
      const auto fresh = make_view<const Bf16>(memory.data(), 1, n_new, 2, 64);
      bf16_cache_update<Bf16>(fresh, fresh, {host.data(), 2, host}, cache, cache, nullptr);
    };
  };
  EXPECT_TRUE(refuses(call(3, {0, 1}), {"k", "3", "need 2"}));
  EXPECT_TRUE(refuses(call(2, {0, 8}), {"positions[1] is 8"}));
  EXPECT_TRUE(refuses(call(2, {5, 5}), {"both 5"}));
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include "cuda/ring_cache.cuh"

#include <gtest/gtest.h>

#include "cuda/device/stream.cuh"
#include "reference/ring_cache.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using testkit::refuses;

std::vector<Bf16> numbered(std::int64_t count, int first) {
  std::vector<Bf16> values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i].bits = static_cast<std::uint16_t>(first + static_cast<int>(i));
  return values;
}

/// Chunks of any length, through the wrap at every offset, leave the bits that the reference leaves. Control: a commit
/// one position late leaves others.
RC_GTEST_PROP(RingCacheGpu, HoldsTheBitsOfTheReference, ()) {
  const auto ring_len = *rc::gen::inRange<std::int64_t>(1, 20);
  const auto n_head = *rc::gen::inRange<std::int64_t>(1, 4);
  reference::RingCache<Bf16> expected(n_head, ring_len, 64);
  RingCache ring(n_head, ring_len, 64), late(n_head, ring_len, 64);
  std::int64_t position = 0;
  for (int chunk = 0; chunk < 6; ++chunk) {
    const auto n_new = *rc::gen::inRange<std::int64_t>(1, 2 * ring_len + 3);
    const std::vector<Bf16> k = numbered(n_new * n_head * 64, 1 + chunk * 7), v = numbered(n_new * n_head * 64, 9000);
    const DeviceBuffer<Bf16> k_device(k), v_device(v);
    const DeviceBuffer<std::int32_t> at(std::vector<std::int32_t>{static_cast<std::int32_t>(position)});
    const auto view = [&](const Bf16* data) { return make_view(data, n_new, n_head, std::int64_t{64}); };
    expected.commit(view(k.data()), view(v.data()), position);
    ring.commit(view(k_device.data()), view(v_device.data()),
                chunk % 2 == 0 ? DeviceCount::on_device(at.data()) : DeviceCount::on_host(position), nullptr);
    late.commit(view(k_device.data()), view(v_device.data()), DeviceCount::on_host(position + 1), nullptr);
    position += n_new;
  }
  const auto bits = [&](View<const Bf16, 3> view, cudaMemcpyKind kind) {
    std::vector<Bf16> values(static_cast<std::size_t>(view.size()));
    check(cudaMemcpy(values.data(), view.data, values.size() * sizeof(Bf16), kind), "copy of a ring");
    return values;
  };
  const RingCache& after = ring;
  const reference::RingCache<Bf16>& wanted = expected;
  RC_ASSERT(bits(after.k(), cudaMemcpyDeviceToHost) == bits(wanted.k(), cudaMemcpyHostToHost));
  RC_ASSERT(bits(after.v(), cudaMemcpyDeviceToHost) == bits(wanted.v(), cudaMemcpyHostToHost));
  if (ring_len > 1) {
    RC_ASSERT(bits(std::as_const(late).k(), cudaMemcpyDeviceToHost) != bits(wanted.k(), cudaMemcpyHostToHost));
  }
}

/// The real ring: chunks of any length from 1 to 4096, through the wrap, against the reference.
TEST(RingCacheGpu, ChunksUpTo4096HoldTheBitsOfTheReference) {
  reference::RingCache<Bf16> expected(2, 1024, 256);
  RingCache ring(2, 1024, 256);
  std::int64_t position = 0;
  for (const std::int64_t n_new : {1, 1023, 2, 1024, 1025, 4096, 37, 2048}) {
    const std::vector<Bf16> k = numbered(n_new * 2 * 256, static_cast<int>(position) + 1),
                            v = numbered(n_new * 2 * 256, 77);
    const DeviceBuffer<Bf16> k_device(k), v_device(v);
    const DeviceBuffer<std::int32_t> at(std::vector<std::int32_t>{static_cast<std::int32_t>(position)});
    const auto view = [&](const Bf16* data) { return make_view(data, n_new, std::int64_t{2}, std::int64_t{256}); };
    expected.commit(view(k.data()), view(v.data()), position);
    ring.commit(view(k_device.data()), view(v_device.data()), DeviceCount::on_device(at.data()), nullptr);
    position += n_new;
    const auto same = [&](View<const Bf16, 3> actual, View<const Bf16, 3> wanted) {
      std::vector<Bf16> bits(static_cast<std::size_t>(actual.size()));
      check(cudaMemcpy(bits.data(), actual.data, bits.size() * sizeof(Bf16), cudaMemcpyDeviceToHost), "copy of a ring");
      return std::equal(bits.begin(), bits.end(), wanted.data);
    };
    ASSERT_TRUE(same(std::as_const(ring).k(), std::as_const(expected).k())) << n_new;
    ASSERT_TRUE(same(std::as_const(ring).v(), std::as_const(expected).v())) << n_new;
  }
}

/// One captured commit goes around the ring with the position on the device; a negative position writes nothing, and
/// the memory around the ring stays.
TEST(RingCacheGpu, GraphReplaysAroundTheRingAndNeverOutside) {
  constexpr std::int64_t kMargin = 1024, kRingLen = 5, kSize = kRingLen * 64;
  DeviceBuffer<Bf16> memory(2 * kSize + 2 * kMargin), k_new(64), v_new(64);
  memory.fill_bytes(0x5A);
  std::vector<Bf16> wanted = memory.to_host();
  DeviceBuffer<std::int32_t> position(1);
  const Stream stream;
  const Graph graph = Graph::capture(stream, [&] {
    ring_cache_commit(make_view(k_new.data(), 1, 1, 64), make_view(v_new.data(), 1, 1, 64),
                      DeviceCount::on_device(position.data()), make_view(memory.data() + kMargin, 1, kRingLen, 64),
                      make_view(memory.data() + kMargin + kSize, 1, kRingLen, 64), stream);
  });
  check(cudaDeviceSynchronize(), "wait for the fill");
  for (const std::int32_t at : {-1, -4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 262143}) {
    const std::vector<Bf16> k = numbered(64, at + 100), v = numbered(64, at + 5000);
    position.from_host(std::span<const std::int32_t>(&at, 1), stream);
    k_new.from_host(k, stream);
    v_new.from_host(v, stream);
    graph.launch(stream);
    stream.synchronize();
    if (at >= 0) {
      std::copy(k.begin(), k.end(), wanted.begin() + kMargin + at % kRingLen * 64);
      std::copy(v.begin(), v.end(), wanted.begin() + kMargin + kSize + at % kRingLen * 64);
    }
    ASSERT_TRUE(memory.to_host() == wanted) << at;
  }
}

TEST(RingCachePlan, MisuseIsRefusedBeforeAnyLaunch) {
  std::vector<Bf16> memory(4096);
  const auto commit = [&](std::int64_t n_head, std::int64_t head_dim, DeviceCount position) {
    return [&, n_head, head_dim, position] {
      const auto ring = make_view(memory.data(), 2, 4, 64);
      const auto fresh = make_view<const Bf16>(memory.data(), 3, n_head, head_dim);
      ring_cache_commit(fresh, fresh, position, ring, ring, nullptr);
    };
  };
  EXPECT_TRUE(refuses(commit(3, 64, DeviceCount::on_host(0)), {"k_new", "3", "need 2"}));
  EXPECT_TRUE(refuses(commit(2, 32, DeviceCount::on_host(0)), {"k_new", "32", "need 64"}));
  EXPECT_TRUE(refuses(commit(2, 64, {}), {"position"}));
  EXPECT_TRUE(refuses([] { RingCache(0, 4, 64); }, {"n_head_kv 0"}));
}

}  // namespace
}  // namespace gemma4::cuda

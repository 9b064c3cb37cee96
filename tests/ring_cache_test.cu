// SPDX-License-Identifier: Apache-2.0
#include "cuda/ring_cache.cuh"

#include <gtest/gtest.h>

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

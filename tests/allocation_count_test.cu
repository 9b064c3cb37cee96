// SPDX-License-Identifier: Apache-2.0
#include "cuda/device/allocation_count.cuh"

#include <gtest/gtest.h>

#include <utility>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/pinned_buffer.cuh"

namespace gemma4::cuda {
namespace {

/// Bytes and allocations since the test began.
AllocationCount since(const AllocationCount& before) {
  const AllocationCount now = allocation_count();
  return {now.n_taken - before.n_taken, now.device_bytes - before.device_bytes, now.pinned_bytes - before.pinned_bytes};
}

TEST(AllocationCount, FollowsWhatIsHeldThroughMovesAndToTheEnd) {
  const AllocationCount before = allocation_count();
  {
    DeviceBuffer<float> first(100), empty(0);
    PinnedBuffer<std::int32_t> pinned(7);
    EXPECT_EQ(since(before), (AllocationCount{2, 400, 28}));
    DeviceBuffer<float> moved = std::move(first), other(50);
    EXPECT_EQ(since(before), (AllocationCount{3, 600, 28}));
    other = std::move(moved);
    EXPECT_EQ(since(before), (AllocationCount{3, 600, 28})) << "a move takes and gives nothing back";
    other = DeviceBuffer<float>(10);
    EXPECT_EQ(since(before), (AllocationCount{4, 240, 28})) << "the old one went with the temporary";
    pinned = PinnedBuffer<std::int32_t>(1);
    EXPECT_EQ(since(before), (AllocationCount{5, 240, 4}));
  }
  EXPECT_EQ(since(before), (AllocationCount{5, 0, 0}));
}

}  // namespace
}  // namespace gemma4::cuda

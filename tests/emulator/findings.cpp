// SPDX-License-Identifier: Apache-2.0
// The emulator is code under test: each fault that emulator.hpp promises to find ends a kernel, and is named.
// `.ci/emulate findings` builds and runs this.
#include <gtest/gtest.h>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/shared_memory.cuh"
#include "tests/emulator/settings.hpp"

namespace gemma4::cuda::detail {

constexpr int kThreads = 64;
constexpr std::int64_t kSmemBytes = 256;

/// One block of two warps runs `kernel` on a buffer of 64 floats.
void launch(void (*kernel)(float*), float* data) {
  Launch{.what = "kernel", .block = kThreads, .smem_bytes = kSmemBytes}(kernel, data);
}
void launch(void (*kernel)(float*)) {
  DeviceBuffer<float> data(std::vector<float>(kThreads, 1.0f));
  launch(kernel, data.data());
}

__global__ void diverging_kernel(float* data) {
  if (threadIdx.x % 2 == 0) {
    data[0] = __shfl_sync(~0u, data[0], 0);
  } else {
    __syncwarp();
  }
}
TEST(Emulator, NamesBothOperationsOfAWarpThatDiverges) {
  EXPECT_DEATH(launch(diverging_kernel), "a warp diverges, __syncwarp meets __shfl_sync");
}

__global__ void lonely_kernel(float*) {
  if (threadIdx.x < 32) named_barrier_sync(3, kThreads);
}
TEST(Emulator, SaysWhoWaitsInADeadlock) {
  EXPECT_DEATH(launch(lonely_kernel), "deadlock\n  barrier 3: 32 of 64 threads, the first is thread ");
}

__global__ void wide_kernel(float*) {
  extern __shared__ unsigned char smem[];
  smem[4 * threadIdx.x + 4] = 0;
}
TEST(Emulator, SeesWritesBehindSharedMemory) {
  EXPECT_DEATH(launch(wide_kernel), "byte 256 of 256 bytes of shared memory was written");
}

__global__ void long_kernel(float* data) {
  data[threadIdx.x + 1] = 0.0f;
}
TEST(Emulator, SeesWritesBehindABuffer) {
  EXPECT_DEATH(launch(long_kernel), "byte 256 of a buffer of 256 bytes was written");
}

/// Every thread reads what a bulk copy brings, with or without waiting for it.
template <bool kWaits>
__global__ void copying_kernel(float* data) {
  extern __shared__ unsigned char smem[];
  const std::uint32_t target = shared_address(smem), barrier = target + 64;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_expect(barrier, 64);
    bulk_load(target, data, 64, barrier);
  }
  __syncthreads();
  if (kWaits) mbarrier_wait(barrier, 0);
  const float value = load_shared(target + threadIdx.x % 16 * 4);
  __syncthreads();
  mbarrier_wait(barrier, 0);
  data[threadIdx.x] = value;
}
TEST(Emulator, ACopyThatWasNotWaitedForHasNotLanded) {
  if (emulator::setting("GEMMA4_EMULATOR_COPIES", "late") != "late") GTEST_SKIP() << "copies may land at any time";
  for (const bool waits : {true, false}) {
    DeviceBuffer<float> data(std::vector<float>(kThreads, 1.0f));
    launch(waits ? copying_kernel<true> : copying_kernel<false>, data.data());
    for (const float value : data.to_host()) EXPECT_EQ(value == 1.0f, waits) << value;
  }
}

__global__ void partial_kernel(float* data) {
  data[0] = __shfl_sync(0xFFFFu, data[0], 0);
}
TEST(Emulator, RefusesOperationsOfPartOfAWarp) {
  EXPECT_DEATH(launch(partial_kernel), "part of a warp is not emulated");
}

/// The blocks of a cluster give each other their first number of shared memory, and keep their own second.
__global__ void exchanging_kernel(float* data) {
  extern __shared__ unsigned char smem[];
  float2* const mine = reinterpret_cast<float2*>(smem);
  const int block = static_cast<int>(blockIdx.x), n = static_cast<int>(gridDim.x);
  if (threadIdx.x == 0) {
    mine[n] = make_float2(static_cast<float>(block), 0.0f);
  }
  cluster_arrive_relaxed();
  cluster_wait();
  for (int to = 0; threadIdx.x == 0 && to < n; ++to) store_to_block(mine + block, to, make_float2(mine[n].x + 1, 0.0f));
  cluster_arrive_release();
  cluster_wait_acquire();
  for (int from = 0; threadIdx.x == 0 && from < n; ++from) data[n * block + from] = mine[from].x + 10 * mine[n].x;
}
TEST(Emulator, BlocksOfAClusterHaveSharedMemoryOfTheirOwnAndReachEachOthers) {
  if (GEMMA4_EMULATOR_ARCH < 900) GTEST_SKIP() << "no clusters";
  constexpr int kBlocks = 4;
  DeviceBuffer<float> data(std::vector<float>(kBlocks * kBlocks, -1.0f));
  Launch{.what = "kernel", .grid = kBlocks, .block = kThreads, .smem_bytes = kSmemBytes, .cluster = kBlocks}(
      exchanging_kernel, data.data());
  const std::vector<float> found = data.to_host();
  for (int i = 0; i < kBlocks * kBlocks; ++i) {
    EXPECT_EQ(found[static_cast<std::size_t>(i)], static_cast<float>(i % kBlocks + 1 + 10 * (i / kBlocks))) << i;
  }
}

__global__ void impatient_kernel(float*) {
  if (blockIdx.x == 0) cluster_arrive_release();
  cluster_wait_acquire();
}
__global__ void left_alone_kernel(float*) {
  cluster_arrive_release();
  if (blockIdx.x == 0) return;
  cluster_wait_acquire();
  cluster_arrive_release();
  if (threadIdx.x == 0) named_barrier_sync(3, kThreads);
}
TEST(Emulator, SeesWhoWaitsForAClusterInVain) {
  if (GEMMA4_EMULATOR_ARCH < 900) GTEST_SKIP() << "no clusters";
  const auto launch_pair = [](void (*kernel)(float*)) {
    DeviceBuffer<float> data(std::vector<float>(kThreads, 1.0f));
    Launch{.what = "kernel", .grid = 2, .block = kThreads, .smem_bytes = kSmemBytes, .cluster = 2}(kernel, data.data());
  };
  EXPECT_DEATH(launch_pair(impatient_kernel), "of block 1 waits for its cluster without arriving");
  EXPECT_DEATH(launch_pair(left_alone_kernel), "deadlock in block . of a cluster");
}

}  // namespace gemma4::cuda::detail

// SPDX-License-Identifier: Apache-2.0
#include "tests/emulator/launch.hpp"

#include <iostream>

#include "tests/emulator/copies.hpp"
#include "tests/emulator/device.hpp"
#include "tests/emulator/failure.hpp"
#include "tests/emulator/fibers.hpp"
#include "tests/emulator/rendezvous.hpp"
#include "tests/emulator/shared_memory.hpp"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace gemma4::emulator {
namespace {

const char* kernel_now = nullptr;
uint3 first_block_now;

void run_cluster(const Grid& grid, const std::function<void()>& kernel) {
  const int n_thread = static_cast<int>(grid.n_thread.x * grid.n_thread.y * grid.n_thread.z);
  begin_shared_memory(grid.cluster, grid.smem_bytes);
  begin_rendezvous(grid.cluster, n_thread);
  begin_copies(grid.cluster, n_thread);
  run_threads(grid.cluster, n_thread, kernel);
  end_copies();
  end_rendezvous();
  end_shared_memory();
}

}  // namespace

void run_grid(const Grid& grid, const std::function<void()>& kernel) {
  kernel_now = grid.what;
  if (grid.smem_bytes > smem_limit_bytes()) fail(grid.smem_bytes, " bytes of dynamic shared memory");
  blockDim = grid.n_thread;
  gridDim = grid.n_block;
  for (unsigned z = 0; z < grid.n_block.z; ++z) {
    for (unsigned y = 0; y < grid.n_block.y; ++y) {
      for (unsigned x = 0; x < grid.n_block.x; x += static_cast<unsigned>(grid.cluster)) {
        first_block_now = {x, y, z};
        run_cluster(grid, kernel);
      }
    }
  }
  kernel_now = nullptr;
}

void require_cluster(const Grid& grid) {
  kernel_now = grid.what;
  if (GEMMA4_EMULATOR_ARCH < 900) fail("a cluster on a device that has none");
  const unsigned n = static_cast<unsigned>(grid.cluster);
  if (grid.cluster < 1 || grid.cluster > kMaxBlocks || grid.n_block.x % n != 0) {
    fail("clusters of ", n, " blocks in a grid of ", grid.n_block.x, ": need 1 to ", kMaxBlocks, ", and whole ones");
  }
  kernel_now = nullptr;
}

void place_block(int block) {
  blockIdx = first_block_now;
  blockIdx.x += static_cast<unsigned>(block);
}

void place_thread(int thread) {
  const auto t = static_cast<unsigned>(thread);
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
}

void fail_with(const std::string& message) {
  std::cerr << "emulator: " << message << '\n';
  if (kernel_now != nullptr) {
    std::cerr << "  in block " << blockIdx.x << ' ' << blockIdx.y << ' ' << blockIdx.z << " of " << kernel_now << '\n';
  }
  std::cerr.flush();
  std::abort();
}

}  // namespace gemma4::emulator

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

void run_block(const Grid& grid, const std::function<void()>& kernel) {
  const int n_thread = static_cast<int>(grid.n_thread.x * grid.n_thread.y * grid.n_thread.z);
  begin_shared_memory(grid.smem_bytes);
  begin_rendezvous(n_thread);
  begin_copies(n_thread);
  run_threads(n_thread, kernel);
  end_copies();
  end_rendezvous();
  end_shared_memory(grid.smem_bytes);
}

}  // namespace

void run_grid(const Grid& grid, const std::function<void()>& kernel) {
  kernel_now = grid.what;
  if (grid.smem_bytes > smem_limit_bytes()) fail(grid.smem_bytes, " bytes of dynamic shared memory");
  blockDim = grid.n_thread;
  gridDim = grid.n_block;
  for (unsigned z = 0; z < grid.n_block.z; ++z) {
    for (unsigned y = 0; y < grid.n_block.y; ++y) {
      for (unsigned x = 0; x < grid.n_block.x; ++x) {
        blockIdx = {x, y, z};
        run_block(grid, kernel);
      }
    }
  }
  kernel_now = nullptr;
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

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "tests/emulator/stream.hpp"

/// Launches: every cluster of a grid, one after another, with arguments that were copied when the kernel was launched.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace gemma4::emulator {

struct Grid {
  const char* what;  ///< the kernel's name, for messages
  dim3 n_block, n_thread;
  std::size_t smem_bytes;
  int cluster = 1;  ///< blocks of a cluster along x
};
void run_grid(const Grid& grid, const std::function<void()>& kernel);
void require_cluster(const Grid& grid);  ///< fails where the device takes no such cluster

/// Sets threadIdx, and blockIdx to that of a block of the running cluster, for fibers.cpp.
void place_thread(int thread);
void place_block(int block);

/// What cudaLaunchKernelEx() is here.
template <class... TParams, class... TArgs>
cudaError_t launch_kernel(const cudaLaunchConfig_t* config, void (*kernel)(TParams...), TArgs&&... arguments) {
  Grid grid{__PRETTY_FUNCTION__, config->gridDim, config->blockDim, config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    grid.cluster = static_cast<int>(attribute.val.clusterDim.x);
    require_cluster(grid);
  }
  std::tuple<std::remove_cv_t<TParams>...> kept(std::forward<TArgs>(arguments)...);
  return enqueue(config->stream, [=] { run_grid(grid, [&] { std::apply(kernel, kept); }); });
}

/// What cudaFuncSetAttribute() is here.
template <class... TParams>
cudaError_t set_kernel_attribute(void (*)(TParams...), cudaFuncAttribute, int) {
  return cudaSuccess;
}

}  // namespace gemma4::emulator

#define cudaLaunchKernelEx ::gemma4::emulator::launch_kernel
#define cudaFuncSetAttribute ::gemma4::emulator::set_kernel_attribute

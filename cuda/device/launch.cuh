// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/device/check.cuh"

namespace gemma4::cuda::detail {

/// One launch of a kernel and everything about it but the arguments. Nothing in cuda/ is launched in another way.
struct Launch {
  const char* what;  ///< the kernel's name, for errors
  dim3 grid = 1;
  dim3 block = 1;
  cudaStream_t stream = nullptr;
  /// Programmatic dependent launch (PDL), for sm_90 and later: the kernel may be set up, and runs, while the one before
  /// it in the stream still does. It waits for that one itself (cuda/ptx/grid_dependency.cuh).
  bool overlap = false;
  std::int64_t smem_bytes = 0;        ///< dynamic shared memory of a block
  std::int64_t smem_limit_bytes = 0;  ///< of any launch of the kernel, where they differ; 0: smem_bytes
  int cluster = 0;                    ///< blocks of a cluster along x (sm_90); 0: no clusters

  template <class... TParams, class... TArgs>
  void operator()(void (*kernel)(TParams...), const TArgs&... arguments) const {
    if (smem_bytes > 0) raise_smem(kernel);
    if (smem_bytes > 0 || overlap) keep_smem_share(kernel);
    cudaLaunchAttribute attributes[2] = {};
    unsigned n_attribute = 0;
    if (cluster > 0) {
      cudaLaunchAttribute& of_cluster = attributes[n_attribute++];
      of_cluster.id = cudaLaunchAttributeClusterDimension;
      of_cluster.val.clusterDim.x = static_cast<unsigned>(cluster);
      of_cluster.val.clusterDim.y = of_cluster.val.clusterDim.z = 1;
    }
    if (overlap) {
      cudaLaunchAttribute& programmatic = attributes[n_attribute++];
      programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      programmatic.val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = static_cast<std::size_t>(smem_bytes);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = n_attribute;
    check(cudaLaunchKernelEx(&config, kernel, TParams(arguments)...), what);
  }

 private:
  template <class... TParams>
  void raise_smem(void (*kernel)(TParams...)) const {
    const std::int64_t limit = smem_limit_bytes > 0 ? smem_limit_bytes : smem_bytes;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit)), what);
  }

  /// Asks for the largest share of shared memory, also for a kernel that needs little. A multiprocessor changes the
  /// share only when it is idle, so that a kernel with much shared memory could not start under the end of one with
  /// another share.
  template <class... TParams>
  void keep_smem_share(void (*kernel)(TParams...)) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          what);
  }
};

}  // namespace gemma4::cuda::detail

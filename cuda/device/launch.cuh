// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device/check.cuh"

/// The two instructions by which consecutive kernels of a stream overlap, when the later one is launched with the
/// attribute "programmatic stream serialization". Nothing before sm_90, where kernels then run one after another.
/// Source: the PTX ISA, "griddepcontrol".
namespace gemma4::cuda::detail {

/// Waits until the kernels before have ended and their writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel be set up; what this one still writes is visible to it after its wait.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Asks for the largest share of shared memory, also for a kernel that needs little. A multiprocessor changes the share
/// only when it is idle, so that a kernel with much shared memory could not start under the end of one with another
/// share.
template <class... TParams>
void keep_smem_share(const char* what, void (*kernel)(TParams...)) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        what);
}

/// Launches `kernel`; with `overlap` it may be set up while the kernel before it in the stream still runs, and has to
/// wait for it itself. `overlap` is for sm_90 and later.
template <class... TParams, class... TArgs>
void launch_in_chain(const char* what, void (*kernel)(TParams...), dim3 grid, dim3 block, cudaStream_t stream,
                     bool overlap, const TArgs&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  if (overlap) keep_smem_share(what, kernel);
  check(cudaLaunchKernelEx(&config, kernel, TParams(arguments)...), what);
}

}  // namespace gemma4::cuda::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Programmatic dependent launch (PDL), the device's half: the two instructions by which consecutive kernels of a
/// stream overlap, when the later one is launched with Launch::overlap (cuda/device/launch.cuh). Nothing before sm_90,
/// where kernels then run one after another. Source: the PTX ISA, "griddepcontrol".
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

}  // namespace gemma4::cuda::detail

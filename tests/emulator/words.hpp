// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

/// CUDA's words for functions and variables, as a host compiler may have them.
#ifndef GEMMA4_EMULATOR_ARCH
#error "GEMMA4_EMULATOR_ARCH is not defined: 900, 860 or 800"
#endif
#ifndef __x86_64__
#error "the emulator switches between fibers in x86-64 assembly"
#endif

#undef __CUDA_ARCH__
#define __CUDA_ARCH__ GEMMA4_EMULATOR_ARCH

#undef __noinline__  // libstdc++ has it as an attribute
#undef __forceinline__
#define __forceinline__ inline
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __constant__
#define __constant__
#undef __shared__
#define __shared__ thread_local  // one for all fibers, which are one host thread; unlike static it goes with extern

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Copies of 16 bytes from global to shared memory that the issuing thread does not wait for, from sm_80 on. They are
/// waited for in groups of one thread, or through an mbarrier (mbarrier.cuh). Source: the PTX ISA, "cp.async".
namespace gemma4::cuda {

/// Starts a copy of 16 bytes; writes zeros where `valid` is false and reads nothing.
__device__ __forceinline__ void copy_async_16(std::uint32_t target, const void* source, bool valid) {
  const int n_byte = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(n_byte) : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most kPending of this thread's committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Arrives at an mbarrier once this thread's copies have; one of the arrivals that the barrier counts.
__device__ __forceinline__ void copy_async_arrive(std::uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

}  // namespace gemma4::cuda

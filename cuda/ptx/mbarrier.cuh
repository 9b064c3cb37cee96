// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// mbarriers: 8 bytes of shared memory on which threads and the copy engine meet, from sm_80 on (the copy engine from
/// sm_90). `barrier` is an address in shared memory. Source: the PTX ISA, "mbarrier".
///
/// What racecheck (compute-sanitizer 2025.3) cannot follow, although the memory model allows it, seen on an H200:
/// - one lane that arrives for its warp after __syncwarp(): what the other lanes read or wrote counts as a race with
///   whoever waits. Every lane arrives itself;
/// - an initialisation that some warps pass by with a predicate instead of a branch counts as theirs, too: keep it in a
///   rolled loop, or let a barrier of the block follow.
namespace gemma4::cuda {

__device__ __forceinline__ void mbarrier_init(std::uint32_t barrier, int n_arrival) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(n_arrival) : "memory");
}

/// Makes initialised barriers visible to the copy engine. Nothing before sm_90.
__device__ __forceinline__ void mbarrier_init_fence() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/// Arrives and announces `n_byte` that copies will bring. From sm_90 on.
__device__ __forceinline__ void mbarrier_expect(std::uint32_t barrier, std::uint32_t n_byte) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(n_byte) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(std::uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

/// Waits until the phase of parity `parity` has completed.
__device__ __forceinline__ void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{ .reg .pred done;\n"
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      "again_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#else
      "again_%=: mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#endif
      "@done bra over_%=;\n"
      "bra again_%=;\n"
      "over_%=: }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace gemma4::cuda

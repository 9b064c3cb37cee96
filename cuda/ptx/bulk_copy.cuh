// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// The copy engine of sm_90 on contiguous bytes: from global to shared memory, completing on an mbarrier (mbarrier.cuh)
/// that was told of the bytes. Addresses and sizes are multiples of 16; one thread asks.
/// Source: the PTX ISA, "cp.async.bulk".
namespace gemma4::cuda {

__device__ __forceinline__ void bulk_load(std::uint32_t target, const void* source, std::uint32_t n_byte,
                                          std::uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(n_byte), "r"(barrier)
               : "memory");
}

/// @param policy of cache_hint.cuh
__device__ __forceinline__ void bulk_load(std::uint32_t target, const void* source, std::uint32_t n_byte,
                                          std::uint32_t barrier, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
      "%4;" ::"r"(target),
      "l"(source), "r"(n_byte), "r"(barrier), "l"(policy)
      : "memory");
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace gemma4::cuda::detail {

/// Asks for this block's share of `bytes` bytes at `from` to be brought into the L2 cache: what a later kernel of the
/// chain will read and none writes, while this one leaves the memory idle. One warp of every block of a grid of one
/// dimension calls. Nothing before sm_90. Source: the PTX ISA, "cp.async.bulk.prefetch".
/// @param from  at a multiple of 16 bytes; null: nothing happens
__device__ __forceinline__ void prefetch_share(const std::byte* from, std::int64_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr std::int64_t kPiece = 4096;
  if (from == nullptr) return;
  const std::int64_t lane = static_cast<std::int64_t>(threadIdx.x & 31);
  for (std::int64_t at = (blockIdx.x * std::int64_t{32} + lane) * kPiece; at + 16 <= bytes;
       at += gridDim.x * std::int64_t{32} * kPiece) {
    const std::int64_t rest = (bytes - at) / 16 * 16;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from + at),
                 "r"(static_cast<std::uint32_t>(rest < kPiece ? rest : kPiece))
                 : "memory");
  }
#endif
}

}  // namespace gemma4::cuda::detail

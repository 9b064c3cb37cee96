// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// Twin of cuda/ptx/copy_async.cuh.
namespace gemma4::cuda {

__device__ __forceinline__ void copy_async_16(std::uint32_t target, const void* source, bool valid) {
  emulator::start_copy_16(emulator::from_shared(target), source, valid);
}

__device__ __forceinline__ void copy_async_commit() {
  emulator::commit_copies();
}

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  emulator::wait_for_copies(kPending);
}

__device__ __forceinline__ void copy_async_arrive(std::uint32_t barrier) {
  emulator::arrive_after_copies(barrier);
}

}  // namespace gemma4::cuda

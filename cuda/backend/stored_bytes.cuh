// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "cuda/device/check.cuh"
#include "cuda/device/pinned_buffer.cuh"
#include "cuda/device/stream.cuh"

namespace gemma4::cuda {

/// Bytes between the caches and the host, through page-locked blocks of its own, in the order of a stream. The blocks
/// are allocated with the first copy: a run that saves nothing has none.
class StoredBytes {
 public:
  /// Waits until they are there.
  void copy(const std::byte* from, std::span<std::byte> to, const Stream& stream) {
    std::byte* const block = this->block();
    while (!to.empty()) {
      const std::size_t n = std::min(to.size(), kBlock);
      check(cudaMemcpyAsync(block, from, n, cudaMemcpyDeviceToHost, stream), "copy of a cache to the host");
      stream.synchronize();
      std::memcpy(to.data(), block, n);
      from += n;
      to = to.subspan(n);
    }
  }

  /// Waits until they are there.
  void set(std::byte* to, std::span<const std::byte> from, const Stream& stream) {
    std::byte* const block = this->block();
    while (!from.empty()) {
      const std::size_t n = std::min(from.size(), kBlock);
      std::memcpy(block, from.data(), n);
      check(cudaMemcpyAsync(to, block, n, cudaMemcpyHostToDevice, stream), "copy of a cache to the device");
      stream.synchronize();
      to += n;
      from = from.subspan(n);
    }
  }

 private:
  static constexpr std::size_t kBlock = std::size_t{1} << 20;

  [[nodiscard]] std::byte* block() {
    if (block_.size() == 0) block_ = PinnedBuffer<std::byte>(static_cast<std::int64_t>(kBlock));
    return block_.data();
  }

  PinnedBuffer<std::byte> block_;
};

}  // namespace gemma4::cuda

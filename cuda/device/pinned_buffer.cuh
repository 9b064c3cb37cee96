// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cuda/device/allocation_count.cuh"
#include "cuda/device/check.cuh"
#include "gemma4/error.hpp"

namespace gemma4::cuda {

/// `count` elements of page-locked host memory that the device can read and write at the same address; move-only.
template <class T>
class PinnedBuffer {
  static_assert(std::is_trivially_copyable_v<T>, "device and host exchange it byte by byte");

 public:
  PinnedBuffer() = default;

  /// @throws Error when the host has not enough memory to lock
  explicit PinnedBuffer(std::int64_t count) : count_(count) {
    require(count >= 0, "PinnedBuffer: count ", count, ", need at least 0");
    if (count == 0) return;
    void* data = nullptr;
    require(count <= INT64_MAX / static_cast<std::int64_t>(sizeof(T)), "PinnedBuffer: ", count, " elements of ",
            sizeof(T), " B, more than can be addressed");
    check_allocation(cudaMallocHost(&data, static_cast<std::size_t>(bytes())), bytes(),
                     "allocation of page-locked memory");
    data_ = static_cast<T*>(data);
    detail::allocation_ledger.pinned(bytes());
  }

  PinnedBuffer(PinnedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~PinnedBuffer() {
    if (data_ == nullptr) return;
    cudaFreeHost(data_);
    detail::allocation_ledger.pinned(-bytes());
  }

  [[nodiscard]] T* data() { return data_; }
  [[nodiscard]] const T* data() const { return data_; }
  [[nodiscard]] std::int64_t size() const { return count_; }
  [[nodiscard]] std::int64_t bytes() const { return count_ * static_cast<std::int64_t>(sizeof(T)); }

 private:
  T* data_ = nullptr;
  std::int64_t count_ = 0;
};

}  // namespace gemma4::cuda

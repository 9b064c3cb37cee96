// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/device/allocation_count.cuh"
#include "cuda/device/check.cuh"
#include "gemma4/error.hpp"

namespace gemma4::cuda {

/// `count` elements of device memory on the current device; move-only. Copies are named and ordered by a stream.
/// The contents begin undefined: call fill_bytes() where zeros are meant.
template <class T>
class DeviceBuffer {
  static_assert(std::is_trivially_copyable_v<T>, "device memory is copied byte by byte");

 public:
  DeviceBuffer() = default;

  /// @throws Error when the device has not enough memory
  explicit DeviceBuffer(std::int64_t count) : count_(count) {
    require(count >= 0, "DeviceBuffer: count ", count, ", need at least 0");
    if (count == 0) return;
    void* data = nullptr;
    require(count <= INT64_MAX / static_cast<std::int64_t>(sizeof(T)), "DeviceBuffer: ", count, " elements of ",
            sizeof(T), " B, more than can be addressed");
    check_allocation(cudaMalloc(&data, static_cast<std::size_t>(bytes())), bytes(), "allocation of device memory");
    data_ = static_cast<T*>(data);
    detail::allocation_ledger.device(bytes());
  }

  /// The elements of `host`, on the device before the constructor returns, whatever stream reads them next. (cudaMemcpy
  /// alone returns once pageable memory is staged.)
  explicit DeviceBuffer(std::span<const T> host) : DeviceBuffer(static_cast<std::int64_t>(host.size())) {
    if (host.empty()) return;
    check(cudaMemcpy(data_, host.data(), host.size_bytes(), cudaMemcpyHostToDevice), "copy to device");
    check(cudaStreamSynchronize(nullptr), "wait for a copy to device");
  }
  explicit DeviceBuffer(const std::vector<T>& host) : DeviceBuffer(std::span<const T>(host)) {}

  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ == nullptr) return;
    cudaFree(data_);  // a failure here would show at the next call; a destructor cannot throw
    detail::allocation_ledger.device(-bytes());
  }

  [[nodiscard]] T* data() { return data_; }
  [[nodiscard]] const T* data() const { return data_; }
  [[nodiscard]] std::int64_t size() const { return count_; }
  [[nodiscard]] std::int64_t bytes() const { return count_ * static_cast<std::int64_t>(sizeof(T)); }

  /// Every byte becomes `value`, in stream order.
  void fill_bytes(int value, cudaStream_t stream = nullptr) {
    if (count_ == 0) return;
    check(cudaMemsetAsync(data_, value, static_cast<std::size_t>(bytes()), stream), "fill of device memory");
  }

  /// Elements [first, first + host.size()) become those of `host`, which must stay until the stream has run.
  void from_host(std::span<const T> host, cudaStream_t stream = nullptr, std::int64_t first = 0) {
    require_range("from_host", first, static_cast<std::int64_t>(host.size()));
    if (host.empty()) return;
    check(cudaMemcpyAsync(data_ + first, host.data(), host.size_bytes(), cudaMemcpyHostToDevice, stream),
          "copy to device");
  }

  /// The elements on the host; waits for the stream.
  [[nodiscard]] std::vector<T> to_host(cudaStream_t stream = nullptr) const {
    std::vector<T> host(static_cast<std::size_t>(count_));
    if (count_ == 0) return host;
    check(cudaMemcpyAsync(host.data(), data_, static_cast<std::size_t>(bytes()), cudaMemcpyDeviceToHost, stream),
          "copy to host");
    check(cudaStreamSynchronize(stream), "wait for a copy to host");
    return host;
  }

  /// A second buffer with the same elements.
  [[nodiscard]] DeviceBuffer clone(cudaStream_t stream = nullptr) const {
    DeviceBuffer copy(count_);
    if (count_ == 0) return copy;
    check(cudaMemcpyAsync(copy.data_, data_, static_cast<std::size_t>(bytes()), cudaMemcpyDeviceToDevice, stream),
          "copy within the device");
    return copy;
  }

 private:
  void require_range(const char* who, std::int64_t first, std::int64_t count) const {
    require(first >= 0 && first + count <= count_, "DeviceBuffer::", who, ": elements [", first, ", ", first + count,
            ") of ", count_);
  }

  T* data_ = nullptr;
  std::int64_t count_ = 0;
};

}  // namespace gemma4::cuda

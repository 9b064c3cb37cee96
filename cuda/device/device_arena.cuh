// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "cuda/device/check.cuh"
#include "cuda/device/device_buffer.cuh"
#include "gemma4/error.hpp"
#include "gemma4/plan/memory_plan.hpp"

namespace gemma4::cuda {

/// One allocation for the buffers of a memory plan that `wanted` takes, in the plan's order and without gaps: the plan
/// has rounded each up to kDeviceAlignment. So what was planned is what is allocated, and it is all given back at once.
class DeviceArena {
 public:
  DeviceArena() = default;

  /// @throws Error when the device has not enough memory
  /// @throws std::invalid_argument when the plan is not one for a device
  template <class TWanted>
  DeviceArena(const MemoryPlan& plan, TWanted&& wanted) {
    std::int64_t total = 0;
    for (const PlannedBuffer& buffer : plan.buffers) {
      if (!wanted(buffer.name)) continue;
      require(buffer.bytes % kDeviceAlignment == 0, "arena: buffer '", buffer.name, "' of ", buffer.bytes,
              " B, need a multiple of ", kDeviceAlignment, "; plan for PlanTarget::kCuda");
      places_[buffer.name] = {total, buffer.bytes};
      total += buffer.bytes;
    }
    memory_ = DeviceBuffer<std::byte>(total);
  }

  [[nodiscard]] std::int64_t bytes() const { return memory_.bytes(); }
  [[nodiscard]] std::span<std::byte> all() { return {memory_.data(), static_cast<std::size_t>(memory_.bytes())}; }

  /// A buffer by the plan's name; empty when the plan has none, because nothing of that kind is needed.
  [[nodiscard]] std::span<std::byte> buffer(std::string_view name) {
    const auto found = places_.find(name);
    if (found == places_.end()) return {};
    return all().subspan(static_cast<std::size_t>(found->second.first), static_cast<std::size_t>(found->second.second));
  }

  /// Every byte of some buffers becomes `value`, in stream order.
  void fill_bytes(std::initializer_list<const char*> names, int value, cudaStream_t stream) {
    for (const char* name : names) {
      const std::span<std::byte> bytes = buffer(name);
      check(cudaMemsetAsync(bytes.data(), value, bytes.size(), stream), "fill of a buffer");
    }
  }

  /// The first `count` elements of a buffer.
  template <class T>
  [[nodiscard]] T* data(std::string_view name, std::int64_t count) {
    const std::span<std::byte> bytes = buffer(name);
    require(count * static_cast<std::int64_t>(sizeof(T)) <= static_cast<std::int64_t>(bytes.size()), "arena: buffer '",
            name, "' has ", bytes.size(), " B, need ", count, " x ", sizeof(T));
    return reinterpret_cast<T*>(bytes.data());
  }

 private:
  DeviceBuffer<std::byte> memory_;
  std::map<std::string, std::pair<std::int64_t, std::int64_t>, std::less<>> places_;  ///< offset, bytes
};

/// Hands out pieces of a buffer, one after another.
class Carver {
 public:
  explicit Carver(std::span<std::byte> bytes) : bytes_(bytes) {}

  /// @throws std::invalid_argument when the buffer has no room for them
  template <class T>
  [[nodiscard]] T* take(std::int64_t count, std::int64_t alignment = kDeviceAlignment) {
    const std::int64_t need = gemma4::detail::round_up(count * static_cast<std::int64_t>(sizeof(T)), alignment);
    require(at_ + need <= static_cast<std::int64_t>(bytes_.size()), "arena: ", need, " B asked for, ",
            static_cast<std::int64_t>(bytes_.size()) - at_, " B left of ", bytes_.size());
    T* const data = reinterpret_cast<T*>(bytes_.data() + at_);
    at_ += need;
    return data;
  }
  [[nodiscard]] std::int64_t left() const { return static_cast<std::int64_t>(bytes_.size()) - at_; }

 private:
  std::span<std::byte> bytes_;
  std::int64_t at_ = 0;
};

/// Bytes in use on the current device, of this process and all others.
[[nodiscard]] inline std::int64_t device_bytes_in_use() {
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "question for the free memory of a device");
  return static_cast<std::int64_t>(total - free);
}

[[nodiscard]] inline std::int64_t device_bytes_free() {
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "question for the free memory of a device");
  return static_cast<std::int64_t>(free);
}

}  // namespace gemma4::cuda

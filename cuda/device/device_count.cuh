// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace gemma4::cuda {

/// How many rows of a flat cache are valid, or where a chunk begins: an int32 that the kernel reads from the device,
/// or a number that the host knows. `host` beside `device` lets the host refuse misuse and size its work.
struct DeviceCount {
  const std::int32_t* device = nullptr;
  std::int64_t host = -1;  ///< -1: not known to the host

  [[nodiscard]] static DeviceCount on_device(const std::int32_t* pointer) { return {.device = pointer, .host = -1}; }
  [[nodiscard]] static DeviceCount on_host(std::int64_t value) { return {.device = nullptr, .host = value}; }
  [[nodiscard]] bool known() const { return host >= 0; }
};

}  // namespace gemma4::cuda

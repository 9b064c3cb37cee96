// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "cuda/device/check.cuh"

namespace gemma4::cuda {

/// What plans depend on. A test may lower `smem_limit_bytes` or `sm_count` to stand in for a smaller card; plans use
/// these numbers and ask the device nothing.
struct DeviceInfo {
  std::string name = {};
  int sm_count = 1;
  int compute_capability = 80;                ///< 10 * major + minor
  std::int64_t smem_limit_bytes = 99 * 1024;  ///< dynamic shared memory that one block may ask for
  std::int64_t l2_bytes = 0;
};

/// The current device.
[[nodiscard]] inline DeviceInfo current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "question for the current device");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "question for the properties of a device");
  return {.name = properties.name,
          .sm_count = properties.multiProcessorCount,
          .compute_capability = 10 * properties.major + properties.minor,
          .smem_limit_bytes = static_cast<std::int64_t>(properties.sharedMemPerBlockOptin),
          .l2_bytes = properties.l2CacheSize};
}

}  // namespace gemma4::cuda

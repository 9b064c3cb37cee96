// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "cuda/check.cuh"
#include "cuda/device_info.cuh"
#include "experiments/build_info.hpp"
#include "gemma4/run_info.hpp"

namespace gemma4::experiment {

/// Describes a run on the current GPU.
[[nodiscard]] inline RunInfo gpu_run_info(std::string experiment, int argc, const char* const* argv,
                                          std::uint64_t seed) {
  RunInfo info = run_info(std::move(experiment), argc, argv, seed, build_info());
  const cuda::DeviceInfo device = cuda::current_device();
  const auto version = [](int number) { return concat(number / 1000, ".", number % 1000 / 10); };
  int driver = 0, runtime = 0;
  cuda::check(cudaDriverGetVersion(&driver), "version of the driver");
  cuda::check(cudaRuntimeGetVersion(&runtime), "version of CUDA");
  info.gpu = device.name;
  info.sm_count = std::to_string(device.sm_count);
  info.driver = version(driver);
  info.cuda = version(runtime);
  return info;
}

}  // namespace gemma4::experiment

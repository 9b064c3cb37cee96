// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cuda/device/check.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/device/device_info.cuh"
#include "experiments/build_info.hpp"
#include "experiments/support/nvml.hpp"
#include "gemma4/report/run_info.hpp"

namespace gemma4::experiment {
namespace detail {

/// Every multiprocessor computes for `nanoseconds`; block 0 leaves how many of its cycles passed in how many of them.
static __global__ void count_cycles(unsigned long long nanoseconds, unsigned long long* cycles_and_time) {
  const auto now = [] {
    unsigned long long time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time)::"memory");
    return time;
  };
  const unsigned long long begin = now();
  const long long first = clock64();
  unsigned long long end = begin;
  float busy = static_cast<float>(threadIdx.x);
  while (end - begin < nanoseconds) {
#pragma unroll 1
    for (int i = 0; i < 1000; ++i) busy = fmaf(busy, 0.5f, 1.0f);
    end = now();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    cycles_and_time[0] = static_cast<unsigned long long>(clock64() - first) + (busy == 0.0f ? 1 : 0);
    cycles_and_time[1] = end - begin;
  }
}

/// Clock of the multiprocessors in MHz under a light load on all of them, once the device has left its rest.
[[nodiscard]] inline double measured_sm_mhz(int sm_count) {
  cuda::DeviceBuffer<unsigned long long> counts(2);
  for (const unsigned long long nanoseconds : {50'000'000ull, 10'000'000ull}) {
    count_cycles<<<sm_count, 256>>>(nanoseconds, counts.data());
    cuda::check(cudaGetLastError(), "measurement of the clock");
  }
  const std::vector<unsigned long long> taken = counts.to_host();
  return 1e3 * static_cast<double>(taken[0]) / static_cast<double>(taken[1]);
}

}  // namespace detail

/// Describes a run on the current GPU.
[[nodiscard]] inline RunInfo gpu_run_info(std::string experiment, int argc, const char* const* argv,
                                          std::uint64_t seed) {
  RunInfo info = run_info(std::move(experiment), argc, argv, seed, build_info());
  const cuda::DeviceInfo device = cuda::current_device();
  const auto version = [](int number) { return concat(number / 1000, ".", number % 1000 / 10); };
  int driver = 0, runtime = 0;
  cuda::check(cudaDriverGetVersion(&driver), "version of the driver");
  cuda::check(cudaRuntimeGetVersion(&runtime), "version of CUDA");
  int current = 0, memory_khz = 0;
  cuda::check(cudaGetDevice(&current), "current device");
  cuda::check(cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, current), "clock of the memory");
  cudaDeviceProp properties{};
  cuda::check(cudaGetDeviceProperties(&properties, current), "properties of the device");
  char pci_bus_id[32] = {};
  cuda::check(cudaDeviceGetPCIBusId(pci_bus_id, sizeof(pci_bus_id), current), "address of the device on its bus");
  const DriverSays says = ask_driver(pci_bus_id);
  info.gpu = device.name;
  info.card = card_name(std::string_view(properties.uuid.bytes, sizeof(properties.uuid.bytes)));
  info.sm_count = std::to_string(device.sm_count);
  info.sm_mhz = std::to_string(std::lround(detail::measured_sm_mhz(device.sm_count)));
  info.memory_mhz = std::to_string(memory_khz / 1000);
  info.power_limit_w = says.power_limit_w;
  info.driver = version(driver);
  info.driver_release = says.release;
  info.cuda = version(runtime);
  return info;
}

}  // namespace gemma4::experiment

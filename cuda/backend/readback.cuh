// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <span>
#include <vector>

#include "cuda/device/check.cuh"
#include "cuda/device/stream.cuh"

/// Numbers of a backend on the host, for whoever compares them. All of it waits for the device.
namespace gemma4::cuda {

inline void copy_to_host(const float* from, std::span<float> to, const Stream& stream) {
  check(cudaMemcpyAsync(to.data(), from, to.size_bytes(), cudaMemcpyDeviceToHost, stream), "copy to host");
  stream.synchronize();
}

/// What x would be behind change(), which changes it in place; then x is put back.
template <class TChange>
void copy_as_if(float* x, std::span<float> to, const Stream& stream, TChange&& change) {
  std::vector<float> before(to.size());
  copy_to_host(x, before, stream);
  change();
  copy_to_host(x, to, stream);
  check(cudaMemcpyAsync(x, before.data(), before.size() * sizeof(float), cudaMemcpyHostToDevice, stream),
        "copy to device");
  stream.synchronize();
}

}  // namespace gemma4::cuda

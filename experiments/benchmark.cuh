// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/device/check.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"

/// Timing on the device, and the two ceilings that timings are held against.
namespace gemma4::experiment {

/// Of one call, from launch to launch, in microseconds.
struct Timing {
  double median_us = 0;
  double p10_us = 0;
  double p90_us = 0;
  int n_repeat = 0;
};

struct TimingOptions {
  int n_launch = 20;  ///< calls in a graph: hides the cost of launching it
  int n_warmup = 5;   ///< replays that are not timed
  int n_repeat = 40;  ///< timed replays
};

/// Times enqueue(i), i counting the calls: the caller rotates over buffers with it, so that no call finds the data of
/// the one before in the cache. The calls are captured once and replayed.
template <class TEnqueue>
[[nodiscard]] Timing time_calls(cudaStream_t stream, const TimingOptions& options, TEnqueue&& enqueue) {
  require(options.n_launch >= 1 && options.n_repeat >= 1, "time_calls: n_launch ", options.n_launch, ", n_repeat ",
          options.n_repeat, ", need at least 1");
  enqueue(0);  // loads the kernels
  cuda::check(cudaStreamSynchronize(stream), "first call of a timing");
  const cuda::Graph graph = cuda::Graph::capture(stream, [&] {
    for (int i = 0; i < options.n_launch; ++i) enqueue(i);
  });
  for (int i = 0; i < options.n_warmup; ++i) graph.launch(stream);
  std::vector<cuda::Event> events(static_cast<std::size_t>(options.n_repeat) + 1);
  events[0].record(stream);
  for (std::size_t i = 1; i < events.size(); ++i) {
    graph.launch(stream);
    events[i].record(stream);
  }
  events.back().synchronize();
  std::vector<double> us;
  for (std::size_t i = 1; i < events.size(); ++i) us.push_back(events[i].us_since(events[i - 1]) / options.n_launch);
  std::ranges::sort(us);
  const auto at = [&](double q) { return us[static_cast<std::size_t>(q * static_cast<double>(us.size() - 1) + 0.5)]; };
  return {.median_us = at(0.5), .p10_us = at(0.1), .p90_us = at(0.9), .n_repeat = options.n_repeat};
}

namespace detail {

/// Four independent 16-byte loads a thread. (A copy node of a graph runs on a copy engine, at two thirds of the rate.)
static __global__ void copy_kernel(const uint4* from, uint4* to, std::int64_t count) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count; i += 4 * step) {
    uint4 value[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j * step < count) value[j] = from[i + j * step];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j * step < count) to[i + j * step] = value[j];
    }
  }
}

}  // namespace detail

/// GB/s of a device-to-device copy, bytes read plus bytes written: the rate that kernels bound by memory can hope for.
[[nodiscard]] inline double copy_gb_per_s(cudaStream_t stream) {
  constexpr std::int64_t kBytes = std::int64_t{2} << 30;
  cuda::DeviceBuffer<std::byte> from(kBytes), to(kBytes);
  from.fill_bytes(0x5A, stream);
  const Timing timing = time_calls(stream, {.n_launch = 2, .n_warmup = 2, .n_repeat = 10}, [&](int) {
    detail::copy_kernel<<<132 * 16, 512, 0, stream>>>(reinterpret_cast<const uint4*>(from.data()),
                                                      reinterpret_cast<uint4*>(to.data()), kBytes / 16);
    cuda::check_launch("copy_kernel");
  });
  return 2e-3 * static_cast<double>(kBytes) / timing.median_us;
}

namespace detail {

inline void check_blas(cublasStatus_t status, const char* what) {
  require(status == CUBLAS_STATUS_SUCCESS, what, ": cuBLAS status ", static_cast<int>(status));
}

/// Normal-looking bf16 values: random data draws more power than zeros, and the clock follows.
static __global__ void fill_random_kernel(Bf16* data, std::int64_t count, std::uint32_t seed) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    std::uint32_t bits = static_cast<std::uint32_t>(i) * 2654435761u + seed;
    float sum = 0.0f;
    for (int j = 0; j < 4; ++j) {
      bits ^= bits << 13, bits ^= bits >> 17, bits ^= bits << 5;
      sum += static_cast<float>(bits >> 8) * 0x1p-24f - 0.5f;
    }
    data[i] = to_bf16(sum);
  }
}

}  // namespace detail

/// Fills device memory with random bf16 values of about unit size.
inline void fill_random(Bf16* data, std::int64_t count, std::uint32_t seed, cudaStream_t stream) {
  detail::fill_random_kernel<<<1024, 256, 0, stream>>>(data, count, seed | 1u);
  cuda::check_launch("fill_random_kernel");
}

/// TFLOP/s of a bf16 matrix product of 8192 x 8192 x 8192 on random data through cuBLASLt.
[[nodiscard]] inline double gemm_tflops(cudaStream_t stream) {
  constexpr std::int64_t kSize = 8192;
  constexpr std::size_t kWorkspace = std::size_t{32} << 20;
  cuda::DeviceBuffer<Bf16> a(kSize * kSize), b(kSize * kSize), c(kSize * kSize);
  cuda::DeviceBuffer<std::byte> workspace(kWorkspace);
  fill_random(a.data(), a.size(), 1, stream);
  fill_random(b.data(), b.size(), 2, stream);
  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t layout = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  detail::check_blas(cublasLtCreate(&handle), "cublasLtCreate");
  detail::check_blas(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
  const cublasOperation_t transpose = CUBLAS_OP_T;
  detail::check_blas(
      cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)),
      "cublasLtMatmulDescSetAttribute");
  detail::check_blas(cublasLtMatrixLayoutCreate(&layout, CUDA_R_16BF, kSize, kSize, kSize),
                     "cublasLtMatrixLayoutCreate");
  detail::check_blas(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
  detail::check_blas(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                          &kWorkspace, sizeof(kWorkspace)),
                     "cublasLtMatmulPreferenceSetAttribute");
  cublasLtMatmulHeuristicResult_t found{};
  int n_found = 0;
  detail::check_blas(cublasLtMatmulAlgoGetHeuristic(handle, operation, layout, layout, layout, layout, preference, 1,
                                                    &found, &n_found),
                     "cublasLtMatmulAlgoGetHeuristic");
  require(n_found == 1, "gemm_tflops: cuBLASLt has no algorithm for a square bf16 product");
  const float one = 1.0f, zero = 0.0f;
  const Timing timing = time_calls(stream, {.n_launch = 4, .n_warmup = 2, .n_repeat = 6}, [&](int) {
    detail::check_blas(cublasLtMatmul(handle, operation, &one, a.data(), layout, b.data(), layout, &zero, c.data(),
                                      layout, c.data(), layout, &found.algo, workspace.data(), kWorkspace, stream),
                       "cublasLtMatmul");
  });
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulDescDestroy(operation);
  cublasLtDestroy(handle);
  return 2e-6 * static_cast<double>(kSize * kSize * kSize) / timing.median_us;
}

}  // namespace gemma4::experiment

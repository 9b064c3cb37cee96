// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "gemma4/float16.hpp"

__global__ void round_kernel(float* values, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) values[i] = gemma4::to_float(gemma4::to_bf16(values[i]));
}

int main() {
  float* values = nullptr;
  if (cudaMalloc(&values, 32 * sizeof(float)) != cudaSuccess) return 77;
  round_kernel<<<1, 32>>>(values, 32);
  return cudaDeviceSynchronize() == cudaSuccess && cudaFree(values) == cudaSuccess ? 0 : 1;
}

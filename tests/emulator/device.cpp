// SPDX-License-Identifier: Apache-2.0
// The one device and what it says of itself; errors, which it has none of; events, which all happen at once.
#include "tests/emulator/device.hpp"

#include <cuda_runtime_api.h>

#include <cstring>

#include "tests/emulator/settings.hpp"
#undef cudaGetDeviceProperties

namespace gemma4::emulator {

std::size_t smem_limit_bytes() {
  constexpr int kByArchitecture = (GEMMA4_EMULATOR_ARCH == 900 ? 227 : GEMMA4_EMULATOR_ARCH == 800 ? 163 : 99) * 1024;
  static const int kLimit = whole_setting("GEMMA4_EMULATOR_SMEM_BYTES", kByArchitecture);
  return static_cast<std::size_t>(kLimit);
}

}  // namespace gemma4::emulator

extern "C" {

cudaError_t cudaGetDeviceCount(int* n_device) {
  *n_device = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "emulator");
  properties->major = GEMMA4_EMULATOR_ARCH / 100;
  properties->minor = GEMMA4_EMULATOR_ARCH / 10 % 10;
  properties->multiProcessorCount = gemma4::emulator::whole_setting("GEMMA4_EMULATOR_SMS", 132);
  properties->sharedMemPerBlockOptin = gemma4::emulator::smem_limit_bytes();
  properties->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
/// The name of the same function in toolkits before 13.
cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp* properties, int device) {
  return cudaGetDeviceProperties(properties, device);
}
/// There is no driver to ask.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = nullptr;
  if (found != nullptr) *found = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() {
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
  return "an error of the emulator";
}
const char* cudaGetErrorName(cudaError_t) {
  return "emulator";
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(16);  // a name: there is nothing to point to
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) {
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 1.0f;
  return cudaSuccess;
}

}  // extern "C"

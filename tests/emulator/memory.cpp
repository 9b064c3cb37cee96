// SPDX-License-Identifier: Apache-2.0
// Device memory: host memory that begins as 0xCD and ends with canaries, which are looked at when it is freed.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "tests/emulator/failure.hpp"
#include "tests/emulator/stream.hpp"

namespace {

constexpr unsigned char kUnwritten = 0xCD;
constexpr std::size_t kCanaryBytes = 256, kAlignment = 256;

std::map<void*, std::size_t> bytes_of;

std::size_t up_to_multiple(std::size_t n_byte) {
  return (n_byte + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** pointer, std::size_t n_byte) {
  const std::size_t n_room = up_to_multiple(n_byte + kCanaryBytes);
  *pointer = std::aligned_alloc(kAlignment, n_room);
  if (*pointer == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*pointer, kUnwritten, n_room);
  bytes_of[*pointer] = n_byte;
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  const auto found = bytes_of.find(pointer);
  if (found == bytes_of.end()) return cudaErrorInvalidValue;
  const std::size_t n_byte = found->second;
  for (std::size_t i = n_byte; i < n_byte + kCanaryBytes; ++i) {
    if (static_cast<unsigned char*>(pointer)[i] != kUnwritten) {
      gemma4::emulator::fail("byte ", i, " of a buffer of ", n_byte, " bytes was written; seen when it was freed");
    }
  }
  bytes_of.erase(found);
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** pointer, std::size_t n_byte) {
  *pointer = std::aligned_alloc(kAlignment, up_to_multiple(n_byte));
  return *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFreeHost(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* n_free, std::size_t* n_byte) {
  *n_free = std::size_t{16} << 30, *n_byte = std::size_t{24} << 30;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* target, const void* source, std::size_t n_byte, cudaMemcpyKind) {
  std::memcpy(target, source, n_byte);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* target, int value, std::size_t n_byte) {
  std::memset(target, value, n_byte);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t n_byte, cudaMemcpyKind, cudaStream_t stream) {
  return gemma4::emulator::enqueue(stream, [=] { std::memcpy(target, source, n_byte); });
}
cudaError_t cudaMemsetAsync(void* target, int value, std::size_t n_byte, cudaStream_t stream) {
  return gemma4::emulator::enqueue(stream, [=] { std::memset(target, value, n_byte); });
}
cudaError_t cudaMemcpy2DAsync(void* target, std::size_t target_pitch, const void* source, std::size_t source_pitch,
                              std::size_t row_bytes, std::size_t n_row, cudaMemcpyKind, cudaStream_t stream) {
  return gemma4::emulator::enqueue(stream, [=] {
    for (std::size_t row = 0; row < n_row; ++row) {
      std::memcpy(static_cast<char*>(target) + row * target_pitch,
                  static_cast<const char*>(source) + row * source_pitch, row_bytes);
    }
  });
}

}  // extern "C"

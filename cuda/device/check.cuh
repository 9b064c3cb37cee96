// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

#include "gemma4/error.hpp"

namespace gemma4::cuda {

/// A call to CUDA that failed. The message names what was attempted, CUDA's reason and the line of the caller.
class Error : public std::runtime_error {
 public:
  Error(cudaError_t status, const char* what, const std::source_location& where)
      : std::runtime_error(concat(what, ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ") at ",
                                  where.file_name(), ":", where.line())),
        status_(status) {}

  [[nodiscard]] cudaError_t status() const { return status_; }

 private:
  cudaError_t status_;
};

/// Throws Error unless `status` is success: `check(cudaMemcpyAsync(...), "copy of kv_len")`.
inline void check(cudaError_t status, const char* what,
                  const std::source_location& where = std::source_location::current()) {
  if (status != cudaSuccess) throw Error(status, what, where);
}

/// Throws Error unless an allocation of `bytes` was granted, with what was asked for and what the device has.
inline void check_allocation(cudaError_t status, std::int64_t bytes, const char* what,
                             const std::source_location& where = std::source_location::current()) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // it does not concern the next call
  std::size_t free = 0, total = 0;
  const bool is_known = cudaMemGetInfo(&free, &total) == cudaSuccess;
  const std::string asked = concat(what, " of ", bytes, " B");
  const std::string has = is_known ? concat(" (the device has ", free, " B free of ", total, " B)") : std::string();
  throw Error(status, concat(asked, has).c_str(), where);
}

/// After a launch: the launch itself was accepted. (What the kernel does shows at the next synchronisation.)
inline void check_launch(const char* kernel, const std::source_location& where = std::source_location::current()) {
  check(cudaGetLastError(), kernel, where);
}

}  // namespace gemma4::cuda

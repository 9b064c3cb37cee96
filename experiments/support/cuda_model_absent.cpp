// SPDX-License-Identifier: Apache-2.0
#include "experiments/support/cuda_model.hpp"
#include "gemma4/error.hpp"

/// What cuda_model.hpp promises, in a build without nvcc: a refusal.
namespace gemma4::experiment {
namespace {

constexpr const char* kReason = "this needs CUDA, and the program was built without nvcc; build it where nvcc is found";

}  // namespace

std::unique_ptr<CudaModel> load_cuda_model(const std::filesystem::path&, const CudaLoadSettings&, const CudaSettings&) {
  require(false, kReason);
  return nullptr;
}

std::optional<std::string> missing_device() {
  return kReason;
}

std::int64_t device_bytes_in_use() {
  require(false, kReason);
  return 0;
}

std::int64_t device_bytes_free() {
  require(false, kReason);
  return 0;
}

double device_copy_gb_per_s() {
  require(false, kReason);
  return 0;
}

RunInfo device_run_info(std::string, int, const char* const*, std::uint64_t) {
  require(false, kReason);
  return {};
}

}  // namespace gemma4::experiment

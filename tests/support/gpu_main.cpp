// SPDX-License-Identifier: Apache-2.0
// main() of every GPU test.
//
// Without a usable device each test is skipped before its body runs, rapidcheck properties included, and the reason
// is printed; the process then ends with kSkipped, which CTest shows as "Skipped". With GEMMA4_REQUIRE_GPU=1 a missing
// device is a failure. Suites whose name ends in "Plan" test host code (grids, workspaces) and run everywhere.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <string_view>

namespace {

constexpr int kSkipped = 77;  // SKIP_RETURN_CODE in tests/CMakeLists.txt

/// Why there is no usable device; empty where there is one.
std::string missing_gpu() {
  int n_device = 0;
  const cudaError_t status = cudaGetDeviceCount(&n_device);
  if (status != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(status);
  if (n_device == 0) return "no CUDA device: the driver lists none";
  return {};
}

bool gpu_required() {
  const char* value = std::getenv("GEMMA4_REQUIRE_GPU");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

/// Skips each test that needs a device. GoogleTest runs no body after a skip in OnTestStart.
class SkipWithoutGpu : public testing::EmptyTestEventListener {
 public:
  explicit SkipWithoutGpu(std::string reason) : reason_(std::move(reason)) {}

  void OnTestStart(const testing::TestInfo& info) override {
    if (std::string_view(info.test_suite_name()).ends_with("Plan")) return;
    GTEST_SKIP() << reason_;
  }

 private:
  std::string reason_;
};

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const std::string reason = missing_gpu();
  if (!reason.empty() && gpu_required()) {
    std::cerr << "GEMMA4_REQUIRE_GPU=1, but " << reason << '\n';
    return EXIT_FAILURE;
  }
  if (!reason.empty()) testing::UnitTest::GetInstance()->listeners().Append(new SkipWithoutGpu(reason));
  const int result = RUN_ALL_TESTS();
  const auto& unit = *testing::UnitTest::GetInstance();
  if (result == 0 && !reason.empty() && unit.skipped_test_count() > 0) {
    std::cout << unit.skipped_test_count() << " tests skipped: " << reason << '\n';
    return kSkipped;
  }
  return result;
}

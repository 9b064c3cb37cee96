// SPDX-License-Identifier: Apache-2.0
// What tests/support/gpu_main.cpp promises; gpu_policy_test.sh judges how this program ends.
#include <cuda_runtime_api.h>

#include "tests/support/property.hpp"

namespace {

int n_device() {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

TEST(GpuPolicy, TestBodiesSeeADevice) {
  EXPECT_GT(n_device(), 0);
}

RC_GTEST_PROP(GpuPolicy, PropertiesSeeADevice, ()) {
  RC_ASSERT(n_device() > 0);
}

TEST(GpuPolicyPlan, HostCodeIsTestedEverywhere) {
  SUCCEED();
}

}  // namespace

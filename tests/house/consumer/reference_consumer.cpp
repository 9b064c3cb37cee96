// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstdio>

#include "reference/rms_norm.hpp"

int main() {
  gemma4::reference::Matrix<float> x(1, 2), out(1, 2);
  x << 3.0f, 4.0f;
  gemma4::reference::rms_norm<float>(x, {}, 0.0f, out);
  const float expected = 3.0f / std::sqrt(12.5f);
  std::printf("rms_norm(3, 4) = (%f, %f)\n", static_cast<double>(out(0, 0)), static_cast<double>(out(0, 1)));
  return std::abs(out(0, 0) - expected) <= 1e-6f ? 0 : 1;
}

// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "gemma4/quantisers.hpp"
#include "gemma4/rotation.hpp"
#include "reference/simulated_cache.hpp"
#include "tests/recipes/e4m3_token.hpp"

namespace {

using namespace gemma4;

/// A format of one's own among those that ship: found by its name, and as good as four significant bits promise.
TEST(Recipes, ASimulatedFormatIsAFunctorAndAName) {
  const auto format = SimulatedFormats<ScalarCodes, recipes::E4m3Token>::parse("sim-e4m3-had");
  ASSERT_TRUE(format && std::holds_alternative<Simulated<recipes::E4m3Token>>(*format));
  const std::vector<double> normal = haar_gaussians(1, 64 * 512);
  const auto x = Eigen::Map<const reference::Matrix<double>>(normal.data(), 64, 512).cast<float>().eval();
  auto read = x;
  reference::SimulatedCodec(512, std::get<Simulated<recipes::E4m3Token>>(*format)).roundtrip(CacheSide::kKey, read);
  const float error = (read - x).norm() / x.norm();
  EXPECT_LE(error, 0x1p-4f / std::sqrt(3.0f));  // at most 2^-4 of a value, evenly spread
  EXPECT_GE(error, 0x1p-5f / std::sqrt(3.0f));  // a value just below a power of two has half of that
}

}  // namespace

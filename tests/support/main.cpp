// SPDX-License-Identifier: Apache-2.0
// main() of every CPU test. rapidcheck prints its seed; RC_PARAMS="seed=N" repeats a run.
#include <gtest/gtest.h>

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}

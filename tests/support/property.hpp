// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <string>

/// What rapidcheck properties need besides rapidcheck.
namespace gemma4::testkit {

/// Fails the running property with the message of a GoogleTest assertion result, so that the shrunk counterexample is
/// printed together with the worst element: `rc_require(close(actual, expected, bound));`.
/// (EXPECT_TRUE inside a property would fail the test without shrinking it.)
inline void rc_require(const testing::AssertionResult& result, const std::string& what = {}) {
  if (!result) RC_FAIL((what.empty() ? "" : what + ": ") + result.message());
}

}  // namespace gemma4::testkit

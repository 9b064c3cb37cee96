// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace gemma4::testkit {

/// Success when `call` throws a `TError` with a message that holds each of `parts`.
template <class TError = std::invalid_argument, class TCall>
[[nodiscard]] testing::AssertionResult refuses(const TCall& call, const std::vector<std::string>& parts) {
  try {
    call();
  } catch (const TError& error) {
    const std::string message = error.what();
    for (const std::string& part : parts) {
      if (message.find(part) == std::string::npos) {
        return testing::AssertionFailure() << "the message lacks '" << part << "': " << message;
      }
    }
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure() << "nothing was refused";
}

}  // namespace gemma4::testkit

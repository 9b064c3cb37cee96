// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sstream>
#include <string>

namespace gemma4::emulator {

/// Ends the program after a line with the kernel, the block and the message.
[[noreturn]] void fail_with(const std::string& message);

template <class... TParts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const TParts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  fail_with(message.str());
}

}  // namespace gemma4::emulator

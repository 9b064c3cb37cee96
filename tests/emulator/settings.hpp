// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdlib>
#include <string>

/// What the environment says; emulator.hpp lists it.
namespace gemma4::emulator {

[[nodiscard]] inline std::string setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

[[nodiscard]] inline int whole_setting(const char* name, int otherwise) {
  return std::atoi(setting(name, std::to_string(otherwise).c_str()).c_str());
}

}  // namespace gemma4::emulator

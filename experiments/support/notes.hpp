// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <iostream>
#include <string>
#include <vector>

namespace gemma4::experiment {

/// What was done with a file that is not as expected, on stderr: the program goes on, and says how.
inline void show_notes(const std::vector<std::string>& notes) {
  for (const std::string& note : notes) std::cerr << "note: " << note << '\n';
}

}  // namespace gemma4::experiment

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "gemma4/error.hpp"

namespace gemma4::experiment {

/// Refuses a backend that this program was not built with.
inline void require_reference(const std::string& backend) {
  require(backend == "reference", "--backend ", backend,
          ": the model graph has no such backend in this build; use --backend reference");
}

}  // namespace gemma4::experiment

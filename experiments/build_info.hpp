// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "gemma4/report/run_info.hpp"

namespace gemma4::experiment {

/// The commit, build type and flags of this build. Defined in a source file that the build writes anew whenever the
/// commit or the state of the tree changes.
[[nodiscard]] BuildInfo build_info();

}  // namespace gemma4::experiment

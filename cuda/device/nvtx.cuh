// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nvtx3/nvToolsExt.h>

#include "gemma4/report/nvtx.hpp"

namespace gemma4::cuda {

/// A range that Nsight shows: pushed when made, popped when destroyed, nested as scopes are. Without a profiler a call
/// costs a load and a branch. Ranges wrap the capture of a graph, not its replay: profile eager runs.
/// Mirror: include/gemma4/report/nvtx.hpp, whose NvtxRange does nothing.
class NvtxRange {
 public:
  /// @param name must outlive the range
  explicit NvtxRange(const char* name) noexcept { nvtxRangePushA(name); }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
  ~NvtxRange() { nvtxRangePop(); }
};
static_assert(ProfilerRange<NvtxRange>);

}  // namespace gemma4::cuda

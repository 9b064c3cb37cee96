// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>

#include "experiments/driver.hpp"
#include "experiments/support/cuda_model.hpp"
#include "gemma4/report/run_info.hpp"

namespace gemma4::experiment {

/// Describes the run on the processor or on the GPU, whichever --backend names.
[[nodiscard]] inline RunInfo backend_run_info(const DriverOptions& options, std::string experiment, int argc,
                                              const char* const* argv) {
  return options.backend == "cuda" ? device_run_info(std::move(experiment), argc, argv, options.seed)
                                   : run_info(std::move(experiment), argc, argv, options.seed, build_info());
}

}  // namespace gemma4::experiment

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#include "tests/emulator/failure.hpp"

namespace gemma4::emulator {

/// Does `work` now, or keeps it for a graph where the stream is being captured.
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);

}  // namespace gemma4::emulator

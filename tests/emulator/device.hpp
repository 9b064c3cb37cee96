// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace gemma4::emulator {

/// Dynamic shared memory that a block may ask for.
[[nodiscard]] std::size_t smem_limit_bytes();

}  // namespace gemma4::emulator

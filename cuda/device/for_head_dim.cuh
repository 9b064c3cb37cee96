// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "gemma4/error.hpp"

namespace gemma4::cuda {

/// Calls fn(std::integral_constant<int, head_dim>) for the head_dim at hand. @throws std::invalid_argument on another
template <class TFunction>
void for_head_dim(const char* who, std::int64_t head_dim, TFunction&& fn) {
  if (head_dim == 64) return fn(std::integral_constant<int, 64>{});
  if (head_dim == 128) return fn(std::integral_constant<int, 128>{});
  if (head_dim == 256) return fn(std::integral_constant<int, 256>{});
  if (head_dim == 512) return fn(std::integral_constant<int, 512>{});
  require(false, who, ": head_dim ", head_dim, ", need 64, 128, 256 or 512");
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

namespace gemma4 {

/// FNV-1a, 64 bits: a name for bytes that may be printed, and no protection against anybody who wants two alike.
/// @param hash of what came before
/// Source: Fowler, Noll and Vo, draft-eastlake-fnv.
[[nodiscard]] constexpr std::uint64_t fnv1a(std::string_view text, std::uint64_t hash = 0xcbf29ce484222325u) {
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <rapidcheck.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "cuda/device/device_info.cuh"
#include "cuda/kv_attention.cuh"
#include "gemma4/kv_format.hpp"

/// Formats of one vector for K and V, and the configurations of decode that take them.
namespace gemma4::testkit {

/// Half of the time one with a kernel of its own.
[[nodiscard]] inline KvOptions some_format() {
  const int known = *rc::gen::inRange(0, 4);
  if (known < 2) return {.v_bits = 4 + known};
  return {.rotation = *rc::gen::weightedElement<RotationKind>(
              {{5, RotationKind::kSignedHadamard}, {1, RotationKind::kDenseHaar}}),
          .v_bits = *rc::gen::inRange(3, 7),
          .r_bits = *rc::gen::inRange(3, 7)};
}

/// The compiled configurations of decode that take a format and fit the device.
[[nodiscard]] inline std::vector<cuda::KvDecodeTile> tiles_for(std::int64_t head_dim, const KvOptions& format) {
  const std::int64_t limit = cuda::current_device().smem_limit_bytes;
  std::vector<cuda::KvDecodeTile> tiles;
  std::ranges::copy_if(cuda::kKvDecodeTiles, std::back_inserter(tiles), [&](const cuda::KvDecodeTile& tile) {
    return tile.head_dim == head_dim && tile.takes(format.v_bits, format.r_bits) && tile.smem_bytes() <= limit;
  });
  return tiles;
}

}  // namespace gemma4::testkit

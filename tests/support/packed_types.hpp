// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>

#include "gemma4/plan/packed_rows.hpp"
#include "gemma4/quantized_matrix.hpp"

namespace gemma4::testkit {

inline constexpr std::size_t kPackedTypeCount =
    static_cast<std::size_t>(std::count_if(kWeightTypes.begin(), kWeightTypes.end(), is_packed_type));

/// The types of weights whose rows are permuted on the device: all but the plain ones.
inline constexpr std::array<TensorType, kPackedTypeCount> kPackedTypes = [] {
  std::array<TensorType, kPackedTypeCount> types{};
  std::copy_if(kWeightTypes.begin(), kWeightTypes.end(), types.begin(), is_packed_type);
  return types;
}();
static_assert(kPackedTypeCount + 3 == kWeightTypes.size(), "BF16, F16 and F32 are not packed");

}  // namespace gemma4::testkit

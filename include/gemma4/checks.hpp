// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>

#include "gemma4/error.hpp"
#include "gemma4/view.hpp"

/// What calls ask of the views that they are given. All of these throw std::invalid_argument naming the caller, the
/// argument and both values.
namespace gemma4 {

[[nodiscard]] constexpr bool is_power_of_two(std::int64_t value) {
  return value > 0 && std::has_single_bit(static_cast<std::uint64_t>(value));
}

/// Refuses a view whose extents are not `expected`.
template <class T, int kRank>
void require_extents(const char* who, const char* name, const View<T, kRank>& view,
                     const std::int64_t (&expected)[kRank]) {
  for (int axis = 0; axis < kRank; ++axis) {
    require(view.extent[axis] == expected[axis], who, ": ", name, " has extent ", view.extent[axis], " in axis ", axis,
            ", need ", expected[axis]);
  }
}

/// Refuses a view whose innermost axis is not contiguous.
template <class T, int kRank>
void require_contiguous_rows(const char* who, const char* name, const View<T, kRank>& view) {
  require(view.stride[kRank - 1] == 1, who, ": ", name, " has stride ", view.stride[kRank - 1],
          " in its innermost axis, need 1");
}

/// Refuses a view whose rows do not begin at multiples of 16 bytes.
template <class T, int kRank>
void require_aligned_rows(const char* who, const char* name, const View<T, kRank>& view) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  bool aligned = reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
  for (int axis = 0; axis + 1 < kRank; ++axis) aligned = aligned && view.stride[axis] * kSize % 16 == 0;
  require(aligned, who, ": rows of ", name, " do not begin at multiples of 16 bytes");
}

}  // namespace gemma4

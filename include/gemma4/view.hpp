// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "gemma4/platform.hpp"

namespace gemma4 {

/// A borrowed, row-major, strided tensor of rank kRank; `extent[0]` is the outermost axis. Extents and strides are
/// in elements and 64 bits wide, because a 128k cache has more than 2^32 of them. `View<const T, ...>` for inputs.
/// C arrays, so that device code can index them.
template <class T, int kRank>
struct View {
  static_assert(kRank >= 1);
  T* data = nullptr;
  std::int64_t extent[kRank] = {};
  std::int64_t stride[kRank] = {};

  template <class... TIndex>
  requires(sizeof...(TIndex) == kRank) [[nodiscard]] GEMMA4_HD constexpr T& operator()(TIndex... index) const {
    const std::int64_t indices[kRank] = {static_cast<std::int64_t>(index)...};
    std::int64_t offset = 0;
    for (int axis = 0; axis < kRank; ++axis) offset += indices[axis] * stride[axis];
    return data[offset];
  }

  [[nodiscard]] GEMMA4_HD constexpr std::int64_t size() const {
    std::int64_t count = 1;
    for (int axis = 0; axis < kRank; ++axis) count *= extent[axis];
    return count;
  }

  /// A view of mutable elements converts to a view of const ones. (A template, because nvcc warns of a plain conversion
  /// operator of View<const T> to itself even where `requires` removes it.)
  template <class TConst>
  requires(!std::is_const_v<T> && std::is_same_v<TConst, const T>) [[nodiscard]] constexpr
  operator View<TConst, kRank>() const {
    View<const T, kRank> view;
    view.data = data;
    for (int axis = 0; axis < kRank; ++axis) view.extent[axis] = extent[axis], view.stride[axis] = stride[axis];
    return view;
  }
};

/// A contiguous row-major view: `make_view(pointer, outer, ..., inner)`.
template <class T, class... TExtent>
[[nodiscard]] constexpr auto make_view(T* data, TExtent... extents) {
  constexpr int kRank = sizeof...(TExtent);
  View<T, kRank> view;
  view.data = data;
  const std::int64_t values[kRank] = {static_cast<std::int64_t>(extents)...};
  std::int64_t step = 1;
  for (int axis = kRank - 1; axis >= 0; --axis) {
    view.extent[axis] = values[axis];
    view.stride[axis] = step;
    step *= values[axis];
  }
  return view;
}

/// The same elements with an outermost axis of extent 1.
template <class T, int kRank>
[[nodiscard]] constexpr View<T, kRank + 1> with_batch(const View<T, kRank>& view) {
  View<T, kRank + 1> batched;
  batched.data = view.data;
  batched.extent[0] = 1;
  batched.stride[0] = view.extent[0] * view.stride[0];
  for (int axis = 0; axis < kRank; ++axis) {
    batched.extent[axis + 1] = view.extent[axis];
    batched.stride[axis + 1] = view.stride[axis];
  }
  return batched;
}

}  // namespace gemma4

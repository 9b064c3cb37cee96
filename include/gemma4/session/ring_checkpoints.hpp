// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/session/stored_part.hpp"

/// What rings held at a position, on the host: from there a sequence can be had again at any later one.
namespace gemma4 {

/// Leaves elements as the memory has them: what is filled at once need not be zero before.
template <class T>
struct UnsetAllocator : std::allocator<T> {
  template <class TOther>
  struct rebind {
    using other = UnsetAllocator<TOther>;
  };
  template <class TElement, class... TArguments>
  void construct(TElement* at, TArguments&&... arguments) {
    if constexpr (sizeof...(arguments) == 0) {
      ::new (static_cast<void*>(at)) TElement;
    } else {
      ::new (static_cast<void*>(at)) TElement(std::forward<TArguments>(arguments)...);
    }
  }
};
using HostBytes = std::vector<std::byte, UnsetAllocator<std::byte>>;

/// Rings' rows of the window before `position`, and rows of full layers that were not final then, in the order of the
/// layers and their parts. For the 31B 16.8 MB a sliding layer, 839 MB in all.
struct RingCheckpoint {
  std::int64_t position = 0;
  HostBytes bytes;
};

/// The rows of a checkpoint, in order.
[[nodiscard]] inline std::vector<PartRows> checkpoint_rows(std::span<const StoredLayer> layers, std::int64_t window,
                                                           std::int64_t position) {
  std::vector<PartRows> rows;
  for (const StoredLayer& layer : layers) {
    for (const StoredPart& part : layer.parts) {
      const std::int64_t n_token =
          layer.is_ring ? std::min({window, position, part.n_row}) : layer.n_unsettled(position);
      if (n_token > 0) rows.push_back(rows_of_tokens(part, layer.is_ring, position - n_token, position));
    }
  }
  return rows;
}

[[nodiscard]] inline std::size_t checkpoint_bytes(std::span<const StoredLayer> layers, std::int64_t window,
                                                  std::int64_t position) {
  std::size_t bytes = 0;
  for (const PartRows& rows : checkpoint_rows(layers, window, position)) bytes += rows.bytes();
  return bytes;
}

/// @param position that the caches are at
template <class TBackend>
[[nodiscard]] RingCheckpoint take_checkpoint(TBackend& backend, std::span<const StoredLayer> layers,
                                             std::int64_t window, std::int64_t position) {
  RingCheckpoint kept{.position = position, .bytes = HostBytes(checkpoint_bytes(layers, window, position))};
  std::span<std::byte> room = kept.bytes;
  for (const PartRows& rows : checkpoint_rows(layers, window, position)) {
    copy_rows(backend, rows, 0, room.first(rows.bytes()));
    room = room.subspan(rows.bytes());
  }
  return kept;
}

/// The rings are at kept.position again, and what was not final in the full layers is as it was.
template <class TBackend>
void put_checkpoint(TBackend& backend, std::span<const StoredLayer> layers, std::int64_t window,
                    const RingCheckpoint& kept) {
  std::span<const std::byte> bytes = kept.bytes;
  require(bytes.size() == checkpoint_bytes(layers, window, kept.position), "checkpoint of ", kept.position, ": ",
          bytes.size(), " B, these caches have ", checkpoint_bytes(layers, window, kept.position));
  for (const PartRows& rows : checkpoint_rows(layers, window, kept.position)) {
    set_rows(backend, rows, 0, bytes.first(rows.bytes()));
    bytes = bytes.subspan(rows.bytes());
  }
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/attention.hpp"
#include "gemma4/cache_formats.hpp"
#include "gemma4/error.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/ring_format.hpp"

/// Where the bytes of a layer's cache lie, whatever its format and wherever its memory: what saving, restoring,
/// branching and checkpoints copy.
namespace gemma4 {

/// One part of a layer's cache: [n_head, n_row, row_bytes], without gaps, in the memory of its backend. Row r of a head
/// is of token r, or of tokens r * row_tokens and on; in a ring of the token at the position whose slot is r.
struct StoredPart {
  std::string_view name;      ///< of it in a file; together the names of a layer's parts tell its layout
  std::byte* data = nullptr;  ///< never looked through here: TBackend::copy_stored() and set_stored() do
  std::int64_t n_head = 0, n_row = 0, row_bytes = 0;
  std::int64_t row_tokens = 1;  ///< more where a device stores records
};

/// The cache of one layer. Not every token is final when it is stored: the newest `tail` tokens of a format that keeps
/// them exact still change, and so do those of a tile of `tile` tokens that is not full.
struct StoredLayer {
  bool is_ring = false;
  std::vector<StoredPart> parts;
  std::int64_t tail = 0;
  std::int64_t tile = 1;

  /// Tokens before `position` that are not final when the cache holds so many.
  [[nodiscard]] std::int64_t n_unsettled(std::int64_t position) const {
    return std::max(std::min(tail, position), position % tile);
  }
};

/// A backend whose sequence can be taken out and put back. copy_stored() and set_stored() wait until they are done.
template <class TBackend>
concept StoringBackend = Backend<TBackend> &&
    requires(TBackend& backend, const TBackend& constant, std::int64_t position, const std::byte* from, std::byte* to,
             std::span<std::byte> room, std::span<const std::byte> bytes, std::span<const float> logits) {
  { constant.cache() } -> std::convertible_to<CacheSpec>;
  { constant.ring() } -> std::convertible_to<RingSpec>;
  { backend.stored_layers() } -> std::same_as<std::vector<StoredLayer>>;  // layer by layer
  backend.copy_stored(from, room);                                        // of a part, to the host
  backend.set_stored(to, bytes);                                          // from the host into a part
  backend.set_position(position, position);  // tokens that the caches hold; rings as if they had been at the second
  backend.set_logits(logits);                // of the one row that copy_logits(0, ...) gives
};

/// Rows [first, first + count) of every head of a part, one head after another: as a file has them, and a checkpoint.
/// In a ring they are numbered by position, and lie where its slots are; of more than it holds the last ones stay.
class PartRows {
 public:
  PartRows(const StoredPart& part, bool is_ring, std::int64_t first, std::int64_t count)
      : part_(part), is_ring_(is_ring), first_(first), count_(count) {
    require(first >= 0 && count >= 0 && (is_ring || first + count <= part.n_row), "rows of '", part.name, "': ", first,
            " to ", first + count, ", it has ", part.n_row);
  }

  [[nodiscard]] const StoredPart& part() const { return part_; }
  [[nodiscard]] std::int64_t count() const { return count_; }
  [[nodiscard]] std::size_t bytes() const { return head_bytes() * static_cast<std::size_t>(part_.n_head); }

  /// Calls visit(address, n) for pieces without a gap that make up bytes [offset, offset + length) of the rows.
  template <class TVisit>
  void pieces(std::size_t offset, std::size_t length, TVisit&& visit) const {
    require(offset <= bytes() && length <= bytes() - offset, "rows of '", part_.name, "': bytes ", offset, " to ",
            offset + length, ", there are ", bytes());
    const auto row_bytes = static_cast<std::size_t>(part_.row_bytes);
    while (length > 0) {
      const std::size_t head = offset / head_bytes(), in_head = offset % head_bytes();
      const std::size_t row = in_head / row_bytes, in_row = in_head % row_bytes;
      const std::int64_t place = place_of(static_cast<std::int64_t>(row));
      const auto until_wrap = static_cast<std::size_t>(part_.n_row - place);
      const std::size_t rows = std::min(static_cast<std::size_t>(count_) - row, until_wrap);
      const std::size_t n = std::min(length, rows * row_bytes - in_row);
      const std::size_t at =
          (head * static_cast<std::size_t>(part_.n_row) + static_cast<std::size_t>(place)) * row_bytes;
      visit(part_.data + at + in_row, n);
      offset += n;
      length -= n;
    }
  }

 private:
  [[nodiscard]] std::size_t head_bytes() const { return static_cast<std::size_t>(count_ * part_.row_bytes); }
  [[nodiscard]] std::int64_t place_of(std::int64_t row) const {
    return is_ring_ ? ring_slot(first_ + row, part_.n_row) : first_ + row;
  }

  StoredPart part_;
  bool is_ring_;
  std::int64_t first_, count_;
};

/// Rows of a part that hold the tokens [first, end): whole rows.
[[nodiscard]] inline PartRows rows_of_tokens(const StoredPart& part, bool is_ring, std::int64_t first,
                                             std::int64_t end) {
  const std::int64_t first_row = first / part.row_tokens, end_row = (end + part.row_tokens - 1) / part.row_tokens;
  return {part, is_ring, first_row, std::max<std::int64_t>(0, end_row - first_row)};
}

/// Bytes of rows to the host. `offset` counts within the rows.
template <class TBackend>
void copy_rows(TBackend& backend, const PartRows& rows, std::size_t offset, std::span<std::byte> to) {
  rows.pieces(offset, to.size(), [&](const std::byte* from, std::size_t n) {
    backend.copy_stored(from, to.first(n));
    to = to.subspan(n);
  });
}

/// The other way.
template <class TBackend>
void set_rows(TBackend& backend, const PartRows& rows, std::size_t offset, std::span<const std::byte> from) {
  rows.pieces(offset, from.size(), [&](std::byte* to, std::size_t n) {
    backend.set_stored(to, from.first(n));
    from = from.subspan(n);
  });
}

/// The fewest tokens that the rings of a backend hold; the largest number where it has none.
[[nodiscard]] inline std::int64_t ring_length(std::span<const StoredLayer> layers) {
  std::int64_t length = std::numeric_limits<std::int64_t>::max();
  for (const StoredLayer& layer : layers) {
    if (!layer.is_ring) continue;
    for (const StoredPart& part : layer.parts) length = std::min(length, part.n_row);
  }
  return length;
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <span>

#include "cuda/device/check.cuh"
#include "cuda/device/pinned_buffer.cuh"
#include "cuda/device/stream.cuh"

namespace gemma4::cuda {

/// Bytes between the caches and the host, through page-locked slots of its own, in the order of a stream: while the
/// link brings one slot's bytes the host copies another's. The slots are allocated with the first copy: a run that
/// saves nothing has none.
class StoredBytes {
 public:
  StoredBytes() = default;
  StoredBytes(const StoredBytes&) = delete;
  StoredBytes& operator=(const StoredBytes&) = delete;
  ~StoredBytes() {
    try {
      for (const Event& left : left_) left.synchronize();  // the link may still read a slot
    } catch (const std::exception&) {                      // a device that is lost reads none
    }
  }

  /// Waits until they are there.
  void copy(const std::byte* from, std::span<std::byte> to, const Stream& stream) {
    const std::size_t n_piece = (to.size() + kSlot - 1) / kSlot;
    const auto size = [&](std::size_t piece) { return std::min(kSlot, to.size() - piece * kSlot); };
    const std::size_t first = next_;
    for (std::size_t piece = 0; piece < n_piece + kSlots - 1; ++piece) {
      if (piece < n_piece) {
        const std::size_t slot = take();
        check(cudaMemcpyAsync(data(slot), from + piece * kSlot, size(piece), cudaMemcpyDeviceToHost, stream),
              "copy of a cache to the host");
        left_[slot].record(stream);
      }
      if (piece + 1 < kSlots) continue;
      const std::size_t done = piece + 1 - kSlots, slot = (first + done) % kSlots;
      left_[slot].synchronize();
      std::memcpy(to.data() + done * kSlot, data(slot), size(done));
    }
  }

  /// `from` is free again when this returns; whatever the stream does later sees the bytes.
  void set(std::byte* to, std::span<const std::byte> from, const Stream& stream) {
    while (!from.empty()) {
      const std::size_t n = std::min(from.size(), kSlot), slot = take();
      left_[slot].synchronize();
      std::memcpy(data(slot), from.data(), n);
      check(cudaMemcpyAsync(to, data(slot), n, cudaMemcpyHostToDevice, stream), "copy of a cache to the device");
      left_[slot].record(stream);
      to += n;
      from = from.subspan(n);
    }
  }

 private:
  static constexpr std::size_t kSlots = 4;
  static constexpr std::size_t kSlot = std::size_t{1} << 18;  ///< 5 us of the link, more than it takes to ask for them

  /// The slot whose turn it is.
  [[nodiscard]] std::size_t take() {
    if (slots_.size() == 0) slots_ = PinnedBuffer<std::byte>(static_cast<std::int64_t>(kSlots * kSlot));
    const std::size_t slot = next_;
    next_ = (next_ + 1) % kSlots;
    return slot;
  }
  [[nodiscard]] std::byte* data(std::size_t slot) { return slots_.data() + slot * kSlot; }

  PinnedBuffer<std::byte> slots_;
  std::array<Event, kSlots> left_;  ///< behind the last copy of a slot
  std::size_t next_ = 0;
};

}  // namespace gemma4::cuda

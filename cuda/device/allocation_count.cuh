// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>

namespace gemma4::cuda {

/// What DeviceBuffer and PinnedBuffer, the only owners of memory here, have taken in this process, on all devices. The
/// driver's own count (device_bytes_in_use()) goes by pages of 2 MiB, knows of other processes, and grows when a kernel
/// is loaded: it does not say whether a step has allocated.
struct AllocationCount {
  std::int64_t n_taken = 0;       ///< allocations since the process began
  std::int64_t device_bytes = 0;  ///< held now
  std::int64_t pinned_bytes = 0;  ///< held now
  bool operator==(const AllocationCount&) const = default;
};

namespace detail {

/// The one thing of the room that outlives its owner: nothing but tests reads it.
struct AllocationLedger {
  std::atomic<std::int64_t> n_taken = 0, device_bytes = 0, pinned_bytes = 0;

  void device(std::int64_t bytes) { note(device_bytes, bytes); }
  void pinned(std::int64_t bytes) { note(pinned_bytes, bytes); }

 private:
  void note(std::atomic<std::int64_t>& held, std::int64_t bytes) {
    held += bytes;
    if (bytes > 0) ++n_taken;
  }
};
inline AllocationLedger allocation_ledger;

}  // namespace detail

[[nodiscard]] inline AllocationCount allocation_count() {
  const detail::AllocationLedger& ledger = detail::allocation_ledger;
  return {.n_taken = ledger.n_taken, .device_bytes = ledger.device_bytes, .pinned_bytes = ledger.pinned_bytes};
}

}  // namespace gemma4::cuda

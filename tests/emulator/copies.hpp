// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

/// Copies to shared memory that nobody waits for at once, and the mbarriers that say when they have come. Until a copy
/// lands its target is 0xFF. `barrier` is an address in shared memory.
namespace gemma4::emulator {

/// The copy engine: n_byte, which complete on an mbarrier.
void start_bulk_copy(void* target, const void* source, std::uint32_t n_byte, std::uint32_t barrier);

/// cp.async of the running thread: 16 bytes, or zeros; groups; an arrival once all of them have come.
void start_copy_16(void* target, const void* source, bool valid);
void commit_copies();
void wait_for_copies(int n_pending);
void arrive_after_copies(std::uint32_t barrier);

void init_mbarrier(std::uint32_t barrier, int n_arrival);
void arrive_mbarrier(std::uint32_t barrier, std::uint32_t n_byte_expected);
void wait_mbarrier(std::uint32_t barrier, std::uint32_t parity);

/// For fibers.cpp and launch.cpp. Lands one bulk copy of the running block, where `must` is false perhaps; whether one
/// landed.
bool land_copy(bool must);
void begin_copies(int n_block, int n_thread);
void end_copies();  ///< fails where a bulk copy has not landed
[[nodiscard]] std::string who_waits_for_copies();

}  // namespace gemma4::emulator

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/resource.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>

#include "gemma4/error.hpp"

/// What the host has, and allocations that say for what they were when it is not enough.
namespace gemma4 {

/// An allocation that the host refused, or would only seem to grant.
class HostMemoryError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Bytes that this process may still take: what the kernel counts as available, swap included, the limit of its control
/// group, and its own limit of address space. The largest number where nothing says.
[[nodiscard]] inline std::int64_t host_bytes_available() {
  std::int64_t available = std::numeric_limits<std::int64_t>::max();
  std::int64_t memory = -1, swap = 0;
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    std::int64_t kib = 0;
    if (!(words >> name >> kib)) continue;
    if (name == "MemAvailable:") memory = kib * 1024;
    if (name == "SwapFree:") swap = kib * 1024;
  }
  if (memory >= 0) available = memory + swap;
  std::int64_t group = 0;
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    if (std::ifstream(path) >> group) available = std::min(available, group);
  }
  rlimit limit{};
  if (::getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
    std::int64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;  // of 4096 bytes, or more elsewhere: then less is left than this says
    const auto cap = static_cast<std::int64_t>(
        std::min<rlim_t>(limit.rlim_cur, static_cast<rlim_t>(std::numeric_limits<std::int64_t>::max())));
    available = std::min(available, std::max<std::int64_t>(0, cap - pages * 4096));
  }
  return available;
}

/// Runs make(), where `bytes` of memory are for `what`. Refused before it is tried where that is more than there is:
/// the kernel would grant it, and end the process when it is used.
/// @throws HostMemoryError that says what was asked for, and what there is
template <class TMake>
void allocate_for(const std::string& what, std::int64_t bytes, TMake&& make) {
  const auto refuse = [&](std::int64_t available) {
    throw HostMemoryError(concat(what, ": ", bytes, " B of memory asked for, available are ", available, " B"));
  };
  if (const std::int64_t available = host_bytes_available(); bytes > available) refuse(available);
  try {
    make();
  } catch (const std::bad_alloc&) {
    refuse(host_bytes_available());
  } catch (const std::length_error&) {
    refuse(host_bytes_available());
  }
}

}  // namespace gemma4

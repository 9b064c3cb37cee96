// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "cuda/device/nvtx.cuh"
#include "cuda/device/stream.cuh"

/// Where the time of an eager run goes: events around every range of the graph.
namespace gemma4::cuda {

/// What one name of range took, over all of its uses.
struct ProfileRow {
  std::string_view name;
  double us = 0;  ///< without the ranges inside it, so that the rows add up to the whole
  std::int64_t count = 0;
};

/// Records events; reads them when asked. Events between kernels keep them from overlapping, so that the sum is larger
/// than an unprofiled run takes; shares are what it is for. Not for captured launches: those have no time.
class Profile {
 public:
  /// Opens a range on the stream; close it by end(), innermost first.
  /// @param name outlives the profile
  std::size_t begin(const char* name, cudaStream_t stream) {
    if (events_.size() < 2 * (n_mark_ + 1)) {
      events_.emplace_back();
      events_.emplace_back();
      marks_.emplace_back();
    }
    marks_[n_mark_] = {.name = name, .parent = open_};
    open_ = static_cast<std::ptrdiff_t>(n_mark_);
    events_[2 * n_mark_].record(stream);
    return n_mark_++;
  }

  void end(std::size_t mark, cudaStream_t stream) {
    events_[2 * mark + 1].record(stream);
    open_ = marks_[mark].parent;
  }

  /// Waits for the last range and adds up. In order of first use.
  [[nodiscard]] std::vector<ProfileRow> rows() const {
    std::vector<double> self(n_mark_);
    for (std::size_t i = n_mark_; i-- > 0;) {
      events_[2 * i + 1].synchronize();
      const double us = events_[2 * i + 1].us_since(events_[2 * i]);
      self[i] += us;
      if (marks_[i].parent >= 0) self[static_cast<std::size_t>(marks_[i].parent)] -= us;
    }
    std::vector<ProfileRow> rows;
    for (std::size_t i = 0; i < n_mark_; ++i) {
      const std::string_view name = marks_[i].name;
      auto found = std::find_if(rows.begin(), rows.end(), [&](const ProfileRow& row) { return row.name == name; });
      if (found == rows.end()) found = rows.insert(rows.end(), {.name = name});
      found->us += self[i];
      ++found->count;
    }
    return rows;
  }

  /// Forgets what was recorded; the events are used again.
  void clear() {
    n_mark_ = 0;
    open_ = -1;
  }

 private:
  struct Mark {
    const char* name = "";
    std::ptrdiff_t parent = -1;
  };

  std::vector<Event> events_;
  std::vector<Mark> marks_;
  std::size_t n_mark_ = 0;
  std::ptrdiff_t open_ = -1;
};

/// A range of the graph: NVTX's, and the profile's where there is one.
class ProfiledRange {
 public:
  ProfiledRange(const char* name, Profile* profile, cudaStream_t stream)
      : nvtx_(name), profile_(profile), stream_(stream), mark_(profile != nullptr ? profile->begin(name, stream) : 0) {}
  ProfiledRange(const ProfiledRange&) = delete;
  ProfiledRange& operator=(const ProfiledRange&) = delete;
  ~ProfiledRange() {
    if (profile_ == nullptr) return;
    try {
      profile_->end(mark_, stream_);
    } catch (...) {  // a broken context shows at the next call; a destructor cannot throw
    }
  }

 private:
  NvtxRange nvtx_;
  Profile* profile_;
  cudaStream_t stream_;
  std::size_t mark_;
};

}  // namespace gemma4::cuda

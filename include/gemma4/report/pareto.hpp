// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "gemma4/error.hpp"

/// Which rows of a table of bytes and errors somebody would choose.
namespace gemma4 {

/// What a choice takes and what it costs.
struct CostPoint {
  std::string name;
  double bytes = 0;
  double error = 0;
};

/// For each point the name of one that takes no more bytes and has an error smaller by more than `noise`; of several
/// the one with the least error, and of equals the first. Empty: nobody beats it in both. An error that is no number
/// neither beats nor is beaten.
/// @throws std::invalid_argument for a negative noise
[[nodiscard]] inline std::vector<std::string> dominated_by(std::span<const CostPoint> points, double noise) {
  require(noise >= 0, "dominated_by: a noise of ", noise, ", need at least 0");
  std::vector<std::string> names(points.size());
  for (std::size_t i = 0; i < points.size(); ++i) {
    const CostPoint* best = nullptr;
    for (const CostPoint& other : points) {
      const bool beats = other.bytes <= points[i].bytes && other.error < points[i].error - noise;
      if (beats && (best == nullptr || other.error < best->error)) best = &other;
    }
    if (best != nullptr) names[i] = best->name;
  }
  return names;
}

}  // namespace gemma4

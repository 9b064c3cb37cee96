// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/cache_formats.hpp"
#include "gemma4/plan/cache_bytes.hpp"
#include "gemma4/plan/execution.hpp"
#include "gemma4/report/pareto.hpp"
#include "gemma4/ring_format.hpp"

/// What one row of an accuracy table is of: a cache format, and what else differs from the other rows.
namespace gemma4 {

///   CACHE[@ring=RING][@chunk=N][@off=SWITCH[+SWITCH...]]
///   bf16@chunk=512@off=split_k        the same cache in chunks of 512, keys not split: the noise of the method
///   tq4@ring=sim-int8                 rings of the sliding layers in int8
/// A chunk may be no longer than the run's. Parts come in this order.
struct AccuracyCase {
  CacheSpec cache = Bf16Format{};
  RingSpec ring = {};
  std::int64_t chunk = 0;  ///< 0: the run's
  std::vector<std::string> off = {};
  std::string as_given = {};  ///< the text that it was read from: tq4-peer and tq4-cut-raw-haar are one case
  bool operator==(const AccuracyCase& other) const {
    return cache == other.cache && ring == other.ring && chunk == other.chunk && off == other.off;
  }

  /// As it was given.
  [[nodiscard]] std::string name() const { return as_given.empty() ? canonical_name() : as_given; }
  [[nodiscard]] std::string canonical_name() const {
    std::string text = to_string(cache);
    if (ring) text += "@ring=" + to_string(ring);
    if (chunk > 0) text += "@chunk=" + std::to_string(chunk);
    for (std::size_t i = 0; i < off.size(); ++i) text += (i == 0 ? "@off=" : "+") + off[i];
    return text;
  }
};

/// @throws std::invalid_argument naming the part that was not understood
[[nodiscard]] inline AccuracyCase parse_accuracy_case(std::string_view name) {
  AccuracyCase result;
  result.as_given = name;
  const std::size_t end = std::min(name.find('@'), name.size());
  result.cache = parse_cache_spec(name.substr(0, end));
  std::string_view rest = name.substr(end);
  const auto take = [&](std::string_view word) -> std::string {
    if (!rest.starts_with(word)) return {};
    rest.remove_prefix(word.size());
    const std::size_t length = std::min(rest.find('@'), rest.size());
    const std::string value(rest.substr(0, length));
    require(!value.empty(), "case '", name, "': nothing behind ", word);
    rest.remove_prefix(length);
    return value;
  };
  if (const std::string ring = take("@ring="); !ring.empty()) result.ring = parse_ring_spec(ring);
  if (const std::string chunk = take("@chunk="); !chunk.empty()) {
    const auto [stop, error] = std::from_chars(chunk.data(), chunk.data() + chunk.size(), result.chunk);
    require(error == std::errc() && stop == chunk.data() + chunk.size() && result.chunk >= 1, "case '", name,
            "': a chunk of '", chunk, "', need a number of tokens from 1");
  }
  if (const std::string names = take("@off="); !names.empty()) {
    for (std::size_t at = 0; at <= names.size();) {
      const std::size_t length = std::min(names.find('+', at), names.size()) - at;
      result.off.push_back(names.substr(at, length));
      (void)execution_switch(result.off.back());
      at += length + 1;
    }
  }
  require(rest.empty(), "case '", name, "': '", rest,
          "' is not understood; a case reads CACHE[@ring=RING][@chunk=N][@off=SWITCH+SWITCH], in this order");
  return result;
}

/// The rows of `accuracy --shelf`: what a byte of cache buys. The first two are the noise of the method. Formats of K
/// and V in one that a build does not have are left out: shelf_cases() says which.
inline constexpr std::array kShelf = {
    // The same cache another way, and the baseline in the reference alone.
    "bf16@chunk=512@off=split_k", "bf16@chunk=1000", "f32", "bf16",
    // Formats with kernels.
    "tq4", "tq4-peer", "tq4-raw", "tq4-k4v3", "tq4-k3v3", "kv16r16", "kv6r6", "kv6r5", "kv5r5", "kv5r4", "kv4r4",
    "kv4r3", "kv3r3",
    // K and V apart.
    "sim-k2v2-had", "sim-k3v3-had", "sim-k4v4-had", "sim-k5v5-had", "sim-k6v6-had", "sim-k7v7-had", "sim-k8v8-had",
    "sim-k3v2-had", "sim-k2v3-had", "sim-k4v2-had", "sim-k2v4-had", "sim-k4v3-had", "sim-k3v4-had", "sim-k5v3-had",
    "sim-k3v5-had", "sim-k5v4-had", "sim-k4v5-had", "sim-k6v4-had", "sim-k4v6-had", "sim-k8v4-had", "sim-k4v8-had",
    "sim-k4v4",
    // What others store, plain and rotated, and each with a tail and with a sink.
    "sim-int8", "sim-int8-tail128", "sim-int8-sink4", "sim-int8-had", "sim-int8-had-tail128", "sim-int8-had-sink4",
    "sim-q8_0", "sim-q8_0-tail128", "sim-q8_0-sink4", "sim-q8_0-had", "sim-q8_0-had-tail128", "sim-q8_0-had-sink4",
    "sim-q4_0", "sim-q4_0-tail128", "sim-q4_0-sink4", "sim-q4_0-had", "sim-q4_0-had-tail128", "sim-q4_0-had-sink4",
    "sim-k4v4-had-tail128", "sim-k4v4-had-sink4", "sim-k5v5-had-tail128", "sim-k5v5-had-sink4",
    // Trellis codes.
    "sim-t4l8-had", "sim-t4l9-had", "sim-t4l10-had", "sim-t3l8-had", "sim-t3l9-had", "sim-t3l10-had",
    "sim-t4l10-had-tail128", "sim-t4l10-had-sink4",
    // Scales of tokens and channels.
    "sim-kvarn-k4v4", "sim-kvarn-k4v2",
    // Rings.
    "bf16@ring=sim-int8", "bf16@ring=sim-int8-had", "bf16@ring=sim-k8v8-had", "bf16@ring=sim-k6v6-had",
    "tq4@ring=sim-int8", "tq4@ring=sim-k6v6-had", "kv5r4@ring=sim-int8", "kv5r4@ring=sim-k6v6-had"};

struct ShelfCases {
  std::vector<std::string> cases;
  std::vector<std::string> unknown;  ///< formats of K and V in one that this build has not
};

/// @param on_device f32 and KVarN exist in the reference alone
[[nodiscard]] inline ShelfCases shelf_cases(bool on_device) {
  ShelfCases shelf;
  for (const std::string_view name : kShelf) {
    if (on_device && (name == "f32" || name.starts_with("sim-kvarn"))) continue;
    bool is_known = true;
    if (name.starts_with("kv")) {
      try {
        (void)parse_accuracy_case(name);
      } catch (const std::invalid_argument&) {
        is_known = false;
      }
    }
    (is_known ? shelf.cases : shelf.unknown).emplace_back(name);
  }
  return shelf;
}

/// One case of a table: the bytes of its caches and its divergence from the base, and what the others make of it.
struct CaseCost {
  AccuracyCase of;
  CacheBytes idea;
  std::int64_t context = 1;
  double kl = 0;
  double noise = 0;               ///< of the table
  std::string dominated_by = {};  ///< a case that takes no more bytes and diverges less by more than the noise

  [[nodiscard]] double full_bytes_per_token() const {
    return static_cast<double>(idea.full) / static_cast<double>(context);
  }
};

/// Fills in noise and dominated_by. The noise is the largest divergence of a case that differs from the base in how it
/// is run and in nothing else; 0 without one. Bytes are those of both kinds of caches.
inline void judge_costs(std::vector<CaseCost>& costs, const AccuracyCase& base) {
  double noise = 0;
  std::vector<CostPoint> points;
  for (const CaseCost& cost : costs) {
    const bool is_base_otherwise = cost.of.cache == base.cache && cost.of.ring == base.ring && cost.of != base;
    if (is_base_otherwise) noise = std::max(noise, cost.kl);
    points.push_back({cost.of.name(), static_cast<double>(cost.idea.full + cost.idea.sliding), cost.kl});
  }
  const std::vector<std::string> names = dominated_by(points, noise);
  for (std::size_t i = 0; i < costs.size(); ++i) costs[i].noise = noise, costs[i].dominated_by = names[i];
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>

#include "gemma4/error.hpp"
#include "gemma4/quantisers.hpp"

/// What the rings of the sliding layers hold: the storage type that goes with the cache (bf16; f32 beside an f32
/// cache), or in that what a simulated format reads back. A chunk attends to its own quantised K and V too, as later
/// tokens will: with a window shorter than the chunk its keys would otherwise be exact nearly all.
namespace gemma4 {

/// Nothing: the storage type alone.
using RingSpec = std::optional<AnySimulated>;

/// bf16, or a simulated format without a tail or sink: a ring has neither end.
/// @throws std::invalid_argument naming what was not understood
[[nodiscard]] inline RingSpec parse_ring_spec(std::string_view name) {
  if (name == "bf16") return std::nullopt;
  const RingSpec ring = ShippedSimulatedFormats::parse(name);
  require(ring.has_value(), "ring '", name, "' is not bf16 or a simulated format, as in sim-int8 or sim-k6v6-had");
  require(std::visit([](const auto& format) { return format.exact_tokens() == 0; }, *ring), "ring '", name,
          "': a ring has no tail and no sink");
  return ring;
}

[[nodiscard]] inline std::string to_string(const RingSpec& ring) {
  return ring ? std::visit([](const auto& format) { return format.name(); }, *ring) : "bf16";
}

/// The same format with another seed of everything random in it.
[[nodiscard]] inline RingSpec with_seed(const RingSpec& ring, std::uint64_t seed) {
  if (!ring) return ring;
  return std::visit([&](const auto& format) { return AnySimulated(format.with_seed(seed)); }, *ring);
}

}  // namespace gemma4

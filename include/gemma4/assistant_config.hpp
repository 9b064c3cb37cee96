// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "gemma4/config.hpp"
#include "gemma4/error.hpp"

/// The shape of Gemma 4's drafter. Source of the 31B's: derived from the size of the published file (0.5 B parameters),
/// not read in it.
namespace gemma4 {

/// A drafter: a few layers without keys and values of their own, which read the caches of a target's last layers.
struct AssistantConfig {
  ModelConfig own;  ///< its layers; head_dim, KV heads, RoPE and window are those of the caches it reads.
                    ///< Of softcap it makes no use: its logits have none
  std::int64_t hidden_target = 0;  ///< width of the target's residual stream
  bool operator==(const AssistantConfig&) const = default;

  /// Two vectors of the target's width go in: a token's embedding, and the state before it.
  [[nodiscard]] std::int64_t n_input() const { return 2 * hidden_target; }
};

/// The last layer of the target of the kind that a drafter's sliding, or full, layers are: the one whose cache they
/// read. @throws std::invalid_argument where the target has none
[[nodiscard]] inline std::int64_t last_layer_of_kind(const ModelConfig& target, bool sliding) {
  for (std::int64_t layer = target.n_layer() - 1; layer >= 0; --layer) {
    if (target.sliding_layer(layer) == sliding) return layer;
  }
  require(false, "drafter: it has ", sliding ? "sliding" : "full", " layers, the target has none");
  return -1;
}

namespace detail {

/// Three sliding layers and a full one over the caches of `target`.
[[nodiscard]] inline AssistantConfig assistant_of(const ModelConfig& target, std::int64_t hidden,
                                                  std::int64_t ffn_hidden) {
  AssistantConfig config{.own = target, .hidden_target = target.hidden};
  config.own.hidden = hidden;
  config.own.ffn_hidden = ffn_hidden;
  config.own.is_sliding = {1, 1, 1, 0};
  return config;
}

}  // namespace detail

/// The drafter of Gemma 4 31B: hidden 1024 and FFN 8192 with the target's 32 heads give the published 0.5 B.
[[nodiscard]] inline AssistantConfig gemma4_31b_assistant() {
  return detail::assistant_of(gemma4_31b(), 1024, 8192);
}

/// The trained drafter of the nano model.
[[nodiscard]] inline AssistantConfig gemma4_nano_assistant() {
  return detail::assistant_of(gemma4_nano(), 256, 512);
}

/// A drafter's shape by name (31b-assistant, nano-assistant); nothing for any other.
[[nodiscard]] inline std::optional<AssistantConfig> assistant_from_name(std::string_view name) {
  if (name == "31b-assistant") return gemma4_31b_assistant();
  if (name == "nano-assistant") return gemma4_nano_assistant();
  return std::nullopt;
}

}  // namespace gemma4

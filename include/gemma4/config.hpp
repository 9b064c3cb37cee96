// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"

/// The shape of a dense Gemma 4 decoder. Source of the 31B constants: the published model configuration of Gemma 4 31B
/// (HuggingFace `config.json`, text_config) and the GGUF metadata that llama.cpp's converter derives from it.
namespace gemma4 {

/// One of the two kinds of attention layer.
struct AttentionConfig {
  std::int64_t head_dim = 0;
  std::int64_t n_head_kv = 0;
  double rope_theta = 0;
  /// Rotated pairs (i, i + head_dim / 2), i < rope_pairs, with frequency rope_theta^(-2 i / head_dim); the other
  /// coordinates pass through. head_dim / 2 on sliding layers; an eighth of head_dim (partial 0.25, proportional) on
  /// full.
  std::int64_t rope_pairs = 0;
  bool operator==(const AttentionConfig&) const = default;
};

struct ModelConfig {
  std::int64_t vocab = 0;
  std::int64_t hidden = 0;
  std::int64_t ffn_hidden = 0;
  std::int64_t n_head = 0;
  std::int64_t window = 0;   ///< keys that a query of a sliding layer sees, itself included
  std::int64_t context = 0;  ///< positions that the model was trained for
  float rms_epsilon = 1e-6f;
  float softcap = 30.0f;  ///< logits = softcap * tanh(raw / softcap)
  AttentionConfig sliding;
  AttentionConfig full;                  ///< K and V come from one projection, unless the file has a v_proj
  std::vector<std::uint8_t> is_sliding;  ///< [n_layer], 1 = sliding, 0 = full
  bool operator==(const ModelConfig&) const = default;

  /// Scores are not scaled: q and k are RMS-normalised with learned weights.
  static constexpr float kAttentionScale = 1.0f;

  [[nodiscard]] std::int64_t n_layer() const { return static_cast<std::int64_t>(is_sliding.size()); }
  [[nodiscard]] bool sliding_layer(std::int64_t layer) const {
    return is_sliding.at(static_cast<std::size_t>(layer)) != 0;
  }
  [[nodiscard]] const AttentionConfig& attention(std::int64_t layer) const {
    return sliding_layer(layer) ? sliding : full;
  }
  [[nodiscard]] std::int64_t n_full_layer() const {
    std::int64_t count = 0;
    for (const std::uint8_t flag : is_sliding) count += flag == 0;
    return count;
  }
  /// The tied embedding is multiplied by this when it is looked up.
  [[nodiscard]] float embedding_scale() const { return std::sqrt(static_cast<float>(hidden)); }
};

/// `n_layer` layers in Gemma's pattern: five sliding, one full, and so on.
[[nodiscard]] inline std::vector<std::uint8_t> five_to_one_pattern(std::int64_t n_layer) {
  std::vector<std::uint8_t> pattern(static_cast<std::size_t>(n_layer));
  for (std::size_t layer = 0; layer < pattern.size(); ++layer) pattern[layer] = (layer + 1) % 6 != 0;
  return pattern;
}

/// Gemma 4 31B.
[[nodiscard]] inline ModelConfig gemma4_31b() {
  return {.vocab = 262144,
          .hidden = 5376,
          .ffn_hidden = 21504,
          .n_head = 32,
          .window = 1024,
          .context = 262144,
          .rms_epsilon = 1e-6f,
          .softcap = 30.0f,
          .sliding = {.head_dim = 256, .n_head_kv = 16, .rope_theta = 1e4, .rope_pairs = 128},
          .full = {.head_dim = 512, .n_head_kv = 4, .rope_theta = 1e6, .rope_pairs = 64},
          .is_sliding = five_to_one_pattern(60)};
}

/// Gemma 4 12B: the same architecture; one head of keys and values on the full layers, for sixteen of queries. Source:
/// the GGUF metadata of published files of google/gemma-4-12B-it.
[[nodiscard]] inline ModelConfig gemma4_12b() {
  return {.vocab = 262144,
          .hidden = 3840,
          .ffn_hidden = 15360,
          .n_head = 16,
          .window = 1024,
          .context = 262144,
          .rms_epsilon = 1e-6f,
          .softcap = 30.0f,
          .sliding = {.head_dim = 256, .n_head_kv = 8, .rope_theta = 1e4, .rope_pairs = 128},
          .full = {.head_dim = 512, .n_head_kv = 1, .rope_theta = 1e6, .rope_pairs = 64},
          .is_sliding = five_to_one_pattern(48)};
}

/// The trained nano model of this project: the same architecture with 28.6 M parameters.
[[nodiscard]] inline ModelConfig gemma4_nano() {
  return {.vocab = 4096,
          .hidden = 512,
          .ffn_hidden = 768,
          .n_head = 8,
          .window = 512,
          .context = 131072,
          .rms_epsilon = 1e-6f,
          .softcap = 30.0f,
          .sliding = {.head_dim = 64, .n_head_kv = 4, .rope_theta = 1e4, .rope_pairs = 32},
          .full = {.head_dim = 256, .n_head_kv = 1, .rope_theta = 1e6, .rope_pairs = 32},
          .is_sliding = five_to_one_pattern(12)};
}

/// The random six-layer model of the golden files.
[[nodiscard]] inline ModelConfig gemma4_tiny() {
  return {.vocab = 1024,
          .hidden = 256,
          .ffn_hidden = 512,
          .n_head = 4,
          .window = 32,
          .context = 131072,
          .rms_epsilon = 1e-6f,
          .softcap = 30.0f,
          .sliding = {.head_dim = 64, .n_head_kv = 2, .rope_theta = 1e4, .rope_pairs = 32},
          .full = {.head_dim = 128, .n_head_kv = 1, .rope_theta = 1e6, .rope_pairs = 16},
          .is_sliding = five_to_one_pattern(6)};
}

/// Refuses a config that no backend can run, naming the field and its value. The upper limits are far from any model's,
/// and such that no number of bytes made of them reaches 2^63: the caches of 2^12 layers, 2^12 heads of 512 and 2^24
/// positions take 2^60.
inline void require_config(const ModelConfig& config) {
  const auto positive = [](const char* name, std::int64_t value, std::int64_t most) {
    require(value > 0, "config: ", name, " is ", value, ", need at least 1");
    require(value <= most, "config: ", name, " is ", value, ", need at most ", most);
  };
  positive("vocab", config.vocab, std::int64_t{1} << 24);
  positive("hidden", config.hidden, std::int64_t{1} << 20);
  positive("ffn_hidden", config.ffn_hidden, std::int64_t{1} << 22);
  positive("n_head", config.n_head, std::int64_t{1} << 12);
  positive("context", config.context, std::int64_t{1} << 24);
  positive("n_layer", config.n_layer(), std::int64_t{1} << 12);
  require(config.rms_epsilon > 0, "config: rms_epsilon is ", config.rms_epsilon, ", need a positive number");
  require(config.softcap > 0, "config: softcap is ", config.softcap, ", need a positive number");
  for (const bool sliding : {true, false}) {
    const char* kind = sliding ? "sliding" : "full";
    const AttentionConfig& attention = sliding ? config.sliding : config.full;
    if (config.n_full_layer() == (sliding ? config.n_layer() : 0)) continue;  // no layer of this kind
    if (sliding) positive("window", config.window, std::int64_t{1} << 24);
    require(is_power_of_two(attention.head_dim) && attention.head_dim >= 64 && attention.head_dim <= 512,
            "config: ", kind, " head_dim is ", attention.head_dim, ", need a power of two from 64 to 512");
    require(attention.n_head_kv > 0 && config.n_head % attention.n_head_kv == 0, "config: n_head ", config.n_head,
            " is not a multiple of ", kind, " n_head_kv ", attention.n_head_kv);
    require(attention.rope_theta > 1, "config: ", kind, " rope_theta is ", attention.rope_theta, ", need more than 1");
    require(attention.rope_pairs >= 0 && attention.rope_pairs <= attention.head_dim / 2, "config: ", kind,
            " rope_pairs is ", attention.rope_pairs, ", need 0 to head_dim / 2 = ", attention.head_dim / 2);
  }
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <rapidcheck.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/synthetic/synthetic_model.hpp"
#include "tests/support/temp_dir.hpp"

/// Small random models with every structural freedom of the architecture.
namespace gemma4::testkit {

/// A random config: layer pattern, heads, head_dim, window.
[[nodiscard]] inline ModelConfig any_config() {
  const auto head_dim = [] { return *rc::gen::element<std::int64_t>(64, 128, 256); };
  ModelConfig config = gemma4_tiny();
  config.vocab = 300;
  config.context = 4096;
  config.hidden = 256;
  config.ffn_hidden = 256;
  config.n_head = *rc::gen::weightedElement<std::int64_t>({{3, 4}, {1, 16}});
  config.window = *rc::gen::inRange<std::int64_t>(1, 40);
  config.is_sliding = *rc::gen::container<std::vector<std::uint8_t>>(3, rc::gen::element<std::uint8_t>(0, 1));
  config.sliding.head_dim = head_dim();
  config.sliding.n_head_kv = *rc::gen::element<std::int64_t>(1, 2, 4);
  config.sliding.rope_pairs = config.sliding.head_dim / 2;
  config.full.head_dim = head_dim();
  config.full.n_head_kv = *rc::gen::element<std::int64_t>(1, 2, 4);
  config.full.rope_pairs = config.full.head_dim / 8;
  return config;
}

/// Random weights that carry differences on instead of averaging them away: no common part in the values, branches of
/// equal weight 1 / sqrt(n_layer), sharp scores. An error in one step shows in the logits, unlike with the defaults,
/// which are as tame as a trained model.
[[nodiscard]] inline SyntheticOptions sensitive_weights(const ModelConfig& config, std::uint64_t seed) {
  const auto n_layer = static_cast<double>(config.n_layer());
  return {.seed = seed,
          .score_deviation = 2.5,
          .attention_share = 1,
          .mlp_share = n_layer / (n_layer + 1),
          .common_share = 0};
}

/// A model file of a config with seeded random weights, bound.
struct SmallModel {
  explicit SmallModel(const ModelConfig& config, const SyntheticOptions& options) {
    write_synthetic_model(directory.file("model.gguf"), config, options);
    file.emplace(GgufFile::open(directory.file("model.gguf")));
    weights = weights_from_gguf(*file);
  }
  explicit SmallModel(const ModelConfig& config, std::uint64_t seed)
      : SmallModel(config, sensitive_weights(config, seed)) {}
  TempDir directory;
  std::optional<GgufFile> file;
  ModelWeights weights;
};

[[nodiscard]] inline std::vector<std::int32_t> any_tokens(const ModelConfig& config, int count) {
  return *rc::gen::container<std::vector<std::int32_t>>(
      static_cast<std::size_t>(count), rc::gen::inRange<std::int32_t>(0, static_cast<std::int32_t>(config.vocab)));
}

}  // namespace gemma4::testkit

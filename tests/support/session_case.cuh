// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <rapidcheck.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/session.cuh"
#include "gemma4/sampler.hpp"

/// What tests of sessions draw and compare.
namespace gemma4::testkit {

/// Greedy, or any way to sample.
[[nodiscard]] inline SamplerSettings any_settings() {
  SamplerSettings settings;
  settings.temperature = *rc::gen::element(0.0f, 0.7f, 1.5f);
  settings.top_k = *rc::gen::element(0, 20);
  settings.top_p = *rc::gen::element(1.0f, 0.9f);
  settings.seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  return settings;
}

[[nodiscard]] inline std::vector<float> next_logits(const cuda::Session& session) {
  std::vector<float> logits(static_cast<std::size_t>(session.backend().config().vocab));
  session.backend().copy_logits(0, logits);
  return logits;
}

[[nodiscard]] inline cuda::BackendOptions small_options(const std::string& cache, std::int64_t context = 256) {
  return {.cache = parse_cache_spec(cache), .context = context, .max_chunk = 64, .n_logit_row = 1};
}

/// What a sequence comes to: its tokens, and the bits of what would be next.
struct Outcome {
  std::vector<std::int32_t> tokens;
  std::vector<float> logits;
  bool operator==(const Outcome&) const = default;
};

[[nodiscard]] inline Outcome outcome(const cuda::Session& session) {
  return {{session.tokens().begin(), session.tokens().end()}, next_logits(session)};
}

/// Four layers of both kinds, a window that wraps soon.
[[nodiscard]] inline ModelConfig small_config() {
  ModelConfig config = gemma4_tiny();
  config.window = 9;
  config.is_sliding = {1, 0, 1, 0};
  return config;
}

}  // namespace gemma4::testkit

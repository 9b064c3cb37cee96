// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <rapidcheck.h>

#include <cstddef>
#include <cstdint>
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

}  // namespace gemma4::testkit

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cuda/device/check.cuh"
#include "cuda/session.cuh"
#include "gemma4/cache_formats.hpp"
#include "gemma4/model/assistant_weights.hpp"
#include "tests/support/micro_drafter.hpp"
#include "tests/support/session_case.cuh"
#include "tests/support/small_model.hpp"

/// Sessions that draft, and what drafters on the device propose.
namespace gemma4::testkit {

[[nodiscard]] inline cuda::BackendOptions draft_options(const std::string& cache, std::int64_t max_draft,
                                                        std::int64_t context = 256,
                                                        bool sliding_rows = true,
                                                        const cuda::PackedAssistant* assistant = nullptr) {
  return {.cache = parse_cache_spec(cache),
          .context = context,
          .max_chunk = 64,
          .max_draft = max_draft,
          .sliding_rows = sliding_rows,
          .assistant = assistant};
}

/// Whether two sequences have the same tokens, and the same bits of what would be next.
[[nodiscard]] inline testing::AssertionResult same(const cuda::Session& drafting, const cuda::Session& plain) {
  const auto found = drafting.tokens(), expected = plain.tokens();
  const auto [at, other] = std::ranges::mismatch(found, expected);
  if (at != found.end() || other != expected.end()) {
    return testing::AssertionFailure() << "texts of " << found.size() << " and " << expected.size()
                                       << " tokens differ from token " << at - found.begin() << " on";
  }
  const std::vector<float> logits = next_logits(drafting), others = next_logits(plain);
  std::size_t n_different = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) n_different += logits[i] == others[i] ? 0 : 1;
  if (n_different == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure() << n_different << " of " << logits.size() << " logits differ behind "
                                     << found.size() << " equal tokens, the first " << logits[0] << " and "
                                     << others[0];
}

/// The true tokens by position, some of them replaced by others.
[[nodiscard]] inline std::vector<std::int32_t> spoiled(std::span<const std::int32_t> truth, std::int64_t size,
                                                       unsigned percent, std::uint64_t seed, std::int64_t vocab) {
  std::mt19937_64 random(seed);
  std::vector<std::int32_t> script(truth.begin(), truth.end());
  script.resize(static_cast<std::size_t>(size), 0);
  for (std::int32_t& token : script) {
    if (random() % 100 < percent) token = static_cast<std::int32_t>((static_cast<std::int64_t>(token) + 1) % vocab);
  }
  return script;
}

/// What steps of `n_draft` drafts by a script make of a text that is known to be `truth`.
[[nodiscard]] inline draft::Counts by_hand(std::span<const std::int32_t> truth, const std::vector<std::int32_t>& script,
                                           std::int64_t first, std::int64_t n_draft) {
  draft::Counts counts;
  for (std::int64_t at = first; at < static_cast<std::int64_t>(truth.size());) {
    std::int64_t n_accepted = 0;
    const auto agrees = [&](std::int64_t place) {
      return place < static_cast<std::int64_t>(truth.size()) &&
             truth[static_cast<std::size_t>(place)] == script[static_cast<std::size_t>(place)];
    };
    while (n_accepted < n_draft && agrees(at + 1 + n_accepted)) ++n_accepted;
    counts.add(n_draft, n_accepted);
    at += n_accepted + 1;
  }
  return counts;
}

/// A small model and a small drafter for it, on the device; its weights are as sensitive as the model's.
struct DraftedModel {
  /// @param more_heads times as many query heads in the drafter
  explicit DraftedModel(const ModelConfig& config, std::uint64_t seed = 4, std::int64_t more_heads = 1)
      : small(config, seed),
        drafter(drafter_config(config, more_heads),
                sensitive_weights(drafter_config(config, more_heads).own, seed + 1)),
        packed(cuda::load_model(*small.file)),
        assistant(cuda::load_assistant(*drafter.file, config)) {}

  [[nodiscard]] static AssistantConfig drafter_config(const ModelConfig& target, std::int64_t more_heads) {
    AssistantConfig config = micro_drafter_config(target);
    config.own.n_head *= more_heads;
    return config;
  }

  SmallModel small;
  MicroDrafter drafter;
  cuda::PackedModel packed;
  cuda::PackedAssistant assistant;
};

/// What an assistant proposes behind the token that the target's logits name.
struct Drafts {
  std::vector<std::int32_t> tokens;  ///< the target's, and the drafts
  std::vector<float> logits;         ///< [n_draft, vocab]
  bool operator==(const Drafts&) const = default;
};

/// Of the sequence as it stands, which then goes no further: a prompt or a reset must follow.
/// @param token to stand behind it; none: the likeliest
[[nodiscard]] inline Drafts drafts_of(cuda::Backend& backend, std::int64_t n_draft,
                                      std::optional<std::int32_t> token = std::nullopt) {
  const auto vocab = static_cast<std::size_t>(backend.config().vocab);
  if (token) {
    std::vector<float> logits(vocab, 0.0f);
    logits[static_cast<std::size_t>(*token)] = 1.0f;
    backend.set_logits(logits);
  }
  backend.sample({});
  backend.propose(n_draft);
  Drafts drafts{.tokens = {}, .logits = std::vector<float>(static_cast<std::size_t>(n_draft) * vocab)};
  backend.stream().synchronize();
  cuda::check(cudaMemcpy(drafts.logits.data(), backend.drafting().assistant()->logits(),
                         drafts.logits.size() * sizeof(float), cudaMemcpyDeviceToHost),
              "copy of the logits of a draft");
  cuda::DraftState state;
  cuda::check(cudaMemcpy(&state, backend.drafting().state(), sizeof(state), cudaMemcpyDeviceToHost), "copy of a draft");
  drafts.tokens.assign(state.tokens, state.tokens + n_draft + 1);
  return drafts;
}

}  // namespace gemma4::testkit

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "gemma4/model/model.hpp"
#include "gemma4/session/sequence_store.hpp"
#include "tests/support/toy_cache.hpp"

namespace gemma4::testkit {

inline constexpr std::uint64_t kToyModel = 77;  ///< its model hash

/// A toy backend, its model, its tokens and its store.
struct ToySession {
  explicit ToySession(const ToyOptions& options, const CheckpointPolicy& policy = {.interval = 16})
      : backend(options), model(backend), store(model, policy) {}
  ToySession(const ToySession&) = delete;
  ToySession& operator=(const ToySession&) = delete;

  /// In passes of at most `chunk` tokens, with logits of the last.
  void prefill(std::span<const std::int32_t> prompt, std::int64_t chunk) {
    if (prompt.empty()) return;
    tokens.insert(tokens.end(), prompt.begin(), prompt.end());
    model.prefill(prompt, chunk, [&](std::int64_t) { store.noted(); });
  }
  void rewind(std::int64_t to) {
    store.rewind(tokens, to);
    tokens.resize(static_cast<std::size_t>(to));
    backend.poison();
  }
  void save(const std::filesystem::path& path) {
    std::vector<float> logits(static_cast<std::size_t>(ToyCache::kVocab));
    if (!tokens.empty()) backend.copy_logits(0, logits);
    store.save(path, {.model_hash = kToyModel,
                      .sampler = {.temperature = 0.5f, .top_k = 7, .top_p = 0.25f, .seed = 9},
                      .note = "as it was",
                      .tokens = tokens,
                      .logits = tokens.empty() ? std::vector<float>{} : logits});
  }
  SessionInfo restore(const SessionFile& file, std::uint64_t model_hash = kToyModel) {
    SessionInfo info = store.restore(file, model_hash);
    tokens = info.tokens;
    backend.poison();
    return info;
  }
  [[nodiscard]] std::vector<float> logits() const {
    std::vector<float> out(static_cast<std::size_t>(ToyCache::kVocab));
    backend.copy_logits(0, out);
    return out;
  }
  /// Logits of each of `next`, token by token.
  std::vector<float> go_on(std::span<const std::int32_t> next) {
    std::vector<float> all;
    for (const std::int32_t token : next) {
      model.decode(token);
      tokens.push_back(token);
      store.noted();
      const std::vector<float> row = logits();
      all.insert(all.end(), row.begin(), row.end());
    }
    return all;
  }

  ToyCache backend;
  Model<ToyCache> model;
  SequenceStore<ToyCache> store;
  std::vector<std::int32_t> tokens;
};

/// Tokens that do not repeat soon.
[[nodiscard]] inline std::vector<std::int32_t> toy_tokens(std::int64_t count, std::int32_t seed = 1) {
  std::vector<std::int32_t> tokens;
  for (std::int64_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<std::int32_t>((i * 31 + seed * (i / 7 + 3)) % ToyCache::kVocab));
  }
  return tokens;
}

}  // namespace gemma4::testkit

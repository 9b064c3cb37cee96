// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <span>
#include <vector>

#include "gemma4/model/model.hpp"
#include "reference/backend.hpp"

/// The residual stream of a chunk between the layers, and what one layer makes of it by itself: an error of a layer is
/// seen where it is made, however much the layers above make of it.
namespace gemma4::testkit {

using Layers = std::vector<std::vector<float>>;  ///< the residual stream [n_token, hidden] before or after each layer

/// The residual stream after each layer, beginning with that after the embedding.
template <Backend TBackend>
[[nodiscard]] Layers stream_of(TBackend& backend, std::span<const std::int32_t> tokens) {
  const ModelConfig& config = backend.config();
  Layers stream;
  const auto note = [&] {
    backend.copy_residual(stream.emplace_back(tokens.size() * static_cast<std::size_t>(config.hidden)));
  };
  backend.reset();
  backend.embed(tokens, 0);
  note();
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    backend.project_qkv(layer), backend.attend(layer), backend.project_output(layer);
    backend.gate_up(layer), backend.down(layer);
    note();
  }
  return stream;
}

/// `stream` moved by `noise` of each row's length, in a random direction.
inline void add_noise(std::span<float> stream, std::int64_t hidden_in, double noise, std::mt19937& random) {
  const auto hidden = static_cast<std::size_t>(hidden_in);
  std::normal_distribution<double> normal;
  for (std::size_t row = 0; row < stream.size(); row += hidden) {
    const double square = std::inner_product(&stream[row], &stream[row] + hidden, &stream[row], 0.0);
    const double deviation = noise * std::sqrt(square / static_cast<double>(hidden));
    for (std::size_t i = row; i < row + hidden; ++i) stream[i] += static_cast<float>(deviation * normal(random));
  }
}

/// What each layer of the reference makes of the stream before it, moved by `noise` of each row's length.
[[nodiscard]] inline Layers layer_by_layer(reference::Backend<float>& backend, std::span<const std::int32_t> tokens,
                                           const Layers& before, double noise, std::uint32_t seed) {
  const ModelConfig& config = backend.config();
  std::mt19937 random(seed);
  Layers after;
  backend.reset();
  backend.embed(tokens, 0);
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    std::vector<float> x = before[static_cast<std::size_t>(layer)];
    add_noise(x, config.hidden, noise, random);
    backend.set_residual(x);
    backend.project_qkv(layer), backend.attend(layer), backend.project_output(layer);
    backend.gate_up(layer), backend.down(layer);
    backend.copy_residual(after.emplace_back(x.size()));
  }
  return after;
}

/// Logits [n_token, vocab] of the chunk that is in the backend, its layers done.
template <Backend TBackend>
[[nodiscard]] std::vector<float> logits_of_chunk(TBackend& backend, std::size_t n_token) {
  const auto vocab = static_cast<std::size_t>(backend.config().vocab);
  std::vector<std::int64_t> rows(n_token);
  std::iota(rows.begin(), rows.end(), 0);
  backend.lm_head(rows);
  std::vector<float> logits(n_token * vocab);
  for (std::size_t t = 0; t < n_token; ++t) {
    backend.copy_logits(static_cast<std::int64_t>(t), std::span(logits).subspan(t * vocab, vocab));
  }
  return logits;
}

}  // namespace gemma4::testkit

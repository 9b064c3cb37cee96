// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cuda/backend.cuh"
#include "gemma4/model/model.hpp"
#include "reference/backend.hpp"
#include "tests/support/layer_streams.hpp"
#include "tests/support/model_logits.hpp"

/// A model in both rooms, and how far its logits may be apart.
namespace gemma4::testkit {

/// How far logits may be apart, relative to their length. A product with 8-bit activations adds an error of s /
/// sqrt(12) with s = max / 127 of 32 values, max about 2.5 of their deviation: 0.6 % of the product. bf16 adds 0.2 % a
/// rounding. Norms keep relative errors; a branch of the residual stream has three products and some six roundings on
/// its way, sqrt(3 * 0.6^2 + 6 * 0.2^2) = 1.1 %. Scores deviate by s = 2.5: an error of 1 % in q and in k moves them by
/// 0.035, and with them the weights by 3.5 % each, the attended value by at most as much. Three to six layers of two
/// branches, each 1 / sqrt(n) of the stream, then come to some 4 %; logits have one product more. The worst of some
/// 10000 rows lies at two deviations or less of its own error, which is a sum of hundreds of terms: 10 %.
inline constexpr double kRounding = 0.10;

/// A TQ4 cache makes more of it: a coordinate that moves by e deviations crosses a boundary with probability e / step,
/// step being that of the codebook in deviations, and then its level moves by a step. So K and V are off by
/// sqrt(e * step) of their length: with e = 1 % and 4 bits (step 0.3 where most values are) 5 %, with 2 bits (step 1)
/// 10 %, and scores by 2.5 times as much. Where all tokens are one, as in shrunk examples, no average over keys lessens
/// it: three and a half times the bound of bf16, and six. That is loose: it finds a wrong path, not a small error.
/// Small ones show where each layer is held by itself (below), in the goldens, and in each attention kernel's own
/// tests.
[[nodiscard]] inline double rounding_of(const std::string& cache) {
  return cache == "bf16" ? kRounding : cache == "tq4-k3v2" ? 6 * kRounding : 3.5 * kRounding;
}

/// A model of the host on the device, and a backend of each room over it.
struct BothRooms {
  BothRooms(const ModelWeights& weights, const GgufFile& file, const cuda::BackendOptions& options,
            const cuda::LoadOptions& load = {})
      : packed(weights, model_tensors(file), load),
        device(packed, options),
        reference(weights, {.cache = options.cache, .context = options.context, .max_chunk = options.max_chunk}) {}
  cuda::PackedModel packed;
  cuda::Backend device;
  reference::Backend<float> reference;
};

/// How far the worst row of the reference's logits goes where each layer's stream is moved by 1 % of its length.
[[nodiscard]] inline double moved_by_noise(reference::Backend<float>& backend, std::span<const std::int32_t> tokens,
                                           const std::vector<float>& expected) {
  const ModelConfig& config = backend.config();
  double moved = 0;
  for (const std::uint32_t seed : {1u, 2u}) {
    std::mt19937 random(seed);
    Model<reference::Backend<float>> model(backend);
    model.reset();
    std::vector<std::int64_t> rows(tokens.size());
    std::iota(rows.begin(), rows.end(), 0);
    model.forward(tokens, rows, [&](std::int64_t) {
      std::vector<float> stream(tokens.size() * static_cast<std::size_t>(config.hidden));
      backend.copy_residual(stream);
      add_noise(stream, config.hidden, 0.01, random);
      backend.set_residual(stream);
    });
    const auto vocab = static_cast<std::size_t>(config.vocab);
    std::vector<float> logits(expected.size());
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      backend.copy_logits(static_cast<std::int64_t>(t), std::span(logits).subspan(t * vocab, vocab));
    }
    moved = std::max(moved, row_error(logits, expected, config.vocab).worst);
  }
  return moved;
}

/// The bound of a cache, and where a model with a compressed one is beyond it, what that model makes of noise: twice,
/// three times where rows are few (a boundary is crossed or not).
[[nodiscard]] inline testing::AssertionResult logits_close(BothRooms& both, const std::vector<float>& actual,
                                                           const std::vector<float>& expected,
                                                           std::span<const std::int32_t> tokens,
                                                           const std::string& cache) {
  const std::int64_t vocab = both.reference.config().vocab;
  const testing::AssertionResult result = rows_close(actual, expected, vocab, rounding_of(cache));
  if (result || cache == "bf16") return result;
  const double moved = moved_by_noise(both.reference, tokens, expected);
  return rows_close(actual, expected, vocab, (tokens.size() < 10 ? 3 : 2) * moved)
         << " (" << cache << "; the reference is moved by " << moved << ")";
}

}  // namespace gemma4::testkit

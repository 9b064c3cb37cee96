// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <span>
#include <vector>

#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/report/accuracy_stats.hpp"

/// Golden logits: what another implementation computes for a token sequence, and the comparison with a backend.
namespace gemma4 {

/// A container with `ids` [n_token] i32, `positions` [n_position] i32 (increasing), `logits` [n_position, vocab] f32.
struct GoldenLogits {
  std::vector<std::int32_t> ids;
  std::vector<std::int32_t> positions;
  std::vector<float> logits;
  std::int64_t vocab = 0;

  [[nodiscard]] std::span<const float> row(std::size_t i) const {
    return std::span(logits).subspan(i * static_cast<std::size_t>(vocab), static_cast<std::size_t>(vocab));
  }
};

/// @throws FormatError naming the tensor that is missing or does not fit
[[nodiscard]] inline GoldenLogits read_golden_logits(const std::filesystem::path& path) {
  const GgufFile file = GgufFile::open(path);
  const auto copy = [](auto span) { return std::vector(span.begin(), span.end()); };
  GoldenLogits golden;
  golden.ids = copy(data_as<std::int32_t>(file.tensor("ids")));
  golden.positions = copy(data_as<std::int32_t>(file.tensor("positions")));
  const GgufTensor& logits = file.tensor("logits");
  require_format(logits.dims.size() == 2 && logits.dims[1] == static_cast<std::int64_t>(golden.positions.size()),
                 path.string(), ": tensor 'logits' needs two dimensions and a row for each of the ",
                 golden.positions.size(), " positions");
  golden.logits = copy(data_as<float>(logits));
  golden.vocab = logits.dims[0];
  for (std::size_t i = 0; i < golden.positions.size(); ++i) {
    const std::int32_t position = golden.positions[i];
    require_format(position >= (i == 0 ? 0 : golden.positions[i - 1] + 1) &&
                       position < static_cast<std::int32_t>(golden.ids.size()),
                   path.string(), ": positions[", i, "] is ", position, ", expected increasing values below ",
                   golden.ids.size(), ", the number of ids");
  }
  return golden;
}

struct GoldenComparison {
  std::int64_t n_position = 0;
  std::int64_t n_same_argmax = 0;
  double max_abs = 0;  ///< infinite when a logit is not a number
  std::int64_t worst_position = -1;
};

/// Runs the ids through the model in chunks and compares the logits at the golden positions. `on_chunk(n_done)` after
/// each chunk.
template <class TBackend, class TOnChunk>
[[nodiscard]] GoldenComparison compare_with_golden(TBackend& backend, const GoldenLogits& golden, std::int64_t chunk,
                                                   TOnChunk&& on_chunk) {
  require(golden.vocab == backend.config().vocab, "golden: logits of ", golden.vocab, " tokens, the model has ",
          backend.config().vocab);
  Model<TBackend> model(backend);
  model.reset();
  GoldenComparison result;
  std::vector<float> actual(static_cast<std::size_t>(golden.vocab));
  std::size_t next = 0;
  while (next < golden.positions.size()) {
    const std::int64_t begin = model.position();
    const std::int64_t count = std::min(chunk, static_cast<std::int64_t>(golden.ids.size()) - begin);
    std::vector<std::int64_t> rows;
    for (std::size_t i = next; i < golden.positions.size() && golden.positions[i] < begin + count; ++i) {
      rows.push_back(golden.positions[i] - begin);
    }
    model.forward(std::span(golden.ids).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count)),
                  rows);
    if constexpr (WatchedBackend<TBackend>) {
      model.require_finite(std::span(golden.ids).first(static_cast<std::size_t>(begin + count)));
    }
    for (std::size_t i = 0; i < rows.size(); ++i, ++next) {
      backend.copy_logits(static_cast<std::int64_t>(i), actual);
      const std::span<const float> expected = golden.row(next);
      double worst = 0;
      for (std::size_t v = 0; v < actual.size(); ++v) {
        const double error = std::abs(static_cast<double>(actual[v]) - static_cast<double>(expected[v]));
        worst = error <= worst ? worst : error > worst ? error : std::numeric_limits<double>::infinity();
      }
      if (worst > result.max_abs || result.worst_position < 0) {
        result.max_abs = worst;
        result.worst_position = golden.positions[next];
      }
      ++result.n_position;
      result.n_same_argmax += same_argmax(actual, expected);
    }
    on_chunk(model.position());
  }
  return result;
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/report/accuracy_stats.hpp"

/// What a cache's error does to a text that the model writes itself, where it may add up: greedy texts from the same
/// prompts, token by token, against those of a base.
namespace gemma4 {

/// One prompt behind the other.
struct TrajectoryTask {
  std::vector<std::vector<std::int32_t>> prompts;
  std::int64_t n_token = 0;  ///< that are written after each

  [[nodiscard]] std::int64_t context() const {
    std::int64_t longest = 0;
    for (const auto& prompt : prompts) longest = std::max(longest, static_cast<std::int64_t>(prompt.size()));
    return longest + n_token;
  }
};

/// `n_prompt` pieces of `length` ids, evenly spread over the text from its beginning to its end.
/// @throws std::invalid_argument when the text is shorter than one of them
[[nodiscard]] inline TrajectoryTask trajectory_task(std::span<const std::int32_t> ids, std::int64_t n_prompt,
                                                    std::int64_t length, std::int64_t n_token) {
  const auto n_id = static_cast<std::int64_t>(ids.size());
  require(n_prompt >= 1 && length >= 1 && n_token >= 1, "trajectory: ", n_prompt, " prompts of ", length,
          " tokens and texts of ", n_token, ", need at least 1 of each");
  require(length <= n_id, "trajectory: prompts of ", length, " tokens, the text has ", n_id);
  TrajectoryTask task{.prompts = {}, .n_token = n_token};
  for (std::int64_t i = 0; i < n_prompt; ++i) {
    const std::int64_t begin = n_prompt == 1 ? 0 : (n_id - length) * i / (n_prompt - 1);
    const auto piece = ids.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(length));
    task.prompts.emplace_back(piece.begin(), piece.end());
  }
  return task;
}

template <class TBackend>
using PromptReader = std::function<void(Model<TBackend>& model, std::span<const std::int32_t> prompt)>;

/// The greedy text after every prompt, [n_prompt][n_token]: the largest logit, the lowest token among equals. A step is
/// one token through the model, as in decoding. `on_token(n_done)` counts over all prompts.
/// @param read brings a model, which is empty, behind a prompt, with logits of its last token; none: by prefill
/// @throws NotFiniteError when the numbers behind a text are not finite
template <Backend TBackend, class TOnToken>
[[nodiscard]] std::vector<std::vector<std::int32_t>> greedy_texts(TBackend& backend, const TrajectoryTask& task,
                                                                  std::int64_t chunk, TOnToken&& on_token,
                                                                  const PromptReader<TBackend>& read = {}) {
  Model<TBackend> model(backend);
  std::vector<float> logits(static_cast<std::size_t>(backend.config().vocab));
  std::vector<std::vector<std::int32_t>> texts;
  std::int64_t n_done = 0;
  for (const auto& prompt : task.prompts) {
    model.reset();
    read ? read(model, prompt) : model.prefill(prompt, chunk, [](std::int64_t) {});
    std::vector<std::int32_t>& text = texts.emplace_back();
    for (std::int64_t i = 0; i < task.n_token; ++i) {
      backend.copy_logits(0, logits);
      text.push_back(static_cast<std::int32_t>(argmax(logits)));
      if (i + 1 < task.n_token) model.decode(text.back());
      on_token(++n_done);
    }
    if constexpr (WatchedBackend<TBackend>) {
      std::vector<std::int32_t> seen = prompt;
      seen.insert(seen.end(), text.begin(), text.end() - 1);
      model.require_finite(seen);
    }
  }
  return texts;
}

/// How far texts go with those of the base.
struct TrajectoryAgreement {
  std::vector<std::int64_t> first_difference;  ///< of each text: the place of the first other token; its length: none
  std::vector<double> agreement;               ///< at each place: the share of texts with the base's token there

  /// The median over the texts, of an even number the lower.
  [[nodiscard]] std::int64_t median_difference() const {
    std::vector<std::int64_t> sorted = first_difference;
    std::ranges::sort(sorted);
    return sorted[(sorted.size() - 1) / 2];
  }
  /// The mean over places [begin, end).
  [[nodiscard]] double mean_agreement(std::int64_t begin, std::int64_t end) const {
    double sum = 0;
    for (std::int64_t i = begin; i < end; ++i) sum += agreement[static_cast<std::size_t>(i)];
    return sum / static_cast<double>(end - begin);
  }
};

/// @param texts, base  [n_prompt][n_token], of the same prompts
/// @throws std::invalid_argument unless they are as many and as long
[[nodiscard]] inline TrajectoryAgreement compare_texts(std::span<const std::vector<std::int32_t>> texts,
                                                       std::span<const std::vector<std::int32_t>> base) {
  require(!texts.empty() && texts.size() == base.size(), "compare_texts: ", texts.size(), " texts against ",
          base.size());
  TrajectoryAgreement result;
  result.agreement.resize(base.front().size());
  for (std::size_t t = 0; t < texts.size(); ++t) {
    require(!base[t].empty() && texts[t].size() == base.front().size() && base[t].size() == base.front().size(),
            "compare_texts: text ", t, " has ", texts[t].size(), " tokens and its base ", base[t].size(), ", need ",
            base.front().size());
    const auto [mine, other] = std::ranges::mismatch(texts[t], base[t]);
    result.first_difference.push_back(mine - texts[t].begin());
    for (std::size_t i = 0; i < base[t].size(); ++i) {
      if (texts[t][i] == base[t][i]) result.agreement[i] += 1.0 / static_cast<double>(texts.size());
    }
  }
  return result;
}

}  // namespace gemma4

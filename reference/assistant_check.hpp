// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <span>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/model/model.hpp"
#include "reference/assistant.hpp"
#include "reference/backend.hpp"

/// A drafter held against what another implementation drafts, and against what its target says.
namespace gemma4::reference {

/// A container with `ids` [n_token] i32; `positions` [n] i32, increasing: p, the newest in the target's cache, so that
/// the first step gets ids[p + 1]; `hidden` [n, hidden_target] f32, the target's state at p; `draft` [n, n_step] i32
/// and `logits` [n, n_step, vocab] f32 of greedy steps, each fed with the one before.
struct GoldenDrafts {
  std::vector<std::int32_t> ids, positions, draft;
  std::vector<float> hidden, logits;
  std::int64_t n_step = 0, vocab = 0, hidden_target = 0;

  [[nodiscard]] std::size_t count() const { return positions.size(); }
  [[nodiscard]] std::span<const float> hidden_of(std::size_t i) const {
    const auto size = static_cast<std::size_t>(hidden_target);
    return std::span(hidden).subspan(i * size, size);
  }
  [[nodiscard]] std::int32_t draft_of(std::size_t i, std::int64_t step) const { return draft[index(i, step)]; }
  [[nodiscard]] std::span<const float> logits_of(std::size_t i, std::int64_t step) const {
    const auto size = static_cast<std::size_t>(vocab);
    return std::span(logits).subspan(index(i, step) * size, size);
  }

 private:
  [[nodiscard]] std::size_t index(std::size_t i, std::int64_t step) const {
    return i * static_cast<std::size_t>(n_step) + static_cast<std::size_t>(step);
  }
};

/// @throws FormatError naming the tensor that is missing or does not fit
[[nodiscard]] inline GoldenDrafts read_golden_drafts(const std::filesystem::path& path) {
  const GgufFile file = GgufFile::open(path);
  const auto copy = [](auto span) { return std::vector(span.begin(), span.end()); };
  GoldenDrafts golden;
  golden.ids = copy(data_as<std::int32_t>(file.tensor("ids")));
  golden.positions = copy(data_as<std::int32_t>(file.tensor("positions")));
  golden.draft = copy(data_as<std::int32_t>(file.tensor("draft")));
  golden.hidden = copy(data_as<float>(file.tensor("hidden")));
  golden.logits = copy(data_as<float>(file.tensor("logits")));
  const auto n = static_cast<std::int64_t>(golden.count());
  const auto& hidden = file.tensor("hidden").dims;
  const auto& draft = file.tensor("draft").dims;
  const auto& logits = file.tensor("logits").dims;
  require_format(hidden.size() == 2 && hidden[1] == n, path.string(), ": tensor 'hidden' needs a row for each of the ",
                 n, " positions");
  require_format(draft.size() == 2 && draft[1] == n, path.string(), ": tensor 'draft' needs a row for each of the ", n,
                 " positions");
  require_format(logits.size() == 3 && logits[2] == n && logits[1] == draft[0], path.string(),
                 ": tensor 'logits' needs a row for each of the ", n, " x ", draft[0], " drafted tokens");
  golden.hidden_target = hidden[0], golden.n_step = draft[0], golden.vocab = logits[0];
  for (std::size_t i = 0; i < golden.count(); ++i) {
    const std::int64_t position = golden.positions[i];
    const std::int64_t least = i == 0 ? 0 : std::int64_t{golden.positions[i - 1]} + 1;
    require_format(position >= least && position + 1 < static_cast<std::int64_t>(golden.ids.size()), path.string(),
                   ": positions[", i, "] is ", position, ", expected increasing values, each with an id behind it, of ",
                   golden.ids.size());
  }
  return golden;
}

struct DraftComparison {
  std::int64_t n_compared = 0;
  std::int64_t n_same = 0;  ///< drafted tokens that are the golden ones
  double max_abs = 0;       ///< of a logit; infinite when one is not a number
  std::int64_t worst_position = -1;
};

/// Drafts greedily at golden position i, where the target's caches are, and adds to `result`. Each step is fed with the
/// drafter's own token and state.
/// @param hidden [1, hidden_target] of the target at the position
template <class Scalar, class TTarget>
void compare_draft(const Assistant<Scalar, TTarget>& drafter, const GoldenDrafts& golden, std::size_t i,
                   Matrix<Scalar> hidden, DraftComparison& result) {
  const std::int64_t position = golden.positions[i];
  std::int32_t token = golden.ids[static_cast<std::size_t>(position) + 1];
  for (std::int64_t step = 0; step < golden.n_step; ++step) {
    const auto out = drafter.step(token, hidden, position + 1);
    const std::span<const float> expected = golden.logits_of(i, step);
    require(out.logits.cols() == static_cast<Eigen::Index>(expected.size()), "golden drafts: logits of ",
            expected.size(), " tokens, the drafter has ", out.logits.cols());
    for (std::size_t v = 0; v < expected.size(); ++v) {
      const double error =
          std::abs(static_cast<double>(out.logits(0, static_cast<Eigen::Index>(v))) - static_cast<double>(expected[v]));
      if (error <= result.max_abs) continue;
      result.max_abs = std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
      result.worst_position = position;
    }
    token = likeliest(out.logits);
    hidden = out.hidden;
    ++result.n_compared;
    result.n_same += token == golden.draft_of(i, step);
  }
}

/// Runs the golden ids through the target in chunks and calls `at_position(i)` wherever its caches end at golden
/// position i: its hidden() is then the state there.
template <class TBackend, class TAtPosition>
void for_each_golden_position(TBackend& target, const GoldenDrafts& golden, std::int64_t chunk,
                              TAtPosition&& at_position) {
  Model<TBackend> model(target);
  model.reset();
  for (std::size_t i = 0; i < golden.count(); ++i) {
    const auto begin = static_cast<std::size_t>(model.position());
    const auto end = static_cast<std::size_t>(golden.positions[i]) + 1;
    model.prefill(std::span(golden.ids).subspan(begin, end - begin), chunk, [](std::int64_t) {});
    at_position(i);
  }
}

/// How often a drafter says what its target says. Element j is of step j alone, fed the true tokens and its own states.
struct DraftAgreement {
  std::int64_t n_draft = 0;
  std::vector<std::int64_t> step;     ///< step j names the target's likeliest token
  std::vector<std::int64_t> through;  ///< so do all steps up to j

  explicit DraftAgreement(std::int64_t n_step)
      : step(static_cast<std::size_t>(n_step)), through(static_cast<std::size_t>(n_step)) {}

  /// One draft beside what the target says behind the same tokens.
  void add(std::span<const std::int32_t> drafted, std::span<const std::int32_t> said) {
    require(drafted.size() == step.size() && said.size() == step.size(), "agreement: ", drafted.size(), " drafted and ",
            said.size(), " said tokens, need ", step.size());
    ++n_draft;
    bool all_agree = true;
    for (std::size_t j = 0; j < step.size(); ++j) {
      const bool agrees = drafted[j] == said[j];
      all_agree = all_agree && agrees;
      step[j] += agrees;
      through[j] += all_agree;
    }
  }
};

/// Teacher-forced agreement: a draft behind every position p < n_position, of which step j is fed ids[p + j], beside
/// the target's likeliest token behind the same id. `on_token(n_done)` after each.
/// @param ids at least n_position + n_step of them
template <class Scalar, class TTarget>
[[nodiscard]] DraftAgreement measure_agreement(const Assistant<Scalar, TTarget>& drafter, Backend<Scalar>& target,
                                               std::span<const std::int32_t> ids, std::int64_t n_position,
                                               std::int64_t n_step, auto&& on_token) {
  require(n_step >= 1 && n_position >= 1 && static_cast<std::int64_t>(ids.size()) >= n_position + n_step,
          "agreement: ", ids.size(), " ids, need ", n_position, " positions + ", n_step, " steps");
  Model<Backend<Scalar>> model(target);
  model.reset();
  const auto at = [](std::int64_t index) { return static_cast<std::size_t>(index); };
  std::vector<std::int32_t> said, drafted;  // by position, and n_step a position
  DraftAgreement agreement(n_step);
  for (std::int64_t p = 0; p < n_position + n_step; ++p) {
    model.decode(ids[at(p)]);
    said.push_back(likeliest(target.logits()));
    Matrix<Scalar> hidden = target.hidden();
    for (std::int64_t j = 1; j <= n_step && p < n_position; ++j) {
      const auto out = drafter.step(ids[at(p + j)], hidden, p + 1);
      drafted.push_back(likeliest(out.logits));
      hidden = out.hidden;
    }
    if (p >= n_step) {
      agreement.add(std::span(drafted).subspan(at((p - n_step) * n_step), at(n_step)),
                    std::span(said).subspan(at(p - n_step + 1), at(n_step)));
    }
    on_token(p + 1);
  }
  return agreement;
}

}  // namespace gemma4::reference

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "gemma4/draft/drafter.hpp"
#include "gemma4/error.hpp"
#include "gemma4/model/model.hpp"

/// A step that may give several tokens: draft, verify, accept, go back (the picture is in gemma4/draft/drafter.hpp).
namespace gemma4::draft {

/// What one step gave.
struct Step {
  std::vector<std::int32_t> tokens;  ///< those accepted, and the target's own behind them: 1 to n_draft + 1
  std::int64_t n_draft = 0;          ///< that were proposed and verified

  [[nodiscard]] std::int64_t n_accepted() const { return static_cast<std::int64_t>(tokens.size()) - 1; }
};

/// Acceptance, counted.
struct Counts {
  std::int64_t n_step = 0, n_token = 0;
  std::array<std::int64_t, kMaxDrafts> drafted = {};   ///< [place] steps that drafted a token there
  std::array<std::int64_t, kMaxDrafts> accepted = {};  ///< [place] of those, in which it stayed

  void add(const Step& step) { add(step.n_draft, step.n_accepted()); }
  /// A step of so many drafts, of which the first n_accepted stayed.
  void add(std::int64_t n_draft, std::int64_t n_accepted) {
    ++n_step;
    n_token += n_accepted + 1;
    for (std::int64_t i = 0; i < n_draft; ++i) {
      const auto place = static_cast<std::size_t>(i);
      ++drafted[place];
      accepted[place] += i < n_accepted ? 1 : 0;
    }
  }
  void add(const Counts& other) {
    n_step += other.n_step;
    n_token += other.n_token;
    for (std::size_t place = 0; place < drafted.size(); ++place) {
      drafted[place] += other.drafted[place];
      accepted[place] += other.accepted[place];
    }
  }
  /// What came behind `before`, which it began with.
  [[nodiscard]] Counts since(const Counts& before) const {
    Counts part = *this;
    part.n_step -= before.n_step;
    part.n_token -= before.n_token;
    for (std::size_t place = 0; place < drafted.size(); ++place) {
      part.drafted[place] -= before.drafted[place];
      part.accepted[place] -= before.accepted[place];
    }
    return part;
  }
  [[nodiscard]] double tokens_per_step() const {
    return n_step > 0 ? static_cast<double>(n_token) / static_cast<double>(n_step) : 0;
  }
};

/// One step of a sequence `tokens` of which the caches hold all but the last: model.position() == tokens.size() - 1,
/// before and, with the tokens of the step behind them, after. Draws drafts and moves the position; what the caches
/// hold of rejected tokens is overwritten by what follows, and read by nobody. Near the end of the context fewer are
/// drafted: k drafts need k + 1 free positions.
/// @param n_draft    to ask the drafter for, at most; 0 is a plain step. The last step of a text asks for fewer than it
///                   lacks, so that it never gives too many
/// @param hidden_row of the target's last lm_head, that gave the last token
/// @param judge      judge(backend, proposal, settings, position) -> {n_accepted, next}, from the backend's logits of
/// the
///                   rows 0 to proposal.size(): reference/acceptance.hpp
/// @throws std::invalid_argument before any work for a sequence that is not as above, or n_draft out of range
template <class TBackend, Drafter<TBackend> TDrafter, class TJudge>
[[nodiscard]] Step run_step(Model<TBackend>& model, TDrafter& drafter, std::span<const std::int32_t> tokens,
                            std::int64_t n_draft, const SamplerSettings& settings, std::int64_t hidden_row,
                            TJudge&& judge) {
  TBackend& backend = model.backend();
  const std::int64_t position = model.position();
  require(!tokens.empty() && position == static_cast<std::int64_t>(tokens.size()) - 1, "draft: ", tokens.size(),
          " tokens, of which the caches hold ", position, ", need all but the last");
  require(n_draft >= 0 && n_draft <= kMaxDrafts, "draft: ", n_draft, " drafts, need 0 to ", kMaxDrafts);
  model.require_room(1);
  require(n_draft < backend.max_chunk(), "draft: ", n_draft, " drafts and the token before them are a chunk of ",
          n_draft + 1, ", the longest is ", backend.max_chunk());
  const std::int64_t n_room = backend.context() - position - 1;

  Proposal proposal;
  const Request request{
      .tokens = tokens, .n_draft = std::min(n_draft, n_room), .sampler = settings, .hidden_row = hidden_row};
  if (request.n_draft > 0) drafter.propose(backend, request, proposal);
  require(proposal.size() <= request.n_draft, "draft: the drafter proposes ", proposal.size(), " tokens, ",
          request.n_draft, " were asked for");

  std::vector<std::int32_t> chunk = {tokens.back()};
  chunk.insert(chunk.end(), proposal.tokens.begin(), proposal.tokens.end());
  std::array<std::int64_t, kMaxDrafts + 1> rows;
  std::iota(rows.begin(), rows.end(), 0);
  model.forward(chunk, std::span<const std::int64_t>(rows).first(chunk.size()));

  const auto verdict = judge(backend, proposal, settings, position);
  Step step{.tokens = {proposal.tokens.begin(), proposal.tokens.begin() + verdict.n_accepted},
            .n_draft = proposal.size()};
  step.tokens.push_back(verdict.next);
  model.rewind(proposal.size() - verdict.n_accepted);
  return step;
}

/// A drafter of whatever kind, for who learns it at run time.
template <class TTarget>
class AnyDrafter {
 public:
  AnyDrafter() = default;
  AnyDrafter(const AnyDrafter&) = delete;
  AnyDrafter& operator=(const AnyDrafter&) = delete;
  virtual ~AnyDrafter() = default;
  virtual void propose(TTarget& target, const Request& request, Proposal& proposal) = 0;
  virtual void keep(std::int64_t n_token) = 0;
  /// What a proposed token costs, in plain steps of the target: for AutoDrafts.
  [[nodiscard]] virtual double cost() const = 0;
};

template <class TTarget, Drafter<TTarget> TDrafter>
class Erased final : public AnyDrafter<TTarget> {
 public:
  template <class... TArguments>
  explicit Erased(TArguments&&... arguments) : drafter_(std::forward<TArguments>(arguments)...) {}
  void propose(TTarget& target, const Request& request, Proposal& proposal) override {
    drafter_.propose(target, request, proposal);
  }
  void keep(std::int64_t n_token) override { drafter_.keep(n_token); }
  /// That of the drafter where it says so, else nothing.
  [[nodiscard]] double cost() const override {
    if constexpr (requires { drafter_.cost(); }) return drafter_.cost();
    return 0;
  }
  [[nodiscard]] TDrafter& drafter() { return drafter_; }

 private:
  TDrafter drafter_;
};

}  // namespace gemma4::draft

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "gemma4/sampler.hpp"
#include "gemma4/step_limits.hpp"

/// Drafting: a drafter proposes the next tokens, the target verifies them in one pass.
///
///   sequence   t[0] ... t[p] t[p + 1]            p + 1 positions are in the target's caches; t[p + 1] was chosen from
///                                                the logits at p, and has not been through the target
///   draft      x[1] ... x[k]                     k <= kMaxDrafts
///   verify     target(t[p + 1], x[1] ... x[k])   k + 1 rows of logits, the caches hold p + k + 2 positions
///   accept     the longest beginning x[1] ... x[a] that the target agrees with, and its own next token
///   go back    k - a positions: the caches hold p + a + 2, and the new last token is not in them
namespace gemma4::draft {

/// Drafts of one step, at most: verified with the token before them, they are a chunk whose rows have the bits that
/// each would have alone.
inline constexpr std::int64_t kMaxDrafts = kDecodeChunk - 1;

/// What a drafter is asked for.
struct Request {
  std::span<const std::int32_t> tokens;  ///< the whole sequence; the target's caches hold all but the last
  std::int64_t n_draft = 1;              ///< tokens to propose, at most; 1 to kMaxDrafts
  SamplerSettings sampler = {};          ///< how the target chooses
  /// Row of the target's last lm_head that gave the last token: its hidden state behind the final norm is the one at
  /// the position tokens.size() - 2.
  std::int64_t hidden_row = 0;
};

/// What it proposes: tokens, and the logits that it drew them from.
struct Proposal {
  std::vector<std::int32_t> tokens;  ///< none up to n_draft of them
  /// [tokens, vocab]: each token was drawn from what `sampler` makes of its row, the distribution q, by the noise of
  /// draft_uniform() (gemma4/draft/acceptance.hpp). Empty: the tokens were not drawn at random; q is 1 at each.
  std::vector<float> logits;

  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(tokens.size()); }
  [[nodiscard]] bool is_drawn() const { return !logits.empty(); }
  /// [vocab] of the token `i` of a drawn proposal.
  [[nodiscard]] std::span<const float> row(std::int64_t i) const {
    const std::size_t vocab = logits.size() / tokens.size();
    return std::span(logits).subspan(static_cast<std::size_t>(i) * vocab, vocab);
  }
  void clear() {
    tokens.clear();
    logits.clear();
  }
};

/// What proposes tokens for a target of the type TTarget: a backend of the graph, whose caches and whose hidden state
/// of the last lm_head a drafter may read; it changes neither. One that does without takes any target.
template <class TDrafter, class TTarget>
concept Drafter = requires(TDrafter& drafter, TTarget& target, const Request& request, Proposal& proposal,
                           std::int64_t n_token) {
  drafter.propose(target, request, proposal);  // fills an empty proposal
  drafter.keep(n_token);                       // of the sequence so far the first n_token stay, others will follow
};

/// Plain decoding, as a drafter.
struct NoDrafter {
  template <class TTarget>
  void propose(TTarget& /*target*/, const Request& /*request*/, Proposal& /*proposal*/) {}
  void keep(std::int64_t /*n_token*/) {}
};

}  // namespace gemma4::draft

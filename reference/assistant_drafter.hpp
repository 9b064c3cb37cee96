// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "gemma4/draft/drafter.hpp"
#include "gemma4/error.hpp"
#include "gemma4/model/assistant_weights.hpp"
#include "gemma4/sampler.hpp"
#include "reference/acceptance.hpp"
#include "reference/assistant.hpp"
#include "reference/backend.hpp"

namespace gemma4::reference {

/// The drafter of Gemma 4 as a draft::Drafter: its first state is the target's behind the token that the target has
/// just chosen, each further one its own. It proposes as many tokens as it is asked for, and remembers nothing. Where
/// the target takes the likeliest token, so does it; else it draws each from its own logits as the target would from
/// its, and hands them over.
template <class Scalar>
class AssistantDrafter {
 public:
  /// @param weights borrowed; made for the target that will be given to propose()
  explicit AssistantDrafter(const AssistantWeights& weights) : weights_(weights) {}

  /// @throws std::invalid_argument unless 1 to draft::kMaxDrafts tokens are asked for, the sequence has two tokens, and
  ///         the target has the row's state
  void propose(const Backend<Scalar>& target, const draft::Request& request, draft::Proposal& proposal) const {
    const auto n_token = static_cast<std::int64_t>(request.tokens.size());
    require(request.n_draft >= 1 && request.n_draft <= draft::kMaxDrafts, "drafter: ", request.n_draft,
            " drafts, need 1 to ", draft::kMaxDrafts);
    require(n_token >= 2, "drafter: a sequence of ", n_token, " tokens, need at least 2");
    require(request.hidden_row >= 0 && request.hidden_row < target.hidden().rows(), "drafter: the state of row ",
            request.hidden_row, ", the target has ", target.hidden().rows());
    const Assistant<Scalar> assistant(weights_, target);
    Matrix<Scalar> hidden = target.hidden().row(request.hidden_row);
    std::int32_t token = request.tokens.back();
    for (std::int64_t i = 0; i < request.n_draft; ++i) {
      auto out = assistant.step(token, hidden, n_token - 1);
      token = choose(out.logits, request.sampler, n_token - 1 + i, proposal);
      hidden = std::move(out.hidden);
      proposal.tokens.push_back(token);
    }
  }

  void keep(std::int64_t /*n_token*/) {}

 private:
  /// @param position of the token that gave the logits
  [[nodiscard]] static std::int32_t choose(const Matrix<Scalar>& logits, const SamplerSettings& sampler,
                                           std::int64_t position, draft::Proposal& proposal) {
    if (sampler.temperature == 0) return likeliest(logits);
    const std::size_t first = proposal.logits.size();
    for (Eigen::Index i = 0; i < logits.cols(); ++i) proposal.logits.push_back(static_cast<float>(logits(0, i)));
    return draw_draft(std::span(proposal.logits).subspan(first), sampler, position);
  }

  const AssistantWeights& weights_;
};

static_assert(draft::Drafter<AssistantDrafter<float>, Backend<float>>);

}  // namespace gemma4::reference

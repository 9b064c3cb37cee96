// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "gemma4/draft/drafter.hpp"

/// Drafters for tests.
namespace gemma4::testkit {

/// Proposes tokens of a text that is known, and wrong ones in between: every number of right tokens from none to all of
/// any number of drafts comes about.
class KnownTextDrafter {
 public:
  /// @param text by position; @param share of right tokens
  KnownTextDrafter(std::vector<std::int32_t> text, std::int64_t vocab, double share, std::uint32_t seed)
      : text_(std::move(text)), vocab_(vocab), share_(share), random_(seed) {}

  template <class TTarget>
  void propose(TTarget& /*target*/, const draft::Request& request, draft::Proposal& proposal) {
    std::uniform_real_distribution<double> uniform(0, 1);
    const std::int64_t n_draft = std::uniform_int_distribution<std::int64_t>(0, request.n_draft)(random_);
    n_right = 0;
    bool all_right = true;
    for (std::int64_t i = 0; i < n_draft; ++i) {
      const std::size_t at = request.tokens.size() + static_cast<std::size_t>(i);
      const std::int32_t right = at < text_.size() ? text_[at] : 0;
      const auto other = static_cast<std::int32_t>(1 + random_() % static_cast<std::uint64_t>(vocab_ - 1));
      const bool is_right = at < text_.size() && uniform(random_) < share_;
      proposal.tokens.push_back(is_right ? right : static_cast<std::int32_t>((right + other) % vocab_));
      all_right = all_right && is_right;
      n_right += all_right ? 1 : 0;
    }
  }
  void keep(std::int64_t /*n_token*/) {}

  std::int64_t n_right = 0;  ///< right tokens at the beginning of the last proposal

 private:
  std::vector<std::int32_t> text_;
  std::int64_t vocab_;
  double share_;
  std::mt19937 random_;
};

}  // namespace gemma4::testkit

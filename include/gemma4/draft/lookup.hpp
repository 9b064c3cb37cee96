// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "gemma4/draft/drafter.hpp"
#include "gemma4/error.hpp"

/// Prompt lookup: what followed the last tokens where they stood before is proposed again. Costs no pass of any model.
namespace gemma4::draft {

/// Tokens of the longest suffix that is looked for.
inline constexpr std::int64_t kMaxSuffix = 8;

/// Where a suffix stood before.
struct SuffixMatch {
  std::int64_t length = 0;  ///< of the suffix; 0: its last token is new
  std::int64_t end = -1;    ///< position of its last token there, the latest such below that of the sequence
  bool operator==(const SuffixMatch&) const = default;
};

/// The longest suffix of a sequence, up to kMaxSuffix tokens, that stood in it before, and where it did so last.
///
/// Every run of 1 to kMaxSuffix tokens is a node of a trie, whose edges are a hash table: (node without the last token,
/// last token) -> node; exact, for a node is a run and no hash. A node knows where its run ended last, a position where
/// the runs that end there had ended before. So append() does kMaxSuffix look-ups, O(1), and take_back() undoes them in
/// reverse: the latest nodes leave the table as they came, and every other gets back what it knew.
/// Memory: at most kMaxSuffix x (12 B a node + 16 B of table) + 36 B = 260 B a token, 34 MB for 131072 of them; with
/// what vectors reserve while they grow, up to twice their 132 B of these, 392 B and 51 MB.
class SuffixIndex {
 public:
  SuffixIndex() : slots_(kFirstSlots, kNone) {}

  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(tokens_.size()); }
  [[nodiscard]] std::span<const std::int32_t> tokens() const { return tokens_; }
  /// What is held, without what vectors keep in reserve.
  [[nodiscard]] std::int64_t bytes() const {
    return static_cast<std::int64_t>(tokens_.size() * (sizeof(std::int32_t) + sizeof(Runs)) +
                                     nodes_.size() * sizeof(Node) + slots_.size() * sizeof(std::int32_t));
  }

  void append(std::int32_t token) {
    const std::int64_t at = size();
    tokens_.push_back(token);
    Runs runs = none(), before = none();
    for (std::size_t n = 0; n < kRuns && static_cast<std::int64_t>(n) <= at; ++n) {
      const std::int32_t parent = n == 0 ? kNone : newest_[n - 1];
      runs[n] = find_or_add(parent, token);
      before[n] = node(runs[n]).last;
      node(runs[n]).last = static_cast<std::int32_t>(at);
    }
    newest_ = runs;
    before_.push_back(before);
  }

  /// The last `n_token` tokens never were.
  /// @throws std::invalid_argument when there are not so many
  void take_back(std::int64_t n_token) {
    require(n_token >= 0 && n_token <= size(), "lookup: take back ", n_token, " tokens, there are ", size());
    for (; n_token > 0; --n_token) {
      const std::int64_t at = size() - 1;
      for (std::size_t n = kRuns; n-- > 0;) {
        if (static_cast<std::int64_t>(n) > at) continue;
        const std::int32_t before = before_.back()[n];
        before == kNone ? remove_last_node() : void(node(newest_[n]).last = before);
      }
      tokens_.pop_back();
      before_.pop_back();
      newest_ = runs_ending_at(at - 1);
    }
  }

  /// Of the whole sequence as it stands.
  [[nodiscard]] SuffixMatch longest() const {
    if (tokens_.empty()) return {};
    const Runs& before = before_.back();
    for (std::size_t n = kRuns; n-- > 0;) {
      if (before[n] != kNone) return {static_cast<std::int64_t>(n) + 1, before[n]};
    }
    return {};
  }

 private:
  static constexpr std::int32_t kNone = -1;
  static constexpr std::size_t kRuns = static_cast<std::size_t>(kMaxSuffix), kFirstSlots = 64;  // a power of two
  using Runs = std::array<std::int32_t, kRuns>;  ///< of the run of n + 1 tokens: a node, or a position

  struct Node {
    std::int32_t parent = kNone;  ///< the run without its last token
    std::int32_t token = 0;
    std::int32_t last = kNone;  ///< position at which it ended last
  };

  [[nodiscard]] static Runs none() {
    Runs runs;
    runs.fill(kNone);
    return runs;
  }
  [[nodiscard]] Node& node(std::int32_t i) { return nodes_[static_cast<std::size_t>(i)]; }

  /// The slot that holds the node, or the empty one where it would be.
  [[nodiscard]] std::size_t slot_of(std::int32_t parent, std::int32_t token) const {
    std::uint64_t hash = std::uint64_t{static_cast<std::uint32_t>(parent)} << 32 | static_cast<std::uint32_t>(token);
    hash = (hash ^ hash >> 32) * 0x9E3779B97F4A7C15u;
    const std::size_t mask = slots_.size() - 1;
    for (std::size_t slot = static_cast<std::size_t>(hash >> 32) & mask;; slot = (slot + 1) & mask) {
      if (slots_[slot] == kNone) return slot;
      const Node& found = nodes_[static_cast<std::size_t>(slots_[slot])];
      if (found.parent == parent && found.token == token) return slot;
    }
  }

  /// At most half of the slots are taken. A larger table takes the nodes in their order, so that whoever came last can
  /// leave without breaking another's chain of slots.
  [[nodiscard]] std::int32_t find_or_add(std::int32_t parent, std::int32_t token) {
    std::size_t slot = slot_of(parent, token);
    if (slots_[slot] != kNone) return slots_[slot];
    nodes_.push_back({parent, token, kNone});
    if (2 * nodes_.size() > slots_.size()) {
      slots_.assign(2 * slots_.size(), kNone);
      for (std::size_t i = 0; i + 1 < nodes_.size(); ++i) {
        slots_[slot_of(nodes_[i].parent, nodes_[i].token)] = static_cast<std::int32_t>(i);
      }
      slot = slot_of(parent, token);
    }
    return slots_[slot] = static_cast<std::int32_t>(nodes_.size() - 1);
  }

  void remove_last_node() {
    slots_[slot_of(nodes_.back().parent, nodes_.back().token)] = kNone;
    nodes_.pop_back();
  }

  [[nodiscard]] Runs runs_ending_at(std::int64_t at) const {
    Runs runs = none();
    for (std::int64_t n = 0; n < kMaxSuffix && n <= at; ++n) {
      std::int32_t run = kNone;
      for (std::int64_t i = at - n; i <= at; ++i) run = slots_[slot_of(run, tokens_[static_cast<std::size_t>(i)])];
      runs[static_cast<std::size_t>(n)] = run;
    }
    return runs;
  }

  std::vector<std::int32_t> tokens_;
  std::vector<Runs> before_;         ///< [tokens]: where the runs that end at a position had ended before
  std::vector<Node> nodes_;          ///< in the order in which they came
  std::vector<std::int32_t> slots_;  ///< the hash table: nodes
  Runs newest_ = none();             ///< nodes of the runs that end at the last token
};

/// Proposes what followed the longest suffix; where that runs into the end of the sequence, it goes on with what it has
/// proposed, so that a text that repeats itself goes on to. Nothing where the last token is new.
class LookupDrafter {
 public:
  template <class TTarget>
  void propose(TTarget& /*target*/, const Request& request, Proposal& proposal) {
    propose(request, proposal);
  }

  /// @throws std::invalid_argument for a sequence that does not go on from the one before: keep() was not told
  void propose(const Request& request, Proposal& proposal) {
    const std::int64_t n_token = static_cast<std::int64_t>(request.tokens.size()), n_known = index_.size();
    require(n_known <= n_token &&
                (n_known == 0 || index_.tokens().back() == request.tokens[static_cast<std::size_t>(n_known - 1)]),
            "lookup: a sequence of ", n_token, " tokens does not go on from the ", n_known, " before it; keep() first");
    for (const std::int32_t token : request.tokens.subspan(static_cast<std::size_t>(n_known))) index_.append(token);
    const SuffixMatch match = index_.longest();
    if (match.length == 0) return;
    for (std::int64_t i = 1; i <= request.n_draft; ++i) {
      const auto at = static_cast<std::size_t>(match.end + i), end = request.tokens.size();
      proposal.tokens.push_back(at < end ? request.tokens[at] : proposal.tokens[at - end]);
    }
  }

  void keep(std::int64_t n_token) { index_.take_back(std::max<std::int64_t>(0, index_.size() - n_token)); }

  [[nodiscard]] const SuffixIndex& index() const { return index_; }

 private:
  SuffixIndex index_;
};

}  // namespace gemma4::draft

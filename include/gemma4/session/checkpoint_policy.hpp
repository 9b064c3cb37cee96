// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "gemma4/error.hpp"

/// When the rings of a sequence are copied to the host, and which of those checkpoints stay: as many as are wanted
/// close behind the newest token, where sequences are taken back most, and few before.
namespace gemma4 {

/// A checkpoint falls due behind the pass that comes to a multiple of spacing(). As the sequence grows those that the
/// near zone has left are thinned to the first behind each multiple of `interval`. To go back by n tokens,
///   n <= near_tokens   near_interval - 1 tokens
///   beyond             interval - 1 tokens
/// at most go through the model again, where a pass ended at each multiple; where passes of up to p tokens ended
/// anywhere, p - 1 more. So it is less than a window where near_interval is one and chunks divide it, and where
/// near_interval and a chunk are one together. Going back takes the near zone along. Before the place where it began
/// lie far checkpoints alone: whoever goes back once more, to before that, replays from one of those, which leaves near
/// ones on the way. One of the 31B takes 839 MB of the host's memory (ring_checkpoint_bytes()).
struct CheckpointPolicy {
  std::int64_t interval = 0;       ///< tokens between those that stay for good; 0: none are made
  std::int64_t near_interval = 0;  ///< tokens between the newest; divides `interval`; 0: there is no near zone
  std::int64_t near_tokens = 0;    ///< the near zone: as far back as those serve

  bool operator==(const CheckpointPolicy&) const = default;

  [[nodiscard]] constexpr bool is_on() const { return interval > 0; }
  /// Tokens between those that are made.
  [[nodiscard]] constexpr std::int64_t spacing() const { return near_interval > 0 ? near_interval : interval; }
  /// @param last position of the newest checkpoint; 0: none
  [[nodiscard]] constexpr bool is_due(std::int64_t last, std::int64_t position) const {
    return is_on() && position / spacing() > last / spacing();
  }
  /// Tokens from `position` to the next multiple: where whoever works in one go had better pause.
  [[nodiscard]] constexpr std::int64_t n_until_due(std::int64_t position) const {
    return is_on() ? spacing() - position % spacing() : std::numeric_limits<std::int64_t>::max();
  }
};

/// @throws std::invalid_argument naming what cannot be, and the values
inline void validate(const CheckpointPolicy& policy) {
  require(policy.interval >= 0, "checkpoints: interval ", policy.interval, ", need at least 0");
  require(policy.near_interval >= 0, "checkpoints: near interval ", policy.near_interval, ", need at least 0");
  require(policy.near_interval > 0 || policy.near_tokens == 0, "checkpoints: ", policy.near_tokens,
          " near tokens without a near interval");
  if (policy.near_interval == 0) return;
  require(policy.near_interval <= policy.interval && policy.interval % policy.near_interval == 0,
          "checkpoints: near interval ", policy.near_interval, ", need one that divides the interval ",
          policy.interval);
  require(policy.near_tokens >= policy.near_interval, "checkpoints: ", policy.near_tokens,
          " near tokens, need at least the near interval ", policy.near_interval);
}

/// As the command lines have it: 8192, or 8192,1024:20480 for one every 1024 tokens within the newest 20480.
[[nodiscard]] inline std::string to_string(const CheckpointPolicy& policy) {
  const std::string far = concat(policy.interval);
  return policy.near_interval > 0 ? concat(far, ',', policy.near_interval, ':', policy.near_tokens) : far;
}

/// Of checkpoints at `positions`, ascending, those that stay when the sequence is at `position`: the first at each
/// multiple of the interval; and the first at each of the near interval from which a position of the near zone would be
/// reached. The zone is a token longer than is taken back: the last token that stays may go through the model again.
[[nodiscard]] inline std::vector<std::int64_t> staying_checkpoints(const CheckpointPolicy& policy,
                                                                   std::span<const std::int64_t> positions,
                                                                   std::int64_t position) {
  std::vector<std::int64_t> firsts;
  for (const std::int64_t at : positions) {
    if (policy.is_due(firsts.empty() ? 0 : firsts.back(), at)) firsts.push_back(at);
  }
  const std::int64_t zone = position - policy.near_tokens - 1;
  std::vector<std::int64_t> staying;
  for (std::size_t i = 0; i < firsts.size(); ++i) {
    const bool is_far = firsts[i] / policy.interval > (i == 0 ? 0 : firsts[i - 1] / policy.interval);
    const bool is_near = policy.near_interval > 0 && (i + 1 == firsts.size() || firsts[i + 1] > zone);
    if (is_far || is_near) staying.push_back(firsts[i]);
  }
  return staying;
}

/// Checkpoints that a sequence of up to `context` tokens has at most at any time, whatever its passes: one of each
/// spacing. With a near zone no more than of the near intervals that it touches, the one before them, and the far ones
/// before that.
[[nodiscard]] constexpr std::int64_t n_checkpoint(std::int64_t context, const CheckpointPolicy& policy) {
  if (!policy.is_on()) return 0;
  const std::int64_t all = context / policy.spacing();
  if (policy.near_interval == 0) return all;
  const std::int64_t n_before = std::max<std::int64_t>(0, context - policy.near_tokens) / policy.near_interval;
  const std::int64_t near = (policy.near_tokens - 1) / policy.near_interval + 3;
  const std::int64_t far = std::max<std::int64_t>(0, n_before - 2) / (policy.interval / policy.near_interval);
  return std::min(all, near + far);
}

}  // namespace gemma4

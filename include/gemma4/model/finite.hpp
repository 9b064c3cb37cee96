// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include "gemma4/error.hpp"

/// Numbers that are none: where a NaN or an infinity began, so that no result is made of them.
///
/// What is promised: a forward pass of which a position's residual stream (with what is pending on it), or a logit that
/// was asked for, is not finite, is an error, and the first such position is named with the layer behind which its
/// residual stream first was not finite. A position's stream keeps what it once has taken in, so that its end shows
/// what happened in any layer, also where no logits are computed, as in the middle of a prompt. What is not promised:
/// that a NaN inside a step is seen which that step itself makes a number again, as a quantiser of a cache may that
/// stores the nearest code.
namespace gemma4 {

struct NotFinite {
  std::int64_t position = 0;
  std::optional<std::int64_t> layer = {};  ///< -1: the embedding; n_layer: behind the last layer; nothing: not known

  bool operator==(const NotFinite&) const = default;
};

/// A result that would have been made of a NaN or an infinity.
class NotFiniteError : public std::runtime_error {
 public:
  NotFiniteError(const NotFinite& where, std::int64_t n_layer)
      : std::runtime_error(concat("not finite from position ", where.position, " on: ", place(where, n_layer))),
        where_(where) {}

  [[nodiscard]] const NotFinite& where() const { return where_; }
  std::size_t backend = 0;  ///< of several that ran side by side

 private:
  [[nodiscard]] static std::string place(const NotFinite& where, std::int64_t n_layer) {
    if (!where.layer) return "in which layer it began is not known, since the same tokens once more were finite";
    if (*where.layer < 0) return "it began before layer 0, in the embedding";
    if (*where.layer >= n_layer) {
      return concat("it began behind the last layer, ", n_layer - 1, ": in output_norm or in the head");
    }
    return concat("it began in layer ", *where.layer, " (blk.", *where.layer, ")");
  }

  NotFinite where_;
};

[[nodiscard]] inline bool all_finite(std::span<const float> values) {
  return std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); });
}

}  // namespace gemma4

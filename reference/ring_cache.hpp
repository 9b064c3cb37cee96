// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

namespace gemma4::reference {

/// K and V of the last `ring_len` tokens of a sliding layer. The token at absolute position p lives in slot
/// ring_slot(p, ring_len) until the token at p + ring_len replaces it. A chunk is committed after it has attended,
/// because its first queries still need what it will replace. A sequence may go back by up to `n_spare` tokens from the
/// farthest that it has been: of those slots nobody will ask for what they held before. Mirror: cuda/ring_cache.cuh
template <class TStorage>
class RingCache {
 public:
  RingCache(std::int64_t n_head_kv, std::int64_t ring_len, std::int64_t head_dim, std::int64_t n_spare = 0)
      : n_head_kv_(n_head_kv), ring_len_(ring_len), head_dim_(head_dim), n_spare_(n_spare) {
    require(n_head_kv >= 1, "ring_cache: n_head_kv ", n_head_kv, ", need at least 1");
    require(ring_len >= 1, "ring_cache: ring_len ", ring_len, ", need at least 1");
    require(head_dim >= 1, "ring_cache: head_dim ", head_dim, ", need at least 1");
    require(n_spare >= 0 && n_spare < ring_len, "ring_cache: n_spare ", n_spare,
            ", need 0 to ring_len - 1 = ", ring_len - 1);
    k_.resize(static_cast<std::size_t>(n_head_kv * ring_len * head_dim));
    v_.resize(k_.size());
  }

  [[nodiscard]] std::int64_t ring_len() const { return ring_len_; }
  /// Position that the next commit starts at: one more than the newest token's. Or an earlier one, to go back.
  [[nodiscard]] std::int64_t end() const { return end_; }
  /// [n_head_kv, ring_len, head_dim]
  [[nodiscard]] View<const TStorage, 3> k() const { return make_view(k_.data(), n_head_kv_, ring_len_, head_dim_); }
  [[nodiscard]] View<const TStorage, 3> v() const { return make_view(v_.data(), n_head_kv_, ring_len_, head_dim_); }

  /// Stores the last min(n_new, ring_len) of the tokens at position, position + 1, ...
  /// @param k_new, v_new [n_new, n_head_kv, head_dim]
  /// @throws std::invalid_argument when extents do not fit, beyond end(), where a gap would leave slots of other
  ///         positions, or too far back, where the tokens before are gone
  void commit(View<const TStorage, 3> k_new, View<const TStorage, 3> v_new, std::int64_t position) {
    const std::int64_t n_new = k_new.extent[0];
    require_extents("ring_cache", "k_new", k_new, {n_new, n_head_kv_, head_dim_});
    require_extents("ring_cache", "v_new", v_new, {n_new, n_head_kv_, head_dim_});
    require_position(position);
    for (std::int64_t token = std::max<std::int64_t>(0, n_new - ring_len_); token < n_new; ++token) {
      const std::int64_t slot = ring_slot(position + token, ring_len_);
      for (std::int64_t head = 0; head < n_head_kv_; ++head) {
        const auto target = static_cast<std::ptrdiff_t>((head * ring_len_ + slot) * head_dim_);
        for (std::int64_t i = 0; i < head_dim_; ++i) {
          k_[static_cast<std::size_t>(target + i)] = k_new(token, head, i);
          v_[static_cast<std::size_t>(target + i)] = v_new(token, head, i);
        }
      }
    }
    end_ = position + n_new;
    farthest_ = std::max(farthest_, end_);
  }

  /// @throws std::invalid_argument unless commit() would take tokens at `position`
  void require_position(std::int64_t position) const {
    require(position <= end_ && position >= farthest_ - n_spare_, "ring_cache: commit at position ", position,
            ", the ring ends at ", end_, ", has been at ", farthest_, " and can go back ", n_spare_,
            "; tokens are committed in order, and reset() starts a new sequence");
  }

  /// The storage itself, as k() and v() have it: what a sequence that is put back fills before resume().
  [[nodiscard]] std::span<TStorage> k_storage() { return k_; }
  [[nodiscard]] std::span<TStorage> v_storage() { return v_; }

  /// The slots hold the tokens before `end`, and what a sequence leaves that has been at `farthest`.
  void resume(std::int64_t end, std::int64_t farthest) {
    require(end >= 0 && farthest >= end, "ring_cache: resume at ", end, " from ", farthest, ", need at least 0 and ",
            end);
    end_ = end;
    farthest_ = farthest;
  }

  /// Starts a new sequence; what the slots hold is no longer reachable.
  void reset() { end_ = farthest_ = 0; }

 private:
  std::int64_t n_head_kv_;
  std::int64_t ring_len_;
  std::int64_t head_dim_;
  std::int64_t n_spare_;
  std::int64_t end_ = 0;
  std::int64_t farthest_ = 0;  ///< end() that the sequence had at most
  std::vector<TStorage> k_;
  std::vector<TStorage> v_;
};

}  // namespace gemma4::reference

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/view.hpp"

/// The contract of writing new K and V to a flat cache, compressed or not.
///
/// k, v [batch, n_new, n_head_kv, head_dim] are stored at positions[t], t in [0, n_new), of the cache
/// [batch, n_head_kv, buffer_len, ...]; the positions are shared by the batch and come in any order. Rows of the cache
/// at other positions keep every bit. Nothing is written when the call is refused.
namespace gemma4 {

/// Which of the two halves of a cache a row belongs to: they may be stored in different formats.
enum class CacheSide { kKey, kValue };

/// Extents of the cache that is written to.
struct CacheShape {
  std::int64_t batch = 1;
  std::int64_t n_head_kv = 1;
  std::int64_t buffer_len = 1;
  std::int64_t head_dim = 64;
  bool operator==(const CacheShape&) const = default;
};

/// Refuses positions outside [0, buffer_len) and positions given twice, whose order of writing would decide the result.
/// @throws std::invalid_argument naming the indices and the values
inline void require_positions(const char* who, std::span<const std::int32_t> positions, std::int64_t buffer_len) {
  std::vector<std::pair<std::int32_t, std::size_t>> sorted;
  sorted.reserve(positions.size());
  for (std::size_t i = 0; i < positions.size(); ++i) {
    require(positions[i] >= 0 && positions[i] < buffer_len, who, ": positions[", i, "] is ", positions[i],
            ", outside [0, buffer_len = ", buffer_len, ")");
    sorted.emplace_back(positions[i], i);
  }
  std::sort(sorted.begin(), sorted.end());
  const auto twice =
      std::adjacent_find(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.first == b.first; });
  if (twice == sorted.end()) return;
  const auto next = twice + 1;
  require(false, who, ": positions[", twice->second, "] and positions[", next->second, "] are both ", twice->first,
          "; give each position once");
}

/// Refuses k and v whose extents do not fit the cache or the positions.
/// @throws std::invalid_argument naming the argument, the axis and both values
template <class Scalar>
void require_cache_update(const char* who, const View<const Scalar, 4>& k, const View<const Scalar, 4>& v,
                          std::span<const std::int32_t> positions, const CacheShape& cache) {
  const auto n_new = static_cast<std::int64_t>(positions.size());
  const std::int64_t expected[4] = {cache.batch, n_new, cache.n_head_kv, cache.head_dim};
  const char* const axis_name[4] = {"batch", "n_new (the number of positions)", "n_head_kv", "head_dim"};
  const std::pair<const char*, const View<const Scalar, 4>*> inputs[2] = {{"k", &k}, {"v", &v}};
  for (const auto& [name, input] : inputs) {
    for (int axis = 0; axis < 4; ++axis) {
      require(input->extent[axis] == expected[axis], who, ": ", name, " has extent ", input->extent[axis], " on axis ",
              axis, ", need ", axis_name[axis], " = ", expected[axis]);
    }
    require(input->stride[3] == 1, who, ": ", name, " has stride ", input->stride[3],
            " between the values of a head, need 1");
  }
  require_positions(who, positions, cache.buffer_len);
}

}  // namespace gemma4

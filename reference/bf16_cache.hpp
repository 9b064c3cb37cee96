// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "gemma4/cache_update.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// The uncompressed flat cache: the baseline that TQ4 is judged against. Mirror: cuda/bf16_cache.cuh.
namespace gemma4::reference {

/// K and V of one layer, [batch, n_head_kv, buffer_len, head_dim] of TStorage: Bf16, or float where a comparison must
/// not see the rounding of storage. Begins as zeros.
template <class TStorage>
class FlatCache {
 public:
  FlatCache(std::int64_t batch, std::int64_t n_head_kv, std::int64_t buffer_len, std::int64_t head_dim)
      : shape_{batch, n_head_kv, buffer_len, head_dim}, k_(size()), v_(size()) {}
  FlatCache(FlatCache&&) noexcept = default;
  FlatCache& operator=(FlatCache&&) noexcept = default;
  [[nodiscard]] FlatCache clone() const { return *this; }

  [[nodiscard]] const CacheShape& shape() const { return shape_; }
  [[nodiscard]] std::int64_t bytes() const { return static_cast<std::int64_t>(2 * size() * sizeof(TStorage)); }
  [[nodiscard]] View<TStorage, 4> k() { return view_of(k_.data()); }
  [[nodiscard]] View<TStorage, 4> v() { return view_of(v_.data()); }
  [[nodiscard]] View<const TStorage, 4> k() const { return view_of(k_.data()); }
  [[nodiscard]] View<const TStorage, 4> v() const { return view_of(v_.data()); }
  /// The storage itself, as k() and v() have it.
  [[nodiscard]] std::span<TStorage> k_storage() { return k_; }
  [[nodiscard]] std::span<TStorage> v_storage() { return v_; }
  bool operator==(const FlatCache&) const = default;

 private:
  FlatCache(const FlatCache&) = default;

  [[nodiscard]] std::size_t size() const {
    return static_cast<std::size_t>(shape_.batch * shape_.n_head_kv * shape_.buffer_len * shape_.head_dim);
  }
  template <class T>
  [[nodiscard]] View<T, 4> view_of(T* data) const {
    return make_view(data, shape_.batch, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim);
  }

  CacheShape shape_;
  std::vector<TStorage> k_;
  std::vector<TStorage> v_;
};

/// Stores k and v [batch, n_new, n_head_kv, head_dim], rounded to TStorage (to nearest, ties to even), at `positions`
/// [n_new] of the cache; every other row keeps its bits. The contract is that of gemma4/cache_update.hpp.
/// @throws std::invalid_argument on extents that do not fit, a position outside the buffer or given twice
template <class Scalar, class TStorage>
void bf16_cache_update(View<const Scalar, 4> k, View<const Scalar, 4> v, std::span<const std::int32_t> positions,
                       View<TStorage, 4> k_cache, View<TStorage, 4> v_cache) {
  const char* const who = "bf16_cache_update";
  const CacheShape shape{k_cache.extent[0], k_cache.extent[1], k_cache.extent[2], k_cache.extent[3]};
  for (int axis = 0; axis < 4; ++axis) {
    require(v_cache.extent[axis] == k_cache.extent[axis], who, ": v_cache has extent ", v_cache.extent[axis],
            " on axis ", axis, ", k_cache has ", k_cache.extent[axis]);
  }
  require_cache_update(who, k, v, positions, shape);
  require(k_cache.stride[3] == 1 && v_cache.stride[3] == 1, who, ": the cache has strides ", k_cache.stride[3], " and ",
          v_cache.stride[3], " between the values of a head, need 1");
  const auto store = [&](const Scalar* from, TStorage* to) {
    for (std::int64_t i = 0; i < shape.head_dim; ++i) to[i] = from_float<TStorage>(static_cast<float>(from[i]));
  };
  for (std::int64_t b = 0; b < shape.batch; ++b) {
    for (std::int64_t h = 0; h < shape.n_head_kv; ++h) {
      for (std::size_t t = 0; t < positions.size(); ++t) {
        store(&k(b, t, h, 0), &k_cache(b, h, positions[t], 0));
        store(&v(b, t, h, 0), &v_cache(b, h, positions[t], 0));
      }
    }
  }
}

/// The same on an owning cache.
template <class Scalar, class TStorage>
void bf16_cache_update(View<const Scalar, 4> k, View<const Scalar, 4> v, std::span<const std::int32_t> positions,
                       FlatCache<TStorage>& cache) {
  bf16_cache_update<Scalar, TStorage>(k, v, positions, cache.k(), cache.v());
}

}  // namespace gemma4::reference

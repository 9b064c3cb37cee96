// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <string_view>
#include <vector>

#include "gemma4/float16.hpp"
#include "gemma4/session/stored_part.hpp"
#include "gemma4/view.hpp"
#include "reference/matrix.hpp"

/// Matrices of heads as the caches take them.
namespace gemma4::reference {

namespace detail {

/// A matrix of heads as the view [1, n_token, n_heads, head_dim].
template <class Scalar>
[[nodiscard]] View<const Scalar, 4> heads_view(const Matrix<Scalar>& m, std::int64_t head_dim) {
  return make_view(m.data(), 1, m.rows(), m.cols() / head_dim, head_dim);
}

/// Values [n_head, n_row, row_len] as a part that can be taken out and put back.
template <class T>
[[nodiscard]] StoredPart stored_part(std::string_view name, std::span<T> values, std::int64_t n_head,
                                     std::int64_t n_row) {
  const auto bytes = std::as_writable_bytes(values);
  return {.name = name,
          .data = bytes.data(),
          .n_head = n_head,
          .n_row = n_row,
          .row_bytes = static_cast<std::int64_t>(bytes.size()) / (n_head * n_row)};
}

/// Each element rounded to the storage type.
template <class TStorage, class Scalar>
[[nodiscard]] std::vector<TStorage> to_storage(const Matrix<Scalar>& m) {
  std::vector<TStorage> out(static_cast<std::size_t>(m.size()));
  std::transform(m.data(), m.data() + m.size(), out.begin(),
                 [](Scalar value) { return from_float<TStorage>(static_cast<float>(value)); });
  return out;
}

[[nodiscard]] inline std::vector<std::int32_t> consecutive(std::int64_t first, std::int64_t count) {
  std::vector<std::int32_t> positions(static_cast<std::size_t>(count));
  std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(first));
  return positions;
}

}  // namespace detail

}  // namespace gemma4::reference

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gemma4/cache_update.hpp"
#include "gemma4/tq4_codebook.hpp"
#include "gemma4/tq4_format.hpp"
#include "reference/rotation.hpp"

/// What a TQ4 cache holds, read byte by byte as gemma4/tq4_format.hpp says. Shared with nothing that is under test but
/// the inverse rotation, which has tests and an oracle of its own.
namespace gemma4::testkit {

/// Every vector of one side in double, rotated back: [batch, n_head_kv, buffer_len, head_dim].
/// @param codes [batch, n_head_kv, buffer_len, head_dim/2] and norms [batch, n_head_kv, buffer_len], without gaps
/// @param book  the side's own
[[nodiscard]] inline std::vector<double> decode_side(const CacheShape& s, const std::uint8_t* codes,
                                                     const Tq4Norm* norms, const Codebook& book,
                                                     const reference::Rotation<double>& rotation) {
  const std::int64_t n_row = s.batch * s.n_head_kv * s.buffer_len;
  reference::Matrix<double> rows(n_row, s.head_dim);
  for (std::int64_t row = 0; row < n_row; ++row) {
    const double norm = to_float(norms[row]);
    for (std::int64_t i = 0; i < s.head_dim; ++i) {
      const int byte = codes[row * s.head_dim / 2 + i / 2];
      rows(row, i) = norm * book.centroids[static_cast<std::size_t>(i % 2 == 0 ? byte / 16 : byte % 16)];
    }
  }
  rotation.inverse(rows);
  return {rows.data(), rows.data() + rows.size()};
}

}  // namespace gemma4::testkit

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "reference/quantized_linear.hpp"

namespace gemma4::reference {

/// out[t] = table[tokens[t]] * scale.
/// @param tokens  [n_token], each in [0, table.rows)
/// @param table   [vocab, hidden] in any block format
/// @param scale   sqrt(hidden) in Gemma
/// @param out     [n_token, hidden]
/// @throws std::invalid_argument naming the token that is outside the vocabulary
/// Mirror: cuda/embedding.cuh
template <class Scalar>
void embedding(std::span<const std::int32_t> tokens, const QuantizedMatrix& table, float scale, MatrixRef<Scalar> out) {
  require(out.rows() == static_cast<Eigen::Index>(tokens.size()) && out.cols() == table.cols, "embedding: out is ",
          out.rows(), " x ", out.cols(), ", need ", tokens.size(), " x ", table.cols);
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    require(tokens[t] >= 0 && tokens[t] < table.rows, "embedding: token ", tokens[t], " at ", t,
            " is outside the vocabulary [0, ", table.rows, ")");
    out.row(static_cast<Eigen::Index>(t)) =
        detail::dequantise_rows<Scalar>(table, tokens[t], 1) * static_cast<Scalar>(scale);
  }
}

}  // namespace gemma4::reference

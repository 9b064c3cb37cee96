// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "reference/quantized_linear.hpp"

namespace gemma4::reference {

/// logits = softcap * tanh(x table^T / softcap).
/// @param x       [n_row, hidden], after the output norm; only the rows whose logits are wanted
/// @param table   [vocab, hidden], the tied embedding or an output matrix of its own
/// @param logits  [n_row, vocab]
/// Mirror: cuda/lm_head.cuh
template <class Scalar>
void lm_head(ConstMatrixRef<Scalar> x, const QuantizedMatrix& table, float softcap, MatrixRef<Scalar> logits) {
  require(softcap > 0, "lm_head: softcap is ", softcap, ", need a positive number");
  quantized_linear<Scalar>(x, table, logits);
  const auto cap = static_cast<Scalar>(softcap);
  logits = (cap * (logits.array() / cap).tanh()).matrix();
}

}  // namespace gemma4::reference

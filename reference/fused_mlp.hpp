// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include "reference/quantized_linear.hpp"

namespace gemma4::reference {

/// GELU in its tanh form, element by element, times the gate's partner: out = gelu(gate) * up.
/// gelu(x) = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). Source: arXiv:1606.08415.
template <class Scalar>
[[nodiscard]] Matrix<Scalar> gelu_times(const Matrix<Scalar>& gate, const Matrix<Scalar>& up) {
  const auto x = gate.array();
  const auto inner =
      static_cast<Scalar>(std::sqrt(2.0 / std::numbers::pi)) * (x + static_cast<Scalar>(0.044715) * x * x * x);
  return (static_cast<Scalar>(0.5) * x * (static_cast<Scalar>(1) + inner.tanh()) * up.array()).matrix();
}

namespace detail {

inline void require_mlp(const char* who, std::int64_t x_cols, std::int64_t out_rows, std::int64_t out_cols,
                        std::int64_t n_token, const QuantizedMatrix& gate, const QuantizedMatrix& up) {
  require(gate.rows == up.rows && gate.cols == up.cols, who, ": gate is ", gate.rows, " x ", gate.cols, ", up is ",
          up.rows, " x ", up.cols);
  require(x_cols == gate.cols, who, ": x has width ", x_cols, ", gate has ", gate.cols, " columns");
  require(out_rows == n_token && out_cols == gate.rows, who, ": out is ", out_rows, " x ", out_cols, ", need ", n_token,
          " x ", gate.rows);
}

}  // namespace detail

/// The gated product as two matrices, one after another: out = gelu(x gate^T) * (x up^T).
/// @param x    [n_token, hidden]
/// @param out  [n_token, ffn_hidden]
template <class Scalar>
void unfused_gate_up(ConstMatrixRef<Scalar> x, const QuantizedMatrix& gate, const QuantizedMatrix& up,
                     MatrixRef<Scalar> out) {
  detail::require_mlp("unfused_gate_up", x.cols(), out.rows(), out.cols(), x.rows(), gate, up);
  Matrix<Scalar> gated(x.rows(), gate.rows);
  Matrix<Scalar> lifted(x.rows(), up.rows);
  quantized_linear<Scalar>(x, gate, gated);
  quantized_linear<Scalar>(x, up, lifted);
  out = gelu_times(gated, lifted);
}

/// The same as one matrix with the rows of gate and up side by side: each tile of it is gated where it is made, and the
/// two intermediate matrices never exist. Bit-identical to the unfused form, for any pair of types.
template <class Scalar>
void fused_gate_up(ConstMatrixRef<Scalar> x, const QuantizedMatrix& gate, const QuantizedMatrix& up,
                   MatrixRef<Scalar> out) {
  detail::require_mlp("fused_gate_up", x.cols(), out.rows(), out.cols(), x.rows(), gate, up);
  detail::for_weight_tiles(gate.rows, gate.cols, x.rows(), [&](std::int64_t begin, std::int64_t count) {
    Matrix<Scalar> gated(x.rows(), count), lifted(x.rows(), count);
    detail::times_tile<Scalar>(x, detail::dequantise_rows<Scalar>(gate, begin, count), gated);
    detail::times_tile<Scalar>(x, detail::dequantise_rows<Scalar>(up, begin, count), lifted);
    out.middleCols(begin, count) = gelu_times(gated, lifted);
  });
}

/// out = (gelu(x gate^T) * (x up^T)) down^T.
/// @param x    [n_token, hidden]
/// @param out  [n_token, hidden]
/// @throws std::invalid_argument when a shape differs
/// Mirror: cuda/fused_mlp.cuh
template <class Scalar>
void fused_mlp(ConstMatrixRef<Scalar> x, const QuantizedMatrix& gate, const QuantizedMatrix& up,
               const QuantizedMatrix& down, MatrixRef<Scalar> out) {
  Matrix<Scalar> activation(x.rows(), gate.rows);
  fused_gate_up<Scalar>(x, gate, up, activation);
  quantized_linear<Scalar>(activation, down, out);
}

/// fused_mlp with gate and up apart: what a backend does where their types differ, and what the fusion is held to.
template <class Scalar>
void unfused_mlp(ConstMatrixRef<Scalar> x, const QuantizedMatrix& gate, const QuantizedMatrix& up,
                 const QuantizedMatrix& down, MatrixRef<Scalar> out) {
  Matrix<Scalar> activation(x.rows(), gate.rows);
  unfused_gate_up<Scalar>(x, gate, up, activation);
  quantized_linear<Scalar>(activation, down, out);
}

}  // namespace gemma4::reference

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <span>

#include "gemma4/error.hpp"
#include "reference/matrix.hpp"

namespace gemma4::reference {

/// out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * weight, row by row; the mean accumulates in double.
/// @param x       [n_row, width]; for the per-head norms of q, k and v a row is one head (`as_heads`)
/// @param weight  [width], or empty: no weight (the norm of v)
/// @param out     [n_row, width]; may be x itself
/// @throws std::invalid_argument when a width differs
/// Source: arXiv:1910.07467; Gemma 4 multiplies by the weight itself, not by 1 + weight. Mirror: cuda/rms_norm.cuh
template <class Scalar>
void rms_norm(ConstMatrixRef<Scalar> x, std::span<const float> weight, float epsilon, MatrixRef<Scalar> out) {
  require(weight.empty() || static_cast<Eigen::Index>(weight.size()) == x.cols(), "rms_norm: weight has ",
          weight.size(), " values, x has width ", x.cols());
  require(out.rows() == x.rows() && out.cols() == x.cols(), "rms_norm: out is ", out.rows(), " x ", out.cols(),
          ", x is ", x.rows(), " x ", x.cols());
  for (Eigen::Index row = 0; row < x.rows(); ++row) {
    const double mean_square = x.row(row).template cast<double>().squaredNorm() / static_cast<double>(x.cols());
    const auto scale = static_cast<Scalar>(1.0 / std::sqrt(mean_square + static_cast<double>(epsilon)));
    if (weight.empty()) {
      out.row(row) = x.row(row) * scale;
    } else {
      out.row(row) = (x.row(row) * scale).cwiseProduct(as_row<Scalar>(weight));
    }
  }
}

}  // namespace gemma4::reference

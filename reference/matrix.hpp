// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <span>

/// Names for the Eigen types of the reference. A matrix of activations is [n_token, width], row-major, a token a row.
namespace gemma4::reference {

template <class Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Borrowed matrices with contiguous rows. A block of rows converts; a temporary copy is never made for the mutable
/// one.
template <class Scalar>
using MatrixRef = Eigen::Ref<Matrix<Scalar>, 0, Eigen::OuterStride<>>;
template <class Scalar>
using ConstMatrixRef = Eigen::Ref<const Matrix<Scalar>, 0, Eigen::OuterStride<>>;

template <class Scalar>
using MatrixMap = Eigen::Map<Matrix<Scalar>>;

/// A float vector of weights as a row of `Scalar`.
template <class Scalar>
[[nodiscard]] auto as_row(std::span<const float> values) {
  return Eigen::Map<const Eigen::RowVector<float, Eigen::Dynamic>>(values.data(),
                                                                   static_cast<Eigen::Index>(values.size()))
      .template cast<Scalar>();
}

/// [n_token, n_head * head_dim] seen as [n_token * n_head, head_dim]: a head a row. `x` must own contiguous rows.
template <class Scalar>
[[nodiscard]] MatrixMap<Scalar> as_heads(Matrix<Scalar>& x, std::int64_t head_dim) {
  return {x.data(), x.size() / head_dim, head_dim};
}

}  // namespace gemma4::reference

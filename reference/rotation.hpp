// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/rotation.hpp"
#include "gemma4/tq4_format.hpp"
#include "reference/matrix.hpp"

/// The seeded orthogonal transform of head vectors, as Eigen computes it. Mirror: cuda/rotation.cuh.
namespace gemma4::reference {

/// y = R x for an orthogonal R [head_dim, head_dim], applied to many vectors at once; gemma4/rotation.hpp defines what
/// a seed means. Errors of one application, relative to |x|: about log2(head_dim) roundings (signed Hadamard) or
/// sqrt(head_dim) roundings (dense).
template <class Scalar>
class Rotation {
 public:
  /// y = H diag(s) x / sqrt(head_dim). @throws std::invalid_argument unless head_dim is a power of two
  [[nodiscard]] static Rotation signed_hadamard(std::int64_t head_dim, std::uint64_t seed) {
    const std::vector<std::int8_t> signs = hadamard_signs(seed, head_dim);
    Rotation rotation;
    rotation.kind_ = RotationKind::kSignedHadamard;
    rotation.signs_ =
        Eigen::Map<const Eigen::Array<std::int8_t, Eigen::Dynamic, 1>>(signs.data(), head_dim).template cast<Scalar>();
    return rotation;
  }

  /// The seeded Haar matrix. @throws std::invalid_argument unless head_dim is even and positive
  [[nodiscard]] static Rotation dense_haar(std::int64_t head_dim, std::uint64_t seed) {
    const std::vector<double> values = haar_matrix(seed, head_dim);
    Rotation rotation;
    rotation.kind_ = RotationKind::kDenseHaar;
    rotation.matrix_ = Eigen::Map<const Matrix<double>>(values.data(), head_dim, head_dim).template cast<Scalar>();
    return rotation;
  }

  /// A given R, from a file for instance.
  /// @throws std::invalid_argument unless it is square and R R^T = 1 within 1e-5 in every entry
  [[nodiscard]] static Rotation dense(Matrix<Scalar> matrix) {
    require(matrix.rows() == matrix.cols() && matrix.rows() > 0, "Rotation::dense: matrix is ", matrix.rows(), " x ",
            matrix.cols(), ", need a square one");
    const Matrix<double> wide = matrix.template cast<double>();
    const double error =
        (wide * wide.transpose() - Matrix<double>::Identity(wide.rows(), wide.rows())).cwiseAbs().maxCoeff();
    // Asked for by itself, because a maximum may or may not show a NaN.
    require(wide.allFinite(), "Rotation::dense: the matrix holds a value that is not finite");
    require(error <= 1e-5, "Rotation::dense: R R^T differs from the identity by ", error, ", need at most 1e-5");
    Rotation rotation;
    rotation.kind_ = RotationKind::kDenseHaar;
    rotation.matrix_ = std::move(matrix);
    return rotation;
  }

  [[nodiscard]] static Rotation make(RotationKind kind, std::int64_t head_dim, std::uint64_t seed) {
    return kind == RotationKind::kSignedHadamard ? signed_hadamard(head_dim, seed) : dense_haar(head_dim, seed);
  }

  [[nodiscard]] RotationKind kind() const { return kind_; }
  [[nodiscard]] std::int64_t head_dim() const {
    return kind_ == RotationKind::kSignedHadamard ? signs_.size() : matrix_.rows();
  }

  /// Every row x of `rows` becomes R x, in place. A row's result does not depend on the rows beside it with the signed
  /// Hadamard; with a dense matrix Eigen may sum in another order for another number of rows.
  /// @throws std::invalid_argument unless `rows` has head_dim columns
  void forward(MatrixRef<Scalar> rows) const {
    require_columns("Rotation::forward", rows.cols());
    if (kind_ == RotationKind::kDenseHaar) {
      rows = (rows * matrix_.transpose()).eval();
      return;
    }
    transform_blocks(rows, [this](Lanes& block) {
      block.colwise() *= signs_;
      hadamard(block);
    });
  }

  /// Every row y of `rows` becomes R^T y, in place; otherwise like forward.
  void inverse(MatrixRef<Scalar> rows) const {
    require_columns("Rotation::inverse", rows.cols());
    if (kind_ == RotationKind::kDenseHaar) {
      rows = (rows * matrix_).eval();
      return;
    }
    transform_blocks(rows, [this](Lanes& block) {
      hadamard(block);
      block.colwise() *= signs_;
    });
  }

 private:
  /// Sixteen vectors side by side, one a column: a butterfly then works on whole lines of sixteen numbers, three times
  /// faster than on pairs inside one vector, and head_dim 512 still fits the first-level cache.
  static constexpr Eigen::Index kLanes = 16;
  using Lanes = Eigen::Array<Scalar, Eigen::Dynamic, kLanes, Eigen::RowMajor>;

  Rotation() = default;

  void require_columns(const char* who, Eigen::Index columns) const {
    require(columns == head_dim(), who, ": rows of ", columns, " values, need head_dim ", head_dim());
  }

  template <class TTransform>
  static void transform_blocks(MatrixRef<Scalar>& rows, const TTransform& transform) {
    Lanes block = Lanes::Zero(rows.cols(), kLanes);
    for (Eigen::Index first = 0; first < rows.rows(); first += kLanes) {
      const Eigen::Index count = std::min(kLanes, rows.rows() - first);
      block.leftCols(count) = rows.middleRows(first, count).transpose().array();
      transform(block);
      rows.middleRows(first, count) = block.leftCols(count).transpose().matrix();
    }
  }

  /// Every column x becomes H x / sqrt(n), by n log2(n) additions: the butterfly of the Sylvester construction
  /// H_2n = [H_n H_n; H_n -H_n].
  static void hadamard(Lanes& block) {
    const Eigen::Index n = block.rows();
    for (Eigen::Index half = 1; half < n; half *= 2) {
      for (Eigen::Index base = 0; base < n; base += 2 * half) {
        for (Eigen::Index i = base; i < base + half; ++i) {
          const Eigen::Array<Scalar, 1, kLanes> upper = block.row(i);
          const Eigen::Array<Scalar, 1, kLanes> lower = block.row(i + half);
          block.row(i) = upper + lower;
          block.row(i + half) = upper - lower;
        }
      }
    }
    block *= Scalar(1) / std::sqrt(static_cast<Scalar>(n));
  }

  RotationKind kind_ = RotationKind::kSignedHadamard;
  Eigen::Array<Scalar, Eigen::Dynamic, 1> signs_;  ///< [head_dim], signed Hadamard only
  Matrix<Scalar> matrix_;                          ///< R [head_dim, head_dim], dense only
};

}  // namespace gemma4::reference

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "gemma4/error.hpp"
#include "reference/matrix.hpp"

namespace gemma4::reference {

/// Softmax-weighted sums over keys that arrive a block at a time, for a tile of rows (a row is one query of one head):
///   max = max_j s[j],   sum = sum_j exp(s[j] - max),   weighted = sum_j exp(s[j] - max) V[j],   result = weighted /
///   sum.
/// The state of no key (max = -inf, sum = 0, weighted = 0) is the exact identity of `merge`; `merge` commutes bit for
/// bit and is associative within rounding, which is why keys may be split in any way.
///
/// This is the only place that knows about -inf: a score of -inf says that the row does not see the key. Such a key
/// contributes nothing, whatever its value row holds (0 * NaN would be NaN), and a row that saw no key gives zeros.
/// Weights below the smallest normal number are taken as zero. A NaN in a score that is seen makes the row NaN.
/// Source: the running maximum and sum are those of arXiv:1805.02867; the merge is the same rule on two partial sums.
/// Mirror: cuda/softmax_state.cuh
template <class Scalar>
class SoftmaxState {
 public:
  SoftmaxState(std::int64_t n_row, std::int64_t head_dim)
      : max_(Vector::Constant(n_row, kNoKey)),
        sum_(Vector::Zero(n_row)),
        weighted_(Matrix<Scalar>::Zero(n_row, head_dim)) {}

  /// The score of a key that a row does not see.
  static constexpr Scalar kNoKey = -std::numeric_limits<Scalar>::infinity();

  /// Takes in a block of keys. Both arguments are scratch and are overwritten.
  /// @param scores [n_row, n_key], kNoKey where a row does not see a key
  /// @param values [n_key, head_dim]
  void absorb(MatrixRef<Scalar> scores, MatrixRef<Scalar> values) {
    if (values.rows() == 0) return;
    for (Eigen::Index row = 0; row < scores.rows(); ++row) absorb_scores(row, scores.row(row));
    absorb_non_finite(scores, values);
    weighted_.noalias() += scores * values;
  }

  /// Takes in the keys of `other`, which must be disjoint from those seen here.
  void merge(const SoftmaxState& other) {
    require(other.weighted_.rows() == weighted_.rows() && other.weighted_.cols() == weighted_.cols(),
            "SoftmaxState: merge of [", weighted_.rows(), ", ", weighted_.cols(), "] with [", other.weighted_.rows(),
            ", ", other.weighted_.cols(), "]");
    for (Eigen::Index row = 0; row < max_.size(); ++row) {
      if (other.max_[row] == kNoKey) continue;
      // The larger maximum keeps its weights exactly, whichever side it is on, and both sides share one line of code
      // (a compiler may contract one of two copies to a fused multiply-add): hence the commutation bit for bit.
      const bool mine = max_[row] >= other.max_[row];
      const SoftmaxState& stronger = mine ? *this : other;
      const SoftmaxState& weaker = mine ? other : *this;
      const Scalar weight = weight_of(weaker.max_[row] - stronger.max_[row]);
      sum_[row] = stronger.sum_[row] + weight * weaker.sum_[row];
      weighted_.row(row) = stronger.weighted_.row(row) + weight * weaker.weighted_.row(row);
      max_[row] = stronger.max_[row];
    }
  }

  /// weighted / sum, and zeros for a row that saw no key: [n_row, head_dim].
  [[nodiscard]] Matrix<Scalar> finish() const {
    Matrix<Scalar> out = Matrix<Scalar>::Zero(weighted_.rows(), weighted_.cols());
    for (Eigen::Index row = 0; row < out.rows(); ++row) {
      if (max_[row] != kNoKey) out.row(row) = weighted_.row(row) / sum_[row];
    }
    return out;
  }

 private:
  using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;
  using Row = Eigen::Ref<Eigen::Matrix<Scalar, 1, Eigen::Dynamic>>;

  /// Logarithm of the smallest normal number; below it Eigen's exp need not reach zero, not even for -inf.
  [[nodiscard]] static Scalar lowest_exponent() {
    static const Scalar value = std::log(std::numeric_limits<Scalar>::min());
    return value;
  }

  [[nodiscard]] static Scalar weight_of(Scalar difference) {
    return difference < lowest_exponent() ? Scalar(0) : std::exp(difference);
  }

  /// Replaces the scores of one row by weights relative to the new maximum, and rescales what the row had.
  void absorb_scores(Eigen::Index row, Row scores) {
    const Scalar block_max = scores.template maxCoeff<Eigen::PropagateNaN>();
    if (block_max == kNoKey) {
      scores.setZero();
      return;
    }
    const Scalar new_max = block_max <= max_[row] ? max_[row] : block_max;  // NaN wins
    const Scalar rescale = weight_of(max_[row] - new_max);
    scores.array() -= new_max;
    weights_ = scores.array().exp();
    const Scalar lowest = lowest_exponent();
    for (Eigen::Index key = 0; key < scores.size(); ++key) {
      scores[key] = scores[key] < lowest ? Scalar(0) : weights_[key];
    }
    sum_[row] = rescale * sum_[row] + scores.sum();
    if (rescale != Scalar(1)) weighted_.row(row) *= rescale;
    max_[row] = new_max;
  }

  /// Value rows that hold an infinity or NaN reach only the rows that see them; they then are zero in the block.
  void absorb_non_finite(MatrixRef<Scalar> weights, MatrixRef<Scalar> values) {
    for (Eigen::Index key = 0; key < values.rows(); ++key) {
      const Scalar largest = values.row(key).cwiseAbs().template maxCoeff<Eigen::PropagateNaN>();
      if (largest <= std::numeric_limits<Scalar>::max()) continue;
      for (Eigen::Index row = 0; row < weights.rows(); ++row) {
        if (weights(row, key) != Scalar(0)) weighted_.row(row) += weights(row, key) * values.row(key);
      }
      values.row(key).setZero();
      weights.col(key).setZero();
    }
  }

  Vector max_;
  Vector sum_;
  Matrix<Scalar> weighted_;
  Eigen::Array<Scalar, 1, Eigen::Dynamic> weights_;  // scratch of absorb_scores
};

}  // namespace gemma4::reference

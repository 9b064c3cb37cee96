// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

/// How far a computed attention may be from the exact one on the same inputs.
namespace gemma4 {

/// The roundings of an implementation of attention.
struct AttentionRounding {
  double unit = 0x1p-24;          ///< relative error of one operation: 2^-24 float, 2^-53 double
  double weight_unit = 0;         ///< of a softmax weight as stored for the second product: 2^-8 when that is bf16
  double output_unit = 0;         ///< of the result as stored: 2^-8 when that is bf16
  std::int64_t longest_sum = 1;   ///< additions on the way of one key's weight into the result; kv_len is always enough
  std::int64_t n_rescale = 1;     ///< times that a partial result may be rescaled: blocks of keys and merges of splits
  double rotation_roundings = 0;  ///< error of rotating a vector and of reading a stored one, in units u of its length
};

/// Bound on |computed - exact| of one output, to first order in the unit roundoff u, for any order of summation.
/// With S = max_j scale * sum_i |q_i k_ji| and V = max_j |v_j| over the visible keys j:
///   a score is off by at most (head_dim + 2) u S (products, sums and the scale), and its difference to the maximum,
///   rounded once in the exponential and once more along all the rescales together, by another 4 u S;
///   an exponential is off by 4 u relative, and so is each rescale, which also rounds once: 5 u (n_rescale + 1);
///   so the logarithm of a weight is off by at most d = u ((head_dim + 6) S + 5 (n_rescale + 1)) + weight_unit,
///   which moves the weighted mean by at most (e^(2 d) - 1) V;
///   numerator and denominator are sums of at most longest_sum additions, one product and one division:
///   2 u (longest_sum + 2) V; storing the result adds output_unit V.
/// Attention in a rotated space, with r = rotation_roundings: the same holds for the length of the error of a whole
/// head vector, and so for each of its elements, with S = scale * |q| * max_j |k_j| and V = max_j |v_j| in lengths of
/// vectors (which a rotation keeps, and which the sums of absolute products above never exceed); rotating q and reading
/// K add r u S to a score, rotating back and reading V add r u V.
[[nodiscard]] inline double attention_bound(const AttentionRounding& rounding, std::int64_t head_dim,
                                            double score_magnitude, double value_magnitude) {
  const double weight =
      rounding.unit * ((static_cast<double>(head_dim + 6) + rounding.rotation_roundings) * score_magnitude +
                       5.0 * static_cast<double>(rounding.n_rescale + 1)) +
      rounding.weight_unit;
  const double sums =
      2.0 * rounding.unit * static_cast<double>(rounding.longest_sum + 2) + rounding.rotation_roundings * rounding.unit;
  return value_magnitude * (std::expm1(2.0 * weight) + sums + rounding.output_unit);
}

}  // namespace gemma4

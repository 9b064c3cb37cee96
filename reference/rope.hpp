// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "gemma4/config.hpp"
#include "reference/matrix.hpp"

namespace gemma4::reference {

/// Rotary position embedding in split-half order, in place: pair i of a head is (x[i], x[i + head_dim / 2]) and turns
/// by
///   position * rope_theta^(-2 i / head_dim),  i < rope_pairs;
/// the other pairs stay. With rope_pairs = head_dim / 2 this is the full rotation of the sliding layers, with
/// head_dim / 8 the proportional partial one of the full layers (the frequencies are those of the whole head).
/// Angles are computed in double: at position 262143 a float angle would be off by 0.008 rad.
/// @param x         [n_token, n_head * head_dim]
/// @param position  of the first token, in [0, 2^31); token t stands at position + t
/// Source: arXiv:2104.09864. Mirror: cuda/rope.cuh
template <class Scalar>
void rope(MatrixRef<Scalar> x, std::int64_t position, const AttentionConfig& attention) {
  const Eigen::Index head_dim = attention.head_dim;
  const Eigen::Index n_pair = attention.rope_pairs;
  require(head_dim > 0 && x.cols() % head_dim == 0, "rope: width ", x.cols(), " is not a multiple of head_dim ",
          head_dim);
  require(n_pair >= 0 && n_pair <= head_dim / 2, "rope: rope_pairs ", n_pair,
          ", need 0 to head_dim / 2 = ", head_dim / 2);
  require(position >= 0, "rope: position ", position, ", need at least 0");
  Eigen::Array<double, 1, Eigen::Dynamic> frequency(n_pair);
  for (Eigen::Index i = 0; i < n_pair; ++i) {
    frequency[i] = std::pow(attention.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
  }
  Eigen::Array<Scalar, 1, Eigen::Dynamic> first(n_pair);
  for (Eigen::Index token = 0; token < x.rows(); ++token) {
    const Eigen::Array<double, 1, Eigen::Dynamic> angle = frequency * static_cast<double>(position + token);
    const Eigen::Array<Scalar, 1, Eigen::Dynamic> cosine = angle.cos().template cast<Scalar>();
    const Eigen::Array<Scalar, 1, Eigen::Dynamic> sine = angle.sin().template cast<Scalar>();
    for (Eigen::Index head = 0; head < x.cols(); head += head_dim) {
      auto a = x.row(token).segment(head, n_pair).array();
      auto b = x.row(token).segment(head + head_dim / 2, n_pair).array();
      first = a;
      a = first * cosine - b * sine;
      b = b * cosine + first * sine;
    }
  }
}

}  // namespace gemma4::reference

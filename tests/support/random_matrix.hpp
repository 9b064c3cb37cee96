// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "gemma4/rotation.hpp"
#include "reference/matrix.hpp"

namespace gemma4::testkit {

/// Uniform numbers in [-1, 1), a pure function of the seed: no test depends on which ones ran before it, as with
/// Eigen's Random() and the C library's one stream.
template <class Scalar>
[[nodiscard]] reference::Matrix<Scalar> random_matrix(std::uint64_t seed, Eigen::Index rows, Eigen::Index cols) {
  reference::Matrix<Scalar> m(rows, cols);
  std::uint64_t counter = mix_bits(seed + 0x9E3779B97F4A7C15u);
  for (Eigen::Index i = 0; i < m.size(); ++i) {
    m.data()[i] =
        static_cast<Scalar>(static_cast<double>(mix_bits(counter += 0x9E3779B97F4A7C15u) >> 40) * 0x1p-23 - 1);
  }
  return m;
}

}  // namespace gemma4::testkit

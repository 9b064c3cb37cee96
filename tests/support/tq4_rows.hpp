// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <rapidcheck.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gemma4/rotation.hpp"
#include "reference/tq4_cache.hpp"

/// Compressed rows outside a cache, and random ones to compress.
namespace gemma4::testkit {

inline constexpr double kBf16Unit = 0x1p-8;  ///< the largest relative error of rounding to bf16

/// Compressed rows outside a cache.
struct Tq4Rows {
  reference::Matrix<std::uint8_t> codes;  ///< [n, head_dim/2]
  std::vector<Tq4Norm> norms;             ///< [n]

  [[nodiscard]] View<const std::uint8_t, 2> code_view() const {
    return make_view(codes.data(), codes.rows(), codes.cols());
  }
  [[nodiscard]] View<const Tq4Norm, 1> norm_view() const { return make_view(norms.data(), norms.size()); }
  bool operator==(const Tq4Rows& other) const { return codes == other.codes && norms == other.norms; }
};

template <class Scalar>
[[nodiscard]] Tq4Rows compress(const reference::Tq4Codec<Scalar>& codec, reference::CacheSide side,
                               const reference::Matrix<Scalar>& x) {
  Tq4Rows rows{reference::Matrix<std::uint8_t>(x.rows(), x.cols() / 2),
               std::vector<Tq4Norm>(static_cast<std::size_t>(x.rows()))};
  codec.compress(side, x, make_view(rows.codes.data(), x.rows(), x.cols() / 2), make_view(rows.norms.data(), x.rows()));
  return rows;
}

template <class Scalar>
[[nodiscard]] reference::Matrix<Scalar> decompress(const reference::Tq4Codec<Scalar>& codec, reference::CacheSide side,
                                                   const Tq4Rows& rows) {
  reference::Matrix<Scalar> out(rows.codes.rows(), 2 * rows.codes.cols());
  codec.decompress(side, rows.code_view(), rows.norm_view(), out);
  return out;
}

/// n rows of independent normal numbers.
[[nodiscard]] inline reference::Matrix<float> normal_rows(std::uint64_t seed, Eigen::Index rows, Eigen::Index cols) {
  const std::vector<double> values = haar_gaussians(seed, rows * cols);
  return Eigen::Map<const reference::Matrix<double>>(values.data(), rows, cols).cast<float>();
}

[[nodiscard]] inline std::int64_t any_head_dim() {
  return *rc::gen::element<std::int64_t>(64, 128, 256, 512);
}

/// Every format but the dense rotation, whose matrix takes long to draw; both norms, both codebooks, all widths.
[[nodiscard]] inline Tq4Options any_options() {
  return {.rotation = RotationKind::kSignedHadamard,
          .codebook = *rc::gen::element(CodebookKind::kFull, CodebookKind::kCutAtThreeSigma),
          .norm = *rc::gen::element(NormKind::kCorrected, NormKind::kRaw),
          .k_bits = *rc::gen::inRange(2, 5),
          .v_bits = *rc::gen::inRange(2, 5),
          .seed = *rc::gen::arbitrary<std::uint64_t>()};
}

[[nodiscard]] inline int code_at(const Tq4Rows& rows, Eigen::Index row, Eigen::Index i) {
  const std::uint8_t byte = rows.codes(row, i / 2);
  return i % 2 == 0 ? byte >> 4 : byte & 15;
}

}  // namespace gemma4::testkit

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <rapidcheck.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "gemma4/kv_format.hpp"
#include "gemma4/rotation.hpp"
#include "reference/kv_cache.hpp"
#include "tests/support/tq4_rows.hpp"

/// Vectors of a cache of one vector for K and V: compressed outside a cache, and read byte by byte as
/// gemma4/kv_format.hpp says, with nothing of the codec but its parts.
namespace gemma4::testkit {

inline constexpr double kF16Unit = 0x1p-11;  ///< the largest relative error of rounding to f16

/// Compressed rows outside a cache.
struct KvRows {
  reference::Matrix<std::uint8_t> codes;  ///< [n_row, bytes]
  std::vector<KvNorm> norms;              ///< [n_row]

  [[nodiscard]] View<const std::uint8_t, 2> code_view() const {
    return make_view(codes.data(), codes.rows(), codes.cols());
  }
  [[nodiscard]] View<const KvNorm, 1> norm_view() const { return make_view(norms.data(), norms.size()); }
  bool operator==(const KvRows& other) const { return codes == other.codes && norms == other.norms; }
};

template <class Scalar>
[[nodiscard]] KvRows compress(const reference::KvVectorCodec<Scalar>& codec, const reference::Matrix<Scalar>& x) {
  KvRows rows{reference::Matrix<std::uint8_t>(x.rows(), codec.code_bytes()),
              std::vector<KvNorm>(static_cast<std::size_t>(x.rows()))};
  codec.compress(x, make_view(rows.codes.data(), x.rows(), codec.code_bytes()), make_view(rows.norms.data(), x.rows()));
  return rows;
}

template <class Scalar>
[[nodiscard]] reference::Matrix<Scalar> decompress(const reference::KvVectorCodec<Scalar>& codec, const KvRows& rows) {
  reference::Matrix<Scalar> out(rows.codes.rows(), codec.size());
  codec.decompress(rows.code_view(), rows.norm_view(), out);
  return out;
}

/// Value i of a row of planes: its level with its sign, no norm.
[[nodiscard]] inline double kv_level(const std::uint8_t* row, std::int64_t n, std::int64_t i, const KvCodebook& book) {
  int code = 0;
  for (int plane = book.bits - 1; plane >= 0; --plane) {
    code = 2 * code + ((row[plane * (n / 8) + i / 8] & (1 << (i % 8))) != 0 ? 1 : 0);
  }
  const int sign = 1 << (book.bits - 1);
  return code >= sign ? -static_cast<double>(book.level[code - sign]) : static_cast<double>(book.level[code]);
}

/// Every vector of V or of R in double, still rotated: [n_row, n].
/// @param codes [n_row, bits * n / 8] and norms [n_row], without gaps
[[nodiscard]] inline reference::Matrix<double> turned_kv_vectors(std::int64_t n_row, std::int64_t n,
                                                                 const std::uint8_t* codes, const KvNorm* norms,
                                                                 const KvCodebook& book) {
  reference::Matrix<double> turned(n_row, n);
  for (std::int64_t row = 0; row < n_row; ++row) {
    for (std::int64_t i = 0; i < n; ++i) {
      turned(row, i) = to_float(norms[row]) * kv_level(codes + row * kv_code_bytes(n, book.bits), n, i, book);
    }
  }
  return turned;
}

/// The same rotated back, by the reference's rotation, which has tests and an oracle of its own.
[[nodiscard]] inline reference::Matrix<double> decode_kv_vectors(std::int64_t n_row, std::int64_t n,
                                                                 const std::uint8_t* codes, const KvNorm* norms,
                                                                 const KvCodebook& book, std::uint64_t seed) {
  reference::Matrix<double> rows = turned_kv_vectors(n_row, n, codes, norms, book);
  reference::Rotation<double>::signed_hadamard(n, seed).inverse(rows);
  return rows;
}

/// Every format but the dense rotation, whose matrix takes long to draw.
[[nodiscard]] inline KvOptions any_kv_options() {
  return {.rotation = RotationKind::kSignedHadamard,
          .codebook = *rc::gen::element(CodebookKind::kFull, CodebookKind::kCutAtThreeSigma),
          .norm = *rc::gen::element(NormKind::kCorrected, NormKind::kRaw),
          .v_bits = *rc::gen::inRange(3, 7),
          .r_bits = *rc::gen::inRange(3, 7),
          .seed = *rc::gen::arbitrary<std::uint64_t>()};
}

/// Weights of a k norm [head_dim], of both signs and spread over 100 to 1.
[[nodiscard]] inline std::vector<float> spread_weights(std::uint64_t seed, std::int64_t head_dim) {
  const std::vector<double> normal = haar_gaussians(seed, 2 * head_dim);
  std::vector<float> weights;
  for (std::size_t i = 0; i < static_cast<std::size_t>(head_dim); ++i) {
    const double size = 0.1 * std::pow(10.0, std::tanh(normal[2 * i]));
    weights.push_back(static_cast<float>(normal[2 * i + 1] < 0 ? -size : size));
  }
  return weights;
}

}  // namespace gemma4::testkit

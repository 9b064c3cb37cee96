// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "gemma4/tq4_golden.hpp"
#include "reference/tq4_attention.hpp"
#include "reference/tq4_cache.hpp"

/// The reference held against a golden TQ4 case: packing, decompression, attention.
namespace gemma4::reference {

struct Tq4GoldenComparison {
  std::int64_t n_value = 0;
  std::int64_t n_other_code = 0;  ///< codes that differ where the rotated value is no tie
  std::int64_t n_tie = 0;         ///< codes that differ within `tie` of a boundary
  double norm_error = 0;          ///< largest relative difference of a stored norm
  double decompressed_rms = 0;    ///< of the decompressed rows below kv_len against the originals, relative
  double decoded_error = 0;       ///< largest difference to out_tq4 of attention on the decoded rows, float32 norms
  double attention_miss = 0;      ///< largest ratio of tq4_attention's difference to out_tq4 to the bound of bf16 norms
};

/// The unit roundoff of a stored norm: the case's norms are float32, ours bf16.
inline constexpr double kNormRoundoff = 0x1p-8;

namespace detail {

[[nodiscard]] inline Tq4Codec<float> golden_codec(const Tq4Golden& golden) {
  const std::int64_t d = golden.shape.head_dim;
  const Matrix<float> rotation = Eigen::Map<const Matrix<float>>(golden.rotation.data(), d, d);
  return {Rotation<float>::dense(rotation), golden.codebook, golden.codebook, NormKind::kRaw};
}

/// Compares one side's codes and norms, and how far its decompressed rows are from the originals.
inline void compare_side(const Tq4Golden& golden, const Tq4Codec<float>& codec, CacheSide side, double tie,
                         Tq4GoldenComparison& result, double& error_square, double& square) {
  const bool is_key = side == CacheSide::kKey;
  const std::int64_t d = golden.shape.head_dim, n_row = golden.shape.n_head_kv * golden.shape.buffer_len;
  const std::vector<float>& x = is_key ? golden.k : golden.v;
  const std::vector<std::uint8_t>& expected = is_key ? golden.k_codes : golden.v_codes;
  const std::vector<float>& expected_norm = is_key ? golden.k_norm : golden.v_norm;
  const Matrix<float> rows = Eigen::Map<const Matrix<float>>(x.data(), n_row, d);
  std::vector<std::uint8_t> codes(expected.size());
  std::vector<Tq4Norm> norms(expected_norm.size());
  codec.compress(side, rows, make_view(codes.data(), n_row, d / 2), make_view(norms.data(), n_row));
  Matrix<float> rotated = rows.rowwise().normalized();
  codec.rotation().forward(rotated);
  for (std::int64_t i = 0; i < n_row * d; ++i) {
    const auto nibble = [i](const std::vector<std::uint8_t>& bytes) {
      const int byte = bytes[static_cast<std::size_t>(i / 2)];
      return i % 2 == 0 ? byte >> 4 : byte & 15;
    };
    ++result.n_value;
    if (nibble(codes) == nibble(expected)) continue;
    const auto distance = [&](float boundary) { return std::abs(rotated.data()[i] - boundary); };
    float nearest = std::numeric_limits<float>::infinity();
    for (const float boundary : golden.codebook.boundaries) nearest = std::min(nearest, distance(boundary));
    ++(static_cast<double>(nearest) <= tie ? result.n_tie : result.n_other_code);
  }
  Matrix<float> back(n_row, d);
  codec.decompress(side, make_view(std::as_const(codes).data(), n_row, d / 2),
                   make_view(std::as_const(norms).data(), n_row), back);
  for (std::int64_t row = 0; row < n_row; ++row) {
    const double norm = static_cast<double>(expected_norm[static_cast<std::size_t>(row)]);
    const double actual = static_cast<double>(to_float(norms[static_cast<std::size_t>(row)]));
    result.norm_error = std::max(result.norm_error, std::abs(actual - norm) / norm);
    if (row % golden.shape.buffer_len >= golden.kv_len) continue;  // the tail would drown the rest
    error_square += (back.row(row) - rows.row(row)).cast<double>().squaredNorm();
    square += rows.row(row).cast<double>().squaredNorm();
  }
}

/// Rows [0, kv_len) of one KV head as the case stores them, decoded with its float32 norms: [kv_len, head_dim].
[[nodiscard]] inline Matrix<double> decoded_rows(const Tq4Golden& golden, const Tq4Codec<float>& codec, CacheSide side,
                                                 std::int64_t head_kv) {
  const bool is_key = side == CacheSide::kKey;
  const std::int64_t d = golden.shape.head_dim, first = head_kv * golden.shape.buffer_len;
  const std::vector<std::uint8_t>& codes = is_key ? golden.k_codes : golden.v_codes;
  const std::vector<float>& norms = is_key ? golden.k_norm : golden.v_norm;
  const std::vector<Tq4Norm> ones(static_cast<std::size_t>(golden.kv_len), to_bf16(1.0f));
  Matrix<float> rows(golden.kv_len, d);
  codec.decompress(side, make_view(codes.data() + first * d / 2, golden.kv_len, d / 2),
                   make_view(ones.data(), golden.kv_len), rows);
  return (Eigen::Map<const Eigen::VectorXf>(norms.data() + first, golden.kv_len).asDiagonal() * rows).cast<double>();
}

/// Attention on the decoded rows in double, for each output element, and how far norms rounded to bf16 may move it. To
/// first order, with u the roundoff of a norm: a K norm moves score s_j by u |s_j| and so the mean by
/// u sum_j p_j |s_j| |v_j - out|; a V norm moves it by u sum_j p_j |v_j|. A tenth more covers the second order (u S is
/// below 0.03 here) and float32 sums.
struct GoldenAttention {
  std::vector<double> value, bound;
};

[[nodiscard]] inline GoldenAttention attend_decoded(const Tq4Golden& golden, const Tq4Codec<float>& codec) {
  const AttentionShape& shape = golden.shape;
  GoldenAttention result;
  result.value.resize(golden.out_tq4.size());
  result.bound.resize(golden.out_tq4.size());
  for (std::int64_t head = 0; head < shape.n_head; ++head) {
    const Matrix<double> k = decoded_rows(golden, codec, CacheSide::kKey, head / shape.group());
    const Matrix<double> v = decoded_rows(golden, codec, CacheSide::kValue, head / shape.group());
    for (std::int64_t t = 0; t < shape.n_query; ++t) {
      const std::int64_t at = (t * shape.n_head + head) * shape.head_dim;
      const std::int64_t n_visible = golden.kv_len - shape.n_query + t + 1;
      const Eigen::Map<const Eigen::VectorXf> q(golden.q.data() + at, shape.head_dim);
      const Eigen::ArrayXd score = (k.topRows(n_visible) * q.cast<double>()).array() * golden.options().scale;
      const Eigen::ArrayXd weight = (score - score.maxCoeff()).exp();
      const Eigen::RowVectorXd p = (weight / weight.sum()).matrix().transpose();
      const Eigen::RowVectorXd out = p * v.topRows(n_visible);
      const Eigen::RowVectorXd moved =
          p * v.topRows(n_visible).cwiseAbs() +
          p.cwiseProduct(score.abs().matrix().transpose()) * (v.topRows(n_visible).rowwise() - out).cwiseAbs();
      Eigen::Map<Eigen::RowVectorXd>(result.value.data() + at, shape.head_dim) = out;
      Eigen::Map<Eigen::RowVectorXd>(result.bound.data() + at, shape.head_dim) = 1.1 * kNormRoundoff * moved;
    }
  }
  return result;
}

}  // namespace detail

/// @param tie  distance to a boundary within which another code is a rounding tie
[[nodiscard]] inline Tq4GoldenComparison compare_with_golden(const Tq4Golden& golden, double tie = 1e-5) {
  const Tq4Codec<float> codec = detail::golden_codec(golden);
  Tq4GoldenComparison result;
  double error_square = 0, square = 0;
  detail::compare_side(golden, codec, CacheSide::kKey, tie, result, error_square, square);
  detail::compare_side(golden, codec, CacheSide::kValue, tie, result, error_square, square);
  result.decompressed_rms = std::sqrt(error_square / square);

  const detail::GoldenAttention decoded = detail::attend_decoded(golden, codec);
  const AttentionShape& shape = golden.shape;
  Tq4CacheBuffer cache(1, shape.n_head_kv, shape.buffer_len, shape.head_dim);
  std::ranges::copy(golden.k_codes, cache.k_codes().begin());
  std::ranges::copy(golden.v_codes, cache.v_codes().begin());
  std::ranges::transform(golden.k_norm, cache.k_norm().begin(), to_bf16);
  std::ranges::transform(golden.v_norm, cache.v_norm().begin(), to_bf16);
  std::vector<float> out(golden.out_tq4.size());
  tq4_attention<float>(make_view(golden.q.data(), 1, shape.n_query, shape.n_head, shape.head_dim),
                       std::as_const(cache).view(), codec, golden.options(), golden.kv_len,
                       make_view(out.data(), 1, shape.n_query, shape.n_head, shape.head_dim));
  const auto grow = [](double& worst, double error) {
    worst = error <= worst ? worst : error > worst ? error : std::numeric_limits<double>::infinity();
  };
  for (std::size_t i = 0; i < out.size(); ++i) {
    const auto expected = static_cast<double>(golden.out_tq4[i]);
    grow(result.decoded_error, std::abs(decoded.value[i] - expected));
    grow(result.attention_miss, std::abs(static_cast<double>(out[i]) - expected) / decoded.bound[i]);
  }
  return result;
}

}  // namespace gemma4::reference

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "gemma4/error.hpp"
#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/quantized_matrix.hpp"
#include "gemma4/step_limits.hpp"
#include "reference/matrix.hpp"

namespace gemma4::reference {

namespace detail {

/// Rows of a weight matrix that are dequantised at a time: the tile of the 31B's widest matrix is 11 MB, so a model is
/// never dequantised as a whole, and a GEMM of this width is efficient.
inline constexpr std::int64_t kWeightTileRows = 128;

/// Rows [begin, begin + count) of `weight`, dequantised: [count, cols].
template <class Scalar>
[[nodiscard]] Matrix<Scalar> dequantise_rows(const QuantizedMatrix& weight, std::int64_t begin, std::int64_t count) {
  Matrix<float> tile(count, weight.cols);
  for (std::int64_t row = 0; row < count; ++row) {
    dequantise_row(weight.type, weight.row(begin + row),
                   std::span<float>(tile.row(row).data(), static_cast<std::size_t>(weight.cols)));
  }
  if constexpr (std::is_same_v<Scalar, float>) {
    return tile;
  } else {
    return tile.template cast<Scalar>();
  }
}

/// Calls `body(begin, count)` for each tile of rows, in parallel where that pays (below it, waking the threads costs
/// more than the product); a tile owns its columns of the output.
template <class TBody>
void for_weight_tiles(std::int64_t rows, std::int64_t cols, std::int64_t n_token, TBody&& body) {
  [[maybe_unused]] constexpr std::int64_t kParallelWork = std::int64_t{1} << 18;  // multiplications: some 20 us
#pragma omp parallel for schedule(dynamic) if (rows * cols * n_token >= kParallelWork)
  for (std::int64_t begin = 0; begin < rows; begin += kWeightTileRows) {
    body(begin, std::min(kWeightTileRows, rows - begin));
  }
}

/// out = x * tile^T. Of up to kDecodeChunk rows each is a product of its own: Eigen sums a row of a matrix in another
/// order than a vector, and what a token computes must not depend on how many run with it.
/// @param x [n_token, cols]; @param tile [count, cols]; @param out [n_token, count]
template <class Scalar, class TOut>
void times_tile(const ConstMatrixRef<Scalar>& x, const Matrix<Scalar>& tile, TOut&& out) {
  if (x.rows() > kDecodeChunk) {
    out.noalias() = x * tile.transpose();
    return;
  }
  for (Eigen::Index row = 0; row < x.rows(); ++row) out.row(row).noalias() = x.row(row) * tile.transpose();
}

}  // namespace detail

/// out = x * weight^T: out[t, n] = sum_k x[t, k] * weight[n, k].
/// @param x       [n_token, cols]
/// @param weight  [rows, cols] in any block format
/// @param out     [n_token, rows]; must not alias x
/// Of up to kDecodeChunk tokens each has the bits that it would have alone.
/// @throws std::invalid_argument when a shape differs
/// Mirror: cuda/quantized_linear.cuh
template <class Scalar>
void quantized_linear(ConstMatrixRef<Scalar> x, const QuantizedMatrix& weight, MatrixRef<Scalar> out) {
  require(x.cols() == weight.cols, "quantized_linear: x has width ", x.cols(), ", weight has ", weight.cols,
          " columns");
  require(out.rows() == x.rows() && out.cols() == weight.rows, "quantized_linear: out is ", out.rows(), " x ",
          out.cols(), ", need ", x.rows(), " x ", weight.rows);
  detail::for_weight_tiles(weight.rows, weight.cols, x.rows(), [&](std::int64_t begin, std::int64_t count) {
    const Matrix<Scalar> tile = detail::dequantise_rows<Scalar>(weight, begin, count);
    detail::times_tile<Scalar>(x, tile, out.middleCols(begin, count));
  });
}

}  // namespace gemma4::reference

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <span>

#include "gemma4/cache_update.hpp"
#include "gemma4/error.hpp"
#include "gemma4/quantisers/quantiser.hpp"
#include "gemma4/view.hpp"
#include "reference/bf16_cache.hpp"
#include "reference/matrix.hpp"
#include "reference/rotation.hpp"

/// A cache format before it has a kernel: dequantise(quantise(x)) in the uncompressed flat cache. What a quantiser is,
/// and why both rooms get the same bits: gemma4/quantisers/quantiser.hpp. Mirror: cuda/simulated_cache.cuh.
namespace gemma4::reference {

namespace detail {

/// Every NaN becomes quiet_nan(), as on the device.
inline void settle_nans(MatrixRef<float> rows) {
  rows = rows.unaryExpr([](float value) { return std::isnan(value) ? quiet_nan() : value; }).eval();
}

}  // namespace detail

/// A simulated format and, where it asks for one, its rotation. Arithmetic in float, as on the device.
template <Quantiser TQuantiser>
class SimulatedCodec {
 public:
  /// @throws std::invalid_argument unless the quantiser's blocks fill head_dim and, with the Hadamard rotation,
  ///         head_dim is a power of two
  SimulatedCodec(std::int64_t head_dim, const Simulated<TQuantiser>& format) : format_(format), head_dim_(head_dim) {
    const std::int64_t block = block_size();
    require(block > 0 && head_dim % block == 0, "SimulatedCodec: ", format.name(), " has blocks of ", block,
            " values, which do not fill head_dim ", head_dim);
    if (format.hadamard) rotation_ = Rotation<float>::signed_hadamard(head_dim, format.seed);
  }

  [[nodiscard]] std::int64_t head_dim() const { return head_dim_; }
  [[nodiscard]] const Simulated<TQuantiser>& format() const { return format_; }

  /// Every row of rows [n, head_dim] becomes what the format would read back. A NaN becomes quiet_nan().
  /// @throws std::invalid_argument unless `rows` has head_dim columns
  void roundtrip(CacheSide side, MatrixRef<float> rows) const {
    require(rows.cols() == head_dim_, "SimulatedCodec::roundtrip: rows of ", rows.cols(), " values, need head_dim ",
            head_dim_);
    if (rotation_) rotation_->forward(rows);
    for (Eigen::Index r = 0; r < rows.rows(); ++r) {
      for (std::int64_t first = 0; first < head_dim_; first += block_size()) {
        roundtrip_block(format_.quantiser, side, rows.row(r).data() + first, static_cast<int>(block_size()));
      }
    }
    if (rotation_) rotation_->inverse(rows);
    detail::settle_nans(rows);
  }

 private:
  [[nodiscard]] std::int64_t block_size() const { return format_.quantiser.block_size(head_dim_); }

  Simulated<TQuantiser> format_;
  std::int64_t head_dim_;
  std::optional<Rotation<float>> rotation_;
};

/// Stores what the format would read back of k and v [batch, n_new, n_head_kv, head_dim], rounded to bf16, at
/// `positions` [n_new] of the flat cache [batch, n_head_kv, buffer_len, head_dim]; every other row keeps its bits. At
/// positions below the format's sink K and V are stored as they are, a NaN as quiet_nan(). Its tail is not looked at:
/// with one, tokens are stored by bf16_cache_update() and quantised by simulated_cache_age(). The contract is that of
/// gemma4/cache_update.hpp.
/// @throws std::invalid_argument on extents that do not fit, a position outside the buffer or given twice
template <class Scalar, Quantiser TQuantiser>
void simulated_cache_update(const SimulatedCodec<TQuantiser>& codec, View<const Scalar, 4> k, View<const Scalar, 4> v,
                            std::span<const std::int32_t> positions, View<Bf16, 4> k_cache, View<Bf16, 4> v_cache) {
  const char* const who = "simulated_cache_update";
  const CacheShape shape{k_cache.extent[0], k_cache.extent[1], k_cache.extent[2], codec.head_dim()};
  require_cache_update(who, k, v, positions, shape);
  const auto n_new = static_cast<std::int64_t>(positions.size());
  const auto read_back = [&](CacheSide side, const View<const Scalar, 4>& x) {
    Matrix<float> rows(shape.batch * n_new * shape.n_head_kv, shape.head_dim);
    Eigen::Index row = 0;
    for (std::int64_t b = 0; b < shape.batch; ++b) {
      for (std::int64_t t = 0; t < n_new; ++t) {
        for (std::int64_t h = 0; h < shape.n_head_kv; ++h, ++row) {
          for (std::int64_t i = 0; i < shape.head_dim; ++i) rows(row, i) = static_cast<float>(x(b, t, h, i));
        }
      }
    }
    Matrix<float> exact = codec.format().sink > 0 ? rows : Matrix<float>();
    detail::settle_nans(exact);
    codec.roundtrip(side, rows);
    for (row = 0; row < exact.rows(); ++row) {
      if (positions[static_cast<std::size_t>(row / shape.n_head_kv % n_new)] < codec.format().sink) {
        rows.row(row) = exact.row(row);
      }
    }
    return rows;
  };
  const Matrix<float> k_read = read_back(CacheSide::kKey, k), v_read = read_back(CacheSide::kValue, v);
  const auto view = [&](const Matrix<float>& rows) {
    return View<const float, 4>(make_view(rows.data(), shape.batch, n_new, shape.n_head_kv, shape.head_dim));
  };
  bf16_cache_update<float, Bf16>(view(k_read), view(v_read), positions, k_cache, v_cache);
}

/// The same on an owning cache.
template <class Scalar, Quantiser TQuantiser>
void simulated_cache_update(const SimulatedCodec<TQuantiser>& codec, View<const Scalar, 4> k, View<const Scalar, 4> v,
                            std::span<const std::int32_t> positions, FlatCache<Bf16>& cache) {
  simulated_cache_update<Scalar>(codec, k, v, positions, cache.k(), cache.v());
}

/// What leaves a tail: the rows at `positions` [n_new] minus the format's tail become what the format would read back
/// of them, in place. Rows below its sink and positions before the first token are left as they are.
/// @throws std::invalid_argument on extents that do not fit, a position outside the buffer or given twice
template <Quantiser TQuantiser>
void simulated_cache_age(const SimulatedCodec<TQuantiser>& codec, std::span<const std::int32_t> positions,
                         FlatCache<Bf16>& cache) {
  const char* const who = "simulated_cache_age";
  const View<Bf16, 4> k = cache.k(), v = cache.v();
  require(k.extent[3] == codec.head_dim(), who, ": the cache has head_dim ", k.extent[3], ", need ", codec.head_dim());
  require_positions(who, positions, k.extent[2]);
  Matrix<float> row(1, codec.head_dim());
  for (const std::int32_t newest : positions) {
    const std::int64_t at = newest - std::int64_t{codec.format().tail};
    if (at < codec.format().sink) continue;
    for (const CacheSide side : {CacheSide::kKey, CacheSide::kValue}) {
      const View<Bf16, 4>& rows = side == CacheSide::kKey ? k : v;
      for (std::int64_t b = 0; b < rows.extent[0]; ++b) {
        for (std::int64_t h = 0; h < rows.extent[1]; ++h) {
          for (std::int64_t i = 0; i < rows.extent[3]; ++i) row(0, i) = to_float(rows(b, h, at, i));
          codec.roundtrip(side, row);
          for (std::int64_t i = 0; i < rows.extent[3]; ++i) rows(b, h, at, i) = to_bf16(row(0, i));
        }
      }
    }
  }
}

}  // namespace gemma4::reference

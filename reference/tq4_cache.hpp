// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "gemma4/cache_update.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/tq4_codebook.hpp"
#include "gemma4/tq4_format.hpp"
#include "gemma4/view.hpp"
#include "reference/matrix.hpp"
#include "reference/rotation.hpp"

/// Compression of K and V to the row format of gemma4/tq4_format.hpp, and back. Mirror: cuda/tq4_cache.cuh.
namespace gemma4::reference {

using gemma4::CacheSide;

/// Everything needed to compress head vectors and to read them again: one rotation, a codebook for K and one for V.
///
/// Per vector x (arithmetic in Scalar, lengths in double):
///   y = rotation(x / ||x||);  code[i] = number of boundaries below y[i];  c[i] = centroid[code[i]]
///   norm = bf16(||x|| / ||c||) when corrected, bf16(||x||) when raw;      decoded = norm * inverse_rotation(c)
///
/// Edges: the zero vector gets norm 0 and decodes to zeros. A vector that holds NaN gets a NaN norm, one that holds an
/// infinity (or is longer than bf16 reaches, 3.4e38) an infinite norm; their codes mean nothing, and only their own row
/// suffers. Relative error of a decoded vector: see codebook_distortion.
template <class Scalar>
class Tq4Codec {
 public:
  /// @throws std::invalid_argument unless head_dim is a power of two from 64 to 512 and both widths are 2, 3 or 4 bits
  Tq4Codec(std::int64_t head_dim, const Tq4Options& options)
      : Tq4Codec(Rotation<Scalar>::make(options.rotation, require_head_dim(head_dim), options.seed),
                 solve_codebook(options.codebook, options.k_bits, head_dim),
                 solve_codebook(options.codebook, options.v_bits, head_dim), options.norm) {}

  /// A codec from given parts, as a golden file brings them.
  Tq4Codec(Rotation<Scalar> rotation, const Codebook& k_codebook, const Codebook& v_codebook, NormKind norm)
      : rotation_(std::move(rotation)), norm_(norm), sides_{Side(k_codebook), Side(v_codebook)} {
    require_head_dim(rotation_.head_dim());
  }

  [[nodiscard]] const Rotation<Scalar>& rotation() const { return rotation_; }
  [[nodiscard]] std::int64_t head_dim() const { return rotation_.head_dim(); }
  [[nodiscard]] NormKind norm_kind() const { return norm_; }
  [[nodiscard]] const Codebook& codebook(CacheSide side) const { return at(side).codebook; }
  [[nodiscard]] const Codebook& k_codebook() const { return codebook(CacheSide::kKey); }
  [[nodiscard]] const Codebook& v_codebook() const { return codebook(CacheSide::kValue); }

  /// Compresses rows [n, head_dim] to codes [n, head_dim/2] and norms [n].
  /// @throws std::invalid_argument naming the extent that does not fit
  void compress(CacheSide side, ConstMatrixRef<Scalar> rows, View<std::uint8_t, 2> codes,
                View<Tq4Norm, 1> norms) const {
    require_extents("Tq4Codec::compress", rows.rows(), rows.cols(), codes, norms);
    Matrix<Scalar> rotated(rows.rows(), rows.cols());
    std::vector<double> lengths(static_cast<std::size_t>(rows.rows()));
    for (Eigen::Index r = 0; r < rows.rows(); ++r) {
      const double length = rows.row(r).template cast<double>().norm();
      lengths[static_cast<std::size_t>(r)] = length;
      // Divided in double: a float quotient would lose the vectors whose length is not a normal float.
      rotated.row(r) = (rows.row(r).template cast<double>() / (length == 0.0 ? 1.0 : length)).template cast<Scalar>();
    }
    rotation_.forward(rotated);
    for (Eigen::Index r = 0; r < rows.rows(); ++r) {
      const double levels_length = quantize(at(side).codebook, rotated.row(r).data(), &codes(r, 0));
      const double length = lengths[static_cast<std::size_t>(r)];
      const double norm = norm_ == NormKind::kCorrected ? length / levels_length : length;
      norms(r) = to_bf16(static_cast<float>(norm));
    }
  }

  /// norm * centroid[code], still rotated, of n stored rows: out [n, head_dim]. Two values a table look-up; a norm
  /// that is NaN or infinite, or holds garbage, shows in its own row only.
  /// @throws std::invalid_argument naming the extent that does not fit
  void decompress_rotated(CacheSide side, View<const std::uint8_t, 2> codes, View<const Tq4Norm, 1> norms,
                          MatrixRef<Scalar> out) const {
    require_extents("Tq4Codec::decompress_rotated", out.rows(), out.cols(), codes, norms);
    const auto& pairs = at(side).pairs;
    const Eigen::Index n_byte = out.cols() / 2;
    for (Eigen::Index r = 0; r < out.rows(); ++r) {
      const auto norm = static_cast<Scalar>(to_float(norms(r)));
      const std::uint8_t* const code = &codes(r, 0);
      Scalar* const values = out.row(r).data();
      for (Eigen::Index j = 0; j < n_byte; ++j) {
        const auto& [even, odd] = pairs[code[j]];
        values[2 * j] = norm * even;
        values[2 * j + 1] = norm * odd;
      }
    }
  }

  /// The stored vectors themselves: decompress_rotated and the inverse rotation.
  void decompress(CacheSide side, View<const std::uint8_t, 2> codes, View<const Tq4Norm, 1> norms,
                  MatrixRef<Scalar> out) const {
    decompress_rotated(side, codes, norms, out);
    rotation_.inverse(out);
  }

 private:
  struct Side {
    Codebook codebook;
    std::array<std::array<Scalar, 2>, 256> pairs;  ///< both centroids of a byte: the high nibble's, the low nibble's

    explicit Side(const Codebook& table) : codebook(table) {
      for (std::size_t byte = 0; byte < pairs.size(); ++byte) {
        pairs[byte] = {static_cast<Scalar>(table.centroids[byte >> 4]),
                       static_cast<Scalar>(table.centroids[byte & 15])};
      }
    }
  };

  static std::int64_t require_head_dim(std::int64_t head_dim) {
    require(is_power_of_two(head_dim) && head_dim >= 64 && head_dim <= 512, "Tq4Codec: head_dim ", head_dim,
            ", need a power of two from 64 to 512");
    return head_dim;
  }

  template <class TByte, class TNorm>
  void require_extents(const char* who, Eigen::Index n, Eigen::Index columns, const View<TByte, 2>& codes,
                       const View<TNorm, 1>& norms) const {
    require(columns == head_dim(), who, ": rows of ", columns, " values, need head_dim ", head_dim());
    require(codes.extent[0] == n && codes.extent[1] == head_dim() / 2, who, ": codes are [", codes.extent[0], ", ",
            codes.extent[1], "], need [", n, ", ", head_dim() / 2, "]");
    require(codes.stride[1] == 1, who, ": codes have stride ", codes.stride[1], " between bytes, need 1");
    require(norms.extent[0] == n, who, ": ", norms.extent[0], " norms, need ", n);
  }

  /// Codes of one rotated unit vector y [head_dim]; returns the length of the levels that were chosen.
  double quantize(const Codebook& table, const Scalar* y, std::uint8_t* codes) const {
    double squares = 0.0;
    for (std::int64_t j = 0; j < head_dim() / 2; ++j) {
      const int even = codebook_index(table, y[2 * j]);
      const int odd = codebook_index(table, y[2 * j + 1]);
      codes[j] = static_cast<std::uint8_t>((even << 4) | odd);
      for (const int index : {even, odd}) {
        const double level = table.centroids[static_cast<std::size_t>(index)];
        squares += level * level;
      }
    }
    return std::sqrt(squares);
  }

  [[nodiscard]] const Side& at(CacheSide side) const { return sides_[static_cast<std::size_t>(side)]; }

  Rotation<Scalar> rotation_;
  NormKind norm_;
  std::array<Side, 2> sides_;
};

/// Rows [first, first + count) of one head: codes [count, head_dim/2] and norms [count], without a copy.
template <class TByte, class TNorm>
[[nodiscard]] std::pair<View<TByte, 2>, View<TNorm, 1>> tq4_rows(const View<TByte, 4>& codes,
                                                                 const View<TNorm, 3>& norms, std::int64_t batch,
                                                                 std::int64_t head, std::int64_t first,
                                                                 std::int64_t count) {
  View<TByte, 2> code_rows{
      .data = codes.data + batch * codes.stride[0] + head * codes.stride[1] + first * codes.stride[2],
      .extent = {count, codes.extent[3]},
      .stride = {codes.stride[2], codes.stride[3]}};
  View<TNorm, 1> norm_rows{
      .data = norms.data + batch * norms.stride[0] + head * norms.stride[1] + first * norms.stride[2],
      .extent = {count},
      .stride = {norms.stride[2]}};
  return {code_rows, norm_rows};
}

namespace detail {

/// Refuses a cache whose four parts do not describe the same [batch, n_head_kv, buffer_len] of head_dim vectors.
template <bool kConst>
CacheShape require_tq4_cache(const char* who, const BasicTq4CacheView<kConst>& cache, std::int64_t head_dim) {
  const auto& codes = cache.k_codes;
  const CacheShape shape{codes.extent[0], codes.extent[1], codes.extent[2], head_dim};
  const auto same_rows = [&](const auto& part) { return std::equal(part.extent, part.extent + 3, codes.extent); };
  require(same_rows(cache.v_codes) && same_rows(cache.k_norm) && same_rows(cache.v_norm), who,
          ": v_codes, k_norm and v_norm need the batch, n_head_kv and buffer_len of k_codes: ", shape.batch, ", ",
          shape.n_head_kv, ", ", shape.buffer_len);
  for (const auto* part : {&cache.k_codes, &cache.v_codes}) {
    require(part->extent[3] == head_dim / 2 && part->stride[3] == 1, who, ": codes have rows of ", part->extent[3],
            " bytes, need ", head_dim / 2, " for head_dim ", head_dim, ", next to each other");
  }
  return shape;
}

}  // namespace detail

/// Compresses k and v [batch, n_new, n_head_kv, head_dim] and stores them at `positions` [n_new] of the cache; every
/// other row keeps its bytes. The contract is that of gemma4/cache_update.hpp.
/// @throws std::invalid_argument on extents that do not fit, a position outside the buffer or given twice
template <class Scalar>
void tq4_cache_update(const Tq4Codec<Scalar>& codec, View<const Scalar, 4> k, View<const Scalar, 4> v,
                      std::span<const std::int32_t> positions, Tq4CacheView cache) {
  const char* const who = "tq4_cache_update";
  const CacheShape shape = detail::require_tq4_cache(who, cache, codec.head_dim());
  require_cache_update(who, k, v, positions, shape);
  const auto n_new = static_cast<std::int64_t>(positions.size());
  std::vector<std::uint8_t> bytes(positions.size() * static_cast<std::size_t>(shape.head_dim / 2));
  std::vector<Tq4Norm> norms(positions.size());
  const auto byte_rows = make_view(bytes.data(), n_new, shape.head_dim / 2);
  const auto store = [&](CacheSide side, const View<const Scalar, 4>& from, const View<std::uint8_t, 4>& codes_out,
                         const View<Tq4Norm, 3>& norms_out, std::int64_t b, std::int64_t h) {
    const Eigen::Map<const Matrix<Scalar>, 0, Eigen::OuterStride<>> rows(
        from.data + b * from.stride[0] + h * from.stride[2], n_new, shape.head_dim,
        Eigen::OuterStride<>(from.stride[1]));
    codec.compress(side, rows, byte_rows, make_view(norms.data(), n_new));
    for (std::int64_t t = 0; t < n_new; ++t) {
      const std::int64_t position = positions[static_cast<std::size_t>(t)];
      std::copy_n(&byte_rows(t, 0), shape.head_dim / 2, &codes_out(b, h, position, 0));
      norms_out(b, h, position) = norms[static_cast<std::size_t>(t)];
    }
  };
  for (std::int64_t b = 0; b < shape.batch; ++b) {
    for (std::int64_t h = 0; h < shape.n_head_kv; ++h) {
      store(CacheSide::kKey, k, cache.k_codes, cache.k_norm, b, h);
      store(CacheSide::kValue, v, cache.v_codes, cache.v_norm, b, h);
    }
  }
}

/// The memory of one compressed cache. Begins as zeros, which decode to zero vectors.
class Tq4CacheBuffer {
 public:
  Tq4CacheBuffer(std::int64_t batch, std::int64_t n_head_kv, std::int64_t buffer_len, std::int64_t head_dim)
      : shape_{batch, n_head_kv, buffer_len, head_dim},
        k_codes_(n_row() * static_cast<std::size_t>(head_dim / 2)),
        v_codes_(k_codes_.size()),
        k_norm_(n_row()),
        v_norm_(n_row()) {}
  Tq4CacheBuffer(Tq4CacheBuffer&&) noexcept = default;
  Tq4CacheBuffer& operator=(Tq4CacheBuffer&&) noexcept = default;
  [[nodiscard]] Tq4CacheBuffer clone() const { return *this; }

  [[nodiscard]] const CacheShape& shape() const { return shape_; }
  [[nodiscard]] std::int64_t bytes() const {
    return 2 * static_cast<std::int64_t>(n_row()) * tq4_row_bytes(shape_.head_dim);
  }
  [[nodiscard]] Tq4CacheView view() {
    return {codes_of(k_codes_.data()), codes_of(v_codes_.data()), norms_of(k_norm_.data()), norms_of(v_norm_.data())};
  }
  [[nodiscard]] ConstTq4CacheView view() const {
    return {codes_of(k_codes_.data()), codes_of(v_codes_.data()), norms_of(k_norm_.data()), norms_of(v_norm_.data())};
  }

  /// The storage itself, row-major as the views say: to fill from a file or to compare byte by byte.
  [[nodiscard]] std::span<std::uint8_t> k_codes() { return k_codes_; }
  [[nodiscard]] std::span<std::uint8_t> v_codes() { return v_codes_; }
  [[nodiscard]] std::span<Tq4Norm> k_norm() { return k_norm_; }
  [[nodiscard]] std::span<Tq4Norm> v_norm() { return v_norm_; }
  bool operator==(const Tq4CacheBuffer&) const = default;

 private:
  Tq4CacheBuffer(const Tq4CacheBuffer&) = default;

  [[nodiscard]] std::size_t n_row() const {
    return static_cast<std::size_t>(shape_.batch * shape_.n_head_kv * shape_.buffer_len);
  }
  template <class TByte>
  [[nodiscard]] View<TByte, 4> codes_of(TByte* data) const {
    return make_view(data, shape_.batch, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim / 2);
  }
  template <class TNorm>
  [[nodiscard]] View<TNorm, 3> norms_of(TNorm* data) const {
    return make_view(data, shape_.batch, shape_.n_head_kv, shape_.buffer_len);
  }

  CacheShape shape_;
  std::vector<std::uint8_t> k_codes_;
  std::vector<std::uint8_t> v_codes_;
  std::vector<Tq4Norm> k_norm_;
  std::vector<Tq4Norm> v_norm_;
};

}  // namespace gemma4::reference

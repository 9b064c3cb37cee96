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
#include "gemma4/kv_format.hpp"
#include "gemma4/view.hpp"
#include "reference/matrix.hpp"
#include "reference/rotation.hpp"

/// One vector for K and V (gemma4/kv_format.hpp): V and the rotated quarter of K to codes, and back. Mirror:
/// cuda/kv_cache.cuh.
namespace gemma4::reference {

/// Compresses vectors of n values, V's or R's, and reads them again: a rotation and a codebook.
///
/// Per vector x (arithmetic in Scalar, lengths in double):
///   y = rotation(x / ||x||);  sign[i] = y[i] < 0;  m[i] = number of edges below |y[i]|;  c[i] = +-level[m[i]]
///   norm = f16(||x|| / ||c||) when corrected, f16(||x||) when raw;      read = norm * inverse_rotation(c)
///
/// Edges: the zero vector gets norm 0 and reads as zeros. A vector that holds NaN gets a NaN norm, one that is longer
/// than f16 reaches (65504) an infinite one; only their own row suffers. Relative error of a vector: see
/// codebook_distortion.
template <class Scalar>
class KvVectorCodec {
 public:
  KvVectorCodec(Rotation<Scalar> rotation, const KvCodebook& codebook, NormKind norm)
      : rotation_(std::move(rotation)), codebook_(codebook), norm_(norm) {
    for (std::size_t code = 0; code < values_.size(); ++code) {
      const std::size_t half = std::size_t{1} << (codebook.bits - 1);
      const auto level = static_cast<Scalar>(codebook.level[code % half]);
      values_[code] = code < half ? level : -level;
    }
  }

  [[nodiscard]] std::int64_t size() const { return rotation_.head_dim(); }
  [[nodiscard]] std::int64_t code_bytes() const { return kv_code_bytes(size(), codebook_.bits); }
  [[nodiscard]] const Rotation<Scalar>& rotation() const { return rotation_; }
  [[nodiscard]] const KvCodebook& codebook() const { return codebook_; }
  [[nodiscard]] NormKind norm_kind() const { return norm_; }

  /// Compresses rows [n_row, n] to codes [n_row, code_bytes()] and norms [n_row].
  /// @throws std::invalid_argument naming the extent that does not fit
  void compress(ConstMatrixRef<Scalar> rows, View<std::uint8_t, 2> codes, View<KvNorm, 1> norms) const {
    require_extents("KvVectorCodec::compress", rows.rows(), rows.cols(), codes, norms);
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
      const double levels_length = quantize(rotated.row(r).data(), &codes(r, 0));
      const double length = lengths[static_cast<std::size_t>(r)];
      norms(r) = to_f16(static_cast<float>(norm_ == NormKind::kCorrected ? length / levels_length : length));
    }
  }

  /// norm * (+-level), still rotated, of stored rows: out [n_row, n]. A norm that is NaN or infinite, or holds garbage,
  /// shows in its own row only.
  /// @throws std::invalid_argument naming the extent that does not fit
  void decompress_rotated(View<const std::uint8_t, 2> codes, View<const KvNorm, 1> norms, MatrixRef<Scalar> out) const {
    require_extents("KvVectorCodec::decompress_rotated", out.rows(), out.cols(), codes, norms);
    const std::int64_t plane = size() / 8;
    for (Eigen::Index r = 0; r < out.rows(); ++r) {
      const auto norm = static_cast<Scalar>(to_float(norms(r)));
      const std::uint8_t* const bytes = &codes(r, 0);
      Scalar* const values = out.row(r).data();
      for (std::int64_t j = 0; j < plane; ++j) {
        std::array<std::size_t, 8> code = {};
        for (int p = 0; p < codebook_.bits; ++p) {
          const std::size_t byte = bytes[p * plane + j];
          for (std::size_t i = 0; i < 8; ++i) code[i] |= (byte >> i & 1) << p;
        }
        for (std::size_t i = 0; i < 8; ++i) values[8 * j + static_cast<std::int64_t>(i)] = norm * values_[code[i]];
      }
    }
  }

  /// The stored vectors themselves: decompress_rotated and the inverse rotation.
  void decompress(View<const std::uint8_t, 2> codes, View<const KvNorm, 1> norms, MatrixRef<Scalar> out) const {
    decompress_rotated(codes, norms, out);
    rotation_.inverse(out);
  }

 private:
  template <class TByte, class TNorm>
  void require_extents(const char* who, Eigen::Index n_row, Eigen::Index columns, const View<TByte, 2>& codes,
                       const View<TNorm, 1>& norms) const {
    require(columns == size(), who, ": rows of ", columns, " values, need ", size());
    require(codes.extent[0] == n_row && codes.extent[1] == code_bytes(), who, ": codes are [", codes.extent[0], ", ",
            codes.extent[1], "], need [", n_row, ", ", code_bytes(), "]");
    require(codes.stride[1] == 1, who, ": codes have stride ", codes.stride[1], " between bytes, need 1");
    require(norms.extent[0] == n_row, who, ": ", norms.extent[0], " norms, need ", n_row);
  }

  /// Planes of one rotated unit vector y [n]; returns the length of the levels that were chosen.
  double quantize(const Scalar* y, std::uint8_t* bytes) const {
    const std::int64_t plane = size() / 8;
    const int sign_plane = codebook_.bits - 1;
    std::fill_n(bytes, code_bytes(), std::uint8_t{0});
    double squares = 0.0;
    for (std::int64_t i = 0; i < size(); ++i) {
      const bool negative = y[i] < Scalar(0);
      const int m = codebook_.index(std::abs(y[i]));
      const int code = m | (negative ? 1 << sign_plane : 0);
      for (int p = 0; p <= sign_plane; ++p) {
        bytes[p * plane + i / 8] |= static_cast<std::uint8_t>((code >> p & 1) << (i % 8));
      }
      const double level = codebook_.level[m];
      squares += level * level;
    }
    return std::sqrt(squares);
  }

  Rotation<Scalar> rotation_;
  KvCodebook codebook_;
  NormKind norm_;
  std::array<Scalar, 2 * KvCodebook::kMaxHalf> values_;  ///< of a code: its sign bit on top of the magnitude
};

/// The codecs of a cache: of V [head_dim] and of R [head_dim / 4].
template <class Scalar>
class KvCodec {
 public:
  /// @throws std::invalid_argument unless head_dim is a power of two from 64 to 512 and both widths are 3 to 6 bits
  KvCodec(std::int64_t head_dim, const KvOptions& options)
      : KvCodec(make(require_head_dim(head_dim), options.v_bits, options),
                make(kv_rotated_size(require_head_dim(head_dim)), options.r_bits, options)) {}

  /// From given parts, R's a quarter as long as V's.
  KvCodec(KvVectorCodec<Scalar> v, KvVectorCodec<Scalar> r) : v_(std::move(v)), r_(std::move(r)) {
    require_head_dim(v_.size());
    require(r_.size() == kv_rotated_size(v_.size()), "KvCodec: R of ", r_.size(), " values, need ",
            kv_rotated_size(v_.size()));
  }

  [[nodiscard]] std::int64_t head_dim() const { return v_.size(); }
  [[nodiscard]] const KvVectorCodec<Scalar>& v() const { return v_; }
  [[nodiscard]] const KvVectorCodec<Scalar>& r() const { return r_; }

 private:
  [[nodiscard]] static KvVectorCodec<Scalar> make(std::int64_t n, int bits, const KvOptions& options) {
    return {Rotation<Scalar>::make(options.rotation, n, options.seed), solve_kv_codebook(options.codebook, bits, n),
            options.norm};
  }
  static std::int64_t require_head_dim(std::int64_t head_dim) {
    require(is_power_of_two(head_dim) && head_dim >= 64 && head_dim <= 512, "KvCodec: head_dim ", head_dim,
            ", need a power of two from 64 to 512");
    return head_dim;
  }

  KvVectorCodec<Scalar> v_, r_;
};

/// Rows [first, first + count) of one head: codes [count, bytes] and norms [count], without a copy.
template <class TByte, class TNorm>
[[nodiscard]] std::pair<View<TByte, 2>, View<TNorm, 1>> kv_rows(const View<TByte, 4>& codes,
                                                                const View<TNorm, 3>& norms, std::int64_t batch,
                                                                std::int64_t head, std::int64_t first,
                                                                std::int64_t count) {
  View<TByte, 2> code_rows{&codes(batch, head, first, 0), {count, codes.extent[3]}, {codes.stride[2], codes.stride[3]}};
  View<TNorm, 1> norm_rows{&norms(batch, head, first), {count}, {norms.stride[2]}};
  return {code_rows, norm_rows};
}

namespace detail {

/// Refuses a cache whose four parts do not describe the same [batch, n_head_kv, buffer_len] of the codec's vectors.
template <class Scalar, bool kConst>
CacheShape require_kv_cache(const char* who, const KvCodec<Scalar>& codec, const BasicKvCacheView<kConst>& cache) {
  const auto& extent = cache.v_codes.extent;
  const CacheShape shape{extent[0], extent[1], extent[2], codec.head_dim()};
  require_extents(who, "v_codes", cache.v_codes, {extent[0], extent[1], extent[2], codec.v().code_bytes()});
  require_extents(who, "r_codes", cache.r_codes, {extent[0], extent[1], extent[2], codec.r().code_bytes()});
  require_extents(who, "v_norm", cache.v_norm, {extent[0], extent[1], extent[2]});
  require_extents(who, "r_norm", cache.r_norm, {extent[0], extent[1], extent[2]});
  require_contiguous_rows(who, "v_codes", cache.v_codes);
  require_contiguous_rows(who, "r_codes", cache.r_codes);
  return shape;
}

template <class TStorage>
CacheShape require_kv_plain(const char* who, const KvPlainView<TStorage>& cache) {
  const auto& extent = cache.v.extent;
  require_extents(who, "r", cache.r, {extent[0], extent[1], extent[2], kv_rotated_size(extent[3])});
  require_contiguous_rows(who, "v", cache.v);
  require_contiguous_rows(who, "r", cache.r);
  return {extent[0], extent[1], extent[2], extent[3]};
}

/// Tokens of one head of v [batch, n_new, n_head_kv, head_dim].
template <class Scalar>
[[nodiscard]] Matrix<Scalar> kv_v_rows(const View<const Scalar, 4>& v, std::int64_t b, std::int64_t h) {
  Matrix<Scalar> rows(v.extent[1], v.extent[3]);
  for (Eigen::Index t = 0; t < rows.rows(); ++t) {
    for (Eigen::Index j = 0; j < rows.cols(); ++j) rows(t, j) = v(b, t, h, j);
  }
  return rows;
}

/// R of tokens of one head of k: its values at the rotated places over their scales.
template <class Scalar>
[[nodiscard]] Matrix<Scalar> kv_r_rows(const View<const Scalar, 4>& k, std::span<const float> k_weight, std::int64_t b,
                                       std::int64_t h) {
  const std::int64_t head_dim = k.extent[3];
  Matrix<Scalar> rows(k.extent[1], kv_rotated_size(head_dim));
  for (Eigen::Index j = 0; j < rows.cols(); ++j) {
    const auto scale = static_cast<Scalar>(kv_rotated_scale(k_weight.data(), head_dim, j));
    for (Eigen::Index t = 0; t < rows.rows(); ++t) rows(t, j) = k(b, t, h, kv_rotated_place(head_dim, j)) / scale;
  }
  return rows;
}

inline void require_k_weight(const char* who, std::span<const float> k_weight, std::int64_t head_dim) {
  require(static_cast<std::int64_t>(k_weight.size()) == head_dim, who, ": k_weight has ", k_weight.size(),
          " values, need head_dim ", head_dim);
}

}  // namespace detail

/// Stores V and the rotated quarter of K at `positions` [n_new] of the cache; every other row keeps its bytes. The
/// contract is that of gemma4/cache_update.hpp.
/// @param k, v [batch, n_new, n_head_kv, head_dim] of a layer whose K is its V: v normalised without weights, k with
///             them and turned by RoPE; only the rotated places of k are read
/// @param k_weight [head_dim] those weights
/// @throws std::invalid_argument on extents that do not fit, a position outside the buffer or given twice
template <class Scalar>
void kv_cache_update(const KvCodec<Scalar>& codec, View<const Scalar, 4> k, View<const Scalar, 4> v,
                     std::span<const float> k_weight, std::span<const std::int32_t> positions, KvCacheView cache) {
  const char* const who = "kv_cache_update";
  const CacheShape shape = detail::require_kv_cache(who, codec, cache);
  require_cache_update(who, k, v, positions, shape);
  detail::require_k_weight(who, k_weight, shape.head_dim);
  const auto n_new = static_cast<std::int64_t>(positions.size());
  const auto store = [&](const KvVectorCodec<Scalar>& vectors, const Matrix<Scalar>& rows,
                         const View<std::uint8_t, 4>& codes_out, const View<KvNorm, 3>& norms_out, std::int64_t b,
                         std::int64_t h) {
    Matrix<std::uint8_t> bytes(n_new, vectors.code_bytes());
    std::vector<KvNorm> norms(positions.size());
    vectors.compress(rows, make_view(bytes.data(), n_new, vectors.code_bytes()), make_view(norms.data(), n_new));
    for (std::int64_t t = 0; t < n_new; ++t) {
      const std::int64_t position = positions[static_cast<std::size_t>(t)];
      std::copy_n(bytes.row(t).data(), bytes.cols(), &codes_out(b, h, position, 0));
      norms_out(b, h, position) = norms[static_cast<std::size_t>(t)];
    }
  };
  for (std::int64_t b = 0; b < shape.batch; ++b) {
    for (std::int64_t h = 0; h < shape.n_head_kv; ++h) {
      store(codec.v(), detail::kv_v_rows(v, b, h), cache.v_codes, cache.v_norm, b, h);
      store(codec.r(), detail::kv_r_rows(k, k_weight, b, h), cache.r_codes, cache.r_norm, b, h);
    }
  }
}

/// The same without codes: V and R rounded to TStorage.
template <class Scalar, class TStorage>
void kv_cache_update(View<const Scalar, 4> k, View<const Scalar, 4> v, std::span<const float> k_weight,
                     std::span<const std::int32_t> positions, KvPlainView<TStorage> cache) {
  const char* const who = "kv_cache_update";
  const CacheShape shape = detail::require_kv_plain(who, cache);
  require_cache_update(who, k, v, positions, shape);
  detail::require_k_weight(who, k_weight, shape.head_dim);
  const auto store = [&](const Matrix<Scalar>& rows, const View<TStorage, 4>& to, std::int64_t b, std::int64_t h) {
    for (Eigen::Index t = 0; t < rows.rows(); ++t) {
      for (Eigen::Index j = 0; j < rows.cols(); ++j) {
        to(b, h, positions[static_cast<std::size_t>(t)], j) = from_float<TStorage>(static_cast<float>(rows(t, j)));
      }
    }
  };
  for (std::int64_t b = 0; b < shape.batch; ++b) {
    for (std::int64_t h = 0; h < shape.n_head_kv; ++h) {
      store(detail::kv_v_rows(v, b, h), cache.v, b, h);
      store(detail::kv_r_rows(k, k_weight, b, h), cache.r, b, h);
    }
  }
}

/// The memory of one cache of codes. Begins as zeros, which read as zero vectors.
class KvCacheBuffer {
 public:
  /// @param v_bytes, r_bytes codes of a row
  KvCacheBuffer(std::int64_t batch, std::int64_t n_head_kv, std::int64_t buffer_len, std::int64_t v_bytes,
                std::int64_t r_bytes)
      : extent_{batch, n_head_kv, buffer_len},
        v_bytes_(v_bytes),
        r_bytes_(r_bytes),
        v_codes_(n_row() * static_cast<std::size_t>(v_bytes)),
        r_codes_(n_row() * static_cast<std::size_t>(r_bytes)),
        v_norm_(n_row()),
        r_norm_(n_row()) {}
  template <class Scalar>
  KvCacheBuffer(std::int64_t batch, std::int64_t n_head_kv, std::int64_t buffer_len, const KvCodec<Scalar>& codec)
      : KvCacheBuffer(batch, n_head_kv, buffer_len, codec.v().code_bytes(), codec.r().code_bytes()) {}
  KvCacheBuffer(KvCacheBuffer&&) noexcept = default;
  KvCacheBuffer& operator=(KvCacheBuffer&&) noexcept = default;
  [[nodiscard]] KvCacheBuffer clone() const { return *this; }

  [[nodiscard]] std::int64_t bytes() const {
    return static_cast<std::int64_t>(v_codes_.size() + r_codes_.size() + 2 * n_row() * sizeof(KvNorm));
  }
  [[nodiscard]] KvCacheView view() {
    return {codes_of(v_codes_.data(), v_bytes_), codes_of(r_codes_.data(), r_bytes_), norms_of(v_norm_.data()),
            norms_of(r_norm_.data())};
  }
  [[nodiscard]] ConstKvCacheView view() const {
    return {codes_of(v_codes_.data(), v_bytes_), codes_of(r_codes_.data(), r_bytes_), norms_of(v_norm_.data()),
            norms_of(r_norm_.data())};
  }

  /// The storage itself, row-major as the views say: to fill or to compare byte by byte.
  [[nodiscard]] std::span<std::uint8_t> v_codes() { return v_codes_; }
  [[nodiscard]] std::span<std::uint8_t> r_codes() { return r_codes_; }
  [[nodiscard]] std::span<KvNorm> v_norm() { return v_norm_; }
  [[nodiscard]] std::span<KvNorm> r_norm() { return r_norm_; }
  bool operator==(const KvCacheBuffer&) const = default;

 private:
  KvCacheBuffer(const KvCacheBuffer&) = default;

  [[nodiscard]] std::size_t n_row() const { return static_cast<std::size_t>(extent_[0] * extent_[1] * extent_[2]); }
  template <class TByte>
  [[nodiscard]] View<TByte, 4> codes_of(TByte* data, std::int64_t bytes) const {
    return make_view(data, extent_[0], extent_[1], extent_[2], bytes);
  }
  template <class TNorm>
  [[nodiscard]] View<TNorm, 3> norms_of(TNorm* data) const {
    return make_view(data, extent_[0], extent_[1], extent_[2]);
  }

  std::array<std::int64_t, 3> extent_;
  std::int64_t v_bytes_, r_bytes_;
  std::vector<std::uint8_t> v_codes_, r_codes_;
  std::vector<KvNorm> v_norm_, r_norm_;
};

/// The memory of one cache without codes: Bf16, or float where a comparison must not see the rounding of storage.
template <class TStorage>
class KvPlainBuffer {
 public:
  KvPlainBuffer(std::int64_t batch, std::int64_t n_head_kv, std::int64_t buffer_len, std::int64_t head_dim)
      : shape_{batch, n_head_kv, buffer_len, head_dim},
        v_(static_cast<std::size_t>(batch * n_head_kv * buffer_len * head_dim)),
        r_(v_.size() / 4) {}

  [[nodiscard]] std::int64_t bytes() const {
    return static_cast<std::int64_t>((v_.size() + r_.size()) * sizeof(TStorage));
  }
  [[nodiscard]] KvPlainView<TStorage> view() { return view_of<TStorage>(v_.data(), r_.data()); }
  [[nodiscard]] KvPlainView<const TStorage> view() const { return view_of<const TStorage>(v_.data(), r_.data()); }

  /// The storage itself, row-major as the views say.
  [[nodiscard]] std::span<TStorage> v_storage() { return v_; }
  [[nodiscard]] std::span<TStorage> r_storage() { return r_; }

 private:
  template <class T>
  [[nodiscard]] KvPlainView<T> view_of(T* v, T* r) const {
    const auto& [batch, n_head_kv, buffer_len, head_dim] = shape_;
    return {make_view(v, batch, n_head_kv, buffer_len, head_dim),
            make_view(r, batch, n_head_kv, buffer_len, kv_rotated_size(head_dim))};
  }

  CacheShape shape_;
  std::vector<TStorage> v_, r_;
};

}  // namespace gemma4::reference

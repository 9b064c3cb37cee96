// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "gemma4/cache_format.hpp"
#include "gemma4/cache_update.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/platform.hpp"
#include "gemma4/quantisers/unit_codebook.hpp"
#include "gemma4/tq4_codebook.hpp"
#include "gemma4/tq4_format.hpp"
#include "gemma4/view.hpp"

/// One vector for K and V: the cache of full-attention layers whose K is their V.
///
/// Such a layer has no projection of its own for V. With r = rk / rms(rk), rk being a head's projection,
///   V = r,   K = RoPE(w * r),
/// w [head_dim] being the weight of k's norm. So K holds nothing that V does not, but for the position, which turns the
/// pairs (i, i + D/2), i < D/8, a quarter of its values (D = head_dim). A token and head is stored as two vectors:
///   V   the D values,
///   R   D/4 values: those of K at the rotated places, as RoPE left them, over the scale c of their pair, a power of
///       two:   R[j] = K[kv_rotated_place(D, j)] / c[j],   c[j] = kv_rotated_scale(w, D, j);
/// and is read as
///   <q, K> = <w * q with zeros at the rotated places, V> + <c * (q at the rotated places), R>,   out = sum p V.
/// That is exact, whatever the position; only the codes lose anything. Not the cache is turned back, but the query is
/// turned with the cache's rotations, H over D values and H' over D/4:
///   <H (w * q_rest), H V> + <H' (c * q_rot), H' R>,   out = H^T sum p H V.
///
/// Why the scale: a model whose w is s times larger at a pair, and the weight of q's norm s times smaller, is the same
/// model. Codes of K itself would spread the error of its large values over the small ones, which such a q weighs most;
/// so TQ4 loses accuracy with the spread of w. V does not know w, and with the scale R does not either: for s a power
/// of two the cache holds the same bits. Where w is nearly constant, only the exponent of R's norm is another.
///
/// Each vector x of n values (V: n = D; R: n = D/4) is stored as TQ4 does it (gemma4/tq4_format.hpp): a norm, n codes.
///   y = rotation(x / ||x||) over n values; both rotations have one seed, so that R takes the first D/4 Hadamard signs.
///   code[i] is a sign and a magnitude. The sign bit is set where y[i] < 0. The magnitude m is the number of edges
///   strictly below |y[i]| (a tie goes towards zero, NaN to +0) and stands for level[m] of KvCodebook.
///   norm = f16(||x|| / ||level[m]||) when corrected, so that what is read has the length of x; f16(||x||) when raw.
/// Read, still rotated: +-norm * level[m]. The zero vector has norm 0.
///
/// A row of n codes of b bits is b planes of n / 8 bytes, one after another; bit i % 8 of byte i / 8 of a plane belongs
/// to value i. Plane p < b - 1 holds bit p of the magnitudes, the last plane the signs. With two norms of 2 bytes a
/// token and head takes D (4 b_V + b_R) / 32 + 4 bytes: kv5r4 388 at D = 512, kv4r4 324, where TQ4 has 516.
///
/// `kv16r16` stores V and R as bf16, not rotated and without norms: 5 D / 2 bytes.
/// Source: the architecture itself (attention_k_eq_v); the codes: arXiv:2504.19874 and what tq4_format.hpp names.
namespace gemma4 {

/// Everything that decides the bits of such a cache. 16 bits each: bf16, and nothing else counts.
struct KvOptions {
  RotationKind rotation = RotationKind::kSignedHadamard;
  CodebookKind codebook = CodebookKind::kFull;
  NormKind norm = NormKind::kCorrected;
  int v_bits = 5;
  int r_bits = 4;
  std::uint64_t seed = 0;  ///< of both rotations, in every layer
  bool operator==(const KvOptions&) const = default;

  /// Codes and norms; else bf16.
  [[nodiscard]] constexpr bool has_codes() const { return v_bits != kPlainBits; }
  static constexpr int kPlainBits = 16, kMinBits = 3, kMaxBits = 6;
};

/// Of a stored vector. 11 bits of precision, for lengths from 6e-5 to 65504: what V and K have behind their norms.
using KvNorm = F16;

/// Values of K that R holds.
[[nodiscard]] GEMMA4_HD constexpr std::int64_t kv_rotated_size(std::int64_t head_dim) {
  return head_dim / 4;
}

/// The place in K of R's value j: the first halves of the pairs, then the second ones.
[[nodiscard]] GEMMA4_HD constexpr std::int64_t kv_rotated_place(std::int64_t head_dim, std::int64_t j) {
  const std::int64_t n_pair = head_dim / 8;
  return j < n_pair ? j : head_dim / 2 + j - n_pair;
}

/// Whether R holds the value of K at this place.
[[nodiscard]] GEMMA4_HD constexpr bool kv_is_rotated(std::int64_t head_dim, std::int64_t place) {
  return place % (head_dim / 2) < head_dim / 8;
}

/// The scale of a rotated pair of places where the weights of k's norm are `a` and `b`: the power of two at or below
/// the larger of |a| and |b|; 1 where neither is a normal number. Its inverse is exact, too.
[[nodiscard]] GEMMA4_HD constexpr float kv_rotated_scale(float a, float b) {
  constexpr std::uint32_t kExponent = 0x7F800000u, kOne = 0x3F800000u;
  const std::uint32_t of_a = bit_cast<std::uint32_t>(a) & kExponent, of_b = bit_cast<std::uint32_t>(b) & kExponent;
  const std::uint32_t larger = of_a > of_b ? of_a : of_b;
  return bit_cast<float>(larger == 0 ? kOne : larger);
}

/// That of R's value j, w [head_dim] being the weight of k's norm.
[[nodiscard]] GEMMA4_HD constexpr float kv_rotated_scale(const float* w, std::int64_t head_dim, std::int64_t j) {
  const std::int64_t pair = j % (head_dim / 8);
  return kv_rotated_scale(w[pair], w[pair + head_dim / 2]);
}

/// Bytes of the codes of a vector of n values.
[[nodiscard]] GEMMA4_HD constexpr std::int64_t kv_code_bytes(std::int64_t n, int bits) {
  return n / 8 * bits;
}

/// The positive half of a Lloyd-Max table for N(0, 1/n), which is symmetric about zero, ascending: level[m] is the mean
/// of the cell from edge[m - 1] (0 for the first) to edge[m]. Entries from n_half on (edges: n_half - 1) are zero.
struct KvCodebook {
  static constexpr int kMaxHalf = 1 << (KvOptions::kMaxBits - 1);
  int bits = 0;
  int n_half = 0;
  float level[kMaxHalf] = {};
  float edge[kMaxHalf - 1] = {};
  bool operator==(const KvCodebook&) const = default;

  /// The number of edges strictly below `magnitude`, compared in the wider of Scalar and float; NaN gives 0.
  template <class Scalar>
  [[nodiscard]] GEMMA4_HD constexpr int index(Scalar magnitude) const {
    int m = 0;
    for (int step = n_half / 2; step > 0; step /= 2) {
      if (magnitude > static_cast<Scalar>(edge[m + step - 1])) m += step;
    }
    return m;
  }
};

/// The table of `bits` for vectors of `n` values: kFull is the fixed point on the whole line, kCutAtThreeSigma that of
/// the density cut at three standard deviations after kCutCodebookRounds of Lloyd's rounds, as tq4_codebook.hpp says.
/// @throws std::invalid_argument unless bits is 3 to 6 and n at least 1
[[nodiscard]] inline KvCodebook solve_kv_codebook(CodebookKind kind, int bits, std::int64_t n) {
  require(bits >= KvOptions::kMinBits && bits <= KvOptions::kMaxBits, "solve_kv_codebook: bits ", bits, ", need ",
          KvOptions::kMinBits, " to ", KvOptions::kMaxBits);
  require(n >= 1, "solve_kv_codebook: n ", n, ", need at least 1");
  KvCodebook table{.bits = bits, .n_half = 1 << (bits - 1)};
  const double sigma = 1.0 / std::sqrt(static_cast<double>(n));
  const auto put = [&](const auto& level) {
    const auto at = [&](int m) { return static_cast<double>(level[static_cast<std::size_t>(m)]); };
    for (int m = 0; m < table.n_half; ++m) table.level[m] = static_cast<float>(sigma * at(m));
    for (int m = 0; m + 1 < table.n_half; ++m) {
      table.edge[m] = static_cast<float>(sigma * 0.5 * (at(m) + at(m + 1)));
    }
  };
  if (kind == CodebookKind::kFull) {
    put(solve_unit_codebook(bits).level);
  } else {
    put(detail::solve_unit_half(table.n_half, 3.0, kCutCodebookRounds).level);
  }
  return table;
}

/// The codes and norms of a flat cache, in the shared row format.
template <bool kConst>
struct BasicKvCacheView {
  template <class T>
  using Element = std::conditional_t<kConst, const T, T>;
  View<Element<std::uint8_t>, 4> v_codes;  ///< [batch, n_head_kv, buffer_len, v_bits * head_dim / 8] bytes
  View<Element<std::uint8_t>, 4> r_codes;  ///< [batch, n_head_kv, buffer_len, r_bits * head_dim / 32] bytes
  View<Element<KvNorm>, 3> v_norm;         ///< [batch, n_head_kv, buffer_len]
  View<Element<KvNorm>, 3> r_norm;         ///< the same

  /// A view of a mutable cache converts to a view of a const one.
  template <bool kTo>
  requires(kTo && !kConst) [[nodiscard]] constexpr operator BasicKvCacheView<kTo>() const {
    return {v_codes, r_codes, v_norm, r_norm};
  }
};
using KvCacheView = BasicKvCacheView<false>;
using ConstKvCacheView = BasicKvCacheView<true>;

/// The same of `kv16r16` (TStorage = Bf16), and of the reference's own float.
template <class TStorage>
struct KvPlainView {
  View<TStorage, 4> v;  ///< [batch, n_head_kv, buffer_len, head_dim]
  View<TStorage, 4> r;  ///< [batch, n_head_kv, buffer_len, head_dim / 4]
};

/// The cache format:
///
///   kv<bits of V>r<bits of R>[-cut][-raw][-haar]       bits are 3 to 6 each: kv5r4, kv4r4, kv6r5, kv3r3
///   kv16r16                                            bf16
///
/// The parts mean what they mean in tq4 and come in this order. Of a row's two sides, the value's is V and the key's is
/// R.
struct KvFormat {
  KvOptions options = {};

  static constexpr std::string_view kGrammar = "kv<bits of V>r<bits of R>[-cut][-raw][-haar] (bits 3 to 6) | kv16r16";
  /// Rows of one KV head come in records of this many tokens on the device: one bulk copy brings a record.
  static constexpr std::int64_t kRecordTokens = 16;
  static constexpr std::int64_t kRingValueBytes = 2;
  static constexpr bool kUnpacksForPrefill = true, kStoredByPrologue = true, kReadsKeysFromValues = true;

  [[nodiscard]] static std::string grammar() { return std::string(kGrammar); }
  [[nodiscard]] static std::optional<KvFormat> parse(std::string_view name) {
    std::string_view rest = name;
    if (!detail::take(rest, "kv") || rest.empty() || rest.front() < '0' || rest.front() > '9') return std::nullopt;
    if (rest == "16r16") return KvFormat{{.v_bits = KvOptions::kPlainBits, .r_bits = KvOptions::kPlainBits}};
    KvFormat format;
    const std::optional<int> v_bits = detail::take_bits(rest, '3', '6');
    const bool has_r = v_bits && detail::take(rest, "r");
    const std::optional<int> r_bits = has_r ? detail::take_bits(rest, '3', '6') : std::nullopt;
    require(r_bits.has_value(), "cache '", name, "': the widths read kv<bits>r<bits> with 3 to 6 bits each, as in ",
            "kv5r4, or 16 for both; the grammar is ", kGrammar);
    format.options.v_bits = *v_bits;
    format.options.r_bits = *r_bits;
    if (detail::take(rest, "-cut")) format.options.codebook = CodebookKind::kCutAtThreeSigma;
    if (detail::take(rest, "-raw")) format.options.norm = NormKind::kRaw;
    if (detail::take(rest, "-haar")) format.options.rotation = RotationKind::kDenseHaar;
    require(rest.empty(), "cache '", name, "': '", rest, "' is not understood here; the grammar is ", kGrammar);
    return format;
  }
  [[nodiscard]] std::string name() const {
    std::string name = concat("kv", options.v_bits, "r", options.r_bits);
    if (options.codebook == CodebookKind::kCutAtThreeSigma) name += "-cut";
    if (options.norm == NormKind::kRaw) name += "-raw";
    if (options.rotation == RotationKind::kDenseHaar) name += "-haar";
    return name;
  }
  /// bf16 has nothing random in it.
  [[nodiscard]] KvFormat with_seed(std::uint64_t seed) const {
    KvFormat seeded = *this;
    if (options.has_codes()) seeded.options.seed = seed;
    return seeded;
  }
  [[nodiscard]] constexpr std::int64_t allocated_row_bytes(CacheSide side, std::int64_t head_dim) const {
    const std::int64_t n = side == CacheSide::kValue ? head_dim : kv_rotated_size(head_dim);
    const int bits = side == CacheSide::kValue ? options.v_bits : options.r_bits;
    return kv_code_bytes(n, bits) + (options.has_codes() ? static_cast<std::int64_t>(sizeof(KvNorm)) : 0);
  }
  [[nodiscard]] constexpr std::int64_t row_bytes(CacheSide side, std::int64_t head_dim) const {
    return allocated_row_bytes(side, head_dim);
  }
  /// Two dense rotations and their transposes, f32; signs alone take none.
  [[nodiscard]] constexpr std::int64_t rotation_bytes(std::int64_t head_dim) const {
    const std::int64_t r = kv_rotated_size(head_dim);
    const bool dense = options.has_codes() && options.rotation == RotationKind::kDenseHaar;
    return dense ? 2 * (head_dim * head_dim + r * r) * 4 : 0;
  }
  bool operator==(const KvFormat&) const = default;
};

}  // namespace gemma4

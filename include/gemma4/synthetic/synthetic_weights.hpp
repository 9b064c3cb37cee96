// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numbers>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/gguf/block_formats.hpp"
#include "gemma4/gguf/block_quantise.hpp"
#include "gemma4/gguf/gguf.hpp"

/// Rows of random weights from N(0, deviation^2), reproducible row by row in any order.
///
/// Q4_0, Q4_K and Q6_K rows are drawn in the block format itself: codes from a bell curve cut off at the edge of their
/// range, as an encoder leaves them, and scales that vary from block to block. That costs 1 ns a weight (the 31 G
/// weights of the largest model: half a minute of one core, less than the disk takes). Other types are drawn as floats
/// and encoded; those that have no encoder are blocks of random bits, for measuring kernels.
namespace gemma4 {

/// A stream of 64-bit numbers for each (seed, name, row). Source: the SplitMix64 finaliser, Steele, Lea and Flood,
/// "Fast splittable pseudorandom number generators", OOPSLA 2014.
class RowRandom {
 public:
  RowRandom(std::uint64_t seed, std::string_view name, std::int64_t row) {
    std::uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a
    for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
    state_ = mix(mix(mix(seed + kGamma) ^ hash) + static_cast<std::uint64_t>(row) * kGamma);
  }

  [[nodiscard]] std::uint64_t next() { return mix(state_ += kGamma); }

  /// Uniform in (0, 1).
  [[nodiscard]] double uniform() { return (static_cast<double>(next() >> 12) + 0.5) * 0x1p-52; }

  /// From N(0, 1) (Box and Muller; the second of each pair is not used).
  [[nodiscard]] double normal() {
    const double radius = std::sqrt(-2.0 * std::log(uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
  }

 private:
  static constexpr std::uint64_t kGamma = 0x9E3779B97F4A7C15u;
  [[nodiscard]] static constexpr std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  std::uint64_t state_ = 0;
};

namespace detail {

/// The value below which a standard normal number falls with probability `p`, to 1e-12.
[[nodiscard]] inline double normal_quantile(double p) {
  double low = -10, high = 10;
  while (high - low > 1e-12) {
    const double middle = (low + high) / 2;
    (std::erfc(-middle / std::numbers::sqrt2) / 2 < p ? low : high) = middle;
  }
  return (low + high) / 2;
}

/// Codes with a bell-shaped histogram: entry b is the code of the (b + 1/2)/256 quantile, so that a random byte gives a
/// code. Symmetric about `centre` by construction.
struct CodeTable {
  CodeTable(double centre, double deviation, int max_code) {
    double sum = 0, squares = 0;
    for (std::size_t b = 0; b < codes.size(); ++b) {
      const double value = centre + deviation * normal_quantile((static_cast<double>(b) + 0.5) / 256);
      codes[b] = static_cast<std::uint8_t>(std::clamp(static_cast<int>(std::lround(value)), 0, max_code));
      sum += codes[b];
      squares += static_cast<double>(codes[b]) * codes[b];
    }
    mean = sum / 256;
    variance = squares / 256 - mean * mean;
  }
  std::array<std::uint8_t, 256> codes{};
  double mean = 0;
  double variance = 0;
};

/// +-2.1 deviations over the codes 0..15: where the extremes of 32 normal numbers lie.
[[nodiscard]] inline const CodeTable& q4_code_table() {
  static const CodeTable table(7.5, 3.4, 15);
  return table;
}
/// The same about the code of zero: with a step of either sign, weights of mean 0 whose extremes are at -8 steps more
/// often than at 7, as the encoder leaves them.
[[nodiscard]] inline const CodeTable& q4_0_code_table() {
  static const CodeTable table(Q40Block::kOffset, 3.4, 15);
  return table;
}
/// The outermost quantile, 2.9 deviations, is code 1 or 63. With a `share` the bell is narrower and its centre is
/// moved, so that code - 32 keeps its mean square and has `share` of its RMS as mean.
[[nodiscard]] inline CodeTable q6_code_table(double share) {
  constexpr double kDeviation = 10.7;
  return {32.0 + kDeviation * share, kDeviation * std::sqrt(1 - share * share), 63};
}

/// Spreads the super-block steps over +-10 %.
[[nodiscard]] inline double step_jitter(std::uint64_t random) {
  return 0.9 + 0.2 * static_cast<double>(random & 255) / 255;
}
/// E[jitter^2] = 1 + variance of 256 equidistant values over [0.9, 1.1].
inline constexpr double kStepJitterSquare = 1.0 + 0.2 * 0.2 * (256.0 + 1.0) / (12.0 * (256.0 - 1.0));

/// How a block of random bits is made one of mean 0: where its f16 step lies, and that of its minima or its offset, in
/// steps. A type without these has mean 0 over steps of either sign.
struct RandomBlockFormat {
  std::int64_t step_at;
  std::int64_t offset_at = -1;
  float offset = 0;
};

/// Of the types without an encoder; nothing for others. Offsets are means of the quants: scales and minima of Q2_K and
/// Q5_K have the same mean, as random bits have.
[[nodiscard]] inline std::optional<RandomBlockFormat> random_block_format(TensorType type) {
  switch (type) {
    case TensorType::kQ4_1:
      return RandomBlockFormat{0, 2, -7.5f};
    case TensorType::kQ5_0:
    case TensorType::kIq4Nl:
    case TensorType::kIq4Xs:
      return RandomBlockFormat{0};
    case TensorType::kQ5_1:
      return RandomBlockFormat{0, 2, -15.5f};
    case TensorType::kQ2K:
      return RandomBlockFormat{80, 82, 1.5f};
    case TensorType::kQ3K:
      return RandomBlockFormat{108};
    case TensorType::kQ5K:
      return RandomBlockFormat{0, 2, 15.5f};
    default:
      return std::nullopt;
  }
}

}  // namespace detail

/// Draws rows. One instance may serve many threads.
///
/// The rows of a tensor may have a part in common, as the rows of a trained embedding do:
///   row = deviation (share c + sqrt(1 - share^2) z),   c_j = +-1, the same for all rows, z drawn anew for each.
/// The signs change from column to column in steps of 16, the sub-block of Q6_K, in which the common part costs
/// nothing: it is a table of codes that is not centred, and scales whose signs the rows share.
class SyntheticRows {
 public:
  /// @param common_share RMS of the common part over that of the rows, 0 to 0.9
  explicit SyntheticRows(std::uint64_t seed, double common_share = 0)
      : seed_(seed), share_(common_share), q6_(detail::q6_code_table(common_share * scale_correction())) {
    require(common_share >= 0 && common_share <= 0.9, "synthetic rows: a common share of ", common_share,
            ", need 0 to 0.9");
  }

  /// Row `row` of the tensor `name`: out.size() = row_bytes(type, row_len).
  /// @throws std::invalid_argument for a type that has no encoder, or a row that does not divide into blocks
  void fill(std::string_view name, std::int64_t row, TensorType type, std::int64_t row_len, double deviation,
            std::span<std::byte> out) const {
    require(static_cast<std::int64_t>(out.size()) == row_bytes(type, row_len), "synthetic row of '", name,
            "': ", out.size(), " bytes, need ", row_bytes(type, row_len));
    RowRandom random(seed_, name, row);
    RowRandom signs(seed_, name, kSignRow);
    if (type == TensorType::kQ4K && share_ == 0) {
      fill_blocks<Q4KBlock>(random, signs, deviation, out);
    } else if (type == TensorType::kQ4_0 && share_ == 0) {
      fill_blocks<Q40Block>(random, signs, deviation, out);
    } else if (const auto format = detail::random_block_format(type); format && share_ == 0) {
      fill_random_blocks(random, type, *format, deviation, out);
    } else if (type == TensorType::kQ6K) {
      fill_blocks<Q6KBlock>(random, signs, deviation, out);
    } else {
      std::vector<float> values(static_cast<std::size_t>(row_len));
      const double own = std::sqrt(1 - share_ * share_);
      double common = 0;
      for (std::size_t i = 0; i < values.size(); ++i) {
        if (share_ != 0 && i % kSignStep == 0) common = (signs.next() & 1) != 0 ? -share_ : share_;
        values[i] = static_cast<float>(deviation * (common + own * random.normal()));
      }
      encode_row(type, values, out);
    }
  }

 private:
  /// Copies block by block: the file's bytes need not be aligned for a block.
  template <class TBlock>
  void fill_blocks(RowRandom& random, RowRandom& signs, double deviation, std::span<std::byte> out) const {
    for (std::size_t at = 0; at < out.size(); at += sizeof(TBlock)) {
      TBlock block;
      draw(random, signs, deviation, block);
      std::memcpy(out.data() + at, &block, sizeof(block));
    }
  }

  /// Random bits, but for the step, with which the block's mean square is deviation^2.
  static void fill_random_blocks(RowRandom& random, TensorType type, const detail::RandomBlockFormat& format,
                                 double deviation, std::span<std::byte> out) {
    std::vector<float> values(static_cast<std::size_t>(block_size(type)));
    const auto put = [](std::span<std::byte> block, std::int64_t at, double value) {
      const F16 step = to_f16(static_cast<float>(value));
      std::memcpy(block.data() + at, &step, sizeof(step));
    };
    for (; !out.empty(); out = out.subspan(static_cast<std::size_t>(block_bytes(type)))) {
      const std::span<std::byte> block = out.first(static_cast<std::size_t>(block_bytes(type)));
      for (std::byte& byte : block) byte = static_cast<std::byte>(random.next());
      put(block, format.step_at, 1);
      if (format.offset_at >= 0) put(block, format.offset_at, format.offset);
      dequantise_row(type, block, values);
      double squares = 0;
      for (const float value : values) squares += static_cast<double>(value) * value;
      const bool is_negative = format.offset_at < 0 && (random.next() & 1) != 0;
      const double step = deviation / std::sqrt(squares / static_cast<double>(values.size()));
      put(block, format.step_at, is_negative ? -step : step);
      if (format.offset_at >= 0) put(block, format.offset_at, format.offset * step);
    }
  }

  /// weight = d (q - 8) with d of either sign, so that E[weight] = 0 and E[weight^2] = d^2 (Var[q] + (E[q] - 8)^2).
  void draw(RowRandom& random, RowRandom& /*signs*/, double deviation, Q40Block& block) const {
    const double unit = std::sqrt(detail::kStepJitterSquare * (q4_0_.variance + std::pow(q4_0_.mean - 8, 2)));
    const std::uint64_t bits = random.next();
    const double d = deviation / unit * detail::step_jitter(bits);
    block.d = to_f16(static_cast<float>((bits & 256) != 0 ? -d : d));
    for (std::size_t at = 0; at < sizeof(block.quants); at += 4) {
      std::uint64_t bytes = random.next();
      for (std::size_t i = 0; i < 4; ++i, bytes >>= 16) {
        block.quants[at + i] =
            static_cast<std::uint8_t>(q4_0_.codes[bytes & 255] | (q4_0_.codes[(bytes >> 8) & 255] << 4));
      }
    }
  }

  /// weight = d scale q - dmin min with q of mean 7.5, min = scale - 1, scale or scale + 1 and dmin = 7.5 d, so that
  ///   E[weight] = 0,   E[weight^2] = d^2 (E[scale^2] Var[q] + 7.5^2 / 2),   scale uniform on 44..59, d with jitter.
  void draw(RowRandom& random, RowRandom& /*signs*/, double deviation, Q4KBlock& block) const {
    constexpr int kFirstScale = 44, kScales = 16;
    constexpr double kScaleSquare = 51.5 * 51.5 + (kScales * kScales - 1.0) / 12.0;
    const double unit = std::sqrt(detail::kStepJitterSquare * (kScaleSquare * q4_.variance + q4_.mean * q4_.mean / 2));
    block.d = to_f16(static_cast<float>(deviation / unit * detail::step_jitter(random.next())));
    block.dmin = to_f16(static_cast<float>(q4_.mean) * to_float(block.d));
    block.scales = {};
    std::uint64_t bits = random.next();
    for (int sub_block = 0; sub_block < Q4KBlock::kSubBlocks; ++sub_block, bits >>= 8) {
      const int scale = kFirstScale + static_cast<int>(bits & 15);
      constexpr int kOffsets[4] = {-1, 0, 0, 1};
      const int min = scale + kOffsets[(bits >> 4) & 3];
      block.scales.set(sub_block, {static_cast<std::uint8_t>(scale), static_cast<std::uint8_t>(min)});
    }
    for (std::size_t at = 0; at < sizeof(block.quants); at += 4) {
      std::uint64_t bytes = random.next();
      for (std::size_t i = 0; i < 4; ++i, bytes >>= 16) {
        block.quants[at + i] = static_cast<std::uint8_t>(q4_.codes[bytes & 255] | (q4_.codes[(bytes >> 8) & 255] << 4));
      }
    }
  }

  /// weight = d scale (q - 32) with |scale| uniform on 64..127, either sign, and q of mean 32 + m, so that
  ///   E[weight^2] = d^2 E[scale^2] (Var[q] + m^2),   E[weight] = 0 over all columns;
  /// with m != 0 the rows share the signs, and a column's mean over the rows is +-E[d] E[|scale|] m.
  void draw(RowRandom& random, RowRandom& signs, double deviation, Q6KBlock& block) const {
    const double offset = q6_.mean - 32;
    const double unit = std::sqrt(detail::kStepJitterSquare * kQ6ScaleSquare * (q6_.variance + offset * offset));
    block.d = to_f16(static_cast<float>(deviation / unit * detail::step_jitter(random.next())));
    constexpr std::uint64_t kSignBits = 0x4040404040404040u;
    for (int half = 0; half < 2; ++half) {
      std::uint64_t bits = random.next();
      if (share_ != 0) bits = (bits & ~kSignBits) | (signs.next() & kSignBits);
      for (int i = 0; i < 8; ++i, bits >>= 8) {
        const int scale = kQ6FirstScale + static_cast<int>(bits & 63);
        block.scales[8 * half + i] = static_cast<std::int8_t>((bits & 64) != 0 ? -scale : scale);
      }
      for (int l = 0; l < 32; l += 2) {
        std::uint64_t bytes = random.next();
        for (int i = 0; i < 2; ++i, bytes >>= 32) {
          std::array<unsigned, 4> q{};
          for (std::size_t r = 0; r < 4; ++r) q[r] = q6_.codes[(bytes >> (8 * r)) & 255];
          block.low[64 * half + l + i] = static_cast<std::uint8_t>((q[0] & 15) | (q[2] & 15) << 4);
          block.low[64 * half + 32 + l + i] = static_cast<std::uint8_t>((q[1] & 15) | (q[3] & 15) << 4);
          block.high[32 * half + l + i] =
              static_cast<std::uint8_t>(q[0] >> 4 | q[1] >> 4 << 2 | q[2] >> 4 << 4 | q[3] >> 4 << 6);
        }
      }
    }
  }

  static constexpr std::int64_t kSignRow = -1;  // a stream of its own: rows count from 0
  static constexpr std::size_t kSignStep = 16;
  static constexpr int kQ6FirstScale = 64;
  static constexpr double kQ6MeanScale = 95.5;
  static constexpr double kQ6ScaleSquare = kQ6MeanScale * kQ6MeanScale + (64 * 64 - 1.0) / 12.0;
  /// Scales that differ from row to row cost the common part of Q6_K rows 2 % of its share; this gives them back.
  [[nodiscard]] static double scale_correction() {
    return std::sqrt(detail::kStepJitterSquare * kQ6ScaleSquare) / kQ6MeanScale;
  }

  std::uint64_t seed_;
  double share_;
  const detail::CodeTable& q4_ = detail::q4_code_table();
  const detail::CodeTable& q4_0_ = detail::q4_0_code_table();
  detail::CodeTable q6_;
};

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/ptx/arithmetic.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/error.hpp"
#include "gemma4/kv_format.hpp"

/// The levels of a cache of one vector for K and V as decode reads them: bytes, eight codes of a word at a time.
///
/// A level becomes step * m with a whole m up to 255, within step / 2 of what the codebook says: at most 0.7 % of a
/// standard deviation, where quantising to 5 bits leaves 5 %. As a 16-bit number whose low byte is m and whose top bit
/// is the sign that is +-m 2^-24 in fp16 and +-m 2^-133 in bf16 (cuda/tq4_cache/layout.cuh): the same bits are an
/// operand of q K^T in fp16 and of p V in bf16, so that a code is decoded once.
///
/// Eight magnitudes lie in two registers, and a byte permutation selects four of them by three bits each. Its fourth
/// bit says to replicate the sign of the selected byte instead, and that is how sixteen are read: half of the nibbles
/// select in table `even`, the others, their bit flipped, in table `odd`, and what the other table gives for them is 0
/// or 255 and known from the table alone: 255 where both magnitudes of a pair are above 127, which then have `even`
/// inverted. So the exclusive or of the two is the magnitude, if only neighbours (2j, 2j + 1) lie on one side of 127.
namespace gemma4::cuda {

/// The magnitudes of a codebook as bytes. even[x], odd[x]: numbers 2j and 2j + 1 (5 bits; x = 0), 4j + 2x and 4j + 2x +
/// 1 (6 bits), j in [0, 8); up to 4 bits even[0] alone.
struct KvByteLevels {
  std::uint32_t even[2][2];
  std::uint32_t odd[2][2];
  float step;
  int magnitude[KvCodebook::kMaxHalf];  ///< m of each number; for the host
};

namespace detail {

/// One choice of a scale.
struct KvByteFit {
  int magnitude[KvCodebook::kMaxHalf] = {};
  double step = 0.0, error = 1e30;  ///< of the sum of squared differences
};

[[nodiscard]] inline KvByteFit fit_kv_bytes(const KvCodebook& codebook, double top) {
  KvByteFit fit;
  const double scale = top / static_cast<double>(codebook.level[codebook.n_half - 1]);
  double product = 0.0, squares = 0.0, levels = 0.0;
  int n_low = 0;
  for (int i = 0; i < codebook.n_half; ++i) {
    const auto level = static_cast<double>(codebook.level[i]);
    fit.magnitude[i] = static_cast<int>(std::lround(level * scale));
    const double m = fit.magnitude[i];
    product += m * level, squares += m * m, levels += level * level;
    n_low += fit.magnitude[i] < 128 ? 1 : 0;
  }
  if (codebook.n_half > 8 && n_low % 2 != 0) return fit;  // a pair on both sides of 127
  fit.step = product / squares;
  fit.error = levels - fit.step * product;
  return fit;
}

inline void put_kv_byte(std::uint32_t (&table)[2], int j, int value) {
  table[j >> 2] |= static_cast<std::uint32_t>(value) << (8 * (j & 3));
}

}  // namespace detail

/// The bytes whose squared distance from the codebook is the least, of all scales of the largest up to 255.
[[nodiscard]] inline KvByteLevels kv_byte_levels(const KvCodebook& codebook) {
  detail::KvByteFit best;
  for (double top = 160.0; top < 255.45; top += 0.05) {
    const detail::KvByteFit fit = detail::fit_kv_bytes(codebook, top);
    if (fit.error < best.error) best = fit;
  }
  require(best.step > 0.0, "kv_byte_levels: the codebook of ", codebook.bits, " bits has no scale");
  KvByteLevels levels{};
  levels.step = static_cast<float>(best.step);
  for (int i = 0; i < codebook.n_half; ++i) levels.magnitude[i] = best.magnitude[i];
  for (int j = 0; j < 8; ++j) {
    for (int x = 0; x < 2; ++x) {
      if (codebook.n_half <= 8) {
        if (x == 0 && j < codebook.n_half) detail::put_kv_byte(levels.even[0], j, best.magnitude[j]);
      } else if (codebook.n_half == 32 || x == 0) {
        const int first = codebook.n_half == 32 ? 4 * j + 2 * x : 2 * j;
        const int even = best.magnitude[first], odd = best.magnitude[first + 1];
        detail::put_kv_byte(levels.even[x], j, odd > 127 ? even ^ 0xFF : even);
        detail::put_kv_byte(levels.odd[x], j, odd);
      }
    }
  }
  return levels;
}

/// The codebook that the bytes stand for: their levels, the edges as they are.
[[nodiscard]] inline KvCodebook read_kv_codebook(KvCodebook codebook, const KvByteLevels& bytes) {
  for (int i = 0; i < codebook.n_half; ++i) {
    codebook.level[i] = bytes.step * static_cast<float>(bytes.magnitude[i]);
  }
  return codebook;
}

/// What decoding takes of a codebook. The factors come from memory, so that the compiler leaves shifts as
/// multiplications on the otherwise idle FMA pipe.
struct KvDecodeTable {
  std::uint32_t even[2][2];
  std::uint32_t odd[2][2];
};
struct KvShifts {
  std::uint32_t two_16 = 65536, sixteen = 16;
  std::uint32_t by[8] = {1, 2, 4, 8, 16, 32, 64, 128};  ///< by[k]: to the left by k
};

/// The eight values of a word as pairs of 16-bit numbers, the low half first: out[p] holds elements 2p and 2p + 1.
/// 9 integer operations with 4 bits, 13 with 5.
/// @param nibbles the word; of 3 bits its magnitudes alone, at bits 4 e
/// @param signs, extra the words of the group, shifted left by 2 i if the word's number i is not kWord
template <int kBits, int kWord>
__device__ __forceinline__ void decode_kv_word(std::uint32_t nibbles, std::uint32_t signs, std::uint32_t extra,
                                               const KvDecodeTable& table, const KvShifts& shifts,
                                               std::uint32_t (&out)[4]) {
  static_assert(kBits >= 3 && kBits <= 6 && kWord >= 0 && kWord < 4);
  if constexpr (kBits == 4) {
    decode_word_bytes(nibbles, table.even[0], shifts.two_16, shifts.sixteen, out);
  } else {
    const std::uint32_t first = nibbles, second = __umulhi(first, shifts.two_16);  // first >> 16
    std::uint32_t low0 = permute_bytes(table.even[0][0], table.even[0][1], first);
    std::uint32_t low1 = permute_bytes(table.even[0][0], table.even[0][1], second);
    if constexpr (kBits >= 5) {
      const std::uint32_t flipped = first ^ 0x88888888u, flipped_second = __umulhi(flipped, shifts.two_16);
      low0 ^= permute_bytes(table.odd[0][0], table.odd[0][1], flipped);
      low1 ^= permute_bytes(table.odd[0][0], table.odd[0][1], flipped_second);
      if constexpr (kBits == 6) {
        const std::uint32_t up0 = permute_bytes(table.even[1][0], table.even[1][1], first) ^
                                  permute_bytes(table.odd[1][0], table.odd[1][1], flipped);
        const std::uint32_t up1 = permute_bytes(table.even[1][0], table.even[1][1], second) ^
                                  permute_bytes(table.odd[1][0], table.odd[1][1], flipped_second);
        const std::uint32_t mask0 = permute_bytes(extra * shifts.by[2 * kWord], 0u, 0xBA98u);  // tops over bytes
        const std::uint32_t mask1 = permute_bytes(extra * shifts.by[2 * kWord + 1], 0u, 0xBA98u);
        low0 = (low0 & ~mask0) | (up0 & mask0);
        low1 = (low1 & ~mask1) | (up1 & mask1);
      }
    }
    const std::uint32_t sign0 = (signs * shifts.by[2 * kWord]) & 0x80808080u;
    const std::uint32_t sign1 = (signs * shifts.by[2 * kWord + 1]) & 0x80808080u;
    out[0] = permute_bytes(low0, sign0, 0x5140u);
    out[1] = permute_bytes(low0, sign0, 0x7362u);
    out[2] = permute_bytes(low1, sign1, 0x5140u);
    out[3] = permute_bytes(low1, sign1, 0x7362u);
  }
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "cuda/device/launch.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/platform.hpp"
#include "gemma4/tq4_codebook.hpp"
#include "gemma4/tq4_format.hpp"
#include "gemma4/view.hpp"

/// The device layout of a TQ4 cache: records of 16 tokens of one KV head, the same bits as 16 rows of K and V in the
/// shared format (gemma4/tq4_format.hpp) and their norms, in the order in which mma.sync wants them. A record is
/// contiguous and a multiple of 16 bytes, so that one bulk copy brings it.
///
///   [0, 8D)            K codes, 2D words of 8 nibbles
///   [8D, 16D)          V codes, 2D words of 8 nibbles
///   [16D, 16D + 32)    norms of K, 16 bf16
///   [16D + 32, + 64)   norms of V, 16 bf16                     D = head_dim; D / 2 + 2 bytes a row, nothing added
///
/// With lane = 4 g + t of a warp (g in [0, 8), t in [0, 4)), a lane reads 16-byte pieces piece * 32 + lane:
///   K, an mma A operand [16 tokens, dims]: lane holds tokens g and g + 8 and a quarter of the dims;
///      a word is 8 consecutive dims of one token. For D >= 128 piece = 2 r + half is token g + 8 half, dims
///      32 (4 r + t) + 8 i + e (word i, element e); for D = 64 the one piece has words 2 half + i, dims 16 t + 8 i + e.
///   V, transposed, an A operand [16 dims, 16 tokens]: word i of piece j is the whole fragment of dims 16 m .. 16 m +
///   15,
///      m = 4 j + i; element e is dim 16 m + g + 8 ((e >> 1) & 1), token 2 t + (e & 1) + 8 (e >> 2).
///
/// Inside a word the nibble of index c is sign-magnitude, c ^ 8 for c >= 8 and c ^ 15 below (so that 7 and 8, the two
/// levels around zero, are magnitude 0): three magnitude bits of element e at bit 4e, its sign at bit 8e + 7 for e < 4
/// and 8 (e - 4) + 3 for e >= 4, where one shift brings four signs to four byte tops. The permutation of the 16 indices
/// is fixed, so the layout knows no codebook and loses nothing, whatever the nibbles are.
/// For a trial that lost, see decode_word.
namespace gemma4::cuda {

[[nodiscard]] GEMMA4_HD constexpr std::int64_t tq4_record_bytes(std::int64_t head_dim) {
  return 16 * head_dim + 64;
}
[[nodiscard]] GEMMA4_HD constexpr std::int64_t tq4_v_codes_offset(std::int64_t head_dim) {
  return 8 * head_dim;
}
[[nodiscard]] GEMMA4_HD constexpr std::int64_t tq4_k_norms_offset(std::int64_t head_dim) {
  return 16 * head_dim;
}
[[nodiscard]] GEMMA4_HD constexpr std::int64_t tq4_v_norms_offset(std::int64_t head_dim) {
  return 16 * head_dim + 32;
}
[[nodiscard]] GEMMA4_HD constexpr std::int64_t tq4_record_count(std::int64_t buffer_len) {
  return (buffer_len + kTq4RecordTokens - 1) / kTq4RecordTokens;
}
static_assert(tq4_record_bytes(512) == 16 * 2 * tq4_row_bytes(512) && tq4_record_bytes(64) % 16 == 0);

/// Where a code lives: 32-bit word of the K codes or of the V codes of a record, and element 0..7 of that word.
struct Tq4Place {
  int word;
  int element;
  bool operator==(const Tq4Place&) const = default;
};

/// Where a code comes from: token 0..15 of the record and dim 0..head_dim-1.
struct Tq4Source {
  int token;
  int dim;
  bool operator==(const Tq4Source&) const = default;
};

[[nodiscard]] GEMMA4_HD constexpr Tq4Place tq4_k_place(int head_dim, int token, int dim) {
  const int half = token >> 3, g = token & 7;
  if (head_dim == 64) return {((4 * g + (dim >> 4)) << 2) + 2 * half + ((dim >> 3) & 1), dim & 7};
  const int r = dim >> 7, t = (dim >> 5) & 3, i = (dim >> 3) & 3;
  return {(((2 * r + half) * 32 + 4 * g + t) << 2) + i, dim & 7};
}

[[nodiscard]] GEMMA4_HD constexpr Tq4Source tq4_k_source(int head_dim, int word, int element) {
  const int i = word & 3, lane = (word >> 2) & 31, piece = word >> 7, g = lane >> 2, t = lane & 3;
  if (head_dim == 64) return {g + 8 * (i >> 1), 16 * t + 8 * (i & 1) + element};
  return {g + 8 * (piece & 1), 32 * (4 * (piece >> 1) + t) + 8 * i + element};
}

[[nodiscard]] GEMMA4_HD constexpr Tq4Place tq4_v_place(int token, int dim) {
  const int m = dim >> 4, g = dim & 7, t = (token >> 1) & 3;
  return {((((m >> 2) * 32) + 4 * g + t) << 2) + (m & 3), (token & 1) + 2 * ((dim >> 3) & 1) + 4 * (token >> 3)};
}

[[nodiscard]] GEMMA4_HD constexpr Tq4Source tq4_v_source(int word, int element) {
  const int lane = (word >> 2) & 31, m = 4 * (word >> 7) + (word & 3), g = lane >> 2, t = lane & 3;
  return {2 * t + (element & 1) + 8 * (element >> 2), 16 * m + g + 8 * ((element >> 1) & 1)};
}

/// Bit of the sign of an element.
[[nodiscard]] GEMMA4_HD constexpr int tq4_sign_bit(int element) {
  return element < 4 ? 8 * element + 7 : 8 * (element - 4) + 3;
}

/// The bits of `index` (0..15) as element `element` of a word; all other bits are zero.
[[nodiscard]] GEMMA4_HD constexpr std::uint32_t tq4_element_bits(int element, int index) {
  const auto nibble = static_cast<std::uint32_t>(index >= 8 ? index ^ 8 : index ^ 15);
  return ((nibble & 7u) << (4 * element)) | ((nibble >> 3) << tq4_sign_bit(element));
}

/// The bits that belong to `element` in a word.
[[nodiscard]] GEMMA4_HD constexpr std::uint32_t tq4_element_mask(int element) {
  return (7u << (4 * element)) | (1u << tq4_sign_bit(element));
}

/// The index (0..15) of an element of a word.
[[nodiscard]] GEMMA4_HD constexpr int tq4_element_index(std::uint32_t word, int element) {
  const int magnitude = static_cast<int>((word >> (4 * element)) & 7u);
  return ((word >> tq4_sign_bit(element)) & 1u) != 0 ? 7 - magnitude : 8 + magnitude;
}

/// A TQ4 cache in records on the device: [batch, n_head_kv, tq4_record_count(buffer_len)] records.
/// Tokens at buffer_len and beyond in the last record belong to nobody.
template <bool kConst>
struct BasicTq4Records {
  std::conditional_t<kConst, const std::byte, std::byte>* data = nullptr;
  std::int64_t batch = 1;
  std::int64_t n_head_kv = 1;
  std::int64_t buffer_len = 1;
  std::int64_t head_dim = 64;

  [[nodiscard]] GEMMA4_HD constexpr std::int64_t n_record() const { return tq4_record_count(buffer_len); }
  [[nodiscard]] GEMMA4_HD constexpr std::int64_t head_bytes() const { return n_record() * tq4_record_bytes(head_dim); }
  [[nodiscard]] GEMMA4_HD constexpr std::int64_t bytes() const { return batch * n_head_kv * head_bytes(); }
  [[nodiscard]] GEMMA4_HD constexpr auto* record(std::int64_t b, std::int64_t h, std::int64_t r) const {
    return data + (b * n_head_kv + h) * head_bytes() + r * tq4_record_bytes(head_dim);
  }
  template <bool kOther>
  requires(kOther && !kConst) [[nodiscard]] constexpr operator BasicTq4Records<kOther>() const {
    return {data, batch, n_head_kv, buffer_len, head_dim};
  }
};
using Tq4Records = BasicTq4Records<false>;
using ConstTq4Records = BasicTq4Records<true>;

/// Bytes that the records of a cache take. Zero them once: a zero norm is the zero vector.
[[nodiscard]] constexpr std::int64_t tq4_cache_bytes(std::int64_t batch, std::int64_t n_head_kv,
                                                     std::int64_t buffer_len, std::int64_t head_dim) {
  return batch * n_head_kv * tq4_record_count(buffer_len) * tq4_record_bytes(head_dim);
}

/// Refuses records that no kernel here reads.
template <bool kConst>
void require_tq4_records(const char* who, const BasicTq4Records<kConst>& records) {
  require(records.data != nullptr, who, ": the cache has no memory");
  require(reinterpret_cast<std::uintptr_t>(records.data) % 16 == 0, who, ": the cache begins at ",
          reinterpret_cast<std::uintptr_t>(records.data) % 16, " modulo 16 bytes, need 0");
  require(is_power_of_two(records.head_dim) && records.head_dim >= 64 && records.head_dim <= 512, who, ": head_dim ",
          records.head_dim, ", need a power of two from 64 to 512");
  require(records.batch >= 1 && records.n_head_kv >= 1 && records.buffer_len >= 1, who, ": the cache is [",
          records.batch, ", ", records.n_head_kv, ", ", records.buffer_len, "], need at least 1 of each");
  require(records.buffer_len < (std::int64_t{1} << 30), who, ": buffer_len ", records.buffer_len, ", need below 2^30");
}

/// The eight magnitudes of a codebook in a 16-bit type, as byte tables for decode_word: byte j of low[0] is the low
/// byte of magnitude j, of low[1] that of magnitude 4 + j; `high` alike.
struct LevelTable {
  std::uint32_t low[2];
  std::uint32_t high[2];
};

/// The table of a codebook. Indices 8..15 are +magnitude and 0..7 are -magnitude, so a table of 16 levels must be
/// symmetric; one of 4 or 8 levels uses the indices below 8 only, and its "magnitudes" carry their own sign.
/// @throws std::invalid_argument when 16 levels are not symmetric within 1e-4 of the largest
template <class T16>
[[nodiscard]] LevelTable level_table(const Codebook& codebook) {
  static_assert(sizeof(T16) == 2);
  LevelTable table = {};
  for (int magnitude = 0; magnitude < 8; ++magnitude) {
    const float negative = codebook.centroids[static_cast<std::size_t>(7 - magnitude)];
    float level = -negative;
    if (codebook.n_level == 16) {
      const float positive = codebook.centroids[static_cast<std::size_t>(8 + magnitude)];
      require(std::abs(positive + negative) <= 1e-4f * codebook.centroids[15], "level_table: levels ", 7 - magnitude,
              " and ", 8 + magnitude, " are ", negative, " and ", positive,
              "; the device layout needs a codebook that is symmetric about zero");
      level = 0.5f * (positive - negative);
    }
    const std::uint32_t bits = from_float<T16>(level).bits;
    const int shift = 8 * (magnitude & 3);
    table.low[magnitude >> 2] |= (bits & 0xFFu) << shift;
    table.high[magnitude >> 2] |= (bits >> 8) << shift;
  }
  return table;
}

/// The eight magnitudes of a symmetric codebook of 16 levels as bytes m, magnitude = step * m, for decode_word_bytes.
struct ByteLevels {
  std::uint32_t bytes[2];  ///< byte j of bytes[0] is m of magnitude j, of bytes[1] that of magnitude 4 + j
  float step;
};

/// The scale under which all eight magnitudes are nearest to whole numbers up to 255; absent when a magnitude would be
/// off by more than 2^-8 of itself, which is what a rounding to bf16 may do. The solved tables of 4 bits are within
/// 0.37 % = 0.95 * 2^-8, and their squared error grows by less than 0.1 %.
[[nodiscard]] inline std::optional<ByteLevels> byte_levels(const Codebook& codebook) {
  if (codebook.n_level != 16) return std::nullopt;
  double magnitude[8];
  for (std::size_t j = 0; j < 8; ++j) {
    const double positive = codebook.centroids[8 + j], negative = codebook.centroids[7 - j];
    if (!(std::abs(positive + negative) <= 1e-4 * codebook.centroids[15])) return std::nullopt;
    magnitude[j] = 0.5 * (positive - negative);
  }
  ByteLevels best{};
  double best_error = 0x1p-8;
  for (double top = 100.0; top < 255.4; top += 0.01) {
    double low = 1e30, high = 0.0;
    std::uint32_t bytes[2] = {};
    for (int j = 0; j < 8; ++j) {
      const double m = std::round(magnitude[j] * top / magnitude[7]);
      bytes[j >> 2] |= static_cast<std::uint32_t>(m) << (8 * (j & 3));
      low = std::min(low, m / magnitude[j]);
      high = std::max(high, m / magnitude[j]);
    }
    const double error = (high - low) / (high + low);  // of the step that balances the largest and the smallest ratio
    if (!(error < best_error)) continue;
    best_error = error;
    best = {{bytes[0], bytes[1]}, static_cast<float>(2.0 / (low + high))};
  }
  return best.step > 0.0f ? std::optional(best) : std::nullopt;
}

/// The codebook that decode_word_bytes stands for: the levels that `bytes` gives, the boundaries as they are.
[[nodiscard]] inline Codebook rounded_codebook(Codebook codebook, const ByteLevels& bytes) {
  for (std::size_t j = 0; j < 8; ++j) {
    const std::uint32_t m = (bytes.bytes[j >> 2] >> (8 * (j & 3))) & 0xFFu;
    codebook.centroids[8 + j] = bytes.step * static_cast<float>(m);
    codebook.centroids[7 - j] = -codebook.centroids[8 + j];
  }
  return codebook;
}

/// The eight levels of a word as pairs of 16-bit values: out[p] holds element 2p in its low half and 2p + 1 in its high
/// half. 8 PRMT, 3 LOP3, 1 SHF and 1 IMAD for eight values. Trials that lost: a table in memory (one gather a value),
/// and setting signs after the bytes are paired (2 more operations a word).
__device__ __forceinline__ void decode_word(std::uint32_t word, const LevelTable& table, std::uint32_t (&out)[4]) {
  const std::uint32_t first = word & 0x77777777u;  // bit 3 of a selector would replicate a sign
  const std::uint32_t second = first >> 16;
  const std::uint32_t low0 = permute_bytes(table.low[0], table.low[1], first);
  const std::uint32_t low1 = permute_bytes(table.low[0], table.low[1], second);
  const std::uint32_t high0 = permute_bytes(table.high[0], table.high[1], first) ^ (word & 0x80808080u);
  const std::uint32_t high1 = permute_bytes(table.high[0], table.high[1], second) ^ ((word << 4) & 0x80808080u);
  out[0] = permute_bytes(low0, high0, 0x5140u);
  out[1] = permute_bytes(low0, high0, 0x7362u);
  out[2] = permute_bytes(low1, high1, 0x5140u);
  out[3] = permute_bytes(low1, high1, 0x7362u);
}

/// The levels of a word as 16-bit numbers whose low byte is m and whose high byte is the sign alone; pairs as in
/// decode_word. In fp16 that is +-m 2^-24, in bf16 +-m 2^-133, for every byte m: a linear scale of subnormal numbers,
/// which the tensor cores multiply exactly. It saves the table of high bytes.
/// `two_16` = 65536 and `sixteen` = 16 come from memory, so that the compiler leaves the two shifts as multiplications
/// on the otherwise idle FMA pipe: 9 integer operations for 8 values, against 12.
__device__ __forceinline__ void decode_word_bytes(std::uint32_t word, const std::uint32_t (&bytes)[2],
                                                  std::uint32_t two_16, std::uint32_t sixteen,
                                                  std::uint32_t (&out)[4]) {
  const std::uint32_t first = word & 0x77777777u;
  const std::uint32_t second = __umulhi(first, two_16);  // first >> 16
  const std::uint32_t low0 = permute_bytes(bytes[0], bytes[1], first);
  const std::uint32_t low1 = permute_bytes(bytes[0], bytes[1], second);
  const std::uint32_t sign0 = word & 0x80808080u;
  const std::uint32_t sign1 = (word * sixteen) & 0x80808080u;
  out[0] = permute_bytes(low0, sign0, 0x5140u);
  out[1] = permute_bytes(low0, sign0, 0x7362u);
  out[2] = permute_bytes(low1, sign1, 0x5140u);
  out[3] = permute_bytes(low1, sign1, 0x7362u);
}

namespace detail {

/// One thread a word of a record.
static __global__ void tq4_to_records_kernel(const ConstTq4CacheView rows, const Tq4Records records) {
  const int head_dim = static_cast<int>(records.head_dim), n_code = 2 * head_dim, n_word = 2 * n_code + 16;
  const std::int64_t n_record = records.n_record();
  const std::int64_t total = records.batch * records.n_head_kv * n_record * n_word;
  for (std::int64_t item = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; item < total;
       item += std::int64_t{gridDim.x} * blockDim.x) {
    const int word = static_cast<int>(item % n_word);
    const std::int64_t r = item / n_word % n_record, head = item / n_word / n_record;
    const std::int64_t b = head / records.n_head_kv, h = head % records.n_head_kv, row0 = r * kTq4RecordTokens;
    std::uint32_t bits = 0;
    if (word < 2 * n_code) {
      const View<const std::uint8_t, 4>& codes = word < n_code ? rows.k_codes : rows.v_codes;
      for (int element = 0; element < 8; ++element) {
        const Tq4Source from =
            word < n_code ? tq4_k_source(head_dim, word, element) : tq4_v_source(word - n_code, element);
        if (row0 + from.token >= records.buffer_len) continue;
        const std::uint8_t byte = codes(b, h, row0 + from.token, from.dim >> 1);
        bits |= tq4_element_bits(element, (from.dim & 1) == 0 ? byte >> 4 : byte & 15);
      }
    } else {
      const int pair = word - 2 * n_code;
      const View<const Tq4Norm, 3>& norms = pair < 8 ? rows.k_norm : rows.v_norm;
      for (int i = 0; i < 2; ++i) {
        const std::int64_t row = row0 + 2 * (pair & 7) + i;
        if (row < records.buffer_len) bits |= static_cast<std::uint32_t>(norms(b, h, row).bits) << (16 * i);
      }
    }
    reinterpret_cast<std::uint32_t*>(records.record(b, h, r))[word] = bits;
  }
}

/// One thread a byte of a row of codes, or a norm.
static __global__ void tq4_to_rows_kernel(const ConstTq4Records records, const Tq4CacheView rows) {
  const int head_dim = static_cast<int>(records.head_dim), n_byte = head_dim / 2, n_item = 2 * n_byte + 2;
  const std::int64_t total = records.batch * records.n_head_kv * records.buffer_len * n_item;
  for (std::int64_t item = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; item < total;
       item += std::int64_t{gridDim.x} * blockDim.x) {
    const int what = static_cast<int>(item % n_item);
    const std::int64_t row = item / n_item % records.buffer_len, head = item / n_item / records.buffer_len;
    const std::int64_t b = head / records.n_head_kv, h = head % records.n_head_kv;
    const std::byte* record = records.record(b, h, row / kTq4RecordTokens);
    const int token = static_cast<int>(row % kTq4RecordTokens);
    if (what >= 2 * n_byte) {
      const bool is_k = what == 2 * n_byte;
      const auto* norms = reinterpret_cast<const Tq4Norm*>(
          record + (is_k ? tq4_k_norms_offset(head_dim) : tq4_v_norms_offset(head_dim)));
      (is_k ? rows.k_norm : rows.v_norm)(b, h, row) = norms[token];
      continue;
    }
    const bool is_k = what < n_byte;
    const int byte = is_k ? what : what - n_byte;
    const auto* words = reinterpret_cast<const std::uint32_t*>(record + (is_k ? 0 : tq4_v_codes_offset(head_dim)));
    int value = 0;
    for (int i = 0; i < 2; ++i) {
      const Tq4Place place = is_k ? tq4_k_place(head_dim, token, 2 * byte + i) : tq4_v_place(token, 2 * byte + i);
      value = (value << 4) | tq4_element_index(words[place.word], place.element);
    }
    (is_k ? rows.k_codes : rows.v_codes)(b, h, row, byte) = static_cast<std::uint8_t>(value);
  }
}

/// Refuses rows whose extents are not those of the records.
template <bool kConst>
void require_rows_fit(const char* who, const BasicTq4CacheView<kConst>& rows, const ConstTq4Records& records) {
  require_tq4_records(who, records);
  const std::int64_t codes[4] = {records.batch, records.n_head_kv, records.buffer_len, records.head_dim / 2};
  const std::int64_t norms[3] = {records.batch, records.n_head_kv, records.buffer_len};
  require_extents(who, "k_codes", rows.k_codes, codes);
  require_extents(who, "v_codes", rows.v_codes, codes);
  require_extents(who, "k_norm", rows.k_norm, norms);
  require_extents(who, "v_norm", rows.v_norm, norms);
}

[[nodiscard]] inline unsigned conversion_grid(std::int64_t n_thread) {
  return static_cast<unsigned>(std::clamp<std::int64_t>((n_thread + 255) / 256, 1, 65536));
}

}  // namespace detail

/// Rows in the shared format (on the device) to records; lossless. Tokens past buffer_len become zeros.
/// @throws std::invalid_argument when the extents differ
inline void tq4_rows_to_records(const ConstTq4CacheView& rows, const Tq4Records& records, cudaStream_t stream) {
  detail::require_rows_fit("tq4_rows_to_records", rows, records);
  detail::Launch{.what = "tq4_to_records_kernel",
                 .grid = detail::conversion_grid(records.bytes() / 4),
                 .block = 256,
                 .stream = stream}(detail::tq4_to_records_kernel, rows, records);
}

/// Records to rows in the shared format (on the device); lossless.
/// @throws std::invalid_argument when the extents differ
inline void tq4_records_to_rows(const ConstTq4Records& records, const Tq4CacheView& rows, cudaStream_t stream) {
  detail::require_rows_fit("tq4_records_to_rows", rows, records);
  detail::Launch{
      .what = "tq4_to_rows_kernel", .grid = detail::conversion_grid(records.bytes()), .block = 256, .stream = stream}(
      detail::tq4_to_rows_kernel, records, rows);
}

}  // namespace gemma4::cuda

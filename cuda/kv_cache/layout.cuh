// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/tq4_cache.cuh"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/kv_format.hpp"
#include "gemma4/platform.hpp"

/// The device layout of a cache of one vector for K and V: records of 16 tokens of one KV head, the same bits as 16
/// rows of V and R in the shared format (gemma4/kv_format.hpp) and their norms, in the order in which mma.sync wants
/// them. A record is contiguous and a multiple of 16 bytes, so that one bulk copy brings it.
///
///   [0, 2D v)             V codes, v bits each: a vector set of D values
///   [2D v, + D r / 2)     R codes, r bits each: a vector set of D / 4 values
///   [.., + 64)            norms, f16: those of V of tokens g and g + 8, then those of R, g in [0, 8)
///                                                   D = head_dim; D (4 v + r) / 32 + 4 bytes a token, nothing added
///
/// A vector set of n values and 16 tokens is n / 2 groups of 32 codes: four words i of eight elements e. Codes lie
/// where an mma A operand [16 tokens, dims] wants them: lane 4 g + t holds tokens g and g + 8 ("half" 0 and 1) and, of
/// every 16 dims, 2t, 2t + 1, 2t + 8 and 2t + 9. Element e of a word is dim 32 U + 16 (e >> 2) + 8 ((e >> 1) & 1) + 2 t
/// + (e & 1) of one token, U being the number of the word among those of the token in that lane:
///   n >= 128   group (2 (U >> 2) + half) * 32 + lane, i = U & 3
///   n = 64     group lane, i = 2 half + U
///   n = 32     group lane >> 1, i = 2 (lane & 1) + half
///   n = 16     group g, i = t; half is e >> 2
///
/// Planes of a set, each over all groups, one after another; m is the magnitude's number, and "slot k of e" is bit
/// 8 (e & 3) + 7 - k with k = 2 i + (e >> 2), where one shift by k brings four bits to four byte tops:
///   3 bits   two words a group: m of word i at bit 4 e + 2 (i & 1) of word i >> 1;    signs, slots
///   4 bits   words 0 and 1 of every group, then 2 and 3, as TQ4 has them: m at bits 4 e .. 4 e + 2, the sign in the
///            slots of cuda/tq4_cache/layout.cuh
///   5 bits   words 0 and 1, then 2 and 3: nibble m >> 1 | (m & 1) << 3 at bit 4 e;    signs, slots
///   6 bits   the same: nibble m >> 2 | (m & 1) << 3;    signs, slots;    bit 1 of m, slots
/// Magnitudes are split so because three bits are the selector of one byte permutation, and the fourth one tells
/// whether it selects or replicates a sign: decode_kv_word().
///
/// `kv16r16`: V [16, D] and R [16, D / 4] as bf16, no norms.
namespace gemma4::cuda {

inline constexpr int kKvRecordTokens = 16;
static_assert(kKvRecordTokens == KvFormat::kRecordTokens);

/// Bytes of the codes of 16 vectors of n values.
[[nodiscard]] GEMMA4_HD constexpr std::int64_t kv_set_bytes(std::int64_t n, int bits) {
  return 2 * n * bits;
}
[[nodiscard]] GEMMA4_HD constexpr std::int64_t kv_record_bytes(std::int64_t head_dim, int v_bits, int r_bits) {
  return kv_set_bytes(head_dim, v_bits) + kv_set_bytes(kv_rotated_size(head_dim), r_bits) +
         (v_bits == KvOptions::kPlainBits ? 0 : 4 * kKvRecordTokens);
}
static_assert(kv_record_bytes(512, 5, 4) == 16 * 388 && kv_record_bytes(512, 4, 4) == 16 * 324);
static_assert(kv_record_bytes(64, 3, 3) % 16 == 0 && kv_record_bytes(512, 16, 16) == 16 * 1280);

/// Where a code lies in a vector set: group, word of the group and element of the word.
struct KvPlace {
  int group, word, element;
  bool operator==(const KvPlace&) const = default;
};

/// Where a code comes from: token 0..15 of the record and dim 0..n-1.
struct KvSource {
  int token, dim;
  bool operator==(const KvSource&) const = default;
};

[[nodiscard]] GEMMA4_HD constexpr KvPlace kv_place(int n, int token, int dim) {
  const int half = token >> 3, g = token & 7, t = (dim >> 1) & 3, column = dim >> 5, lane = 4 * g + t;
  const int element = (dim & 1) + 2 * ((dim >> 3) & 1) + 4 * ((dim >> 4) & 1);
  if (n >= 128) return {(2 * (column >> 2) + half) * 32 + lane, column & 3, element};
  if (n == 64) return {lane, 2 * half + column, element};
  if (n == 32) return {lane >> 1, 2 * (lane & 1) + half, element};
  return {g, t, element + 4 * half};
}

[[nodiscard]] GEMMA4_HD constexpr KvSource kv_source(int n, const KvPlace& at) {
  const int e = at.element, within = (e & 1) + 8 * ((e >> 1) & 1);
  if (n == 16) return {at.group + 8 * (e >> 2), within + 2 * at.word};
  int lane = at.group, half = 0, column = 0;
  if (n >= 128) {
    lane = at.group & 31, half = (at.group >> 5) & 1, column = 4 * (at.group >> 6) + at.word;
  } else if (n == 64) {
    half = at.word >> 1, column = at.word & 1;
  } else {
    lane = 2 * at.group + (at.word >> 1), half = at.word & 1;
  }
  return {(lane >> 2) + 8 * half, 32 * column + 16 * (e >> 2) + within + 2 * (lane & 3)};
}

/// Place of a norm among those of a record.
[[nodiscard]] GEMMA4_HD constexpr int kv_norm_place(bool is_v, int token) {
  return 4 * (token & 7) + (token >> 3) + (is_v ? 0 : 2);
}

/// Bit of a sign, or of another bit that has a plane of its own.
[[nodiscard]] GEMMA4_HD constexpr int kv_slot(const KvPlace& at) {
  return 8 * (at.element & 3) + 7 - (2 * at.word + (at.element >> 2));
}

/// The bits of a set of n values at `words`, for one place: a code is the sign on top of the magnitude's number.
struct KvSet {
  int n = 64, bits = 4;

  [[nodiscard]] GEMMA4_HD constexpr int n_group() const { return n / 2; }
  [[nodiscard]] GEMMA4_HD constexpr int nibble_words() const { return bits == 3 ? 2 : 4; }  ///< of a group
  [[nodiscard]] GEMMA4_HD constexpr bool has_sign_plane() const { return bits != 4; }
  [[nodiscard]] GEMMA4_HD constexpr int sign_word(int group) const { return nibble_words() * n_group() + group; }
  [[nodiscard]] GEMMA4_HD constexpr int extra_word(int group) const { return 5 * n_group() + group; }

  /// The word that holds the nibble of a place, and its first bit there.
  [[nodiscard]] GEMMA4_HD constexpr int nibble_word(const KvPlace& at) const {
    return bits == 3 ? 2 * at.group + (at.word >> 1) : (at.word & 2) * n_group() + 2 * at.group + (at.word & 1);
  }
  [[nodiscard]] GEMMA4_HD constexpr int nibble_bit(const KvPlace& at) const {
    return 4 * at.element + (bits == 3 ? 2 * (at.word & 1) : 0);
  }
  /// A magnitude's number as the nibble has it (without signs of 4 bits).
  [[nodiscard]] GEMMA4_HD constexpr std::uint32_t nibble_of(int code) const {
    const auto m = static_cast<std::uint32_t>(code) & ((1u << (bits - 1)) - 1u);
    return bits <= 4 ? m : (m >> (bits - 4)) | ((m & 1u) << 3);
  }
  [[nodiscard]] GEMMA4_HD constexpr bool is_negative(int code) const { return ((code >> (bits - 1)) & 1) != 0; }

  /// The code at a place of the set that begins at `words`.
  [[nodiscard]] GEMMA4_HD constexpr int code(const std::uint32_t* words, const KvPlace& at) const {
    const std::uint32_t nibbles = words[nibble_word(at)];
    const auto nibble = static_cast<int>((nibbles >> nibble_bit(at)) & (bits == 3 ? 3u : bits == 4 ? 7u : 15u));
    if (bits == 4) return nibble | static_cast<int>((nibbles >> tq4_sign_bit(at.element)) & 1u) << 3;
    const auto slot = [&](int word) { return static_cast<int>((words[word] >> kv_slot(at)) & 1u); };
    int magnitude = nibble;
    if (bits >= 5) magnitude = ((nibble & 7) << (bits - 4)) | (nibble >> 3);
    if (bits == 6) magnitude |= slot(extra_word(at.group)) << 1;
    return magnitude | slot(sign_word(at.group)) << (bits - 1);
  }
};

/// A cache in records on the device: [batch, n_head_kv, n_record()] of them. Tokens at buffer_len and beyond in the
/// last record belong to nobody.
template <bool kConst>
struct BasicKvRecords {
  std::conditional_t<kConst, const std::byte, std::byte>* data = nullptr;
  std::int64_t batch = 1;
  std::int64_t n_head_kv = 1;
  std::int64_t buffer_len = 1;
  std::int64_t head_dim = 64;
  int v_bits = 5, r_bits = 4;

  [[nodiscard]] GEMMA4_HD constexpr bool has_codes() const { return v_bits != KvOptions::kPlainBits; }
  [[nodiscard]] GEMMA4_HD constexpr std::int64_t record_bytes() const {
    return kv_record_bytes(head_dim, v_bits, r_bits);
  }
  [[nodiscard]] GEMMA4_HD constexpr std::int64_t r_offset() const { return kv_set_bytes(head_dim, v_bits); }
  [[nodiscard]] GEMMA4_HD constexpr std::int64_t norms_offset() const { return record_bytes() - 64; }
  [[nodiscard]] GEMMA4_HD constexpr std::int64_t n_record() const {
    return (buffer_len + kKvRecordTokens - 1) / kKvRecordTokens;
  }
  [[nodiscard]] GEMMA4_HD constexpr std::int64_t head_bytes() const { return n_record() * record_bytes(); }
  [[nodiscard]] GEMMA4_HD constexpr std::int64_t bytes() const { return batch * n_head_kv * head_bytes(); }
  [[nodiscard]] GEMMA4_HD constexpr auto* record(std::int64_t b, std::int64_t h, std::int64_t r) const {
    return data + (b * n_head_kv + h) * head_bytes() + r * record_bytes();
  }
  template <bool kOther>
  requires(kOther && !kConst) [[nodiscard]] constexpr operator BasicKvRecords<kOther>() const {
    return {data, batch, n_head_kv, buffer_len, head_dim, v_bits, r_bits};
  }
};
using KvRecords = BasicKvRecords<false>;
using ConstKvRecords = BasicKvRecords<true>;

/// Bytes that the records of a cache take. Zero them once: a zero norm is the zero vector.
[[nodiscard]] constexpr std::int64_t kv_cache_bytes(std::int64_t batch, std::int64_t n_head_kv, std::int64_t buffer_len,
                                                    std::int64_t head_dim, const KvOptions& options) {
  return KvRecords{nullptr, batch, n_head_kv, buffer_len, head_dim, options.v_bits, options.r_bits}.bytes();
}

/// Refuses records that no kernel here reads.
template <bool kConst>
void require_kv_records(const char* who, const BasicKvRecords<kConst>& records) {
  require(records.data != nullptr, who, ": the cache has no memory");
  require(reinterpret_cast<std::uintptr_t>(records.data) % 16 == 0, who, ": the cache begins at ",
          reinterpret_cast<std::uintptr_t>(records.data) % 16, " modulo 16 bytes, need 0");
  require(is_power_of_two(records.head_dim) && records.head_dim >= 64 && records.head_dim <= 512, who, ": head_dim ",
          records.head_dim, ", need a power of two from 64 to 512");
  const auto is_width = [](int bits) { return bits >= KvOptions::kMinBits && bits <= KvOptions::kMaxBits; };
  require((is_width(records.v_bits) && is_width(records.r_bits)) ||
              (records.v_bits == KvOptions::kPlainBits && records.r_bits == KvOptions::kPlainBits),
          who, ": V of ", records.v_bits, " bits and R of ", records.r_bits, ", need 3 to 6 each, or 16 both");
  require(records.batch >= 1 && records.n_head_kv >= 1 && records.buffer_len >= 1, who, ": the cache is [",
          records.batch, ", ", records.n_head_kv, ", ", records.buffer_len, "], need at least 1 of each");
  require(records.buffer_len < (std::int64_t{1} << 30), who, ": buffer_len ", records.buffer_len, ", need below 2^30");
}

}  // namespace gemma4::cuda

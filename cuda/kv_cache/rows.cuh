// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/device/launch.cuh"
#include "cuda/kv_cache/layout.cuh"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/kv_format.hpp"
#include "gemma4/view.hpp"

/// Records from rows of the shared format (gemma4/kv_format.hpp), and back; lossless, for tests and files.
namespace gemma4::cuda {

namespace detail {

/// The code of value i in a row of planes.
[[nodiscard]] __device__ __forceinline__ int kv_row_code(const std::uint8_t* row, int n, int bits, int i) {
  int code = 0;
  for (int p = 0; p < bits; ++p) code |= ((row[p * (n / 8) + i / 8] >> (i % 8)) & 1) << p;
  return code;
}

/// A set of a record: whose rows, how long, where.
struct KvSetRows {
  KvSet set;
  View<const std::uint8_t, 4> codes;
  View<const KvNorm, 3> norms;
  std::int64_t offset;
  bool is_v;
};

/// One thread a group of a set; those of the last group convert the norms.
static __global__ void kv_to_records_kernel(const KvSetRows from, const KvRecords records) {
  const int n_item = from.set.n_group() + 1;
  const std::int64_t n_record = records.n_record(), total = records.batch * records.n_head_kv * n_record * n_item;
  for (std::int64_t item = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; item < total;
       item += std::int64_t{gridDim.x} * blockDim.x) {
    const int group = static_cast<int>(item % n_item);
    const std::int64_t r = item / n_item % n_record, head = item / n_item / n_record;
    const std::int64_t b = head / records.n_head_kv, h = head % records.n_head_kv, row0 = r * kKvRecordTokens;
    std::byte* const record = records.record(b, h, r);
    if (group == from.set.n_group()) {
      auto* const norms = reinterpret_cast<KvNorm*>(record + records.norms_offset());
      for (int token = 0; token < kKvRecordTokens; ++token) {
        norms[kv_norm_place(from.is_v, token)] =
            row0 + token < records.buffer_len ? from.norms(b, h, row0 + token) : KvNorm{};
      }
      continue;
    }
    std::uint32_t nibbles[4] = {}, signs = 0, extra = 0;
    for (int place = 0; place < 32; ++place) {
      const KvPlace at{group, place >> 3, place & 7};
      const KvSource source = kv_source(from.set.n, at);
      if (row0 + source.token >= records.buffer_len) continue;
      const int code = kv_row_code(&from.codes(b, h, row0 + source.token, 0), from.set.n, from.set.bits, source.dim);
      const int word = from.set.bits == 3 ? at.word >> 1 : at.word;
      nibbles[word] |= from.set.nibble_of(code) << from.set.nibble_bit(at);
      if (from.set.bits == 4 && from.set.is_negative(code)) nibbles[word] |= 1u << tq4_sign_bit(at.element);
      if (from.set.is_negative(code)) signs |= 1u << kv_slot(at);
      if ((code & 2) != 0) extra |= 1u << kv_slot(at);
    }
    auto* const words = reinterpret_cast<std::uint32_t*>(record + from.offset);
    for (int i = 0; i < from.set.nibble_words(); ++i) {
      words[from.set.nibble_word({group, from.set.bits == 3 ? 2 * i : i, 0})] = nibbles[i];
    }
    if (from.set.has_sign_plane()) words[from.set.sign_word(group)] = signs;
    if (from.set.bits == 6) words[from.set.extra_word(group)] = extra;
  }
}

/// One thread a row of a set.
static __global__ void kv_to_rows_kernel(const ConstKvRecords records, const KvSet set, std::int64_t offset, bool is_v,
                                         const View<std::uint8_t, 4> codes, const View<KvNorm, 3> norms) {
  const std::int64_t total = records.batch * records.n_head_kv * records.buffer_len;
  for (std::int64_t item = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; item < total;
       item += std::int64_t{gridDim.x} * blockDim.x) {
    const std::int64_t row = item % records.buffer_len, head = item / records.buffer_len;
    const std::int64_t b = head / records.n_head_kv, h = head % records.n_head_kv;
    const std::byte* const record = records.record(b, h, row / kKvRecordTokens);
    const int token = static_cast<int>(row % kKvRecordTokens);
    norms(b, h, row) = reinterpret_cast<const KvNorm*>(record + records.norms_offset())[kv_norm_place(is_v, token)];
    const auto* const words = reinterpret_cast<const std::uint32_t*>(record + offset);
    std::uint8_t* const planes = &codes(b, h, row, 0);
    for (int byte = 0; byte < set.bits * set.n / 8; ++byte) planes[byte] = 0;
    for (int i = 0; i < set.n; ++i) {
      const int code = set.code(words, kv_place(set.n, token, i));
      for (int p = 0; p < set.bits; ++p) {
        planes[p * (set.n / 8) + i / 8] |= static_cast<std::uint8_t>(((code >> p) & 1) << (i % 8));
      }
    }
  }
}

/// Refuses rows whose extents are not those of the records.
template <bool kConst>
void require_kv_rows_fit(const char* who, const BasicKvCacheView<kConst>& rows, const ConstKvRecords& records) {
  require_kv_records(who, records);
  require(records.has_codes(), who, ": the records hold bf16, not codes");
  const std::int64_t b = records.batch, h = records.n_head_kv, n = records.buffer_len;
  require_extents(who, "v_codes", rows.v_codes, {b, h, n, kv_code_bytes(records.head_dim, records.v_bits)});
  require_extents(who, "r_codes", rows.r_codes,
                  {b, h, n, kv_code_bytes(kv_rotated_size(records.head_dim), records.r_bits)});
  require_extents(who, "v_norm", rows.v_norm, {b, h, n});
  require_extents(who, "r_norm", rows.r_norm, {b, h, n});
}

[[nodiscard]] inline unsigned kv_conversion_grid(std::int64_t n_thread) {
  return static_cast<unsigned>(std::clamp<std::int64_t>((n_thread + 127) / 128, 1, 65536));
}

}  // namespace detail

/// Rows in the shared format (on the device) to records; lossless. Tokens past buffer_len become zeros.
/// @throws std::invalid_argument when the extents differ
inline void kv_rows_to_records(const ConstKvCacheView& rows, const KvRecords& records, cudaStream_t stream) {
  detail::require_kv_rows_fit("kv_rows_to_records", rows, records);
  const auto n = static_cast<int>(records.head_dim), n_r = n / 4;
  const detail::KvSetRows sets[2] = {{{n, records.v_bits}, rows.v_codes, rows.v_norm, 0, true},
                                     {{n_r, records.r_bits}, rows.r_codes, rows.r_norm, records.r_offset(), false}};
  for (const detail::KvSetRows& set : sets) {
    detail::Launch{.what = "kv_to_records_kernel",
                   .grid = detail::kv_conversion_grid(records.bytes() / 16),
                   .block = 128,
                   .stream = stream}(detail::kv_to_records_kernel, set, records);
  }
}

/// Records to rows in the shared format (on the device); lossless.
/// @throws std::invalid_argument when the extents differ
inline void kv_records_to_rows(const ConstKvRecords& records, const KvCacheView& rows, cudaStream_t stream) {
  detail::require_kv_rows_fit("kv_records_to_rows", rows, records);
  const auto n = static_cast<int>(records.head_dim), n_r = n / 4;
  const detail::Launch launch{
      .what = "kv_to_rows_kernel",
      .grid = detail::kv_conversion_grid(records.batch * records.n_head_kv * records.buffer_len),
      .block = 128,
      .stream = stream};
  launch(detail::kv_to_rows_kernel, records, KvSet{n, records.v_bits}, std::int64_t{0}, true, rows.v_codes,
         rows.v_norm);
  launch(detail::kv_to_rows_kernel, records, KvSet{n_r, records.r_bits}, records.r_offset(), false, rows.r_codes,
         rows.r_norm);
}

}  // namespace gemma4::cuda

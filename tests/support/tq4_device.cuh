// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/tq4_cache.cuh"
#include "reference/tq4_attention.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"

/// What the tests of TQ4 attention on the device share: codecs, caches in records, and the bounds of decode.
namespace gemma4::testkit {

/// Codecs of the default options but for their width are drawn once: solving a codebook costs more than a small
/// attention.
template <class TCodec>
[[nodiscard]] const TCodec& codec_of(std::int64_t head_dim, int bits = 4) {
  static std::map<std::pair<std::int64_t, int>, std::unique_ptr<TCodec>> codecs;
  auto& codec = codecs[{head_dim, bits}];
  if (!codec) codec = std::make_unique<TCodec>(head_dim, Tq4Options{.k_bits = bits, .v_bits = bits});
  return *codec;
}

/// A codebook as decode on the device reads it.
[[nodiscard]] inline Codebook read_levels(const Codebook& book, const std::optional<cuda::ByteLevels>& bytes) {
  return bytes ? cuda::rounded_codebook(book, *bytes) : book;
}

/// The reference with the levels as decode on the device reads them.
[[nodiscard]] inline const reference::Tq4Codec<double>& codec_with_device_levels(std::int64_t head_dim, int bits = 4) {
  static std::map<std::pair<std::int64_t, int>, std::unique_ptr<reference::Tq4Codec<double>>> codecs;
  auto& codec = codecs[{head_dim, bits}];
  if (!codec) {
    const auto& device = codec_of<cuda::Tq4Codec>(head_dim, bits);
    codec = std::make_unique<reference::Tq4Codec<double>>(
        reference::Rotation<double>::signed_hadamard(head_dim, 0), read_levels(device.k_codebook(), device.k_bytes()),
        read_levels(device.v_codebook(), device.v_bytes()), NormKind::kCorrected);
  }
  return *codec;
}

/// Rows of the shared format, in records on the device.
[[nodiscard]] inline cuda::DeviceBuffer<std::byte> records_of(const reference::Tq4CacheBuffer& cache) {
  const CacheShape& s = cache.shape();
  const auto copy = [](const auto& view) {
    using T = std::remove_cvref_t<decltype(*view.data)>;
    return cuda::DeviceBuffer<T>(std::span<const T>(view.data, static_cast<std::size_t>(view.size())));
  };
  const ConstTq4CacheView host = cache.view();
  const auto k_codes = copy(host.k_codes), v_codes = copy(host.v_codes);
  const auto k_norm = copy(host.k_norm), v_norm = copy(host.v_norm);
  ConstTq4CacheView device = host;
  device.k_codes.data = k_codes.data(), device.v_codes.data = v_codes.data();
  device.k_norm.data = k_norm.data(), device.v_norm.data = v_norm.data();
  cuda::DeviceBuffer<std::byte> memory(cuda::tq4_cache_bytes(s.batch, s.n_head_kv, s.buffer_len, s.head_dim));
  memory.fill_bytes(0xFF);
  cuda::tq4_rows_to_records(device, {memory.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim}, nullptr);
  cuda::check(cudaDeviceSynchronize(), "conversion to records");
  return memory;
}

/// Against the levels as the device reads them: q in fp16 (and those levels, of fewer than 4 bits, too), which moves a
/// score by at most 2^-10 of |q| |k| = `score`; weights, the result and V levels of fewer than 4 bits in bf16 (2^-8
/// each); float sums. The tensor cores and ex2.approx are allowed two bits more than one rounding an operation.
[[nodiscard]] inline AttentionRounding decode_rounding(std::int64_t head_dim, std::int64_t kv_len, int n_split,
                                                       double score) {
  return {.unit = 0x1p-22,
          .weight_unit = 0x1p-8 + 0x1p-10 * score,
          .output_unit = 2 * 0x1p-8,
          .longest_sum = kv_len / 16 + 16 + n_split,
          .n_rescale = kv_len / 16 + n_split + 8,
          .rotation_roundings = std::log2(static_cast<double>(head_dim)) + 2};
}

/// How far a factor of a whole result may be from 1 where each of its n_vector head vectors may come from one key
/// alone: that key's weight is rounded to bf16 once, by at most 2^-9 of itself and in no direction, so by 2^-9 /
/// sqrt(3) in the mean square, and by 1 / sqrt(n_vector) of that all together. Eight deviations.
[[nodiscard]] inline double lean_of_single_keys(std::int64_t n_vector) {
  return 8 * 0x1p-9 / std::sqrt(3.0 * static_cast<double>(n_vector));
}

}  // namespace gemma4::testkit

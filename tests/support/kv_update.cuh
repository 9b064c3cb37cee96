// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/kv_cache.cuh"
#include "gemma4/kv_format.hpp"
#include "reference/kv_cache.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/kv_device.cuh"
#include "tests/support/property.hpp"
#include "tests/support/update_case.hpp"

/// Random updates of caches of one vector for K and V, as the reference and the device make them, and the comparison.
namespace gemma4::testkit {

[[nodiscard]] inline KvOptions some_kv_options(std::uint64_t seed) {
  return {.codebook = *rc::gen::element(CodebookKind::kFull, CodebookKind::kCutAtThreeSigma),
          .norm = *rc::gen::element(NormKind::kCorrected, NormKind::kRaw),
          .v_bits = *rc::gen::inRange(3, 7),
          .r_bits = *rc::gen::inRange(3, 7),
          .seed = seed};
}

/// New tokens for a cache that already holds something in every row.
struct KvUpdate {
  CacheShape shape;
  KvOptions options;
  std::vector<std::int32_t> positions;
  std::vector<float> k, v, weight;  ///< [batch, n_new, n_head_kv, head_dim], exact in bf16
  reference::KvCacheBuffer before;

  KvUpdate(const CacheShape& s, const KvOptions& format, std::vector<std::int32_t> where, std::uint64_t seed)
      : shape(s),
        options(format),
        positions(std::move(where)),
        weight(draw_k_weight(s.head_dim, seed + 5)),
        before(s.batch, s.n_head_kv, s.buffer_len, kv_code_bytes(s.head_dim, format.v_bits),
               kv_code_bytes(kv_rotated_size(s.head_dim), format.r_bits)) {
    const auto n_new = static_cast<std::int64_t>(positions.size());
    k = draw(seed, s.batch * n_new * s.n_head_kv * s.head_dim, 3.0f);
    v = draw(seed + 1, s.batch * n_new * s.n_head_kv * s.head_dim, 0.3f);
    std::uint32_t state = static_cast<std::uint32_t>(seed) | 1u;
    const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
    for (std::uint8_t& byte : before.v_codes()) byte = static_cast<std::uint8_t>(next());
    for (std::uint8_t& byte : before.r_codes()) byte = static_cast<std::uint8_t>(next());
    for (KvNorm& norm : before.v_norm()) norm.bits = static_cast<std::uint16_t>(next());
    for (KvNorm& norm : before.r_norm()) norm.bits = static_cast<std::uint16_t>(next());
  }
  template <class T>
  [[nodiscard]] View<const T, 4> view(const T* data) const {
    return make_view(data, shape.batch, static_cast<std::int64_t>(positions.size()), shape.n_head_kv, shape.head_dim);
  }
  /// What the reference makes of it.
  [[nodiscard]] reference::KvCacheBuffer expected() const {
    reference::KvCacheBuffer cache = before.clone();
    reference::kv_cache_update<float>(kv_codec_of<reference::KvCodec<float>>(shape.head_dim, options), view(k.data()),
                                      view(v.data()), weight, positions, cache.view());
    return cache;
  }
  /// What the device makes of it, from bf16 inputs.
  [[nodiscard]] reference::KvCacheBuffer on_device() const {
    KvDeviceRows cache(before, shape.head_dim, options);
    const cuda::DeviceBuffer<Bf16> k_device(narrow(k)), v_device(narrow(v));
    const cuda::DeviceBuffer<float> w(weight);
    const cuda::DeviceBuffer<std::int32_t> where(positions);
    cuda::kv_cache_update<Bf16>(kv_codec_of<cuda::KvCodec>(shape.head_dim, options), view(k_device.data()),
                                view(v_device.data()), w.data(), {where.data(), where.size(), {}}, cache.records(),
                                nullptr);
    return cache.to_host();
  }
  /// The rotated unit vector that row `t` of batch b and head h is quantised from, in double.
  [[nodiscard]] reference::Matrix<double> rotated(bool is_v, std::int64_t b, std::int64_t t, std::int64_t h) const {
    const auto n_new = static_cast<std::int64_t>(positions.size());
    const std::int64_t n = is_v ? shape.head_dim : kv_rotated_size(shape.head_dim);
    const float* row = (is_v ? v : k).data() + ((b * n_new + t) * shape.n_head_kv + h) * shape.head_dim;
    reference::Matrix<double> y(1, n);
    for (std::int64_t j = 0; j < n; ++j) {
      y(0, j) =
          is_v ? row[j] : row[kv_rotated_place(shape.head_dim, j)] / kv_rotated_scale(weight.data(), shape.head_dim, j);
    }
    y /= y.norm() == 0.0 ? 1.0 : y.norm();
    const auto& codec = kv_codec_of<reference::KvCodec<double>>(shape.head_dim, options);
    (is_v ? codec.v() : codec.r()).rotation().forward(y);
    return y;
  }
};

[[nodiscard]] inline int code_of(const View<const std::uint8_t, 4>& codes, std::int64_t b, std::int64_t h,
                                 std::int64_t row, std::int64_t n, int bits, std::int64_t i) {
  int code = 0;
  for (int p = 0; p < bits; ++p) code |= ((codes(b, h, row, p * (n / 8) + i / 8) >> (i % 8)) & 1) << p;
  return code;
}

/// A code of a side as a place on the line: magnitudes up from zero, negative ones down.
[[nodiscard]] inline int on_line(int code, int bits) {
  const int magnitude = code & ((1 << (bits - 1)) - 1);
  return (code >> (bits - 1)) != 0 ? -1 - magnitude : magnitude;
}

/// The caches agree, except for codes of values that lie within rounding of an edge, or of zero: such a code may be the
/// neighbour's, and the norm of its row then differs with it.
[[nodiscard]] inline testing::AssertionResult same_but_for_ties(const reference::KvCacheBuffer& actual,
                                                                const reference::KvCacheBuffer& expected,
                                                                const KvUpdate& update) {
  const CacheShape& shape = update.shape;
  const auto& codec = kv_codec_of<reference::KvCodec<double>>(shape.head_dim, update.options);
  const ConstKvCacheView a = actual.view(), e = expected.view();
  std::int64_t n_tie = 0;
  for (const bool is_v : {true, false}) {
    const std::int64_t n = is_v ? shape.head_dim : kv_rotated_size(shape.head_dim);
    const int bits = is_v ? update.options.v_bits : update.options.r_bits;
    const KvCodebook& book = (is_v ? codec.v() : codec.r()).codebook();
    // x / |x| and the butterflies round log2(n) + 2 times, each relative to a partial sum of at most |x| = 1; a dense
    // rotation rounds n products and sums, whose magnitudes add up to at most |row| |x| = 1.
    const double size = static_cast<double>(n);
    const double slack = ((update.options.rotation == RotationKind::kDenseHaar ? size : std::log2(size)) + 3) * 0x1p-24;
    for (std::int64_t row = 0; row < shape.batch * shape.n_head_kv * shape.buffer_len; ++row) {
      const std::int64_t j = row % shape.buffer_len, h = row / shape.buffer_len % shape.n_head_kv,
                         b = row / shape.buffer_len / shape.n_head_kv;
      const auto found = std::find(update.positions.begin(), update.positions.end(), j);
      const bool is_new = found != update.positions.end();
      reference::Matrix<double> y(1, n);
      if (is_new) y = update.rotated(is_v, b, found - update.positions.begin(), h);
      double squares[2] = {};  // of the levels, got and wanted
      for (std::int64_t i = 0; i < n; ++i) {
        const int got = code_of(is_v ? a.v_codes : a.r_codes, b, h, j, n, bits, i);
        const int want = code_of(is_v ? e.v_codes : e.r_codes, b, h, j, n, bits, i);
        const int codes[2] = {got, want};
        for (int s = 0; s < 2; ++s) {
          const double level = book.level[codes[s] & (book.n_half - 1)];
          squares[s] += level * level;
        }
        if (got == want) continue;
        const int low = std::min(on_line(got, bits), on_line(want, bits));
        const double edge = low >= 0 ? book.edge[low] : low == -1 ? 0.0 : -book.edge[-2 - low];
        const bool near =
            is_new && std::abs(on_line(got, bits) - on_line(want, bits)) == 1 && std::abs(y(0, i) - edge) <= slack;
        if (!near) {
          return testing::AssertionFailure() << (is_v ? "V" : "R") << " code " << i << " of row " << j << " (batch "
                                             << b << ", head " << h << "): " << got << ", expected " << want << ", y "
                                             << y(0, i) << ", edge " << edge << (is_new ? "" : "; the row is not new");
        }
        ++n_tie;
      }
      const KvNorm got = (is_v ? a.v_norm : a.r_norm)(b, h, j), want = (is_v ? e.v_norm : e.r_norm)(b, h, j);
      if (got.bits == want.bits) continue;
      // |x|, over the length of the levels where corrected: that is known for both. Each is rounded to f16 once, behind
      // roundings of a float that are those of y.
      const double ratio = update.options.norm == NormKind::kRaw ? 1.0 : std::sqrt(squares[1] / squares[0]);
      const double expected_norm = to_float(want) * ratio;
      const double bound =
          half_step(to_float(got), 10, -14) + half_step(to_float(want), 10, -14) * ratio + slack * expected_norm;
      if (!(is_new && std::abs(to_float(got) - expected_norm) <= bound)) {
        return testing::AssertionFailure()
               << (is_v ? "V" : "R") << " norm of row " << j << ": " << to_float(got) << ", expected " << expected_norm
               << " within " << bound << (is_new ? "" : "; the row is not new");
      }
    }
  }
  return testing::AssertionSuccess() << n_tie << " ties";
}

[[nodiscard]] inline CacheShape some_cache_shape() {
  return {*rc::gen::inRange<std::int64_t>(1, 3), *rc::gen::inRange<std::int64_t>(1, 4),
          *rc::gen::inRange<std::int64_t>(1, 60), *rc::gen::element<std::int64_t>(64, 128, 256, 512)};
}

}  // namespace gemma4::testkit

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/device/check.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/tq4_cache.cuh"
#include "reference/tq4_cache.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/update_case.hpp"

/// Random updates of TQ4 caches, as the reference and the device make them, and the comparison.
namespace gemma4::testkit {

/// Records on the device that begin as the bytes of `host`, and come back as rows.
class Tq4DeviceRows {
 public:
  explicit Tq4DeviceRows(const reference::Tq4CacheBuffer& host)
      : shape_(host.shape()),
        memory_(cuda::tq4_cache_bytes(shape_.batch, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim)),
        k_codes_(copy(host.view().k_codes)),
        v_codes_(copy(host.view().v_codes)),
        k_norm_(copy(host.view().k_norm)),
        v_norm_(copy(host.view().v_norm)) {
    cuda::tq4_rows_to_records(rows(), records(), nullptr);
  }
  [[nodiscard]] cuda::Tq4Records records() {
    return {memory_.data(), shape_.batch, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim};
  }
  [[nodiscard]] cuda::DeviceBuffer<std::byte>& memory() { return memory_; }
  [[nodiscard]] reference::Tq4CacheBuffer to_host() {
    cuda::check(cudaDeviceSynchronize(), "wait for the device");
    cuda::tq4_records_to_rows(records(), rows(), nullptr);
    reference::Tq4CacheBuffer host(shape_.batch, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim);
    std::ranges::copy(k_codes_.to_host(), host.k_codes().begin());
    std::ranges::copy(v_codes_.to_host(), host.v_codes().begin());
    std::ranges::copy(k_norm_.to_host(), host.k_norm().begin());
    std::ranges::copy(v_norm_.to_host(), host.v_norm().begin());
    return host;
  }

 private:
  template <class T, int kRank>
  [[nodiscard]] static cuda::DeviceBuffer<std::remove_const_t<T>> copy(const View<T, kRank>& view) {
    return cuda::DeviceBuffer<std::remove_const_t<T>>(
        std::span<const T>(view.data, static_cast<std::size_t>(view.size())));
  }
  [[nodiscard]] Tq4CacheView rows() {
    return {make_view(k_codes_.data(), shape_.batch, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim / 2),
            make_view(v_codes_.data(), shape_.batch, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim / 2),
            make_view(k_norm_.data(), shape_.batch, shape_.n_head_kv, shape_.buffer_len),
            make_view(v_norm_.data(), shape_.batch, shape_.n_head_kv, shape_.buffer_len)};
  }

  CacheShape shape_;
  cuda::DeviceBuffer<std::byte> memory_;
  cuda::DeviceBuffer<std::uint8_t> k_codes_, v_codes_;
  cuda::DeviceBuffer<Tq4Norm> k_norm_, v_norm_;
};

/// New tokens for a cache that already holds something in every row.
struct Tq4Update {
  CacheShape shape;
  std::vector<std::int32_t> positions;
  std::vector<float> k, v;  ///< [batch, n_new, n_head_kv, head_dim], exact in bf16
  reference::Tq4CacheBuffer before;

  Tq4Update(const CacheShape& s, std::vector<std::int32_t> where, std::uint64_t seed)
      : shape(s), positions(std::move(where)), before(s.batch, s.n_head_kv, s.buffer_len, s.head_dim) {
    const auto n_new = static_cast<std::int64_t>(positions.size());
    k = draw(seed, s.batch * n_new * s.n_head_kv * s.head_dim, 3.0f);
    v = draw(seed + 1, s.batch * n_new * s.n_head_kv * s.head_dim, 0.3f);
    std::uint32_t state = static_cast<std::uint32_t>(seed) | 1u;
    const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
    for (std::uint8_t& byte : before.k_codes()) byte = static_cast<std::uint8_t>(next());
    for (std::uint8_t& byte : before.v_codes()) byte = static_cast<std::uint8_t>(next());
    for (Tq4Norm& norm : before.k_norm()) norm.bits = static_cast<std::uint16_t>(next());
    for (Tq4Norm& norm : before.v_norm()) norm.bits = static_cast<std::uint16_t>(next());
  }
  template <class T>
  [[nodiscard]] View<const T, 4> view(const T* data) const {
    return make_view(data, shape.batch, static_cast<std::int64_t>(positions.size()), shape.n_head_kv, shape.head_dim);
  }

  /// What the reference makes of it.
  [[nodiscard]] reference::Tq4CacheBuffer expected(const reference::Tq4Codec<float>& codec) const {
    reference::Tq4CacheBuffer cache = before.clone();
    reference::tq4_cache_update<float>(codec, view(k.data()), view(v.data()), positions, cache.view());
    return cache;
  }

  /// What the device makes of it, from bf16 inputs.
  [[nodiscard]] reference::Tq4CacheBuffer on_device(const cuda::Tq4Codec& codec) const {
    Tq4DeviceRows cache(before);
    const cuda::DeviceBuffer<Bf16> k_device(narrow(k)), v_device(narrow(v));
    const cuda::DeviceBuffer<std::int32_t> where(positions);
    cuda::tq4_cache_update<Bf16>(codec, view(k_device.data()), view(v_device.data()), {where.data(), where.size(), {}},
                                 cache.records(), nullptr);
    return cache.to_host();
  }
};

/// The caches agree, except for codes of values that lie within rounding of a boundary: such a code may be the
/// neighbour's, and the norm of its row then differs with it. `y` are the rotated unit vectors.
[[nodiscard]] inline testing::AssertionResult same_but_for_ties(const reference::Tq4CacheBuffer& actual,
                                                                const reference::Tq4CacheBuffer& expected,
                                                                const Tq4Update& update,
                                                                const reference::Tq4Codec<double>& codec) {
  // x / |x| and the butterflies round log2(head_dim) + 2 times, each relative to a partial sum of at most |x| = 1; a
  // dense rotation rounds head_dim products and sums, whose magnitudes add up to at most |row| |x| = 1.
  const std::int64_t head_dim = update.shape.head_dim;
  const auto size = static_cast<double>(head_dim);
  const double slack = ((codec.rotation().kind() == RotationKind::kDenseHaar ? size : std::log2(size)) + 3) * 0x1p-24;
  const ConstTq4CacheView a = actual.view(), e = expected.view();
  std::int64_t n_tie = 0;
  for (const reference::CacheSide side : {reference::CacheSide::kKey, reference::CacheSide::kValue}) {
    const bool is_k = side == reference::CacheSide::kKey;
    const Codebook& book = codec.codebook(side);
    for (std::int64_t b = 0; b < update.shape.batch; ++b) {
      for (std::int64_t h = 0; h < update.shape.n_head_kv; ++h) {
        for (std::int64_t j = 0; j < update.shape.buffer_len; ++j) {
          const auto found = std::find(update.positions.begin(), update.positions.end(), j);
          reference::Matrix<double> y(1, head_dim);
          if (found != update.positions.end()) {
            const auto t = found - update.positions.begin();
            const float* row =
                (is_k ? update.k : update.v).data() +
                ((b * static_cast<std::int64_t>(update.positions.size()) + t) * update.shape.n_head_kv + h) * head_dim;
            for (std::int64_t i = 0; i < head_dim; ++i) y(0, i) = row[i];
            y /= y.norm() == 0.0 ? 1.0 : y.norm();
            codec.rotation().forward(y);
          }
          bool tie = false;
          double squares[2] = {};  // of the levels, actual and expected
          for (std::int64_t i = 0; i < head_dim; ++i) {
            const auto code = [&](const ConstTq4CacheView& view) {
              const std::uint8_t byte = (is_k ? view.k_codes : view.v_codes)(b, h, j, i / 2);
              return i % 2 == 0 ? byte >> 4 : byte & 15;
            };
            const int codes[2] = {code(a), code(e)};
            for (int which = 0; which < 2; ++which) {
              const double level = book.centroids[static_cast<std::size_t>(codes[which])];
              squares[which] += level * level;
            }
            if (code(a) == code(e)) continue;
            const int low = std::min(code(a), code(e));
            const bool near = found != update.positions.end() && std::abs(code(a) - code(e)) == 1 &&
                              std::abs(y(0, i) - book.boundaries[static_cast<std::size_t>(low)]) <= slack;
            if (!near) {
              return testing::AssertionFailure()
                     << (is_k ? "K" : "V") << " code " << i << " of row " << j << ", head " << h << ": " << code(a)
                     << ", expected " << code(e) << ", y " << y(0, i);
            }
            tie = true;
          }
          const Tq4Norm an = (is_k ? a.k_norm : a.v_norm)(b, h, j), en = (is_k ? e.k_norm : e.v_norm)(b, h, j);
          n_tie += tie ? 1 : 0;
          if (an.bits == en.bits) continue;
          // |x|, over the length of the levels where corrected: that is known for both. Each is rounded to bf16 once,
          // behind roundings of a float that are those of y.
          const double ratio = codec.norm_kind() == NormKind::kRaw ? 1.0 : std::sqrt(squares[1] / squares[0]);
          const double norm = to_float(en) * ratio;
          const double bound =
              half_step(to_float(an), 7, -126) + half_step(to_float(en), 7, -126) * ratio + slack * norm;
          if (!(found != update.positions.end() && std::abs(to_float(an) - norm) <= bound)) {
            return testing::AssertionFailure()
                   << "norm of row " << j << ": " << to_float(an) << ", expected " << norm << " within " << bound;
          }
        }
      }
    }
  }
  return testing::AssertionSuccess() << n_tie << " rows with a tie";
}

}  // namespace gemma4::testkit

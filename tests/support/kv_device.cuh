// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/device/check.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/kv_cache.cuh"
#include "reference/kv_attention.hpp"
#include "reference/kv_cache.hpp"
#include "tests/support/attention_case.hpp"

/// What the tests of one vector for K and V on the device share: codecs, caches in records, and what is read of them.
namespace gemma4::testkit {

/// Codecs are drawn once: solving a codebook costs more than a small attention.
template <class TCodec>
[[nodiscard]] const TCodec& kv_codec_of(std::int64_t head_dim, const KvOptions& options = {}) {
  using Key = std::tuple<std::int64_t, int, int, int, int, int, std::uint64_t>;
  static std::map<Key, std::unique_ptr<TCodec>> codecs;
  auto& codec = codecs[{head_dim, options.v_bits, options.r_bits, static_cast<int>(options.rotation),
                        static_cast<int>(options.codebook), static_cast<int>(options.norm), options.seed}];
  if (!codec) codec = std::make_unique<TCodec>(head_dim, options);
  return *codec;
}

/// The reference with the levels as decode on the device reads them.
[[nodiscard]] inline const reference::KvCodec<double>& kv_codec_with_device_levels(std::int64_t head_dim,
                                                                                   const KvOptions& options = {}) {
  using Key = std::tuple<std::int64_t, int, int, int, int>;
  static std::map<Key, std::unique_ptr<reference::KvCodec<double>>> codecs;
  auto& codec = codecs[{head_dim, options.v_bits, options.r_bits, static_cast<int>(options.rotation),
                        static_cast<int>(options.codebook)}];
  if (!codec) {
    const auto& device = kv_codec_of<cuda::KvCodec>(head_dim, options);
    const auto side = [&](std::int64_t n, const KvCodebook& book, const cuda::KvByteLevels& bytes) {
      return reference::KvVectorCodec<double>(reference::Rotation<double>::make(options.rotation, n, options.seed),
                                              cuda::read_kv_codebook(book, bytes), options.norm);
    };
    codec = std::make_unique<reference::KvCodec<double>>(
        side(head_dim, device.v_codebook(), device.v_bytes()),
        side(kv_rotated_size(head_dim), device.r_codebook(), device.r_bytes()));
  }
  return *codec;
}

/// A weight of k's norm whose values, scales of pairs included, differ: 0.1 to 2.
[[nodiscard]] inline std::vector<float> draw_k_weight(std::int64_t head_dim, std::uint64_t seed = 77) {
  std::vector<float> weight = draw(seed, head_dim, 0.95f);
  for (float& value : weight) value = to_float(to_bf16(1.05f + value));
  return weight;
}

template <class T, int kRank>
[[nodiscard]] cuda::DeviceBuffer<std::remove_const_t<T>> copy_to_device(const View<T, kRank>& view) {
  return cuda::DeviceBuffer<std::remove_const_t<T>>(
      std::span<const T>(view.data, static_cast<std::size_t>(view.size())));
}

/// Rows of the shared format on the device, and records.
class KvDeviceRows {
 public:
  KvDeviceRows(const reference::KvCacheBuffer& host, std::int64_t head_dim, const KvOptions& options)
      : head_dim_(head_dim),
        options_(options),
        extent_{host.view().v_norm.extent[0], host.view().v_norm.extent[1], host.view().v_norm.extent[2]},
        view_(host.view()),
        v_codes_(copy_to_device(view_.v_codes)),
        r_codes_(copy_to_device(view_.r_codes)),
        v_norm_(copy_to_device(view_.v_norm)),
        r_norm_(copy_to_device(view_.r_norm)),
        memory_(cuda::kv_cache_bytes(extent_[0], extent_[1], extent_[2], head_dim, options)) {
    memory_.fill_bytes(0xFF);
    cuda::kv_rows_to_records(rows(), records(), nullptr);
    cuda::check(cudaDeviceSynchronize(), "conversion to records");
  }
  [[nodiscard]] cuda::KvRecords records() {
    return {memory_.data(), extent_[0], extent_[1], extent_[2], head_dim_, options_.v_bits, options_.r_bits};
  }
  [[nodiscard]] cuda::DeviceBuffer<std::byte>& memory() { return memory_; }
  /// The records as rows again.
  [[nodiscard]] reference::KvCacheBuffer to_host() {
    cuda::check(cudaDeviceSynchronize(), "wait for the device");
    for (auto* codes : {&v_codes_, &r_codes_}) codes->fill_bytes(0xA5);
    cuda::kv_records_to_rows(records(), rows(), nullptr);
    reference::KvCacheBuffer host(extent_[0], extent_[1], extent_[2], view_.v_codes.extent[3], view_.r_codes.extent[3]);
    std::ranges::copy(v_codes_.to_host(), host.v_codes().begin());
    std::ranges::copy(r_codes_.to_host(), host.r_codes().begin());
    std::ranges::copy(v_norm_.to_host(), host.v_norm().begin());
    std::ranges::copy(r_norm_.to_host(), host.r_norm().begin());
    return host;
  }

 private:
  [[nodiscard]] KvCacheView rows() {
    const auto [batch, n_head_kv, buffer_len] = extent_;
    return {make_view(v_codes_.data(), batch, n_head_kv, buffer_len, view_.v_codes.extent[3]),
            make_view(r_codes_.data(), batch, n_head_kv, buffer_len, view_.r_codes.extent[3]),
            make_view(v_norm_.data(), batch, n_head_kv, buffer_len),
            make_view(r_norm_.data(), batch, n_head_kv, buffer_len)};
  }

  std::int64_t head_dim_;
  KvOptions options_;
  std::array<std::int64_t, 3> extent_;
  ConstKvCacheView view_;  ///< extents alone outlive the constructor
  cuda::DeviceBuffer<std::uint8_t> v_codes_, r_codes_;
  cuda::DeviceBuffer<KvNorm> v_norm_, r_norm_;
  cuda::DeviceBuffer<std::byte> memory_;
};

/// Records on the device of rows of the shared format.
[[nodiscard]] inline cuda::DeviceBuffer<std::byte> kv_records_of(const reference::KvCacheBuffer& host,
                                                                 std::int64_t head_dim, const KvOptions& options) {
  return std::move(KvDeviceRows(host, head_dim, options).memory());
}

/// K = w * V with c * R at the rotated places, and V, of every row of a cache as a codec reads it: both [batch *
/// n_head_kv * buffer_len, head_dim], no longer rotated by the codec.
template <class Scalar>
struct KvRebuilt {
  reference::Matrix<Scalar> k, v, r;

  KvRebuilt(const reference::KvCacheBuffer& cache, const reference::KvCodec<Scalar>& codec,
            std::span<const float> k_weight) {
    const ConstKvCacheView view = cache.view();
    const std::int64_t batch = view.v_norm.extent[0], n_head = view.v_norm.extent[1], n = view.v_norm.extent[2];
    const std::int64_t head_dim = codec.head_dim(), n_r = kv_rotated_size(head_dim);
    v.resize(batch * n_head * n, head_dim);
    r.resize(v.rows(), n_r);
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t h = 0; h < n_head; ++h) {
        const auto [v_codes, v_norm] = reference::kv_rows(view.v_codes, view.v_norm, b, h, 0, n);
        const auto [r_codes, r_norm] = reference::kv_rows(view.r_codes, view.r_norm, b, h, 0, n);
        codec.v().decompress(v_codes, v_norm, v.middleRows((b * n_head + h) * n, n));
        codec.r().decompress(r_codes, r_norm, r.middleRows((b * n_head + h) * n, n));
      }
    }
    k = v;
    for (std::int64_t i = 0; i < head_dim; ++i) k.col(i) *= static_cast<Scalar>(k_weight[static_cast<std::size_t>(i)]);
    for (std::int64_t j = 0; j < n_r; ++j) {
      k.col(kv_rotated_place(head_dim, j)) =
          r.col(j) * static_cast<Scalar>(kv_rotated_scale(k_weight.data(), head_dim, j));
    }
  }
};

}  // namespace gemma4::testkit

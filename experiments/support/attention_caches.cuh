// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda/bf16_attention.cuh"
#include "cuda/device/check.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/kv_attention.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/tq4_attention.cuh"
#include "cuda/tq4_cache.cuh"
#include "experiments/benchmark.cuh"
#include "experiments/support/attention_measure.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/kv_format.hpp"
#include "gemma4/tq4_format.hpp"
#include "gemma4/view.hpp"
#include "reference/bf16_attention.hpp"
#include "reference/kv_attention.hpp"
#include "reference/tq4_attention.hpp"

/// Caches of one full layer for experiments/support/attention_measure.cuh, each holding random tokens and offering
///   token_bytes()                            of a token and head
///   plan(shape, options, context)            with workspace_bytes
///   attend(i, plan, call)                    over the i-th cache
///   reference(q, options, n, out, stream)    over the tokens [0, n) of cache 0, in double
///   update(i, k, v, positions, stream)       of the i-th cache, where tokens are compressed
namespace gemma4::experiment {

/// Random keys and values of all tokens, piece by piece. take(k, v, positions): [1, count, n_head_kv, head_dim] each.
template <class TTake>
void for_random_tokens(const AttentionShape& shape, std::uint32_t seed, cudaStream_t stream, TTake&& take) {
  constexpr std::int64_t kChunk = 8192;
  const std::int64_t row = shape.n_head_kv * shape.head_dim;
  cuda::DeviceBuffer<Bf16> k(kChunk * row), v(kChunk * row);
  cuda::DeviceBuffer<std::int32_t> positions(kChunk);
  for (std::int64_t first = 0; first < shape.buffer_len; first += kChunk) {
    const std::int64_t count = std::min(kChunk, shape.buffer_len - first);
    std::vector<std::int32_t> where(static_cast<std::size_t>(count));
    std::iota(where.begin(), where.end(), static_cast<std::int32_t>(first));
    positions.from_host(where, stream);
    fill_random(k.data(), k.size(), seed + static_cast<std::uint32_t>(2 * first), stream);
    fill_random(v.data(), v.size(), seed + static_cast<std::uint32_t>(2 * first) + 1, stream);
    const auto view = [&](const Bf16* data) { return make_view(data, 1, count, shape.n_head_kv, shape.head_dim); };
    take(view(k.data()), view(v.data()), cuda::DevicePositions{positions.data(), count, {}});
    cuda::check(cudaStreamSynchronize(stream), "filling of a cache");
  }
}

/// The memory of kBuffers caches.
class CacheCopies {
 public:
  CacheCopies(std::int64_t bytes, cudaStream_t stream) : bytes_(bytes), memory_(kBuffers * bytes) {
    memory_.fill_bytes(0, stream);
  }
  [[nodiscard]] std::byte* at(int i) { return memory_.data() + (i % kBuffers) * bytes_; }
  /// Gives all of them what the first holds.
  void spread(cudaStream_t stream) {
    for (int i = 1; i < kBuffers; ++i) {
      cuda::check(cudaMemcpyAsync(at(i), at(0), static_cast<std::size_t>(bytes_), cudaMemcpyDeviceToDevice, stream),
                  "copy of a cache");
    }
  }

 private:
  std::int64_t bytes_;
  cuda::DeviceBuffer<std::byte> memory_;
};

/// The first n of `length` rows of each head, `width` elements a row.
template <class T, class TIterator>
void copy_first_rows(const cuda::DeviceBuffer<T>& device, std::int64_t length, std::int64_t width, std::int64_t n,
                     TIterator host, cudaStream_t stream) {
  const std::vector<T> all = device.to_host(stream);
  const std::int64_t n_head = device.size() / (length * width);
  for (std::int64_t head = 0; head < n_head; ++head) {
    std::copy_n(all.begin() + head * length * width, n * width, host + head * n * width);
  }
}

class Tq4Caches {
 public:
  Tq4Caches(const AttentionShape& shape, std::uint32_t seed, cudaStream_t stream)
      : shape_(shape),
        codec_(shape.head_dim, {}),
        copies_(cuda::tq4_cache_bytes(1, shape.n_head_kv, shape.buffer_len, shape.head_dim), stream) {
    for_random_tokens(shape, seed, stream, [&](const auto& k, const auto& v, const cuda::DevicePositions& positions) {
      update(0, k, v, positions, stream);
    });
    copies_.spread(stream);
  }

  [[nodiscard]] double token_bytes() const { return static_cast<double>(2 * tq4_row_bytes(shape_.head_dim)); }
  [[nodiscard]] static cuda::Tq4AttentionPlan plan(const AttentionShape& shape, const AttentionOptions& options,
                                                   std::int64_t context) {
    cuda::Tq4AttentionChoice choice;
    choice.max_kv_len = context;  // the host of a prefill knows
    return cuda::plan_tq4_attention(shape, options, cuda::current_device(), choice);
  }
  void attend(int i, const cuda::Tq4AttentionPlan& plan, const TimedCall& call) {
    cuda::tq4_attention(call_of(i, call), plan, call.workspace, call.stream);
  }
  using Plan = cuda::Tq4AttentionPlan;
  using RowsPlan = cuda::Tq4RowsPlan;
  /// @param shape n_query: rows @param one of one of them
  [[nodiscard]] RowsPlan plan_rows(const AttentionShape& shape, const Plan& one) const {
    return cuda::plan_tq4_rows(shape, one.decode, codec_.k_bytes() && codec_.v_bytes(), std::nullopt);
  }
  void attend_rows(int i, const RowsPlan& plan, const TimedCall& call) {
    cuda::tq4_attention_rows(call_of(i, call), plan, call.workspace, call.stream);
  }
  void update(int i, const View<const Bf16, 4>& k, const View<const Bf16, 4>& v, const cuda::DevicePositions& positions,
              cudaStream_t stream) {
    cuda::tq4_cache_update<Bf16>(codec_, k, v, positions, cache(i), stream);
  }
  void reference(const View<const double, 4>& q, const AttentionOptions& options, std::int64_t n,
                 const View<double, 4>& out, cudaStream_t stream) {
    gemma4::reference::tq4_attention<double>(q, rows(n, stream).view(),
                                             gemma4::reference::Tq4Codec<double>(shape_.head_dim, {}), options, n, out);
  }

 private:
  [[nodiscard]] cuda::Tq4AttentionCall call_of(int i, const TimedCall& call) {
    return {call.q, cache(i), codec_, call.options, call.kv_len, call.out};
  }
  [[nodiscard]] cuda::Tq4Records cache(int i) {
    return {copies_.at(i), 1, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim};
  }
  /// The tokens [0, n) of cache 0 in the shared format.
  [[nodiscard]] gemma4::reference::Tq4CacheBuffer rows(std::int64_t n, cudaStream_t stream) {
    const std::int64_t h = shape_.n_head_kv, length = shape_.buffer_len, half = shape_.head_dim / 2;
    cuda::DeviceBuffer<std::uint8_t> k_codes(h * length * half), v_codes(h * length * half);
    cuda::DeviceBuffer<Tq4Norm> k_norm(h * length), v_norm(h * length);
    cuda::tq4_records_to_rows(
        cache(0),
        {make_view(k_codes.data(), 1, h, length, half), make_view(v_codes.data(), 1, h, length, half),
         make_view(k_norm.data(), 1, h, length), make_view(v_norm.data(), 1, h, length)},
        stream);
    gemma4::reference::Tq4CacheBuffer rows(1, h, n, shape_.head_dim);
    copy_first_rows(k_codes, length, half, n, rows.k_codes().begin(), stream);
    copy_first_rows(v_codes, length, half, n, rows.v_codes().begin(), stream);
    copy_first_rows(k_norm, length, 1, n, rows.k_norm().begin(), stream);
    copy_first_rows(v_norm, length, 1, n, rows.v_norm().begin(), stream);
    return rows;
  }

  AttentionShape shape_;
  cuda::Tq4Codec codec_;
  CacheCopies copies_;
};

/// Of one vector for K and V, under a k norm of ones.
class KvCaches {
 public:
  /// @param tile of kKvDecodeTiles, where it takes the format; -1: as planned
  KvCaches(const KvFormat& format, int tile, const AttentionShape& shape, std::uint32_t seed, cudaStream_t stream)
      : format_(format),
        tile_(tile),
        shape_(shape),
        codec_(shape.head_dim, format.options),
        ones_(static_cast<std::size_t>(shape.head_dim), 1.0f),
        weight_(ones_),
        copies_(cuda::kv_cache_bytes(1, shape.n_head_kv, shape.buffer_len, shape.head_dim, format.options), stream) {
    for_random_tokens(shape, seed, stream, [&](const auto& k, const auto& v, const cuda::DevicePositions& positions) {
      update(0, k, v, positions, stream);
    });
    copies_.spread(stream);
  }

  [[nodiscard]] double token_bytes() const {
    return static_cast<double>(format_.row_bytes(CacheSide::kKey, shape_.head_dim) +
                               format_.row_bytes(CacheSide::kValue, shape_.head_dim));
  }
  [[nodiscard]] cuda::KvAttentionPlan plan(const AttentionShape& shape, const AttentionOptions& options,
                                           std::int64_t context) const {
    cuda::KvAttentionChoice choice;
    choice.max_kv_len = context;  // the host of a prefill knows
    const cuda::KvDecodeTile& wanted = cuda::kKvDecodeTiles[static_cast<std::size_t>(std::max(tile_, 0))];
    if (tile_ >= 0 && wanted.takes(format_.options.v_bits, format_.options.r_bits)) choice.decode.tile = wanted;
    return cuda::plan_kv_attention(shape, format_.options, options, cuda::current_device(), choice);
  }
  void attend(int i, const cuda::KvAttentionPlan& plan, const TimedCall& call) {
    cuda::kv_attention(call_of(i, call), plan, call.workspace, call.stream);
  }
  using Plan = cuda::KvAttentionPlan;
  using RowsPlan = cuda::KvRowsPlan;
  /// @param shape n_query: rows @param one of one of them
  [[nodiscard]] static RowsPlan plan_rows(const AttentionShape& shape, const Plan& one) {
    return cuda::plan_kv_rows(shape, one.decode, cuda::current_device(), std::nullopt);
  }
  void attend_rows(int i, const RowsPlan& plan, const TimedCall& call) {
    cuda::kv_attention_rows(call_of(i, call), plan, call.workspace, call.stream);
  }
  void update(int i, const View<const Bf16, 4>& k, const View<const Bf16, 4>& v, const cuda::DevicePositions& positions,
              cudaStream_t stream) {
    cuda::kv_cache_update<Bf16>(codec_, k, v, weight_.data(), positions, cache(i), stream);
  }
  void reference(const View<const double, 4>& q, const AttentionOptions& options, std::int64_t n,
                 const View<double, 4>& out, cudaStream_t stream) {
    gemma4::reference::kv_attention<double>(q, ones_, rows(n, stream).view(),
                                            gemma4::reference::KvCodec<double>(shape_.head_dim, format_.options),
                                            options, n, out);
  }

 private:
  [[nodiscard]] cuda::KvAttentionCall call_of(int i, const TimedCall& call) {
    return {call.q, weight_.data(), cache(i), codec_, call.options, call.kv_len, call.out};
  }
  [[nodiscard]] cuda::KvRecords cache(int i) {
    return {copies_.at(i),         1, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim, format_.options.v_bits,
            format_.options.r_bits};
  }
  /// The tokens [0, n) of cache 0 in the shared format.
  [[nodiscard]] gemma4::reference::KvCacheBuffer rows(std::int64_t n, cudaStream_t stream) {
    const std::int64_t h = shape_.n_head_kv, length = shape_.buffer_len;
    const std::int64_t v_bytes = kv_code_bytes(shape_.head_dim, format_.options.v_bits),
                       r_bytes = kv_code_bytes(kv_rotated_size(shape_.head_dim), format_.options.r_bits);
    cuda::DeviceBuffer<std::uint8_t> v_codes(h * length * v_bytes), r_codes(h * length * r_bytes);
    cuda::DeviceBuffer<KvNorm> v_norm(h * length), r_norm(h * length);
    cuda::kv_records_to_rows(
        cache(0),
        {make_view(v_codes.data(), 1, h, length, v_bytes), make_view(r_codes.data(), 1, h, length, r_bytes),
         make_view(v_norm.data(), 1, h, length), make_view(r_norm.data(), 1, h, length)},
        stream);
    gemma4::reference::KvCacheBuffer rows(1, h, n, v_bytes, r_bytes);
    copy_first_rows(v_codes, length, v_bytes, n, rows.v_codes().begin(), stream);
    copy_first_rows(r_codes, length, r_bytes, n, rows.r_codes().begin(), stream);
    copy_first_rows(v_norm, length, 1, n, rows.v_norm().begin(), stream);
    copy_first_rows(r_norm, length, 1, n, rows.r_norm().begin(), stream);
    return rows;
  }

  KvFormat format_;
  int tile_;
  AttentionShape shape_;
  cuda::KvCodec codec_;
  std::vector<float> ones_;
  cuda::DeviceBuffer<float> weight_;
  CacheCopies copies_;
};

/// Uncompressed. Short contexts walk through the buffer of one cache, call by call.
class Bf16Caches {
 public:
  Bf16Caches(const AttentionShape& shape, std::uint32_t seed, cudaStream_t stream)
      : shape_(shape), k_(shape.n_head_kv * shape.buffer_len * shape.head_dim), v_(k_.size()) {
    fill_random(k_.data(), k_.size(), seed + 1, stream);
    fill_random(v_.data(), v_.size(), seed + 2, stream);
  }

  [[nodiscard]] double token_bytes() const { return static_cast<double>(4 * shape_.head_dim); }
  [[nodiscard]] static cuda::FlashPlan plan(AttentionShape shape, const AttentionOptions& options,
                                            std::int64_t context) {
    shape.buffer_len = context;
    return cuda::plan_bf16_attention(shape, options, cuda::current_device());
  }
  void attend(int i, const cuda::FlashPlan& plan, const TimedCall& call) {
    cuda::bf16_attention(call_of(i, plan.shape.buffer_len, call), plan, call.workspace, call.stream);
  }
  using Plan = cuda::FlashPlan;
  using RowsPlan = cuda::Bf16RowsPlan;
  /// @param shape n_query: rows @param one of one of them
  [[nodiscard]] static RowsPlan plan_rows(AttentionShape shape, const Plan& one) {
    shape.buffer_len = one.shape.buffer_len;
    return cuda::plan_bf16_rows(shape, one, std::nullopt);
  }
  void attend_rows(int i, const RowsPlan& plan, const TimedCall& call) {
    cuda::bf16_attention_rows(call_of(i, plan.shape.buffer_len, call), plan, call.workspace, call.stream);
  }
  void reference(const View<const double, 4>& q, const AttentionOptions& options, std::int64_t n,
                 const View<double, 4>& out, cudaStream_t stream) {
    const std::vector<Bf16> k = k_.to_host(stream), v = v_.to_host(stream);
    gemma4::reference::bf16_attention<double, Bf16>(q, rows(k.data(), 0, n), rows(v.data(), 0, n), options, n, out);
  }

 private:
  [[nodiscard]] cuda::FlatAttentionCall call_of(int i, std::int64_t n, const TimedCall& call) const {
    const std::int64_t first = i % (shape_.buffer_len / n) * n;
    return {call.q, rows(k_.data(), first, n), rows(v_.data(), first, n), call.options, call.kv_len, call.out};
  }
  [[nodiscard]] View<const Bf16, 4> rows(const Bf16* data, std::int64_t first, std::int64_t n) const {
    const std::int64_t head = shape_.buffer_len * shape_.head_dim;
    return {.data = data + first * shape_.head_dim,
            .extent = {1, shape_.n_head_kv, n, shape_.head_dim},
            .stride = {shape_.n_head_kv * head, head, shape_.head_dim, 1}};
  }

  AttentionShape shape_;
  cuda::DeviceBuffer<Bf16> k_, v_;
};

}  // namespace gemma4::experiment

// SPDX-License-Identifier: Apache-2.0
// How fast is attention over a long cache, and how far from the memory and from the matrix units?
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <map>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/bf16_attention.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/kv_attention.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/sliding_attention.cuh"
#include "cuda/sliding_decode.cuh"
#include "cuda/tq4_attention.cuh"
#include "cuda/tq4_cache.cuh"
#include "experiments/benchmark.cuh"
#include "experiments/driver.hpp"
#include "experiments/gpu_run_info.cuh"
#include "gemma4/config.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "reference/bf16_attention.hpp"
#include "reference/kv_attention.hpp"
#include "reference/rms_norm.hpp"
#include "reference/rope.hpp"
#include "reference/sliding_attention.hpp"
#include "reference/tq4_attention.hpp"

namespace gemma4::experiment {
namespace {

constexpr std::int64_t kChecked = 8;  ///< last queries of a call that are compared with the reference
constexpr int kBuffers = 4;           ///< caches that the timed calls take in turn, so that none is found in the L2

/// One line of the table.
struct Case {
  std::string kind;   ///< tq4, a format of one vector, bf16 or sliding
  std::string phase;  ///< decode, prefill or update; step: a decode that begins at the projections of q, k and v
  AttentionShape shape;
  std::int64_t context = 0;
};

/// What a case measured. bytes: the fewest that must be read and written; flop: of the two products, none for an
/// update.
struct Measurement {
  Timing timing;
  double bytes = 0;
  double flop = 0;
  double cosine = 1;  ///< with the reference in double; 1 where nothing is compared
};

/// 4 n_head D (n_query (n - n_query) + n_query^2 / 2): two products over the keys that a causal call sees.
double causal_flop(const AttentionShape& s, std::int64_t context) {
  const double n_query = static_cast<double>(s.n_query), n = static_cast<double>(context);
  return 4.0 * static_cast<double>(s.n_head * s.head_dim) * (n_query * (n - n_query) + n_query * n_query / 2);
}

/// A call of milliseconds hides its launch by itself.
TimingOptions timing_options(double flop) {
  return flop < 1e11 ? TimingOptions{} : TimingOptions{.n_launch = 1, .n_warmup = 2, .n_repeat = 10};
}

double cosine(std::span<const Bf16> actual, std::span<const double> expected) {
  double ab = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double a = to_float(actual[i]);
    ab += a * expected[i], aa += a * a, bb += expected[i] * expected[i];
  }
  return ab / std::sqrt(aa * bb);
}

std::span<std::byte> as_span(cuda::DeviceBuffer<std::byte>& buffer) {
  return {buffer.data(), static_cast<std::size_t>(buffer.size())};
}

/// Some caches of one shape, all holding the same compressed random tokens.
class Tq4Caches {
 public:
  Tq4Caches(const AttentionShape& shape, std::uint32_t seed, cudaStream_t stream)
      : shape_(shape),
        codec_(shape.head_dim, {}),
        bytes_(cuda::tq4_cache_bytes(1, shape.n_head_kv, shape.buffer_len, shape.head_dim)),
        memory_(kBuffers * bytes_) {
    memory_.fill_bytes(0, stream);
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
      cuda::tq4_cache_update<Bf16>(codec_, view(k.data()), view(v.data()), {positions.data(), count, {}}, cache(0),
                                   stream);
      cuda::check(cudaStreamSynchronize(stream), "filling of a cache");
    }
    for (int i = 1; i < kBuffers; ++i) {
      cuda::check(cudaMemcpyAsync(cache(i).data, cache(0).data, static_cast<std::size_t>(bytes_),
                                  cudaMemcpyDeviceToDevice, stream),
                  "copy of a cache");
    }
  }

  [[nodiscard]] const cuda::Tq4Codec& codec() const { return codec_; }
  [[nodiscard]] cuda::Tq4Records cache(int i) {
    return {memory_.data() + (i % kBuffers) * bytes_, 1, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim};
  }

  /// The tokens [0, n) of cache 0 in the shared format.
  [[nodiscard]] reference::Tq4CacheBuffer rows(std::int64_t n, cudaStream_t stream) {
    const std::int64_t h = shape_.n_head_kv, length = shape_.buffer_len, half = shape_.head_dim / 2;
    cuda::DeviceBuffer<std::uint8_t> k_codes(h * length * half), v_codes(h * length * half);
    cuda::DeviceBuffer<Tq4Norm> k_norm(h * length), v_norm(h * length);
    cuda::tq4_records_to_rows(
        cache(0),
        {make_view(k_codes.data(), 1, h, length, half), make_view(v_codes.data(), 1, h, length, half),
         make_view(k_norm.data(), 1, h, length), make_view(v_norm.data(), 1, h, length)},
        stream);
    reference::Tq4CacheBuffer rows(1, h, n, shape_.head_dim);
    const auto take = [&](const auto& device, auto host, std::int64_t width) {
      const auto all = device.to_host(stream);
      for (std::int64_t head = 0; head < h; ++head) {
        std::copy_n(all.begin() + head * length * width, n * width, host.begin() + head * n * width);
      }
    };
    take(k_codes, rows.k_codes(), half);
    take(v_codes, rows.v_codes(), half);
    take(k_norm, rows.k_norm(), 1);
    take(v_norm, rows.v_norm(), 1);
    return rows;
  }

 private:
  AttentionShape shape_;
  cuda::Tq4Codec codec_;
  std::int64_t bytes_;
  cuda::DeviceBuffer<std::byte> memory_;
};

/// One attention over a TQ4 cache. kv_len is read from the device; compared with the reference first.
Measurement measure_tq4_attention(const Case& c, Tq4Caches& caches, std::uint32_t seed, cudaStream_t stream) {
  const AttentionShape& s = c.shape;
  const AttentionOptions options{.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim))};
  cuda::Tq4AttentionChoice choice;
  choice.max_kv_len = c.context;  // the host of a prefill knows
  const cuda::Tq4AttentionPlan plan = cuda::plan_tq4_attention(s, options, cuda::current_device(), choice);
  cuda::DeviceBuffer<Bf16> q(s.n_query * s.n_head * s.head_dim), out(q.size());
  cuda::DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
  cuda::DeviceBuffer<std::int32_t> kv_len(std::vector<std::int32_t>{static_cast<std::int32_t>(c.context)});
  fill_random(q.data(), q.size(), seed, stream);
  const auto call = [&](int i) {
    cuda::tq4_attention({make_view(std::as_const(q).data(), 1, s.n_query, s.n_head, s.head_dim), caches.cache(i),
                         caches.codec(), options, cuda::DeviceCount::on_device(kv_len.data()),
                         make_view(out.data(), 1, s.n_query, s.n_head, s.head_dim)},
                        plan, as_span(workspace), stream);
  };
  call(0);
  const std::vector<Bf16> actual = out.to_host(stream);
  const reference::Tq4CacheBuffer rows = caches.rows(c.context, stream);
  const std::int64_t n_checked = std::min(s.n_query, kChecked), tail = n_checked * s.n_head * s.head_dim;
  const std::vector<Bf16> all = q.to_host(stream);
  std::vector<double> queries, expected(static_cast<std::size_t>(tail));
  for (const Bf16 value : std::span(all).last(expected.size())) queries.push_back(to_float(value));
  reference::tq4_attention<double>(make_view(std::as_const(queries).data(), 1, n_checked, s.n_head, s.head_dim),
                                   rows.view(), reference::Tq4Codec<double>(s.head_dim, {}), options, c.context,
                                   make_view(expected.data(), 1, n_checked, s.n_head, s.head_dim));
  const double io = 4.0 * static_cast<double>(s.n_query * s.n_head * s.head_dim);
  return {.timing = time_calls(stream, timing_options(causal_flop(s, c.context)), call),
          .bytes = static_cast<double>(2 * c.context * s.n_head_kv * tq4_row_bytes(s.head_dim)) + io,
          .flop = causal_flop(s, c.context),
          .cosine = cosine(std::span(actual).last(expected.size()), expected)};
}

/// Compression of n_query new tokens into a TQ4 cache, the last of them at position context - 1.
Measurement measure_tq4_update(const Case& c, Tq4Caches& caches, std::uint32_t seed, cudaStream_t stream) {
  const AttentionShape& s = c.shape;
  std::vector<std::int32_t> where(static_cast<std::size_t>(s.n_query));
  std::iota(where.begin(), where.end(), static_cast<std::int32_t>(c.context - s.n_query));
  const cuda::DeviceBuffer<std::int32_t> positions(where);
  const std::int64_t count = s.n_query * s.n_head_kv * s.head_dim;
  std::vector<cuda::DeviceBuffer<Bf16>> k, v;  // rotated over like the caches
  for (int i = 0; i < kBuffers; ++i) {
    k.emplace_back(count), v.emplace_back(count);
    fill_random(k.back().data(), count, seed + static_cast<std::uint32_t>(2 * i), stream);
    fill_random(v.back().data(), count, seed + static_cast<std::uint32_t>(2 * i) + 1, stream);
  }
  const auto view = [&](const cuda::DeviceBuffer<Bf16>& x) {
    return make_view(x.data(), 1, s.n_query, s.n_head_kv, s.head_dim);
  };
  const auto call = [&](int i) {
    const auto b = static_cast<std::size_t>(i % kBuffers);
    cuda::tq4_cache_update<Bf16>(caches.codec(), view(k[b]), view(v[b]), {positions.data(), s.n_query, {}},
                                 caches.cache(i), stream);
  };
  return {.timing = time_calls(stream, {}, call),
          .bytes = 4.0 * static_cast<double>(count) +
                   static_cast<double>(2 * s.n_query * s.n_head_kv * tq4_row_bytes(s.head_dim))};
}

/// The same of one vector for K and V.
class KvCaches {
 public:
  KvCaches(const KvFormat& format, const AttentionShape& shape, std::uint32_t seed, cudaStream_t stream)
      : format_(format),
        shape_(shape),
        codec_(shape.head_dim, format.options),
        weight_(std::vector<float>(static_cast<std::size_t>(shape.head_dim), 1.0f)),
        bytes_(cuda::kv_cache_bytes(1, shape.n_head_kv, shape.buffer_len, shape.head_dim, format.options)),
        memory_(kBuffers * bytes_) {
    memory_.fill_bytes(0, stream);
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
      cuda::kv_cache_update<Bf16>(codec_, view(k.data()), view(v.data()), weight_.data(), {positions.data(), count, {}},
                                  cache(0), stream);
      cuda::check(cudaStreamSynchronize(stream), "filling of a cache");
    }
    for (int i = 1; i < kBuffers; ++i) {
      cuda::check(cudaMemcpyAsync(cache(i).data, cache(0).data, static_cast<std::size_t>(bytes_),
                                  cudaMemcpyDeviceToDevice, stream),
                  "copy of a cache");
    }
  }

  [[nodiscard]] const KvFormat& format() const { return format_; }
  [[nodiscard]] const cuda::KvCodec& codec() const { return codec_; }
  [[nodiscard]] const float* weight() const { return weight_.data(); }
  /// Of a token and head.
  [[nodiscard]] double token_bytes() const {
    return static_cast<double>(format_.row_bytes(CacheSide::kKey, shape_.head_dim) +
                               format_.row_bytes(CacheSide::kValue, shape_.head_dim));
  }
  [[nodiscard]] cuda::KvRecords cache(int i) {
    return {memory_.data() + (i % kBuffers) * bytes_,
            1,
            shape_.n_head_kv,
            shape_.buffer_len,
            shape_.head_dim,
            format_.options.v_bits,
            format_.options.r_bits};
  }

  /// The tokens [0, n) of cache 0 in the shared format.
  [[nodiscard]] reference::KvCacheBuffer rows(std::int64_t n, cudaStream_t stream) {
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
    reference::KvCacheBuffer rows(1, h, n, v_bytes, r_bytes);
    const auto take = [&](const auto& device, auto host, std::int64_t width) {
      const auto all = device.to_host(stream);
      for (std::int64_t head = 0; head < h; ++head) {
        std::copy_n(all.begin() + head * length * width, n * width, host.begin() + head * n * width);
      }
    };
    take(v_codes, rows.v_codes(), v_bytes);
    take(r_codes, rows.r_codes(), r_bytes);
    take(v_norm, rows.v_norm(), 1);
    take(r_norm, rows.r_norm(), 1);
    return rows;
  }

 private:
  KvFormat format_;
  AttentionShape shape_;
  cuda::KvCodec codec_;
  cuda::DeviceBuffer<float> weight_;
  std::int64_t bytes_;
  cuda::DeviceBuffer<std::byte> memory_;
};

/// One attention over one vector for K and V. kv_len is read from the device; compared with the reference first.
Measurement measure_kv_attention(const Case& c, KvCaches& caches, int tile, std::uint32_t seed, cudaStream_t stream) {
  const AttentionShape& s = c.shape;
  const KvOptions& format = caches.format().options;
  const AttentionOptions options{.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim))};
  cuda::KvAttentionChoice choice;
  choice.max_kv_len = c.context;  // the host of a prefill knows
  const cuda::KvDecodeTile& wanted = cuda::kKvDecodeTiles[static_cast<std::size_t>(std::max(tile, 0))];
  if (tile >= 0 && wanted.takes(format.v_bits, format.r_bits)) choice.decode.tile = wanted;
  const cuda::KvAttentionPlan plan = cuda::plan_kv_attention(s, format, options, cuda::current_device(), choice);
  cuda::DeviceBuffer<Bf16> q(s.n_query * s.n_head * s.head_dim), out(q.size());
  cuda::DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
  cuda::DeviceBuffer<std::int32_t> kv_len(std::vector<std::int32_t>{static_cast<std::int32_t>(c.context)});
  fill_random(q.data(), q.size(), seed, stream);
  const auto call = [&](int i) {
    cuda::kv_attention({make_view(std::as_const(q).data(), 1, s.n_query, s.n_head, s.head_dim), caches.weight(),
                        caches.cache(i), caches.codec(), options, cuda::DeviceCount::on_device(kv_len.data()),
                        make_view(out.data(), 1, s.n_query, s.n_head, s.head_dim)},
                       plan, as_span(workspace), stream);
  };
  call(0);
  const std::vector<Bf16> actual = out.to_host(stream), all = q.to_host(stream);
  const reference::KvCacheBuffer rows = caches.rows(c.context, stream);
  const std::int64_t n_checked = std::min(s.n_query, kChecked), tail = n_checked * s.n_head * s.head_dim;
  std::vector<double> queries, expected(static_cast<std::size_t>(tail));
  for (const Bf16 value : std::span(all).last(expected.size())) queries.push_back(to_float(value));
  const std::vector<float> weight(static_cast<std::size_t>(s.head_dim), 1.0f);
  reference::kv_attention<double>(make_view(std::as_const(queries).data(), 1, n_checked, s.n_head, s.head_dim), weight,
                                  rows.view(), reference::KvCodec<double>(s.head_dim, format), options, c.context,
                                  make_view(expected.data(), 1, n_checked, s.n_head, s.head_dim));
  const double io = 4.0 * static_cast<double>(s.n_query * s.n_head * s.head_dim);
  return {.timing = time_calls(stream, timing_options(causal_flop(s, c.context)), call),
          .bytes = static_cast<double>(c.context * s.n_head_kv) * caches.token_bytes() + io,
          .flop = causal_flop(s, c.context),
          .cosine = cosine(std::span(actual).last(expected.size()), expected)};
}

/// Compression of n_query new tokens, the last of them at position context - 1.
Measurement measure_kv_update(const Case& c, KvCaches& caches, std::uint32_t seed, cudaStream_t stream) {
  const AttentionShape& s = c.shape;
  std::vector<std::int32_t> where(static_cast<std::size_t>(s.n_query));
  std::iota(where.begin(), where.end(), static_cast<std::int32_t>(c.context - s.n_query));
  const cuda::DeviceBuffer<std::int32_t> positions(where);
  const std::int64_t count = s.n_query * s.n_head_kv * s.head_dim;
  std::vector<cuda::DeviceBuffer<Bf16>> k, v;  // rotated over like the caches
  for (int i = 0; i < kBuffers; ++i) {
    k.emplace_back(count), v.emplace_back(count);
    fill_random(k.back().data(), count, seed + static_cast<std::uint32_t>(2 * i), stream);
    fill_random(v.back().data(), count, seed + static_cast<std::uint32_t>(2 * i) + 1, stream);
  }
  const auto view = [&](const cuda::DeviceBuffer<Bf16>& x) {
    return make_view(x.data(), 1, s.n_query, s.n_head_kv, s.head_dim);
  };
  const auto call = [&](int i) {
    const auto b = static_cast<std::size_t>(i % kBuffers);
    cuda::kv_cache_update<Bf16>(caches.codec(), view(k[b]), view(v[b]), caches.weight(),
                                {positions.data(), s.n_query, {}}, caches.cache(i), stream);
  };
  return {
      .timing = time_calls(stream, {}, call),
      .bytes = 4.0 * static_cast<double>(count) + static_cast<double>(s.n_query * s.n_head_kv) * caches.token_bytes()};
}

/// One attention over a flat bf16 cache. Short contexts walk through a buffer of 131072 tokens, call by call.
Measurement measure_bf16_attention(const Case& c, std::uint32_t seed, cudaStream_t stream) {
  AttentionShape s = c.shape;
  const std::int64_t buffer_len = s.buffer_len, n = c.context, head = buffer_len * s.head_dim;
  s.buffer_len = n;
  const AttentionOptions options{.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim))};
  const cuda::FlashPlan plan = cuda::plan_bf16_attention(s, options, cuda::current_device());
  cuda::DeviceBuffer<Bf16> q(s.n_query * s.n_head * s.head_dim), out(q.size()), k(s.n_head_kv * head), v(k.size());
  cuda::DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
  cuda::DeviceBuffer<std::int32_t> kv_len(std::vector<std::int32_t>{static_cast<std::int32_t>(n)});
  fill_random(q.data(), q.size(), seed, stream);
  fill_random(k.data(), k.size(), seed + 1, stream);
  fill_random(v.data(), v.size(), seed + 2, stream);
  const auto rows = [&](const Bf16* data, std::int64_t first) {
    return View<const Bf16, 4>{.data = data + first * s.head_dim,
                               .extent = {1, s.n_head_kv, n, s.head_dim},
                               .stride = {s.n_head_kv * head, head, s.head_dim, 1}};
  };
  const auto call = [&](int i) {
    const std::int64_t first = i % (buffer_len / n) * n;
    cuda::bf16_attention({make_view(std::as_const(q).data(), 1, s.n_query, s.n_head, s.head_dim), rows(k.data(), first),
                          rows(v.data(), first), options, cuda::DeviceCount::on_device(kv_len.data()),
                          make_view(out.data(), 1, s.n_query, s.n_head, s.head_dim)},
                         plan, as_span(workspace), stream);
  };
  call(0);
  const std::int64_t n_checked = std::min(s.n_query, kChecked), tail = n_checked * s.n_head * s.head_dim;
  const std::vector<Bf16> actual = out.to_host(stream), all = q.to_host(stream);
  const std::vector<Bf16> k_host = k.to_host(stream), v_host = v.to_host(stream);
  std::vector<double> queries, expected(static_cast<std::size_t>(tail));
  for (const Bf16 value : std::span(all).last(expected.size())) queries.push_back(to_float(value));
  reference::bf16_attention<double, Bf16>(make_view(std::as_const(queries).data(), 1, n_checked, s.n_head, s.head_dim),
                                          rows(k_host.data(), 0), rows(v_host.data(), 0), options, n,
                                          make_view(expected.data(), 1, n_checked, s.n_head, s.head_dim));
  return {.timing = time_calls(stream, timing_options(causal_flop(s, n)), call),
          .bytes = 4.0 * static_cast<double>(n * s.n_head_kv * s.head_dim + s.n_query * s.n_head * s.head_dim),
          .flop = causal_flop(s, n),
          .cosine = cosine(std::span(actual).last(expected.size()), expected)};
}

/// One attention of a sliding layer whose ring (shape.buffer_len, as long as the window) is full; rotates over 16
/// rings.
Measurement measure_sliding_attention(const Case& c, std::uint32_t seed, cudaStream_t stream) {
  constexpr std::int64_t kRings = 16;
  const AttentionShape& s = c.shape;
  const std::int64_t window = s.buffer_len, position = c.context - s.n_query, ring = s.n_head_kv * window * s.head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  const cuda::FlashPlan plan = cuda::plan_sliding_attention(s, cuda::current_device());
  const std::int64_t chunk = s.n_query * s.n_head_kv * s.head_dim;
  cuda::DeviceBuffer<Bf16> q(s.n_query * s.n_head * s.head_dim), out(q.size()), k_new(chunk), v_new(chunk);
  cuda::DeviceBuffer<Bf16> k(kRings * ring), v(kRings * ring);
  cuda::DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
  cuda::DeviceBuffer<std::int32_t> where(std::vector<std::int32_t>{static_cast<std::int32_t>(position)});
  std::uint32_t stir = seed;
  for (auto* buffer : {&q, &k_new, &v_new, &k, &v}) fill_random(buffer->data(), buffer->size(), stir++, stream);
  const auto queries = [&](const auto* data) { return make_view(data, s.n_query, s.n_head, s.head_dim); };
  const auto fresh = [&](const Bf16* data) { return make_view(data, s.n_query, s.n_head_kv, s.head_dim); };
  const auto old = [&](const Bf16* data) { return make_view(data, s.n_head_kv, window, s.head_dim); };
  const auto call = [&](int i) {
    cuda::sliding_attention(
        {queries(std::as_const(q).data()), old(k.data() + i % kRings * ring), old(v.data() + i % kRings * ring),
         fresh(k_new.data()), fresh(v_new.data()), cuda::DeviceCount::on_device(where.data()), window, scale,
         make_view(out.data(), s.n_query, s.n_head, s.head_dim)},
        plan, as_span(workspace), stream, nullptr,
        true);  // as in the model, the kernel before writes nothing that is read early
  };
  cuda::check(cudaStreamSynchronize(stream), "filling of rings");
  call(0);
  const std::vector<Bf16> actual = out.to_host(stream), k_host = k.to_host(stream), v_host = v.to_host(stream);
  const std::vector<Bf16> k_chunk = k_new.to_host(stream), v_chunk = v_new.to_host(stream);
  std::vector<float> q_host, exact(actual.size());
  for (const Bf16 value : q.to_host(stream)) q_host.push_back(to_float(value));
  reference::sliding_attention<float, Bf16>(queries(std::as_const(q_host).data()), old(k_host.data()),
                                            old(v_host.data()), fresh(k_chunk.data()), fresh(v_chunk.data()), position,
                                            window, scale, make_view(exact.data(), s.n_query, s.n_head, s.head_dim));
  const double flop = 4.0 * static_cast<double>(s.n_head * s.head_dim * s.n_query * window);
  return {.timing = time_calls(stream, timing_options(flop), call),
          .bytes = 4.0 * static_cast<double>(ring + chunk + s.n_query * s.n_head * s.head_dim),
          .flop = flop,
          .cosine = cosine(actual, std::vector<double>(exact.begin(), exact.end()))};
}

/// A random projection of n_head heads: on the device, and normalised, turned and rounded by the reference.
struct Projection {
  cuda::DeviceBuffer<float> device;
  std::vector<Bf16> prepared;

  Projection(const AttentionConfig& attention, std::int64_t n_head, std::int64_t position, const float* weight,
             bool turns, std::uint32_t seed, cudaStream_t stream) {
    cuda::DeviceBuffer<Bf16> drawn(n_head * attention.head_dim);
    fill_random(drawn.data(), drawn.size(), seed, stream);
    reference::Matrix<float> heads(n_head, attention.head_dim);
    const std::vector<Bf16> values = drawn.to_host(stream);
    std::transform(values.begin(), values.end(), heads.data(), [](Bf16 value) { return to_float(value); });
    device = cuda::DeviceBuffer<float>(std::vector<float>(heads.data(), heads.data() + heads.size()));
    const auto head_dim = static_cast<std::size_t>(attention.head_dim);
    reference::rms_norm<float>(heads, {weight, weight != nullptr ? head_dim : 0}, 1e-6f, heads);
    reference::Matrix<float> token = Eigen::Map<const reference::Matrix<float>>(heads.data(), 1, heads.size());
    if (turns) reference::rope<float>(token, position, attention);
    for (const float value : std::span(token.data(), values.size())) prepared.push_back(to_bf16(value));
  }
};

/// A decode step of a sliding layer in one launch (cuda/sliding_decode.cuh), behind itself; rotates over 16 rings.
Measurement measure_sliding_step(const Case& c, std::uint32_t seed, cudaStream_t stream) {
  constexpr std::int64_t kRings = 16;
  const AttentionShape& s = c.shape;
  const AttentionConfig attention = gemma4_31b().sliding;
  const std::int64_t window = gemma4_31b().window, position = c.context - 1;
  const std::int64_t ring = s.n_head_kv * s.buffer_len * s.head_dim;
  const cuda::SlidingDecodePlan plan = cuda::plan_sliding_decode(s, window, cuda::current_device());
  const std::vector<float> weight(static_cast<std::size_t>(s.head_dim), 1.0f);
  const cuda::DeviceBuffer<float> norm(weight);
  const Projection q(attention, s.n_head, position, weight.data(), true, seed, stream);
  const Projection k_new(attention, s.n_head_kv, position, weight.data(), true, seed + 1, stream);
  const Projection v_new(attention, s.n_head_kv, position, nullptr, false, seed + 2, stream);
  cuda::DeviceBuffer<Bf16> out(s.n_head * s.head_dim), k(kRings * ring), v(kRings * ring);
  fill_random(k.data(), k.size(), seed + 3, stream);
  fill_random(v.data(), v.size(), seed + 4, stream);
  const cuda::DeviceBuffer<std::int32_t> where(std::vector<std::int32_t>{static_cast<std::int32_t>(position)});
  const cuda::RopeParams rope = cuda::rope_params(attention);
  const auto heads = [&](auto* data, std::int64_t n_head) { return make_view(data, 1, n_head, s.head_dim); };
  const auto old = [&](auto* data) { return make_view(data, s.n_head_kv, s.buffer_len, s.head_dim); };
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  const auto call = [&](int i) {
    cuda::sliding_decode({heads(q.device.data(), s.n_head),
                          heads(k_new.device.data(), s.n_head_kv),
                          heads(v_new.device.data(), s.n_head_kv),
                          {norm.data(), norm.data(), 1e-6f},
                          cuda::DeviceCount::on_device(where.data()),
                          rope,
                          old(k.data() + i % kRings * ring),
                          old(v.data() + i % kRings * ring),
                          scale,
                          heads(out.data(), s.n_head)},
                         plan, stream, true);
  };
  cuda::check(cudaStreamSynchronize(stream), "filling of rings");
  call(0);
  const std::vector<Bf16> actual = out.to_host(stream), k_host = k.to_host(stream), v_host = v.to_host(stream);
  std::vector<float> q_host, exact(actual.size());
  for (const Bf16 value : q.prepared) q_host.push_back(to_float(value));
  reference::sliding_attention<float, Bf16>(heads(std::as_const(q_host).data(), s.n_head), old(k_host.data()),
                                            old(v_host.data()), heads(k_new.prepared.data(), s.n_head_kv),
                                            heads(v_new.prepared.data(), s.n_head_kv), position, window, scale,
                                            heads(exact.data(), s.n_head));
  const std::int64_t n_row = s.n_head_kv * s.head_dim, n_value = s.n_head * s.head_dim;
  return {.timing = time_calls(stream, {}, call),
          .bytes = static_cast<double>(4 * window * n_row + 8 * n_row + 6 * n_value),
          .flop = 4.0 * static_cast<double>(n_value * window),
          .cosine = cosine(actual, std::vector<double>(exact.begin(), exact.end()))};
}

struct Options {
  DriverOptions driver;
  std::vector<std::string> one_vector = {"kv5r4", "kv4r4"};
  int tile = -1;  ///< of kKvDecodeTiles, where it takes the format; -1: as planned
  std::vector<std::int64_t> n_queries = {1, 4, 8, 2048};
  std::int64_t buffer_len = 131072;
  std::int64_t n_head = 32, n_head_kv = 4, head_dim = 512;
};

std::vector<Case> cases_of(const Options& options) {
  std::vector<Case> cases;
  for (const std::int64_t n_query : options.n_queries) {
    AttentionShape shape{.batch = 1,
                         .n_query = n_query,
                         .n_head = options.n_head,
                         .n_head_kv = options.n_head_kv,
                         .head_dim = options.head_dim,
                         .buffer_len = options.buffer_len};
    for (const std::int64_t context : options.driver.contexts) {
      if (context < n_query || context > options.buffer_len) continue;
      const std::string phase = n_query <= cuda::kTq4DecodeQueries ? "decode" : "prefill";
      cases.push_back({"tq4", phase, shape, context});
      for (const std::string& kind : options.one_vector) {
        cases.push_back({kind, n_query <= cuda::kKvDecodeQueries ? "decode" : "prefill", shape, context});
      }
      cases.push_back({"bf16", phase, shape, context});
    }
    const std::int64_t update_end = std::min(options.buffer_len, std::int64_t{60000} + n_query);
    cases.push_back({"tq4", "update", shape, update_end});
    for (const std::string& kind : options.one_vector) cases.push_back({kind, "update", shape, update_end});
    // A sliding layer of the 31B model; its context is beyond the first window.
    const AttentionShape ring{
        .batch = 1, .n_query = n_query, .n_head = 32, .n_head_kv = 16, .head_dim = 256, .buffer_len = 1024};
    cases.push_back({"sliding", n_query <= cuda::kTq4DecodeQueries ? "decode" : "prefill", ring, 5000 + n_query});
    if (n_query > 1) continue;
    AttentionShape step = ring;
    step.buffer_len = ring_slots(gemma4_31b().window);
    cases.push_back({"sliding", "step", step, 5001});
  }
  return cases;
}

void write_row(ResultTable& table, const Case& c, const Measurement& m, double copy_rate, double gemm_rate) {
  const double gb_per_s = 1e-3 * m.bytes / m.timing.median_us, tflops = 1e-6 * m.flop / m.timing.median_us;
  auto row = table.row();
  row.set("kind", c.kind).set("phase", c.phase).set("n_query", c.shape.n_query).set("context", c.context);
  row.set("n_head", c.shape.n_head).set("n_head_kv", c.shape.n_head_kv).set("head_dim", c.shape.head_dim);
  row.set("buffer_len", c.shape.buffer_len).set("median_us", m.timing.median_us).set("p10_us", m.timing.p10_us);
  row.set("p90_us", m.timing.p90_us).set("n_repeat", m.timing.n_repeat).set("bytes", m.bytes);
  row.set("gb_per_s", gb_per_s).set("ratio_to_copy", gb_per_s / copy_rate).set("copy_gb_per_s", copy_rate);
  row.set("gemm_tflop_per_s", gemm_rate);
  if (m.flop > 0) {
    row.set("tflop_per_s", tflops).set("ratio_to_gemm", tflops / gemm_rate).set("cosine", m.cosine);
  }
  if (!(m.cosine >= 0.9999)) {
    row.fail(concat("cosine ", m.cosine, " with the reference is below 0.9999"));
  } else {
    row.commit();
  }
}

const TableShape kShape = {{"kind", "phase", "n_query", "context", "n_head", "n_head_kv", "head_dim", "buffer_len"},
                           {"median_us", "p10_us", "p90_us", "n_repeat", "bytes", "gb_per_s", "tflop_per_s",
                            "ratio_to_copy", "ratio_to_gemm", "copy_gb_per_s", "gemm_tflop_per_s", "cosine"},
                           {"kind", "phase", "n_query", "context", "median_us", "p10_us", "p90_us", "gb_per_s",
                            "ratio_to_copy", "tflop_per_s", "cosine", "status"}};

void measure(const Options& options, ResultTable& table) {
  const cuda::Stream stream;
  const auto seed = static_cast<std::uint32_t>(options.driver.seed);
  const double copy_rate = copy_gb_per_s(stream), gemm_rate = gemm_tflops(stream);
  const std::vector<Case> cases = cases_of(options);
  Tq4Caches caches(cases.front().shape, seed, stream);
  std::map<std::string, KvCaches> one_vector;
  for (const std::string& name : options.one_vector) {
    const std::optional<KvFormat> format = KvFormat::parse(name);
    require(format && format->options.has_codes(), "--one-vector: '", name, "' is no format of codes; the grammar is ",
            KvFormat::grammar());
    one_vector.try_emplace(name, *format, cases.front().shape, seed, stream);
  }
  Progress bar("attention", static_cast<std::int64_t>(cases.size()), progress_options(options.driver, "case"));
  for (const Case& c : cases) {
    const auto kv = one_vector.find(c.kind);
    const bool is_update = c.phase == "update";
    const Measurement m = kv != one_vector.end()
                              ? (is_update ? measure_kv_update(c, kv->second, seed, stream)
                                           : measure_kv_attention(c, kv->second, options.tile, seed, stream))
                          : c.phase == "step"   ? measure_sliding_step(c, seed, stream)
                          : c.kind == "sliding" ? measure_sliding_attention(c, seed, stream)
                          : c.kind == "bf16"    ? measure_bf16_attention(c, seed, stream)
                          : is_update           ? measure_tq4_update(c, caches, seed, stream)
                                                : measure_tq4_attention(c, caches, seed, stream);
    write_row(table, c, m, copy_rate, gemm_rate);
    bar.advance();
  }
}

void run(int argc, char** argv) {
  CLI::App app("How fast attention and the cache update are, against the memory's and the matrix units' rates.");
  Options options;
  options.driver.contexts = {512, 2048, 8192, 32768, 131072};
  add_contexts(app, options.driver);
  add_whole(app, "--n-query", options.n_queries, "Queries of a call, and new tokens of an update, comma-separated",
            {1, 4096})
      ->delimiter(',');
  app.add_option("--one-vector", options.one_vector, "Formats of one vector for K and V, comma-separated")
      ->delimiter(',')
      ->capture_default_str();
  add_whole(app, "--one-vector-tile", options.tile, "Compiled configuration of their decode, by number; -1: as planned",
            {-1, static_cast<std::int64_t>(cuda::kKvDecodeTiles.size()) - 1});
  add_whole(app, "--buffer", options.buffer_len, "Tokens that a cache holds", {4096, std::int64_t{1} << 20});
  add_seed(app, options.driver);
  add_out(app, options.driver);
  add_quiet(app, options.driver);
  parse(app, argc, argv);

  const RunInfo info = gpu_run_info("attention", argc, argv, options.driver.seed);
  run_table(options.driver, info, kShape, [&](ResultTable& table) { measure(options, table); });
}

}  // namespace
}  // namespace gemma4::experiment

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, gemma4::experiment::run);
}

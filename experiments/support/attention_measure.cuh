// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/device_count.cuh"
#include "experiments/benchmark.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/cache_update.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// Attention and the cache update, timed and held against the reference, whatever the cache holds: TCaches is one of
/// experiments/support/attention_caches.cuh.
namespace gemma4::experiment {

inline constexpr std::int64_t kChecked = 8;  ///< last queries of a call that are compared with the reference
inline constexpr int kBuffers = 4;  ///< caches that the timed calls take in turn, so that none is found in the L2

/// One line of the table.
struct Case {
  std::string kind;   ///< tq4, a format of one vector, bf16 or sliding
  std::string phase;  ///< decode, prefill or update; step: a decode that begins at the projections of q, k and v;
                      ///< rows: several of these at once; rows_apart: one after another
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

/// What an attention attends with, to how many tokens, and into what.
struct TimedCall {
  View<const Bf16, 4> q;  ///< [1, n_query, n_head, head_dim]
  AttentionOptions options;
  cuda::DeviceCount kv_len;
  View<Bf16, 4> out;
  std::span<std::byte> workspace;
  cudaStream_t stream;
};

/// 4 n_head D (n_query (n - n_query) + n_query^2 / 2): two products over the keys that a causal call sees.
[[nodiscard]] inline double causal_flop(const AttentionShape& s, std::int64_t context) {
  const double n_query = static_cast<double>(s.n_query), n = static_cast<double>(context);
  return 4.0 * static_cast<double>(s.n_head * s.head_dim) * (n_query * (n - n_query) + n_query * n_query / 2);
}

/// A call of milliseconds hides its launch by itself.
[[nodiscard]] inline TimingOptions timing_options(double flop) {
  return flop < 1e11 ? TimingOptions{} : TimingOptions{.n_launch = 1, .n_warmup = 2, .n_repeat = 10};
}

[[nodiscard]] inline double cosine(std::span<const Bf16> actual, std::span<const double> expected) {
  double ab = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double a = to_float(actual[i]);
    ab += a * expected[i], aa += a * a, bb += expected[i] * expected[i];
  }
  return ab / std::sqrt(aa * bb);
}

[[nodiscard]] inline std::span<std::byte> as_span(cuda::DeviceBuffer<std::byte>& buffer) {
  return {buffer.data(), static_cast<std::size_t>(buffer.size())};
}

/// One attention. kv_len is read from the device; the last queries are compared with the reference first.
template <class TCaches>
[[nodiscard]] Measurement measure_attention(const Case& c, TCaches& caches, std::uint32_t seed, cudaStream_t stream) {
  const AttentionShape& s = c.shape;
  const AttentionOptions options{.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim))};
  const auto plan = caches.plan(s, options, c.context);
  cuda::DeviceBuffer<Bf16> q(s.n_query * s.n_head * s.head_dim), out(q.size());
  cuda::DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
  const cuda::DeviceBuffer<std::int32_t> kv_len(std::vector<std::int32_t>{static_cast<std::int32_t>(c.context)});
  fill_random(q.data(), q.size(), seed, stream);
  const TimedCall timed{.q = make_view(std::as_const(q).data(), 1, s.n_query, s.n_head, s.head_dim),
                        .options = options,
                        .kv_len = cuda::DeviceCount::on_device(kv_len.data()),
                        .out = make_view(out.data(), 1, s.n_query, s.n_head, s.head_dim),
                        .workspace = as_span(workspace),
                        .stream = stream};
  const auto call = [&](int i) { caches.attend(i, plan, timed); };
  call(0);
  const std::int64_t n_checked = std::min(s.n_query, kChecked), tail = n_checked * s.n_head * s.head_dim;
  const std::vector<Bf16> actual = out.to_host(stream), all = q.to_host(stream);
  std::vector<double> queries, expected(static_cast<std::size_t>(tail));
  for (const Bf16 value : std::span(all).last(expected.size())) queries.push_back(to_float(value));
  caches.reference(make_view(std::as_const(queries).data(), 1, n_checked, s.n_head, s.head_dim), options, c.context,
                   make_view(expected.data(), 1, n_checked, s.n_head, s.head_dim), stream);
  const double io = 4.0 * static_cast<double>(s.n_query * s.n_head * s.head_dim);
  return {.timing = time_calls(stream, timing_options(causal_flop(s, c.context)), call),
          .bytes = static_cast<double>(c.context * s.n_head_kv) * caches.token_bytes() + io,
          .flop = causal_flop(s, c.context),
          .cosine = cosine(std::span(actual).last(expected.size()), expected)};
}

/// Compression of n_query new tokens, the last of them at position context - 1.
template <class TCaches>
[[nodiscard]] Measurement measure_update(const Case& c, TCaches& caches, std::uint32_t seed, cudaStream_t stream) {
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
    caches.update(i, view(k[b]), view(v[b]), {positions.data(), s.n_query, {}}, stream);
  };
  return {
      .timing = time_calls(stream, {}, call),
      .bytes = 4.0 * static_cast<double>(count) + static_cast<double>(s.n_query * s.n_head_kv) * caches.token_bytes()};
}

}  // namespace gemma4::experiment

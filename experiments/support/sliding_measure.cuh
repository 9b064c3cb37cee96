// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/sliding_attention.cuh"
#include "cuda/sliding_decode.cuh"
#include "experiments/benchmark.cuh"
#include "experiments/support/attention_measure.cuh"
#include "gemma4/config.hpp"
#include "reference/rms_norm.hpp"
#include "reference/rope.hpp"
#include "reference/sliding_attention.hpp"

/// Attention of a sliding layer over its ring, timed and held against the reference.
namespace gemma4::experiment {

/// One attention of a sliding layer whose ring (shape.buffer_len, as long as the window) is full; rotates over 16
/// rings.
inline Measurement measure_sliding_attention(const Case& c, std::uint32_t seed, cudaStream_t stream) {
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
inline Measurement measure_sliding_step(const Case& c, std::uint32_t seed, cudaStream_t stream) {
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

/// Neighbouring tokens of a sliding layer, s.n_query of them, over 16 rings.
struct SlidingRows {
  static constexpr std::int64_t kRings = 16;
  AttentionShape s;
  cudaStream_t stream;
  cuda::SlidingDecodePlan one;
  cuda::DeviceBuffer<float> norm, q, k_new, v_new;
  cuda::DeviceBuffer<std::int32_t> positions;
  cuda::DeviceBuffer<Bf16> out, k, v;
  cuda::RopeParams rope = cuda::rope_params(gemma4_31b().sliding);

  SlidingRows(const Case& c, std::uint32_t seed, cudaStream_t on)
      : s(c.shape),
        stream(on),
        norm(std::vector<float>(static_cast<std::size_t>(s.head_dim), 1.0f)),
        q(drawn(s.n_query * s.n_head * s.head_dim, seed)),
        k_new(drawn(s.n_query * s.n_head_kv * s.head_dim, seed + 1)),
        v_new(drawn(s.n_query * s.n_head_kv * s.head_dim, seed + 2)),
        out(q.size()),
        k(kRings * s.n_head_kv * s.buffer_len * s.head_dim),
        v(k.size()) {
    AttentionShape one_token = s;
    one_token.n_query = 1;
    one = cuda::plan_sliding_decode(one_token, gemma4_31b().window, cuda::current_device());
    std::vector<std::int32_t> where(static_cast<std::size_t>(s.n_query));
    std::iota(where.begin(), where.end(), static_cast<std::int32_t>(c.context - s.n_query));
    positions = cuda::DeviceBuffer<std::int32_t>(where);
    fill_random(k.data(), k.size(), seed + 3, stream);
    fill_random(v.data(), v.size(), seed + 4, stream);
    cuda::check(cudaStreamSynchronize(stream), "filling of rings");
  }

  /// `count` of them, from the first on, over ring i.
  [[nodiscard]] cuda::SlidingDecodeCall rows(int i, std::int64_t first, std::int64_t count) {
    const auto some = [&](auto* data, std::int64_t n_head) {
      return make_view(data + first * n_head * s.head_dim, count, n_head, s.head_dim);
    };
    const auto old = [&](cuda::DeviceBuffer<Bf16>& side) {
      return make_view(side.data() + i % kRings * side.size() / kRings, s.n_head_kv, s.buffer_len, s.head_dim);
    };
    return {some(std::as_const(q).data(), s.n_head),
            some(std::as_const(k_new).data(), s.n_head_kv),
            some(std::as_const(v_new).data(), s.n_head_kv),
            {norm.data(), norm.data(), 1e-6f},
            cuda::DeviceCount::on_device(positions.data() + first),
            rope,
            old(k),
            old(v),
            1.0f / std::sqrt(static_cast<float>(s.head_dim)),
            some(out.data(), s.n_head)};
  }
  /// Out, and the first ring.
  [[nodiscard]] std::vector<Bf16> left() {
    std::vector<Bf16> bits = out.to_host(stream);
    for (const auto* side : {&k, &v}) {
      const std::vector<Bf16> all = side->to_host(stream);
      bits.insert(bits.end(), all.begin(), all.begin() + side->size() / kRings);
    }
    return bits;
  }

 private:
  [[nodiscard]] cuda::DeviceBuffer<float> drawn(std::int64_t count, std::uint32_t seed) const {
    cuda::DeviceBuffer<Bf16> values(count);
    fill_random(values.data(), count, seed, stream);
    std::vector<float> host;
    for (const Bf16 value : values.to_host(stream)) host.push_back(to_float(value));
    return cuda::DeviceBuffer<float>(host);
  }
};

/// Steps of s.n_query neighbouring tokens, at once or a launch each, behind themselves; rotates over 16 rings. Both are
/// run before either is timed: the cosine is 1 where they leave the same bits, else 0. (What a launch of one token
/// leaves, measure_sliding_step() holds against the reference.)
inline Measurement measure_sliding_rows(const Case& c, bool at_once, std::uint32_t seed, cudaStream_t stream) {
  SlidingRows rows(c, seed, stream);
  const AttentionShape& s = c.shape;
  const cuda::SlidingRowsPlan plan = cuda::plan_sliding_rows(rows.one, s.n_query, cuda::current_device());
  const auto together = [&](int i) { cuda::sliding_decode_rows(rows.rows(i, 0, s.n_query), plan, stream, true); };
  const auto apart = [&](int i) {  // a row's launch waits for the one that stores the key before
    for (std::int64_t row = 0; row < s.n_query; ++row) cuda::sliding_decode(rows.rows(i, row, 1), rows.one, stream);
  };
  apart(0);
  const std::vector<Bf16> expected = rows.left();
  rows.out.fill_bytes(0xFF, stream);
  together(0);
  const bool same = std::ranges::equal(rows.left(), expected, {}, &Bf16::bits, &Bf16::bits);
  const std::int64_t n_k = rows.k_new.size(), n_q = rows.q.size(), window = gemma4_31b().window;
  return {.timing = at_once ? time_calls(stream, {}, together) : time_calls(stream, {}, apart),
          .bytes = static_cast<double>(4 * window * s.n_head_kv * s.head_dim + 8 * n_k + 6 * n_q),
          .flop = 4.0 * static_cast<double>(n_q * window),
          .cosine = same ? 1.0 : 0.0};
}

}  // namespace gemma4::experiment

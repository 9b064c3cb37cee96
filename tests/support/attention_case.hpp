// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <ostream>
#include <span>
#include <vector>

#include "gemma4/attention.hpp"
#include "gemma4/attention_bound.hpp"
#include "gemma4/float16.hpp"

/// Random attention calls, and the most obvious attention there is as their oracle.
namespace gemma4::testkit {

/// `count` values, uniform in (-amplitude, amplitude) and exact in bf16, from a seed.
[[nodiscard]] inline std::vector<float> draw(std::uint64_t seed, std::int64_t count, float amplitude = 1.7f) {
  std::vector<float> values(static_cast<std::size_t>(count));
  std::uint64_t state = seed;
  for (float& value : values) {
    std::uint64_t bits = state += 0x9E3779B97F4A7C15u;  // splitmix64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    value = to_float(to_bf16(amplitude * (static_cast<float>(bits >> 40) * 0x1p-23f - 1.0f)));
  }
  return values;
}

/// One call over a flat cache: q [batch, n_query, n_head, head_dim]; k, v [batch, n_head_kv, buffer_len, head_dim].
struct AttentionCase {
  AttentionShape shape;
  std::int64_t kv_len = 1;
  bool causal = true;
  float scale = 1;
  std::uint64_t seed = 0;

  [[nodiscard]] std::int64_t q_size() const { return shape.batch * shape.n_query * shape.n_head * shape.head_dim; }
  [[nodiscard]] std::int64_t kv_size() const {
    return shape.batch * shape.n_head_kv * shape.buffer_len * shape.head_dim;
  }
  [[nodiscard]] std::vector<float> q() const { return draw(seed * 3, q_size()); }
  [[nodiscard]] std::vector<float> k() const { return draw(seed * 3 + 1, kv_size()); }
  [[nodiscard]] std::vector<float> v() const { return draw(seed * 3 + 2, kv_size()); }
  [[nodiscard]] AttentionOptions options() const {
    return {.scale = scale, .causal = causal, .causal_skip = true, .mask = std::nullopt};
  }
  /// One more than the last key that query t may see without a mask.
  [[nodiscard]] std::int64_t limit(std::int64_t t) const {
    return causal ? std::clamp<std::int64_t>(kv_len - shape.n_query + t + 1, 0, kv_len) : kv_len;
  }
};

inline std::ostream& operator<<(std::ostream& out, const AttentionCase& c) {
  return out << "batch " << c.shape.batch << ", n_query " << c.shape.n_query << ", n_head " << c.shape.n_head
             << ", n_head_kv " << c.shape.n_head_kv << ", head_dim " << c.shape.head_dim << ", kv_len " << c.kv_len
             << " of " << c.shape.buffer_len << (c.causal ? ", causal" : "") << ", scale " << c.scale << ", seed "
             << c.seed;
}

/// Query t of batch b sees key j.
using Sees = std::function<bool(std::int64_t b, std::int64_t t, std::int64_t j)>;

/// Exact results and, for each of them, score_magnitude and value_magnitude as attention_bound() wants them.
struct NaiveAttention {
  std::vector<double> out, score_magnitude, value_magnitude;

  [[nodiscard]] std::vector<double> bounds(const AttentionRounding& rounding, std::int64_t head_dim) const {
    std::vector<double> bounds(out.size());
    for (std::size_t i = 0; i < out.size(); ++i) {
      bounds[i] = attention_bound(rounding, head_dim, score_magnitude[i], value_magnitude[i]);
    }
    return bounds;
  }
};

/// The oracle: three loops in double over the keys that are seen, nothing shared with either room.
template <class TValue>
[[nodiscard]] NaiveAttention naive_attention(const AttentionShape& s, double scale, const std::vector<float>& q,
                                             const std::vector<TValue>& k, const std::vector<TValue>& v,
                                             const Sees& sees) {
  NaiveAttention result;
  result.out.assign(q.size(), 0.0);
  result.score_magnitude.assign(q.size(), 0.0);
  result.value_magnitude.assign(q.size(), 0.0);
  std::vector<double> weight(static_cast<std::size_t>(s.buffer_len));
  std::vector<std::int64_t> seen;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t t = 0; t < s.n_query; ++t) {
      seen.clear();
      for (std::int64_t j = 0; j < s.buffer_len; ++j) {
        if (sees(b, t, j)) seen.push_back(j);
      }
      if (seen.empty()) continue;
      for (std::int64_t h = 0; h < s.n_head; ++h) {
        const float* query = &q[static_cast<std::size_t>(((b * s.n_query + t) * s.n_head + h) * s.head_dim)];
        const auto base = static_cast<std::size_t>((b * s.n_head_kv + h / s.group()) * s.buffer_len * s.head_dim);
        double largest = -std::numeric_limits<double>::infinity(), total = 0, magnitude = 0;
        for (const std::int64_t j : seen) {
          const TValue* key = &k[base + static_cast<std::size_t>(j * s.head_dim)];
          double score = 0, absolute = 0;
          for (std::int64_t i = 0; i < s.head_dim; ++i) {
            const double product = static_cast<double>(query[i]) * static_cast<double>(key[i]);
            score += product;
            absolute += std::abs(product);
          }
          weight[static_cast<std::size_t>(j)] = scale * score;
          largest = std::max(largest, scale * score);
          magnitude = std::max(magnitude, std::abs(scale) * absolute);
        }
        for (const std::int64_t j : seen) {
          total += weight[static_cast<std::size_t>(j)] = std::exp(weight[static_cast<std::size_t>(j)] - largest);
        }
        const auto row = static_cast<std::size_t>(query - q.data());
        for (const std::int64_t j : seen) {
          const TValue* value = &v[base + static_cast<std::size_t>(j * s.head_dim)];
          for (std::size_t i = 0; i < static_cast<std::size_t>(s.head_dim); ++i) {
            const auto x = static_cast<double>(value[i]);
            result.out[row + i] += weight[static_cast<std::size_t>(j)] / total * x;
            result.value_magnitude[row + i] = std::max(result.value_magnitude[row + i], std::abs(x));
          }
        }
        for (std::size_t i = 0; i < static_cast<std::size_t>(s.head_dim); ++i) {
          result.score_magnitude[row + i] = magnitude;
        }
      }
    }
  }
  return result;
}

/// The oracle on a case, its kv_len and causality.
[[nodiscard]] inline NaiveAttention naive_attention(const AttentionCase& c) {
  return naive_attention(c.shape, c.scale, c.q(), c.k(), c.v(),
                         [&](std::int64_t, std::int64_t t, std::int64_t j) { return j < c.limit(t); });
}

/// Every bit equal; says where and what if not. NaNs of the same bits are equal, zeros of different sign are not.
[[nodiscard]] inline testing::AssertionResult same_bits(std::span<const float> actual,
                                                        std::span<const float> expected) {
  if (actual.size() != expected.size()) {
    return testing::AssertionFailure() << "lengths differ: " << actual.size() << " and " << expected.size();
  }
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (std::bit_cast<std::uint32_t>(actual[i]) != std::bit_cast<std::uint32_t>(expected[i])) {
      return testing::AssertionFailure() << "bits differ at index " << i << ": " << actual[i] << " and " << expected[i];
    }
  }
  return testing::AssertionSuccess();
}

/// Two KV heads, 70 rows behind the valid ones.
[[nodiscard]] inline AttentionCase example_case(std::int64_t head_dim, std::int64_t group, std::int64_t n_query,
                                                std::int64_t kv_len) {
  return {.shape = {.batch = 1,
                    .n_query = n_query,
                    .n_head = 2 * group,
                    .n_head_kv = 2,
                    .head_dim = head_dim,
                    .buffer_len = kv_len + 70},
          .kv_len = kv_len,
          .scale = 1.0f / std::sqrt(static_cast<float>(head_dim)),
          .seed = 11};
}

}  // namespace gemma4::testkit

namespace rc {

/// Every promised head_dim and group, batch 1 and 2; n_query and kv_len around the tiles and blocks of the reference,
/// within a budget of work that keeps a property of a hundred cases below a few seconds.
template <>
struct Arbitrary<gemma4::testkit::AttentionCase> {
  using Case = gemma4::testkit::AttentionCase;

  static Gen<Case> arbitrary() {
    const auto length = [](int small, int large) {
      return gen::weightedOneOf<int>({{1, gen::just(1)}, {3, gen::inRange(1, small)}, {2, gen::inRange(1, large)}});
    };
    return gen::map(gen::tuple(gen::element(64, 128, 256, 512), gen::element(1, 2, 4, 8, 16, 6), gen::inRange(1, 3),
                               gen::inRange(1, 3), length(9, 300), length(40, 900),
                               gen::weightedElement<int>({{8, 3}, {4, 40}, {1, 300}}),
                               gen::tuple(gen::arbitrary<bool>(), gen::element(1.0f, 4.0f), gen::inRange(0, 1 << 30))),
                    [](const std::tuple<int, int, int, int, int, int, int, std::tuple<bool, float, int>>& t) {
                      const auto& [head_dim, group, n_head_kv, batch, n_query, more, tail, rest] = t;
                      return make(head_dim, group, n_head_kv, batch, n_query, more, tail, rest);
                    });
  }

 private:
  static Case make(std::int64_t head_dim, std::int64_t group, std::int64_t n_head_kv, std::int64_t batch,
                   std::int64_t n_query, std::int64_t kv_len, std::int64_t tail,
                   const std::tuple<bool, float, int>& rest) {
    constexpr std::int64_t kBudget = 1'500'000;   // multiply-adds of the scores
    constexpr std::int64_t kRowBudget = 500'000;  // values of K
    const auto [causal, sharpness, seed] = rest;
    const std::int64_t per_query = head_dim * group * n_head_kv * batch;
    n_query = std::clamp<std::int64_t>(kBudget / (per_query * (causal ? n_query : 1)), 1, n_query);
    kv_len = std::clamp<std::int64_t>(kBudget / (per_query * n_query), 1, kv_len);
    kv_len = std::clamp<std::int64_t>(kRowBudget / (head_dim * n_head_kv * batch), 1, kv_len);
    if (causal) kv_len = std::max(kv_len, n_query);
    return {.shape = {.batch = batch,
                      .n_query = n_query,
                      .n_head = group * n_head_kv,
                      .n_head_kv = n_head_kv,
                      .head_dim = head_dim,
                      .buffer_len = kv_len + tail},
            .kv_len = kv_len,
            .causal = causal,
            .scale = sharpness / std::sqrt(static_cast<float>(head_dim)),
            .seed = static_cast<std::uint64_t>(seed)};
  }
};

}  // namespace rc

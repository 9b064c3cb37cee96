// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <ostream>
#include <span>
#include <tuple>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/sliding_decode.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/config.hpp"
#include "gemma4/float16.hpp"
#include "tests/support/attention_case.hpp"

/// Neighbouring tokens of a sliding layer on the device, at once and a launch each.
namespace gemma4::testkit {

inline constexpr Bf16 kNanOfRing{0x7FC0};

/// n_row tokens behind each other, the first at `position`, and a ring with what they see of the tokens before.
struct SlidingRowsCase {
  std::int64_t n_head_kv = 1, group = 2, head_dim = 64, window = 40, ring_len = 48, position = 100, n_row = 4;
  float scale = 0.25f;
  std::uint64_t seed = 1;
  /// Values of tokens 64 apart are opposite; keys have a large part that they share, and others of many exponents: sums
  /// are small beside what is added, and scores large beside their differences, which are rounded. An order of
  /// additions then shows in bf16, where it would else show in one value of ten thousand.
  bool cancels = true;

  [[nodiscard]] std::int64_t n_head() const { return n_head_kv * group; }
  [[nodiscard]] AttentionShape shape() const {
    return {.n_query = 1, .n_head = n_head(), .n_head_kv = n_head_kv, .head_dim = head_dim, .buffer_len = ring_len};
  }
  [[nodiscard]] cuda::RopeParams rope() const {
    AttentionConfig attention;
    attention.head_dim = head_dim;
    attention.n_head_kv = n_head_kv;
    attention.rope_theta = 1e4;
    attention.rope_pairs = head_dim / 2;
    return cuda::rope_params(attention);
  }
};

inline std::ostream& operator<<(std::ostream& out, const SlidingRowsCase& c) {
  return out << c.n_row << " rows from " << c.position << ", heads " << c.n_head() << " over " << c.n_head_kv << " of "
             << c.head_dim << ", window " << c.window << ", ring " << c.ring_len << ", scale " << c.scale << ", seed "
             << c.seed << (c.cancels ? ", values cancel" : "");
}

/// What a launch leaves.
struct SlidingRowsResult {
  std::vector<Bf16> out, ring_k, ring_v;
};

/// Equal bits, else where not.
[[nodiscard]] inline testing::AssertionResult same_bits(const SlidingRowsCase& c, const SlidingRowsResult& actual,
                                                        const SlidingRowsResult& expected) {
  const auto differs = [](const std::vector<Bf16>& a, const std::vector<Bf16>& b) {
    const auto at = std::ranges::mismatch(a, b, [](Bf16 x, Bf16 y) { return x.bits == y.bits; }).in1 - a.begin();
    return at == std::ssize(a) && a.size() == b.size() ? -1 : at;
  };
  const auto row = c.n_head() * c.head_dim;
  if (const auto at = differs(actual.out, expected.out); at >= 0) {
    const auto i = static_cast<std::size_t>(at);
    return testing::AssertionFailure() << "row " << at / row << ", head " << at % row / c.head_dim << ", value "
                                       << at % c.head_dim << ": " << to_float(actual.out[i]) << ", alone "
                                       << to_float(expected.out[i]);
  }
  for (const auto& [name, ring, other] :
       {std::tuple{"keys", &actual.ring_k, &expected.ring_k}, std::tuple{"values", &actual.ring_v, &expected.ring_v}}) {
    if (const auto at = differs(*ring, *other); at >= 0) {
      return testing::AssertionFailure() << "ring of " << name << ": slot " << at / c.head_dim % c.ring_len
                                         << " of KV head " << at / c.head_dim / c.ring_len;
    }
  }
  return testing::AssertionSuccess();
}

[[nodiscard]] inline bool all_finite(std::span<const Bf16> values) {
  return std::ranges::all_of(values, [](Bf16 value) { return (value.bits & 0x7F80) != 0x7F80; });
}

/// A layer on the device. Slots that no row sees hold NaN.
class SlidingRowsLayer {
 public:
  explicit SlidingRowsLayer(const SlidingRowsCase& c)
      : c_(c),
        q_host_(draw(c.seed, c.n_row * c.n_head() * c.head_dim, 3.0f)),
        k_host_(draw(c.seed + 1, c.n_row * c.n_head_kv * c.head_dim, 2.0f)),
        v_host_(draw(c.seed + 2, c.n_row * c.n_head_kv * c.head_dim, 0.5f)),
        q_norm_(draw(c.seed + 3, c.head_dim, 2.0f)),
        k_norm_(draw(c.seed + 4, c.head_dim, 2.0f)),
        ring_k_(poisoned(c.seed + 5, false)),
        ring_v_(poisoned(c.seed + 6, true)),
        rope_(c.rope()) {
    const std::int64_t n = c.n_head_kv * c.head_dim;
    for (std::int64_t i = 0; c.cancels && i < c.n_row * n; ++i) {
      v_host_[static_cast<std::size_t>(i)] = opposite(c.position + i / n, i % c.head_dim);
    }
    upload();
  }

  /// Another key and value for a row.
  void set_row(std::int64_t row, float k, float v) {
    const std::int64_t n = c_.n_head_kv * c_.head_dim;
    std::fill_n(k_host_.begin() + row * n, n, k);
    std::fill_n(v_host_.begin() + row * n, n, v);
    upload();
  }
  /// The ring of another layer's result.
  void continue_from(const SlidingRowsResult& before) { ring_k_ = before.ring_k, ring_v_ = before.ring_v; }

  [[nodiscard]] SlidingRowsResult at_once(std::optional<int> n_split, bool overlap = false,
                                          std::int64_t ahead = 0) const {
    const cuda::SlidingDecodePlan one =
        cuda::plan_sliding_decode(c_.shape(), c_.window, cuda::current_device(), n_split);
    const cuda::SlidingRowsPlan plan = cuda::plan_sliding_rows(one, c_.n_row, cuda::current_device());
    const cuda::DeviceBuffer<std::int32_t> positions = this->positions(ahead);
    return result([&](const View<Bf16, 3>& ring_k, const View<Bf16, 3>& ring_v, const View<Bf16, 3>& out) {
      cuda::sliding_decode_rows(call(ring_k, ring_v, out, 0, c_.n_row, positions.data()), plan, nullptr, overlap);
    });
  }
  [[nodiscard]] SlidingRowsResult one_by_one(std::optional<int> n_split, std::int64_t narrower = 0) const {
    const cuda::SlidingDecodePlan one =
        cuda::plan_sliding_decode(c_.shape(), c_.window - narrower, cuda::current_device(), n_split);
    const cuda::DeviceBuffer<std::int32_t> positions = this->positions(0);
    return result([&](const View<Bf16, 3>& ring_k, const View<Bf16, 3>& ring_v, const View<Bf16, 3>& out) {
      for (std::int64_t row = 0; row < c_.n_row; ++row) {
        const View<Bf16, 3> own = make_view(out.data + row * out.stride[0], 1, c_.n_head(), c_.head_dim);
        cuda::sliding_decode(call(ring_k, ring_v, own, row, 1, positions.data() + row), one, nullptr);
      }
    });
  }

 private:
  [[nodiscard]] static float opposite(std::int64_t position, std::int64_t dim) {
    const float spread = 0.46f + static_cast<float>(dim * 37 % 64) / 64.0f;  // a root mean square of 1
    return (position / 64 + position % 64 * (position % 64) % 11) % 2 == 0 ? spread : -spread;
  }
  void upload() {
    q_ = cuda::DeviceBuffer<float>(q_host_), k_ = cuda::DeviceBuffer<float>(k_host_),
    v_ = cuda::DeviceBuffer<float>(v_host_);
  }
  [[nodiscard]] cuda::DeviceBuffer<std::int32_t> positions(std::int64_t ahead) const {
    std::vector<std::int32_t> host;
    for (std::int64_t row = 0; row < c_.n_row; ++row) {
      host.push_back(static_cast<std::int32_t>(c_.position + ahead + row));
    }
    return cuda::DeviceBuffer<std::int32_t>(host);
  }
  [[nodiscard]] cuda::SlidingDecodeCall call(const View<Bf16, 3>& ring_k, const View<Bf16, 3>& ring_v,
                                             const View<Bf16, 3>& out, std::int64_t first, std::int64_t n_row,
                                             const std::int32_t* position) const {
    const auto heads = [&](const cuda::DeviceBuffer<float>& x, std::int64_t n_head) {
      return make_view(x.data() + first * n_head * c_.head_dim, n_row, n_head, c_.head_dim);
    };
    return {heads(q_, c_.n_head()),
            heads(k_, c_.n_head_kv),
            heads(v_, c_.n_head_kv),
            {q_norm_.data(), k_norm_.data(), 1e-6f},
            cuda::DeviceCount::on_device(position),
            rope_,
            ring_k,
            ring_v,
            c_.scale,
            out};
  }
  [[nodiscard]] std::vector<Bf16> poisoned(std::uint64_t seed, bool is_v) const {
    std::vector<Bf16> ring(static_cast<std::size_t>(c_.n_head_kv * c_.ring_len * c_.head_dim), kNanOfRing);
    const std::vector<float> values = draw(seed, static_cast<std::int64_t>(ring.size()));
    for (std::int64_t head = 0; head < c_.n_head_kv; ++head) {
      for (std::int64_t p = std::max<std::int64_t>(0, c_.position - c_.window + 1); p < c_.position; ++p) {
        const auto row = static_cast<std::size_t>((head * c_.ring_len + ring_slot(p, c_.ring_len)) * c_.head_dim);
        for (std::int64_t dim = 0; dim < c_.head_dim; ++dim) {
          const auto i = row + static_cast<std::size_t>(dim);
          const float shared =
              dim % 4 == 0 ? (dim % 8 == 0 ? 60.0f : -60.0f) : values[i] / static_cast<float>(1 << dim % 8);
          ring[i] = to_bf16(!c_.cancels ? values[i] : is_v ? opposite(p, dim) : shared);
        }
      }
    }
    return ring;
  }
  template <class TRun>
  [[nodiscard]] SlidingRowsResult result(const TRun& run) const {
    cuda::DeviceBuffer<Bf16> ring_k(ring_k_), ring_v(ring_v_), out(c_.n_row * c_.n_head() * c_.head_dim);
    out.fill_bytes(0xFF);
    const auto ring = [&](cuda::DeviceBuffer<Bf16>& x) {
      return make_view(x.data(), c_.n_head_kv, c_.ring_len, c_.head_dim);
    };
    cuda::check(cudaDeviceSynchronize(), "wait for the layer");
    run(ring(ring_k), ring(ring_v), make_view(out.data(), c_.n_row, c_.n_head(), c_.head_dim));
    cuda::check(cudaDeviceSynchronize(), "wait for the launch");
    return {out.to_host(), ring_k.to_host(), ring_v.to_host()};
  }

  SlidingRowsCase c_;
  std::vector<float> q_host_, k_host_, v_host_;
  cuda::DeviceBuffer<float> q_, k_, v_, q_norm_, k_norm_;
  std::vector<Bf16> ring_k_, ring_v_;
  cuda::RopeParams rope_;
};

}  // namespace gemma4::testkit

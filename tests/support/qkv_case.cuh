// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <rapidcheck.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <vector>

#include "cuda/device/check.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/qkv_prologue.cuh"
#include "cuda/rms_norm.cuh"
#include "cuda/rope.cuh"
#include "gemma4/config.hpp"
#include "tests/support/attention_case.hpp"

/// What the tests of the q/k/v prologue share: random calls with their device memory, the same through the components,
/// and memory that shows where somebody wrote.
namespace gemma4::cuda::qkv_test {

inline constexpr float kQkvEpsilon = 1e-6f;

struct QkvCase {
  AttentionConfig attention;
  std::int64_t n_head = 1, n_token = 1, position = 0;
  bool v_is_k = false;
  std::uint64_t seed = 1;

  [[nodiscard]] std::int64_t q_size() const { return n_token * n_head * attention.head_dim; }
  [[nodiscard]] std::int64_t kv_size() const { return n_token * attention.n_head_kv * attention.head_dim; }
};

inline std::ostream& operator<<(std::ostream& out, const QkvCase& c) {
  return out << c.n_token << " tokens at " << c.position << ", heads " << c.n_head << " and " << c.attention.n_head_kv
             << " of " << c.attention.head_dim << ", " << c.attention.rope_pairs << " pairs"
             << (c.v_is_k ? ", v = k" : "") << ", seed " << c.seed;
}

/// Any shape: n_head_kv times 1 to 3 or 16 query heads, none to all pairs turning.
[[nodiscard]] inline QkvCase some_qkv_case(std::int64_t largest_position) {
  QkvCase c;
  c.attention.head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 512);
  c.attention.n_head_kv = *rc::gen::inRange<std::int64_t>(1, 4);
  c.attention.rope_theta = *rc::gen::element(1e4, 1e6);
  c.attention.rope_pairs = c.attention.head_dim / *rc::gen::element<std::int64_t>(2, 8, 64);
  c.n_head = c.attention.n_head_kv * *rc::gen::element<std::int64_t>(1, 2, 3, 16);
  c.n_token = *rc::gen::element<std::int64_t>(1, 1, 2, 7, 33);
  c.position =
      *rc::gen::oneOf(rc::gen::inRange<std::int64_t>(0, largest_position), rc::gen::just(largest_position - 1));
  c.v_is_k = *rc::gen::arbitrary<bool>();
  c.seed = *rc::gen::inRange<std::uint64_t>(1, 1 << 20);
  return c;
}

[[nodiscard]] inline QkvCase real_qkv_case(bool sliding, std::int64_t n_token, std::int64_t position,
                                           const ModelConfig& model = gemma4_31b()) {
  return {.attention = sliding ? model.sliding : model.full,
          .n_head = model.n_head,
          .n_token = n_token,
          .position = position,
          .v_is_k = !sliding,
          .seed = 5};
}

/// Projections and weights, exact in bf16, on the host and on the device.
struct QkvInputs {
  QkvCase c;
  std::vector<float> q, k, v, q_weight, k_weight;
  DeviceBuffer<Bf16> q_device, k_device, v_device;
  DeviceBuffer<float> q_norm, k_norm;
  DeviceBuffer<std::int32_t> position;
  RopeParams rope;

  explicit QkvInputs(const QkvCase& from)
      : c(from),
        q(testkit::draw(c.seed, c.q_size(), 3.0f)),
        k(testkit::draw(c.seed + 1, c.kv_size(), 2.0f)),
        v(c.v_is_k ? k : testkit::draw(c.seed + 2, c.kv_size(), 0.1f)),
        q_weight(testkit::draw(c.seed + 3, c.attention.head_dim, 2.0f)),
        k_weight(testkit::draw(c.seed + 4, c.attention.head_dim, 2.0f)),
        q_device(narrow(q)),
        k_device(narrow(k)),
        v_device(narrow(v)),
        q_norm(q_weight),
        k_norm(k_weight),
        position(std::vector<std::int32_t>{static_cast<std::int32_t>(c.position)}),
        rope(rope_params(c.attention)) {}

  [[nodiscard]] static std::vector<Bf16> narrow(const std::vector<float>& values) {
    std::vector<Bf16> result(values.size());
    std::transform(values.begin(), values.end(), result.begin(), to_bf16);
    return result;
  }
  template <class T>
  [[nodiscard]] View<T, 3> heads(T* data, std::int64_t n_head) const {
    return make_view(data, c.n_token, n_head, c.attention.head_dim);
  }
  template <class T>
  [[nodiscard]] View<T, 3> kv(T* data) const {
    return heads(data, c.attention.n_head_kv);
  }
  [[nodiscard]] QkNorms norms() const { return {q_norm.data(), k_norm.data(), kQkvEpsilon}; }
  [[nodiscard]] DeviceCount at() const { return DeviceCount::on_device(position.data()); }

  template <class TTarget>
  void fused(Bf16* q_out, const TTarget& target, cudaStream_t stream = nullptr, bool overlap = false) const {
    const Bf16* const v_in = c.v_is_k ? k_device.data() : v_device.data();
    qkv_prologue<Bf16>(
        {heads(q_device.data(), c.n_head), kv(k_device.data()), kv(v_in), norms(), at(), rope, heads(q_out, c.n_head)},
        target, stream, overlap);
  }
};

/// The same through the components, one launch each, in float.
struct QkvUnfused {
  DeviceBuffer<float> q, k, v;

  explicit QkvUnfused(const QkvInputs& in) : q(in.c.q_size()), k(in.c.kv_size()), v(in.c.kv_size()) {
    const std::int64_t head_dim = in.c.attention.head_dim;
    const auto norm = [&](const DeviceBuffer<Bf16>& from, const float* weight, DeviceBuffer<float>& to) {
      rms_norm<Bf16, float>(make_view(from.data(), from.size() / head_dim, head_dim), weight, kQkvEpsilon,
                            make_view(to.data(), to.size() / head_dim, head_dim), nullptr);
    };
    norm(in.q_device, in.q_norm.data(), q);
    norm(in.k_device, in.k_norm.data(), k);
    norm(in.v_device, nullptr, v);
    rope<float>(in.heads(q.data(), in.c.n_head), in.at(), in.rope, nullptr);
    rope<float>(in.kv(k.data()), in.at(), in.rope, nullptr);
  }
};

/// Memory that begins as a pattern, with a margin on both sides that nobody may touch.
class Poisoned {
 public:
  static constexpr std::int64_t kMargin = 4096;

  explicit Poisoned(std::int64_t n_byte) : memory_(n_byte + 2 * kMargin) {
    std::vector<std::byte> pattern(static_cast<std::size_t>(memory_.size()));
    std::uint32_t state = 12345;
    for (std::byte& byte : pattern) byte = static_cast<std::byte>((state = state * 1664525u + 1013904223u) >> 24);
    before_ = pattern;
    memory_.from_host(pattern);
    check(cudaDeviceSynchronize(), "wait for the pattern");
  }
  [[nodiscard]] std::byte* bytes() { return memory_.data() + kMargin; }
  [[nodiscard]] Bf16* values() { return reinterpret_cast<Bf16*>(bytes()); }
  [[nodiscard]] const std::vector<std::byte>& before() const { return before_; }
  [[nodiscard]] std::vector<std::byte> now() const {
    check(cudaDeviceSynchronize(), "wait for the device");
    return memory_.to_host();
  }
  [[nodiscard]] bool margins_hold() const {
    const std::vector<std::byte> after = now();
    return std::equal(after.begin(), after.begin() + kMargin, before_.begin()) &&
           std::equal(after.end() - kMargin, after.end(), before_.end() - kMargin);
  }

 private:
  DeviceBuffer<std::byte> memory_;
  std::vector<std::byte> before_;
};

[[nodiscard]] inline std::vector<Bf16> rounded(const DeviceBuffer<float>& values) {
  return QkvInputs::narrow(values.to_host());
}

}  // namespace gemma4::cuda::qkv_test

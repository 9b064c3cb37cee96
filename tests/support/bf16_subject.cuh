// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "cuda/bf16_attention.cuh"
#include "cuda/device/device_buffer.cuh"
#include "gemma4/float16.hpp"
#include "tests/support/attention_promises.hpp"
#include "tests/support/bf16_values.hpp"

/// Attention over a flat bf16 cache on the device, as the promises of tests/support/attention_promises.hpp take it.
namespace gemma4::testkit {

/// bf16 in and out, float32 sums, probabilities in bf16. The tensor cores and ex2.approx are allowed two bits more than
/// one rounding an operation.
[[nodiscard]] inline AttentionRounding bf16_rounding(std::int64_t kv_len, std::int64_t n_split = 1) {
  return {.unit = 0x1p-22,
          .weight_unit = 0x1p-8,
          .output_unit = 0x1p-8,
          .longest_sum = kv_len,
          .n_rescale = kv_len / 16 + n_split + 4};
}

/// bf16_attention on the device.
class Bf16Subject {
 public:
  /// What a subject fixes of the plan.
  struct Fixed {
    cuda::FlashChoice choice = {};
    std::int64_t smem_limit_bytes = 0;  ///< 0: the device's
  };

  explicit Bf16Subject(const AttentionCase& c) : Bf16Subject(c, Fixed{}) {}
  Bf16Subject(const AttentionCase& c, const Fixed& fixed) : case_(c), fixed_(fixed), q_(c.q()), k_(c.k()), v_(c.v()) {}

  /// The same call by another plan.
  [[nodiscard]] Bf16Subject with(const Fixed& fixed) const {
    Bf16Subject other(*this);
    other.fixed_ = fixed;
    return other;
  }

  void spoil(std::int64_t first, std::int64_t last, Spoil kind) {
    for_rows(first, last, [&](std::size_t i) {
      k_[i] = kind == Spoil::kNaN ? std::numeric_limits<float>::quiet_NaN() : 1000 * k_[i];
      v_[i] = kind == Spoil::kNaN ? std::numeric_limits<float>::quiet_NaN() : 1000 * v_[i];
    });
  }

  [[nodiscard]] Bf16Subject sliced(std::int64_t kv_len) const {
    Bf16Subject slice(*this);
    slice.k_.clear();
    slice.v_.clear();
    for_rows(0, kv_len, [&](std::size_t i) {
      slice.k_.push_back(k_[i]);
      slice.v_.push_back(v_[i]);
    });
    slice.case_.shape.buffer_len = kv_len;
    return slice;
  }

  [[nodiscard]] std::vector<float> attend(const AttentionOptions& options, std::optional<std::int64_t> kv_len) const {
    return attend(options, kv_len, 0, case_.shape.n_query);
  }

  /// Queries [first, first + n_query) only. kv_len goes through device memory; the host is told only where a mask may
  /// be as short as kv_len.
  [[nodiscard]] std::vector<float> attend(const AttentionOptions& options, std::optional<std::int64_t> kv_len,
                                          std::int64_t first, std::int64_t n_query) const {
    AttentionShape s = case_.shape;
    const cuda::DeviceBuffer<Bf16> q(narrow(q_)), k(narrow(k_)), v(narrow(v_));
    View<const Bf16, 4> queries = make_view(q.data(), s.batch, s.n_query, s.n_head, s.head_dim);
    queries.data += first * queries.stride[1];
    queries.extent[1] = s.n_query = n_query;
    cuda::DeviceBuffer<Bf16> out(s.batch * n_query * s.n_head * s.head_dim);
    out.fill_bytes(0xFF);  // NaN: every element must be written
    cuda::DeviceInfo device = cuda::current_device();
    if (fixed_.smem_limit_bytes > 0) device.smem_limit_bytes = fixed_.smem_limit_bytes;
    AttentionOptions on_device = options;
    cuda::DeviceBuffer<std::uint8_t> mask;
    if (options.mask) {
      const auto* bytes = static_cast<const std::uint8_t*>(options.mask->data);
      mask = cuda::DeviceBuffer<std::uint8_t>(std::vector<std::uint8_t>(
          bytes, bytes + options.mask->shape[0] * options.mask->shape[2] * options.mask->shape[3]));
      on_device.mask->data = mask.data();
    }
    const cuda::FlashPlan plan = cuda::plan_bf16_attention(s, on_device, device, fixed_.choice);
    cuda::DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
    workspace.fill_bytes(0xFF);
    cuda::DeviceBuffer<std::int32_t> length(std::vector<std::int32_t>{static_cast<std::int32_t>(kv_len.value_or(0))});
    cuda::DeviceBuffer<unsigned long long> count(std::vector<unsigned long long>{0});
    cuda::bf16_attention(
        {queries, make_view(k.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim),
         make_view(v.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim), on_device,
         kv_len ? cuda::DeviceCount{.device = length.data(), .host = options.mask ? *kv_len : -1} : cuda::DeviceCount{},
         make_view(out.data(), s.batch, n_query, s.n_head, s.head_dim)},
        plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, nullptr, count.data());
    n_tile_ = count.to_host()[0];
    return widen(out.to_host());
  }

  /// Key tiles that the last attend() visited, over all blocks.
  [[nodiscard]] unsigned long long n_tile() const { return n_tile_; }

  [[nodiscard]] NaiveAttention exact(const Sees& sees) const {
    return naive_attention(case_.shape, case_.scale, q_, k_, v_, sees);
  }
  [[nodiscard]] AttentionRounding rounding() const { return bf16_rounding(case_.shape.buffer_len, 140); }

 private:
  template <class TAction>
  void for_rows(std::int64_t first, std::int64_t last, const TAction& action) const {
    const AttentionShape& s = case_.shape;
    for (std::int64_t head = 0; head < s.batch * s.n_head_kv; ++head) {
      for (std::int64_t i = first * s.head_dim; i < last * s.head_dim; ++i) {
        action(static_cast<std::size_t>(head * s.buffer_len * s.head_dim + i));
      }
    }
  }

  AttentionCase case_;
  Fixed fixed_;
  std::vector<float> q_, k_, v_;
  mutable unsigned long long n_tile_ = 0;
};

}  // namespace gemma4::testkit

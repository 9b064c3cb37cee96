// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/bf16_attention.cuh"
#include "cuda/bf16_cache.cuh"
#include "cuda/cache/chunk.cuh"
#include "cuda/cache/full_layer_cache.cuh"
#include "cuda/device/device_arena.cuh"
#include "cuda/flash/describe.cuh"
#include "cuda/flash/rows.cuh"
#include "cuda/qkv_prologue.cuh"
#include "gemma4/cache_format.hpp"
#include "gemma4/plan/step_plan.hpp"

/// The uncompressed cache of the full layers: bf16 rows. Mirror: reference/cache/flat_layer_cache.hpp
namespace gemma4::cuda {

/// K and V of all full layers as bf16 [1, n_head_kv, context, head_dim], and attention over them.
class FlatFullLayers {
 public:
  using Plan = FlashPlan;

  FlatFullLayers(const FullCacheShape& shape, std::span<std::byte> memory) : shape_(shape), memory_(memory) {
    require(static_cast<std::int64_t>(memory.size()) >= 2 * shape.n_layer * side_bytes(), "flat cache: ", memory.size(),
            " B of memory, need ", 2 * shape.n_layer * side_bytes());
  }

  [[nodiscard]] Plan plan(const FullPlanWish& wish) const {
    FlashChoice choice{.overlap = wish.overlap};
    if (!wish.split_k) choice.n_split = 1;
    return plan_bf16_attention(shape_.attention(wish.n_query, wish.n_head), wish.options, wish.device, choice);
  }
  [[nodiscard]] StepPlanRow row(const Plan& plan) const { return describe_flash("attention_full", plan); }

  void attend(std::int64_t index, const FullAttentionCall& call, const Plan& plan, cudaStream_t stream) const {
    bf16_attention({with_batch(call.q), k(index), v(index), call.options, call.kv_len, with_batch(call.q)}, plan,
                   call.partials, stream, call.work_count);
  }
  [[nodiscard]] static constexpr bool borrows_scratch(const Plan& /*plan*/) { return false; }

  [[nodiscard]] StoredLayer stored(std::int64_t index) const {
    const std::int64_t row_bytes = shape_.head_dim * static_cast<std::int64_t>(sizeof(Bf16));
    return {.parts = {shape_.part("k", k(index).data, row_bytes), shape_.part("v", v(index).data, row_bytes)}};
  }

  [[nodiscard]] View<Bf16, 4> k(std::int64_t index) const { return side(2 * index); }
  [[nodiscard]] View<Bf16, 4> v(std::int64_t index) const { return side(2 * index + 1); }

 protected:
  FullCacheShape shape_;

 private:
  [[nodiscard]] std::int64_t side_bytes() const {
    return shape_.n_head_kv * shape_.context * shape_.head_dim * static_cast<std::int64_t>(sizeof(Bf16));
  }
  [[nodiscard]] View<Bf16, 4> side(std::int64_t i) const {
    return make_view(reinterpret_cast<Bf16*>(memory_.data() + i * side_bytes()), std::int64_t{1}, shape_.n_head_kv,
                     shape_.context, shape_.head_dim);
  }

  std::span<std::byte> memory_;
};

template <>
class FullLayerCaches<Bf16Format> : public FlatFullLayers {
 public:
  static constexpr bool kSinkStores = Bf16Format::kStoredByPrologue;
  using RowsPlan = Bf16RowsPlan;
  FullLayerCaches(const Bf16Format& /*format*/, const FullCacheShape& shape, std::span<std::byte> memory)
      : FlatFullLayers(shape, memory) {}

  [[nodiscard]] RowsPlan plan_rows(const FullPlanWish& wish, const Plan& one, std::int64_t partials_bytes) const {
    FlashPlan of_one = one;
    of_one.overlap = wish.overlap;
    return plan_bf16_rows(shape_.attention(wish.n_query), of_one, partials_bytes);
  }
  [[nodiscard]] StepPlanRow row_of_rows(const RowsPlan& plan) const {
    StepPlanRow row = describe_flash("attention_full", plan.one);
    row.path += concat(", ", plan.shape.n_query, " rows in one launch");
    row.bytes = plan.workspace_bytes;
    row.why = detail::why_several_launches(plan);
    return row;
  }
  void attend_rows(std::int64_t index, const FullAttentionCall& call, const RowsPlan& plan, cudaStream_t stream) const {
    bf16_attention_rows({with_batch(call.q), k(index), v(index), call.options, call.kv_len, with_batch(call.q)}, plan,
                        call.partials, stream, call.work_count);
  }

  [[nodiscard]] FlatKv sink(std::int64_t index, const FreshKv& /*fresh*/) const { return {k(index), v(index)}; }
  void store(std::int64_t index, const View<const Bf16, 3>& new_k, const View<const Bf16, 3>& new_v,
             const float* /*k_weight*/, const DevicePositions& positions, cudaStream_t stream) const {
    bf16_cache_update<Bf16>(with_batch(new_k), with_batch(new_v), positions, k(index), v(index), stream);
  }
};

/// The reference alone has it.
template <>
class FullLayerCaches<F32Format> : public FullLayerCaches<Bf16Format> {
 public:
  FullLayerCaches(const F32Format& /*format*/, const FullCacheShape& shape, std::span<std::byte> memory)
      : FullLayerCaches<Bf16Format>(Bf16Format{}, shape, memory) {
    require(false, "backend: an f32 cache exists in the reference alone; choose bf16 or tq4");
  }
};

}  // namespace gemma4::cuda

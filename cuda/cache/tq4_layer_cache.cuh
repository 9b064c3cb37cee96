// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "cuda/cache/chunk.cuh"
#include "cuda/cache/full_layer_cache.cuh"
#include "cuda/flash/describe.cuh"
#include "cuda/flash/rows.cuh"
#include "cuda/qkv_prologue.cuh"
#include "cuda/tq4_attention.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/cache_format.hpp"
#include "gemma4/plan/step_plan.hpp"

/// The TQ4 cache of the full layers: records of 16 tokens, one codec for all layers.
/// Mirror: reference/cache/tq4_layer_cache.hpp
namespace gemma4::cuda {

static_assert(kTq4RecordTokens == Tq4Format::kRecordTokens, "the memory plan counts whole records");

template <>
class FullLayerCaches<Tq4Format> {
 public:
  using Plan = Tq4AttentionPlan;
  using RowsPlan = Tq4RowsPlan;
  static constexpr bool kSinkStores = Tq4Format::kStoredByPrologue;

  FullLayerCaches(const Tq4Format& format, const FullCacheShape& shape, std::span<std::byte> memory)
      : shape_(shape), codec_(std::make_unique<Tq4Codec>(shape.head_dim, format.options)), memory_(memory) {
    require(static_cast<std::int64_t>(memory.size()) >= shape.n_layer * layer_bytes(), "tq4 cache: ", memory.size(),
            " B of memory, need ", shape.n_layer * layer_bytes());
  }

  [[nodiscard]] Plan plan(const FullPlanWish& wish) const {
    Tq4AttentionChoice choice;
    choice.prefill.overlap = choice.decode.overlap = wish.overlap;
    choice.scratch_limit = wish.scratch_bytes;
    choice.max_kv_len = wish.max_kv_len;
    if (!wish.split_k) choice.prefill.n_split = choice.decode.n_split = 1;
    return plan_tq4_attention(shape_.attention(wish.n_query, wish.n_head), wish.options, wish.device, choice);
  }
  [[nodiscard]] StepPlanRow row(const Plan& plan) const {
    if (plan.path == Tq4Path::kPrefill) {
      AttentionOptions options;
      StepPlanRow row = describe_flash("attention_full", plan_tq4_pass(plan.prefill, options));
      row.path = concat("tq4 unpack + ", row.path);
      row.bytes = plan.workspace_bytes;
      row.tile += concat(row.tile.empty() ? "" : ", ", plan.prefill.heads_per_pass, " heads a pass");
      return row;
    }
    const bool bytes = codec_->k_bytes() && codec_->v_bytes();
    return {.component = "attention_full",
            .path = concat("tq4 decode, ", bytes ? "byte levels" : "level tables"),
            .tile = tile_text(plan.decode),
            .n_split = plan.decode.n_split,
            .bytes = plan.workspace_bytes,
            .why = bytes ? "" : "the codebook has no byte levels"};
  }

  [[nodiscard]] RowsPlan plan_rows(const FullPlanWish& wish, const Plan& one, std::int64_t partials_bytes) const {
    const bool bytes = codec_->k_bytes() && codec_->v_bytes();
    Tq4DecodePlan of_one = one.decode;
    of_one.overlap = wish.overlap;
    return plan_tq4_rows(shape_.attention(wish.n_query), of_one, bytes, partials_bytes);
  }
  [[nodiscard]] StepPlanRow row_of_rows(const RowsPlan& plan) const {
    return {.component = "attention_full",
            .path = concat("tq4 decode, ", plan.shape.n_query, " rows in one launch"),
            .tile = tile_text(plan.one),
            .n_split = plan.one.n_split,
            .bytes = plan.workspace_bytes,
            .why = detail::why_several_launches(plan)};
  }
  void attend_rows(std::int64_t index, const FullAttentionCall& call, const RowsPlan& plan, cudaStream_t stream) const {
    tq4_attention_rows({with_batch(call.q), records(index), *codec_, call.options, call.kv_len, with_batch(call.q)},
                       plan, call.partials, stream, call.work_count);
  }

  [[nodiscard]] Tq4Kv sink(std::int64_t index, const FreshKv& /*fresh*/) const { return {*codec_, records(index)}; }
  void store(std::int64_t index, const View<const Bf16, 3>& k, const View<const Bf16, 3>& v, const float* /*k_weight*/,
             const DevicePositions& positions, cudaStream_t stream) const {
    tq4_cache_update<Bf16>(*codec_, with_batch(k), with_batch(v), positions, records(index), stream);
  }
  void attend(std::int64_t index, const FullAttentionCall& call, const Plan& plan, cudaStream_t stream) const {
    tq4_attention({with_batch(call.q), records(index), *codec_, call.options, call.kv_len, with_batch(call.q)}, plan,
                  borrows_scratch(plan) ? call.scratch_and_partials : call.partials, stream, call.work_count);
  }
  [[nodiscard]] static constexpr bool borrows_scratch(const Plan& plan) { return plan.path == Tq4Path::kPrefill; }

  [[nodiscard]] StoredLayer stored(std::int64_t index) const {
    return {.parts = {shape_.part("records", records(index).data, tq4_record_bytes(shape_.head_dim),
                                  Tq4Format::kRecordTokens)}};
  }

  [[nodiscard]] Tq4Records records(std::int64_t index) const {
    return {memory_.data() + index * layer_bytes(), 1, shape_.n_head_kv, shape_.context, shape_.head_dim};
  }

 private:
  [[nodiscard]] static std::string tile_text(const Tq4DecodePlan& plan) {
    return concat("d", plan.tile.head_dim, " pairs ", plan.tile.pairs, " stages ", plan.tile.n_stage,
                  plan.overlap ? "" : ", no PDL");
  }
  [[nodiscard]] std::int64_t layer_bytes() const {
    return tq4_cache_bytes(1, shape_.n_head_kv, shape_.context, shape_.head_dim);
  }

  FullCacheShape shape_;
  std::unique_ptr<const Tq4Codec> codec_;  ///< stays where it is: captured kernels hold its tables
  std::span<std::byte> memory_;
};

}  // namespace gemma4::cuda

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
#include "cuda/kv_attention.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/qkv_prologue.cuh"
#include "gemma4/kv_format.hpp"
#include "gemma4/plan/step_plan.hpp"

/// The cache of the full layers that stores one vector for K and V: records of 16 tokens, one codec for all layers.
/// Mirror: reference/cache/kv_layer_cache.hpp
namespace gemma4::cuda {

template <>
class FullLayerCaches<KvFormat> {
 public:
  using Plan = KvAttentionPlan;
  using RowsPlan = KvRowsPlan;
  static constexpr bool kSinkStores = KvFormat::kStoredByPrologue;

  FullLayerCaches(const KvFormat& format, const FullCacheShape& shape, std::span<std::byte> memory)
      : format_(format),
        shape_(shape),
        codec_(std::make_unique<KvCodec>(shape.head_dim, format.options)),
        memory_(memory) {
    require(static_cast<std::int64_t>(memory.size()) >= shape.n_layer * layer_bytes(), format.name(),
            " cache: ", memory.size(), " B of memory, need ", shape.n_layer * layer_bytes());
  }

  [[nodiscard]] Plan plan(const FullPlanWish& wish) const {
    KvAttentionChoice choice;
    choice.prefill.overlap = choice.decode.overlap = wish.overlap;
    choice.scratch_limit = wish.scratch_bytes;
    choice.max_kv_len = wish.max_kv_len;
    if (!wish.split_k) choice.prefill.n_split = choice.decode.n_split = 1;
    return plan_kv_attention(shape_.attention(wish.n_query, wish.n_head), format_.options, wish.options, wish.device,
                             choice);
  }
  [[nodiscard]] StepPlanRow row(const Plan& plan) const {
    if (plan.path == KvPath::kPrefill) {
      AttentionOptions options;
      StepPlanRow row = describe_flash("attention_full", plan_tq4_pass(plan.prefill, options));
      row.path = concat(format_.name(), " unpack + ", row.path);
      row.bytes = plan.workspace_bytes;
      row.tile += concat(row.tile.empty() ? "" : ", ", plan.prefill.heads_per_pass, " heads a pass");
      if (!codec_->has_codes()) row.why = "no decode kernel reads bf16 records";
      return row;
    }
    return {.component = "attention_full",
            .path = concat(format_.name(), " decode"),
            .tile = tile_text(plan.decode.tile, plan.decode.overlap),
            .n_split = plan.decode.n_split,
            .bytes = plan.workspace_bytes};
  }

  [[nodiscard]] RowsPlan plan_rows(const FullPlanWish& wish, const Plan& one, std::int64_t partials_bytes) const {
    if (one.path != KvPath::kDecode) return {.misfit = "no decode kernel reads bf16 records"};
    if (wish.n_query < KvRowsPlan::kFewestRows) return {.misfit = "two rows take less time one by one"};
    KvDecodePlan of_one = one.decode;
    of_one.overlap = wish.overlap;
    return plan_kv_rows(shape_.attention(wish.n_query), of_one, wish.device, partials_bytes);
  }
  [[nodiscard]] StepPlanRow row_of_rows(const RowsPlan& plan) const {
    return {.component = "attention_full",
            .path = concat(format_.name(), " decode, ", plan.shape.n_query, " rows at once"),
            .tile = concat(tile_text(plan.tile, plan.one.overlap), ", row tiles ", plan.tile.row_tiles),
            .n_split = plan.one.n_split,
            .bytes = plan.workspace_bytes,
            .why = detail::why_several_launches(plan)};
  }
  void attend_rows(std::int64_t index, const FullAttentionCall& call, const RowsPlan& plan, cudaStream_t stream) const {
    kv_attention_rows(
        {with_batch(call.q), call.k_weight, records(index), *codec_, call.options, call.kv_len, with_batch(call.q)},
        plan, call.partials, stream, call.work_count);
  }

  [[nodiscard]] KvKv sink(std::int64_t index, const FreshKv& /*fresh*/) const { return {*codec_, records(index)}; }
  void store(std::int64_t index, const View<const Bf16, 3>& k, const View<const Bf16, 3>& v, const float* k_weight,
             const DevicePositions& positions, cudaStream_t stream) const {
    kv_cache_update<Bf16>(*codec_, with_batch(k), with_batch(v), k_weight, positions, records(index), stream);
  }
  void attend(std::int64_t index, const FullAttentionCall& call, const Plan& plan, cudaStream_t stream) const {
    kv_attention(
        {with_batch(call.q), call.k_weight, records(index), *codec_, call.options, call.kv_len, with_batch(call.q)},
        plan, borrows_scratch(plan) ? call.scratch_and_partials : call.partials, stream, call.work_count);
  }
  [[nodiscard]] static constexpr bool borrows_scratch(const Plan& plan) { return plan.path == KvPath::kPrefill; }

  [[nodiscard]] StoredLayer stored(std::int64_t index) const {
    return {
        .parts = {shape_.part("records", records(index).data, records(index).record_bytes(), KvFormat::kRecordTokens)}};
  }

  [[nodiscard]] KvRecords records(std::int64_t index) const {
    return {memory_.data() + index * layer_bytes(),
            1,
            shape_.n_head_kv,
            shape_.context,
            shape_.head_dim,
            format_.options.v_bits,
            format_.options.r_bits};
  }

 private:
  [[nodiscard]] static std::string tile_text(const KvDecodeTile& tile, bool overlap) {
    return concat("d", tile.head_dim, " warps ", tile.team_warps, " x ", tile.teams, " stages ", tile.n_stage,
                  tile.v_bits == 0 ? ", any width" : "", overlap ? "" : ", no PDL");
  }
  [[nodiscard]] std::int64_t layer_bytes() const {
    return kv_cache_bytes(1, shape_.n_head_kv, shape_.context, shape_.head_dim, format_.options);
  }

  KvFormat format_;
  FullCacheShape shape_;
  std::unique_ptr<const KvCodec> codec_;  ///< stays where it is: captured kernels hold its tables
  std::span<std::byte> memory_;
};

}  // namespace gemma4::cuda

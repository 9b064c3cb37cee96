// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cuda/device/profile.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/layer_cache.cuh"
#include "cuda/linear_prefill.cuh"
#include "cuda/model_weights.cuh"
#include "cuda/residual_norm.cuh"
#include "gemma4/config.hpp"
#include "gemma4/gguf/gguf.hpp"
#include "gemma4/plan/execution.hpp"
#include "gemma4/plan/step_plan.hpp"

/// What the two ways of a chunk through a layer share: that of a few tokens and that of a long chunk.
namespace gemma4::cuda {

/// How the output of a step that is not yet added to the residual stream will be.
struct PendingOutput {
  const float* post_norm = nullptr;  ///< null: nothing is pending
  float scale = 1.0f;
};

/// One forward pass: what embed() sets before its first kernel.
struct Pass {
  ChunkPlace chunk = {};
  LayerCachePlan caches = {};
  PendingOutput pending = {};
  /// Not null: every row goes through attention as a step of one token would at that position, and `caches` is the plan
  /// of one, with rows. On the device, [n_token]; with them kv_len of each.
  const std::int32_t* row_positions = nullptr;
  const std::int32_t* row_kv_lens = nullptr;
  bool overlap = true;       ///< programmatic dependent launch of what reads or writes the residual stream
  bool dynamic_rows = true;  ///< blocks of a decode product that end early take rows of others
  [[nodiscard]] std::int64_t n_token() const { return chunk.n_token; }
};

/// What both paths work with; the backend owns all of it.
struct PathContext {
  const PackedModel& model;
  LayerCaches& caches;
  LinearPrefill& gemm;
  const Stream& stream;
  DeviceInfo device;
  Profile** profile;  ///< where the backend keeps it
  float* residual;    ///< [n_token, hidden]
  Bf16* normed;       ///< [n_token, hidden]

  [[nodiscard]] const ModelConfig& config() const { return model.config(); }
  [[nodiscard]] ProfiledRange range(const char* name) const { return {name, *profile, stream}; }
  [[nodiscard]] QkNorms qk_norms(std::int64_t layer) const {
    const PackedLayer& weights = model.layer(layer);
    return {weights.attn_q_norm, weights.attn_k_norm, config().rms_epsilon};
  }
};

/// [n_token, heads, head_dim] as [n_token, heads * head_dim].
template <class T>
[[nodiscard]] View<T, 2> heads_as_rows(const View<T, 3>& heads) {
  return make_view(heads.data, heads.extent[0], heads.extent[1] * heads.extent[2]);
}

/// Finishes some rows of the residual stream and normalises them into `to`; nothing is pending on them afterwards.
/// @param options x_at_rest: the kernel in front does not write the residual stream
/// @return whether there are codes of the rows
template <class TPending>
bool finish_rows(const PathContext& context, const Pass& pass, const TPending* pending, std::int64_t first,
                 std::int64_t count, const float* norm, Bf16* to, ResidualNormOptions options) {
  const auto range = context.range("norm");
  const std::int64_t hidden = context.config().hidden;
  View<const TPending, 2> added = make_view(pending + first * hidden, count, hidden);
  if (pass.pending.post_norm == nullptr) added.data = nullptr;
  options.overlap = pass.overlap;
  return residual_norm<TPending, Bf16>(make_view(context.residual + first * hidden, count, hidden), added,
                                       pass.pending.post_norm, pass.pending.scale, norm, context.config().rms_epsilon,
                                       make_view(to, count, hidden), context.stream, options);
}

/// Row `row` of projected heads.
template <class TIn>
[[nodiscard]] ProjectedHeads<TIn> row_of(ProjectedHeads<TIn> heads, std::int64_t row) {
  const auto cut = [&](auto& view) {
    view.data += row * view.stride[0];
    view.extent[0] = 1;
  };
  cut(heads.q), cut(heads.k), cut(heads.v), cut(heads.q_out), cut(heads.k_out), cut(heads.v_out);
  return heads;
}

/// How a row among others goes through the caches: it must not begin before the one in front has stored its keys, and
/// no mask knows several rows.
[[nodiscard]] inline ExecutionPolicy policy_of_rows(ExecutionPolicy policy) {
  policy.launch_overlap = false;
  policy.kv_len_clamp = true;
  return policy;
}

/// Attention of one row after another, each over the keys up to its own. The bits are those of steps of one token; what
/// several rows could share is read and worked out anew for each.
template <class TIn>
void attend_row_by_row(const PathContext& context, const Pass& pass, std::int64_t layer,
                       const ProjectedHeads<TIn>& heads) {
  const LayerCaches& caches = context.caches;
  const QkNorms norms = context.qk_norms(layer);
  for (std::int64_t row = 0; row < pass.n_token(); ++row) {
    const ProjectedHeads<TIn> one = row_of(heads, row);
    const ChunkPlace place{.n_token = 1,
                           .position = DeviceCount::on_device(pass.row_positions + row),
                           .kv_len = DeviceCount::on_device(pass.row_kv_lens + row),
                           .positions = pass.row_positions + row};
    caches.store(layer, one, norms, place, pass.caches, context.stream);
    caches.attend(layer, one, norms, place, pass.caches, context.stream);
    if (caches.commits(layer, pass.caches)) caches.commit(layer, one, place, context.stream);
  }
}

template <class TIn>
void store_heads(const PathContext& context, const Pass& pass, std::int64_t layer, const ProjectedHeads<TIn>& heads) {
  const bool at_once = context.caches.attends_rows(layer, pass.caches);
  if (pass.row_positions != nullptr && !at_once) return;
  if (!at_once && context.caches.stores_in_attend(layer, pass.caches)) return;
  const auto range = context.range("qkv_prologue");
  if (at_once) {
    return context.caches.store_rows(layer, heads, context.qk_norms(layer), pass.chunk, pass.caches, context.stream);
  }
  context.caches.store(layer, heads, context.qk_norms(layer), pass.chunk, pass.caches, context.stream);
}

template <class TIn>
void attend_heads(const PathContext& context, const Pass& pass, std::int64_t layer, const ProjectedHeads<TIn>& heads) {
  {
    const auto range = context.range(context.config().sliding_layer(layer) ? "attention_sliding" : "attention_full");
    if (context.caches.attends_rows(layer, pass.caches)) {
      return context.caches.attend_rows(layer, heads, context.qk_norms(layer), pass.chunk, pass.row_kv_lens,
                                        pass.caches, context.stream);
    }
    if (pass.row_positions != nullptr) return attend_row_by_row(context, pass, layer, heads);
    context.caches.attend(layer, heads, context.qk_norms(layer), pass.chunk, pass.caches, context.stream);
  }
  if (context.caches.borrows_scratch(layer, pass.caches)) context.gemm.scratch_was_lent(context.stream);
  if (!context.caches.commits(layer, pass.caches)) return;
  const auto range = context.range("cache_commit");
  context.caches.commit(layer, heads, pass.chunk, context.stream);
}

/// Calls body(index of the first, its value, how many) for each run of neighbours in `rows`.
/// @throws std::invalid_argument unless they increase
template <class TBody>
void for_each_run(std::span<const std::int64_t> rows, TBody&& body) {
  for (std::size_t first = 0; first < rows.size();) {
    std::size_t next = first + 1;
    while (next < rows.size() && rows[next] == rows[next - 1] + 1) ++next;
    require(next == rows.size() || rows[next] > rows[next - 1], "backend: logits of row ",
            rows[next < rows.size() ? next : first], " after row ", rows[next - 1], ", need them in increasing order");
    body(static_cast<std::int64_t>(first), rows[first], static_cast<std::int64_t>(next - first));
    first = next;
  }
}

/// The types of a matrix that all layers have, as `Q4_K+Q6_K`.
template <class TMatrixOf>
[[nodiscard]] std::string types_of_layers(const PackedModel& model, TMatrixOf&& matrix_of) {
  std::vector<std::string> names;
  for (std::int64_t layer = 0; layer < model.config().n_layer(); ++layer) {
    const std::string name(type_name(matrix_of(model.layer(layer)).type));
    if (std::ranges::find(names, name) == names.end()) names.push_back(name);
  }
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : "+") + name;
  return text;
}

/// The rows of a layer's products in a step plan. @param path of all of them, before the types of their weights
[[nodiscard]] inline std::vector<StepPlanRow> product_rows(const PackedModel& model, const std::string& path,
                                                           const std::string& tile) {
  const auto row = [&](const char* component, auto&& matrix_of) {
    return StepPlanRow{
        .component = component, .path = concat(path, ", ", types_of_layers(model, matrix_of)), .tile = tile};
  };
  std::vector<StepPlanRow> rows{row("project_qkv", [](const PackedLayer& layer) { return layer.attn_q; }),
                                row("project_output", [](const PackedLayer& layer) { return layer.attn_output; }),
                                row("down", [](const PackedLayer& layer) { return layer.ffn_down; }),
                                row("gate_up", [](const PackedLayer& layer) {
                                  return layer.gate_up.is_fused() ? layer.gate_up.joined : layer.gate_up.gate;
                                })};
  std::int64_t n_apart = 0;
  for (std::int64_t layer = 0; layer < model.config().n_layer(); ++layer) {
    n_apart += model.layer(layer).gate_up.is_fused() ? 0 : 1;
  }
  if (n_apart > 0) {
    rows.back().why = concat("gate and up apart in ", n_apart, " layers: their types differ, or it is switched off");
  }
  return rows;
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "cuda/device/device_info.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/config.hpp"
#include "gemma4/session/stored_part.hpp"

/// What a cache format needs to be on a device: a specialisation of FullLayerCaches with
///
///   FullLayerCaches(const TFormat& format, const FullCacheShape& shape, std::span<std::byte> memory);
///   using Plan = ...;                                  // of an attention
///   Plan plan(const FullPlanWish& wish) const;         // pure host code; refuses what no kernel takes
///   StepPlanRow row(const Plan& plan) const;           // the same for the eye
///   static constexpr bool kSinkStores;                 // whether sink() puts K and V into the cache
///   auto sink(std::int64_t index, const FreshKv& fresh) const;  // what qkv_prologue() writes to
///   void store(index, k, v, k_weight, positions, stream) const;  // K and V [n_token, n_head_kv, head_dim] into the
///                                                                // cache; k_weight [head_dim] of k's norm
///   void attend(index, call, plan, stream) const;      // over the cache, the chunk's own tokens included
///   static constexpr bool borrows_scratch(const Plan& plan);
///   StoredLayer stored(std::int64_t index) const;      // where its bytes are (gemma4/session/stored_part.hpp)
///
/// and, where it takes several rows at once that each must have the bits of a step of their own,
///
///   using RowsPlan = ...;                              // with `const char* misfit`: why not; null: they go at once
///   RowsPlan plan_rows(const FullPlanWish& wish, const Plan& one, std::int64_t partials_bytes) const;  // host code
///   StepPlanRow row_of_rows(const RowsPlan& plan) const;
///   void attend_rows(index, call, plan, stream) const;  // call.kv_len is that of the first row; behind store()
///
/// `index` counts the full layers. All memory is the caller's, as many bytes as the memory plan has for cache_full.
namespace gemma4::cuda {

/// Not defined for a format that no device has a cache of.
template <class TFormat>
class FullLayerCaches;

/// The full layers of a model and how many tokens they remember.
struct FullCacheShape {
  std::int64_t n_layer = 0, n_head = 0, n_head_kv = 0, head_dim = 0, context = 0;

  /// Bytes [n_head_kv, n_row, row_bytes] as a part that can be taken out and put back.
  [[nodiscard]] StoredPart part(std::string_view name, void* data, std::int64_t row_bytes,
                                std::int64_t row_tokens = 1) const {
    return {.name = name,
            .data = static_cast<std::byte*>(data),
            .n_head = n_head_kv,
            .n_row = (context + row_tokens - 1) / row_tokens,
            .row_bytes = row_bytes,
            .row_tokens = row_tokens};
  }
  /// @param n_head_query query heads; 0: the layers' own
  [[nodiscard]] AttentionShape attention(std::int64_t n_query, std::int64_t n_head_query = 0) const {
    return {.batch = 1,
            .n_query = n_query,
            .n_head = n_head_query > 0 ? n_head_query : n_head,
            .n_head_kv = n_head_kv,
            .head_dim = head_dim,
            .buffer_len = context};
  }
};

/// Several rows where a format has nothing for them: each goes by itself.
struct RowByRow {
  const char* misfit = "the format takes one row at a time";
};

/// What a plan is asked for.
struct FullPlanWish {
  std::int64_t n_query = 1;
  std::int64_t n_head = 0;      ///< query heads; 0: the layers' own
  std::int64_t max_kv_len = 0;  ///< no call will have more valid rows
  AttentionOptions options;
  DeviceInfo device;
  bool split_k = true;
  bool overlap = true;             ///< programmatic dependent launch, where the device has it
  std::int64_t scratch_bytes = 0;  ///< for K and V as bf16
};

}  // namespace gemma4::cuda

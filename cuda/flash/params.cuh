// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "gemma4/float16.hpp"

/// What the flash kernels over bf16 keys and values share: where keys come from and which of them a row sees.
///
/// Keys are addressed by absolute position. A call has `fresh` keys, at positions fresh_begin and up, and, on a sliding
/// layer, `old` keys before them in a ring. A flat cache is all fresh with fresh_begin = 0.
/// Query token t stands at kv_end - n_query + t and sees the positions [hi - window, hi) with hi one more than its own
/// (causal) or kv_end. The rows of one KV head are numbered token * group + head within the group.
namespace gemma4::cuda::detail {

inline constexpr int kNoWindow = 1 << 30;  ///< more than any position

/// One source of keys and values; strides in elements.
struct KeySource {
  const Bf16* k = nullptr;
  const Bf16* v = nullptr;
  std::int64_t k_stride[3] = {};  ///< of batch, head, row
  std::int64_t v_stride[3] = {};
};

struct FlashParams {
  const Bf16* q = nullptr;
  Bf16* out = nullptr;
  std::int64_t q_stride[3] = {};  ///< of batch, token, head
  std::int64_t out_stride[3] = {};
  KeySource fresh = {};
  KeySource old = {};                   ///< sliding only
  int ring_len = 0;                     ///< 0: no old keys
  const std::int32_t* count = nullptr;  ///< kv_len (flat) or the chunk's first position (sliding); null: count_host
  int count_host = 0;
  int count_step = 0;  ///< 1: of each sequence of the batch, behind each other (cuda/bf16_attention/rows.cuh)
  int max_kv_end = 0;  ///< rows in the flat buffer: nothing beyond is touched, whatever `count` says
  const std::uint8_t* mask = nullptr;  ///< [batch, 1, n_query, mask_extent], nonzero = visible
  std::int64_t mask_extent = 0;
  int batch = 1, n_query = 1, n_head_kv = 1, group = 1;
  int window = kNoWindow;
  bool causal = true, causal_skip = true;
  float scale_log2 = 1.0f;  ///< scale * log2(e): softmax runs in base 2
  int n_split = 1;
  bool old_at_rest = false;     ///< the kernel before this one writes neither the old keys that are seen nor `count`
  float* partial_o = nullptr;   ///< [n_split, batch * n_head_kv, n_query * group, head_dim]
  float* partial_ml = nullptr;  ///< [n_split, batch * n_head_kv, n_query * group, 2]: maximum (base 2), sum
  unsigned long long* tile_count = nullptr;  ///< of visited key tiles; tests only
};
static_assert(std::is_trivially_copyable_v<FlashParams>);

/// The key positions of a sequence, read once by each thread.
struct KeyExtent {
  int fresh_begin;
  int kv_end;
};

[[nodiscard]] __device__ inline KeyExtent key_extent(const FlashParams& params, int batch = 0) {
  const int before = params.count_step * batch;
  const int count = params.count != nullptr ? params.count[before] : params.count_host + before;
  if (params.ring_len > 0) return {count, count + params.n_query};
  return {0, max(0, min(count, params.max_kv_end))};
}

/// Positions [lo, hi) that query `token` may see before any mask.
struct KeyRange {
  int lo, hi;
};

[[nodiscard]] __device__ inline KeyRange visible_keys(const FlashParams& params, const KeyExtent& keys, int token) {
  const int hi = params.causal ? min(keys.kv_end, keys.kv_end - params.n_query + token + 1) : keys.kv_end;
  return {max(0, hi - params.window), max(0, hi)};
}

/// Rows of a call for one KV head.
[[nodiscard]] __host__ __device__ inline int flash_rows(const FlashParams& params) {
  return params.n_query * params.group;
}

}  // namespace gemma4::cuda::detail

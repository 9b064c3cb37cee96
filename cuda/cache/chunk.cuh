// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/device/device_count.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// What a forward pass hands to the caches.
namespace gemma4::cuda {

/// The tokens that a forward pass takes: how many, and where they stand.
struct ChunkPlace {
  std::int64_t n_token = 0;
  DeviceCount position = {};                ///< of the first
  DeviceCount kv_len = {};                  ///< position + n_token
  const std::int32_t* positions = nullptr;  ///< [n_token] on the device; where LayerCachePlan::needs_positions
};

/// q, k and v of a chunk as projected, [n_token, heads, head_dim]; v may be k. `q_out` takes the normalised and rotated
/// q and then the result of attention, and may be q. `k_out` and `v_out` take K and V where they are needed beside the
/// cache; they may be k and v unless those are one.
template <class TIn>
struct ProjectedHeads {
  View<TIn, 3> q, k, v;
  View<Bf16, 3> q_out, k_out, v_out;
};

/// A query of which no key is stored: a drafter's, at the position behind the newest token that the caches hold. On the
/// device.
struct LoneQuery {
  View<Bf16, 3> q;                         ///< [1, n_head, head_dim], normalised and turned; takes the result
  const std::int32_t* kv_len = nullptr;    ///< tokens in the caches, its own position
  const std::int32_t* newest = nullptr;    ///< kv_len - 1
  View<const Bf16, 3> newest_k, newest_v;  ///< [1, n_head_kv, head_dim], a sliding layer's at the position *newest
};

/// One call of a full layer's attention.
struct FullAttentionCall {
  View<Bf16, 3> q;  ///< [n_token, n_head, head_dim], normalised and rotated by position; takes the result
  View<const Bf16, 3> fresh_k = {}, fresh_v = {};  ///< the chunk's, for a format whose store() left them there
  const std::int32_t* positions = nullptr;         ///< of the chunk, where ChunkPlace has them
  AttentionOptions options;
  DeviceCount kv_len;
  std::span<std::byte> partials;              ///< of split keys
  std::span<std::byte> scratch_and_partials;  ///< K and V as bf16, then what split keys leave
  const float* k_weight = nullptr;            ///< [head_dim] the layer's weight of k's norm
  unsigned long long* work_count = nullptr;   ///< of visited records or key tiles; tests only
};

}  // namespace gemma4::cuda

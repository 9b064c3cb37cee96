// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/quantisers/quantiser.hpp"
#include "gemma4/view.hpp"
#include "reference/bf16_attention.hpp"
#include "reference/bf16_cache.hpp"
#include "reference/decoder_layer.hpp"
#include "reference/simulated_cache.hpp"

namespace gemma4::reference {

/// Full attention over a flat bf16 cache that holds what a simulated format would read back. The chunk attends to its
/// own quantised K and V, as later tokens will.
template <Quantiser TQuantiser>
class SimulatedLayerCache {
 public:
  SimulatedLayerCache(const AttentionConfig& attention, std::int64_t context,
                      std::shared_ptr<const SimulatedCodec<TQuantiser>> codec)
      : head_dim_(attention.head_dim),
        codec_(std::move(codec)),
        cache_(1, attention.n_head_kv, context, attention.head_dim) {}

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend(const Qkv<Scalar>& qkv, std::int64_t position) {
    const std::int64_t n_token = qkv.q.rows();
    std::vector<std::int32_t> positions(static_cast<std::size_t>(n_token));
    std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(position));
    simulated_cache_update<Scalar>(*codec_, heads(qkv.k), heads(qkv.v), positions, cache_);
    const auto& stored = cache_;
    Matrix<Scalar> out(n_token, qkv.q.cols());
    bf16_attention<Scalar, Bf16>(heads(qkv.q), stored.k(), stored.v(), {.scale = ModelConfig::kAttentionScale},
                                 position + n_token,
                                 make_view(out.data(), 1, n_token, out.cols() / head_dim_, head_dim_));
    return out;
  }

 private:
  /// A matrix of heads as the view [1, n_token, n_heads, head_dim].
  template <class Scalar>
  [[nodiscard]] View<const Scalar, 4> heads(const Matrix<Scalar>& m) const {
    return make_view(m.data(), 1, m.rows(), m.cols() / head_dim_, head_dim_);
  }

  std::int64_t head_dim_;
  std::shared_ptr<const SimulatedCodec<TQuantiser>> codec_;
  FlatCache<Bf16> cache_;
};

}  // namespace gemma4::reference

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/kvarn_format.hpp"
#include "reference/bf16_cache.hpp"
#include "reference/cache/flat_layer_cache.hpp"
#include "reference/cache/full_layer_cache.hpp"
#include "reference/cache/heads.hpp"
#include "reference/decoder_layer.hpp"
#include "reference/rotation.hpp"

/// The cache of a full layer in KVarN's format, simulated. A device has none (cuda/cache/kvarn_layer_cache.cuh says
/// so).
namespace gemma4::reference {

/// What the format would read back of a tile.
class KvarnCodec {
 public:
  KvarnCodec(std::int64_t head_dim, const KvarnFormat& format)
      : format_(format), rotation_(Rotation<float>::signed_hadamard(head_dim, format.seed)) {}

  /// The tile [kTileTokens, head_dim], rows tokens, in place.
  void roundtrip(CacheSide side, Matrix<float>& tile) const {
    rotation_.forward(tile);
    auto [token, channel] = balance(tile);
    if (side == CacheSide::kKey) {  // steps of each channel, which take in its scale
      for (Eigen::Index j = 0; j < tile.cols(); ++j) round_line(tile.col(j), channel(j), format_.k_bits);
      for (Eigen::Index i = 0; i < tile.rows(); ++i) tile.row(i) *= stored(token(i));
    } else {
      for (Eigen::Index i = 0; i < tile.rows(); ++i) round_line(tile.row(i), token(i), format_.v_bits);
      for (Eigen::Index j = 0; j < tile.cols(); ++j) tile.col(j) *= stored(channel(j));
    }
    rotation_.inverse(tile);
  }

  struct Scales {
    Eigen::VectorXf token, channel;
  };

  /// Divides rows and columns by scales, which come back, until both have deviation 1.
  [[nodiscard]] static Scales balance(Matrix<float>& tile) {
    Scales scales{Eigen::VectorXf::Ones(tile.rows()), Eigen::VectorXf::Ones(tile.cols())};
    for (std::int64_t round = 0; round < KvarnFormat::kRounds; ++round) {
      for (Eigen::Index j = 0; j < tile.cols(); ++j) take_up(tile.col(j), scales.channel(j));
      for (Eigen::Index i = 0; i < tile.rows(); ++i) take_up(tile.row(i), scales.token(i));
    }
    return scales;
  }

 private:
  /// The line's deviation goes into its scale; a line of equal values keeps it.
  template <class TLine>
  static void take_up(TLine&& line, float& scale) {
    const double mean = line.template cast<double>().mean();
    const double deviation = std::sqrt((line.template cast<double>().array() - mean).square().mean());
    if (deviation == 0.0) return;
    line /= static_cast<float>(deviation);
    scale *= static_cast<float>(deviation);
  }

  [[nodiscard]] static float stored(float value) { return to_float(to_bf16(value)); }

  /// `line` times `scale` as low + step * code.
  template <class TLine>
  static void round_line(TLine&& line, float scale, int bits) {
    const float low = line.minCoeff(), top = static_cast<float>((1 << bits) - 1);
    const float step = (line.maxCoeff() - low) / top;
    const float stored_low = stored(low * scale), stored_step = stored(step * scale);
    for (Eigen::Index i = 0; i < line.size(); ++i) {
      const float code = step == 0.0f ? 0.0f : std::clamp(std::rint((line(i) - low) / step), 0.0f, top);
      line(i) = stored_low + stored_step * code;
    }
  }

  KvarnFormat format_;
  Rotation<float> rotation_;
};

/// Full attention over a flat bf16 cache in which every full tile is what the format reads back.
class KvarnLayerCache {
 public:
  KvarnLayerCache(const AttentionConfig& attention, std::int64_t context, std::shared_ptr<const KvarnCodec> codec)
      : head_dim_(attention.head_dim),
        codec_(std::move(codec)),
        cache_(1, attention.n_head_kv, context, attention.head_dim) {}

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend(const Qkv<Scalar>& qkv, std::int64_t position) {
    constexpr std::int64_t kTile = KvarnFormat::kTileTokens;
    Matrix<Scalar> out(qkv.q.rows(), qkv.q.cols());
    for (std::int64_t first = 0; first < qkv.q.rows();) {
      const std::int64_t at = position + first;
      const std::int64_t count = std::min({KvarnFormat::kPiece, qkv.q.rows() - first, kTile - at % kTile});
      const Qkv<Scalar> piece{qkv.q.middleRows(first, count), qkv.k.middleRows(first, count),
                              qkv.v.middleRows(first, count)};
      bf16_cache_update<Scalar, Bf16>(detail::heads_view(piece.k, head_dim_), detail::heads_view(piece.v, head_dim_),
                                      detail::consecutive(at, count), cache_);
      if ((at + count) % kTile == 0) quantise_tile(at + count - kTile);
      out.middleRows(first, count) = attend_queries(piece.q, {}, at + count);
      first += count;
    }
    return out;
  }

  template <class Scalar>
  [[nodiscard]] Matrix<Scalar> attend_queries(const Matrix<Scalar>& q, std::span<const float> /*k_norm*/,
                                              std::int64_t kv_len) const {
    return detail::attend_flat_cache(q, head_dim_, cache_, kv_len);
  }

  [[nodiscard]] StoredLayer stored() {
    StoredLayer layer = detail::stored_flat_cache(cache_);
    layer.tile = KvarnFormat::kTileTokens;
    return layer;
  }

 private:
  void quantise_tile(std::int64_t first) {
    Matrix<float> tile(KvarnFormat::kTileTokens, head_dim_);
    for (const CacheSide side : {CacheSide::kKey, CacheSide::kValue}) {
      const View<Bf16, 4> rows = side == CacheSide::kKey ? cache_.k() : cache_.v();
      for (std::int64_t h = 0; h < rows.extent[1]; ++h) {
        const auto each = [&](auto&& visit) {
          for (Eigen::Index t = 0; t < tile.rows(); ++t) {
            for (Eigen::Index i = 0; i < tile.cols(); ++i) visit(tile(t, i), rows(0, h, first + t, i));
          }
        };
        each([](float& value, const Bf16& from) { value = to_float(from); });
        codec_->roundtrip(side, tile);
        each([](const float& value, Bf16& to) { to = to_bf16(value); });
      }
    }
  }

  std::int64_t head_dim_;
  std::shared_ptr<const KvarnCodec> codec_;
  FlatCache<Bf16> cache_;
};

/// All layers share one codec.
template <class Scalar>
struct FullLayerCaches<KvarnFormat, Scalar> {
  using Cache = KvarnLayerCache;
  FullLayerCaches(const KvarnFormat& format, const AttentionConfig& attention)
      : attention(attention), codec(std::make_shared<const KvarnCodec>(attention.head_dim, format)) {}
  [[nodiscard]] Cache make(std::int64_t context) const { return {attention, context, codec}; }
  AttentionConfig attention;
  std::shared_ptr<const KvarnCodec> codec;
};

}  // namespace gemma4::reference

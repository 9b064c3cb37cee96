// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cuda/device/device_count.cuh"
#include "cuda/device/for_head_dim.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/kv_cache/layout.cuh"
#include "cuda/kv_cache/levels.cuh"
#include "cuda/kv_cache/rows.cuh"
#include "cuda/kv_cache/store.cuh"
#include "cuda/kv_cache/unpack.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/rotation.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/cache_update.hpp"
#include "gemma4/error.hpp"
#include "gemma4/kv_format.hpp"
#include "gemma4/view.hpp"

/// One vector for K and V on the device (gemma4/kv_format.hpp): V and the rotated quarter of K into records, and K and
/// V rebuilt from them.
///
/// Per vector x, one warp: length |x| in double, y = H (x / |x|), sign and number of edges below |y|, norm = |x| /
/// |levels| (or |x|, raw), then its bits into the record of its token. V and R of all tokens and heads are one launch.
/// Other tokens of the record keep every bit. The arithmetic is that of reference::KvVectorCodec<float>, stage by
/// stage, so that codes agree away from rounding ties. Bytes a token and head: 4 D (bf16) read and D (4 v + r) / 32 + 4
/// written. Mirror: reference/kv_cache.hpp
namespace gemma4::cuda {

/// Rotations and codebooks of a cache, ready for kernels; of kv16r16, which has neither, the widths alone.
class KvCodec {
 public:
  /// @throws std::invalid_argument unless head_dim is a power of two from 64 to 512 and both widths are 3 to 6 bits, or
  /// 16
  KvCodec(std::int64_t head_dim, const KvOptions& options) : head_dim_(head_dim), options_(options) {
    require(is_power_of_two(head_dim) && head_dim >= 64 && head_dim <= 512, "KvCodec: head_dim ", head_dim,
            ", need a power of two from 64 to 512");
    params_.corrected = options.norm == NormKind::kCorrected;
    if (!options.has_codes()) {
      require(options.r_bits == KvOptions::kPlainBits, "KvCodec: V of 16 bits and R of ", options.r_bits,
              ", need 16 both");
      return;
    }
    const std::int64_t n_r = kv_rotated_size(head_dim);
    v_rotation_.emplace(Rotation::make(options.rotation, head_dim, options.seed));
    r_rotation_.emplace(Rotation::make(options.rotation, n_r, options.seed));
    v_ = solve_kv_codebook(options.codebook, options.v_bits, head_dim);
    r_ = solve_kv_codebook(options.codebook, options.r_bits, n_r);
    v_bytes_ = kv_byte_levels(v_);
    r_bytes_ = kv_byte_levels(r_);
    params_.v_rotation = v_rotation_->params();
    params_.r_rotation = r_rotation_->params();
    params_.v = side_params(v_);
    params_.r = side_params(r_);
  }

  [[nodiscard]] std::int64_t head_dim() const { return head_dim_; }
  [[nodiscard]] const KvOptions& options() const { return options_; }
  [[nodiscard]] bool has_codes() const { return options_.has_codes(); }
  [[nodiscard]] const KvCodecParams& params() const { return params_; }
  [[nodiscard]] const KvCodebook& v_codebook() const { return v_; }
  [[nodiscard]] const KvCodebook& r_codebook() const { return r_; }
  /// The codebooks as decode attention reads them.
  [[nodiscard]] const KvByteLevels& v_bytes() const { return v_bytes_; }
  [[nodiscard]] const KvByteLevels& r_bytes() const { return r_bytes_; }

  /// Refuses a cache of another kind.
  void require_fits(const char* who, const ConstKvRecords& cache) const {
    require_kv_records(who, cache);
    require(cache.head_dim == head_dim_, who, ": codec of head_dim ", head_dim_, ", the cache has ", cache.head_dim);
    require(cache.v_bits == options_.v_bits && cache.r_bits == options_.r_bits, who, ": codec of ", options_.v_bits,
            " and ", options_.r_bits, " bits, the cache has ", cache.v_bits, " and ", cache.r_bits);
  }

 private:
  [[nodiscard]] static KvSideParams side_params(const KvCodebook& codebook) {
    KvSideParams side{};
    side.bits = codebook.bits;
    side.n_half = codebook.n_half;
    std::copy_n(codebook.level, KvCodebook::kMaxHalf, side.level);
    std::copy_n(codebook.edge, KvCodebook::kMaxHalf - 1, side.edge);
    return side;
  }

  std::int64_t head_dim_;
  KvOptions options_;
  std::optional<Rotation> v_rotation_, r_rotation_;
  KvCodebook v_{}, r_{};
  KvByteLevels v_bytes_{}, r_bytes_{};
  KvCodecParams params_{};
};

namespace detail {

/// One warp a vector: item = ((b * n_new + t) * n_head_kv + h) * 2 + (0: V, 1: K), the longer work first.
template <int kHeadDim, class TIn>
__global__ void __launch_bounds__(32 * kKvStoreWarps)
    kv_update_kernel(const __grid_constant__ KvCodecParams codec, const __grid_constant__ View<const TIn, 4> k,
                     const __grid_constant__ View<const TIn, 4> v, const float* k_weight, const std::int32_t* positions,
                     const __grid_constant__ KvRecords cache) {
  constexpr int kValues = kHeadDim / 32;
  const std::int64_t item = blockIdx.x * std::int64_t{kKvStoreWarps} + threadIdx.x / 32;
  const bool is_k = (item & 1) != 0;
  const std::int64_t n_new = k.extent[1], h = item / 2 % cache.n_head_kv, t = item / 2 / cache.n_head_kv % n_new,
                     b = item / 2 / cache.n_head_kv / n_new;
  if (b >= cache.batch) return;
  const std::int32_t position = positions[t];
  float x[kValues];
  load_values(&(is_k ? k : v)(b, t, h, static_cast<int>(threadIdx.x & 31) * kValues), x);
  if (position < 0 || position >= cache.buffer_len) return;  // of the whole warp
  kv_store<kHeadDim>(codec, k_weight, is_k, x, cache, b, h, position);
}

}  // namespace detail

/// Compresses V and what is rotated of K, k and v [batch, n_new, n_head_kv, head_dim], and stores them at `positions`
/// of the cache, in one launch; every other token keeps its bits. k is K whole, as RoPE left it. The contract is that
/// of gemma4/cache_update.hpp. Nothing waits for the host: the call can be captured, and a replay reads the positions
/// and vectors of that moment. TIn is Bf16 or float; vectors begin at multiples of 16 bytes.
/// @param k_weight [head_dim] on the device: w, the weight of k's norm
/// @throws std::invalid_argument on extents that do not fit and, where the host knows the positions, on one outside the
///         buffer or given twice
template <class TIn>
void kv_cache_update(const KvCodec& codec, const View<const TIn, 4>& k, const View<const TIn, 4>& v,
                     const float* k_weight, const DevicePositions& positions, const KvRecords& cache,
                     cudaStream_t stream) {
  const char* const who = "kv_cache_update";
  codec.require_fits(who, cache);
  const std::int64_t extents[4] = {cache.batch, positions.count, cache.n_head_kv, cache.head_dim};
  require_extents(who, "k", k, extents);
  require_extents(who, "v", v, extents);
  require_contiguous_rows(who, "k", k);
  require_contiguous_rows(who, "v", v);
  if (!positions.host.empty()) {
    require(static_cast<std::int64_t>(positions.host.size()) == positions.count, who, ": ", positions.host.size(),
            " positions on the host, ", positions.count, " on the device");
    require_positions(who, positions.host, cache.buffer_len);
  }
  if (positions.count == 0) return;
  require(positions.device != nullptr, who, ": positions are null");
  require(k_weight != nullptr, who, ": k_weight is null");
  const std::int64_t n_warp = 2 * cache.batch * positions.count * cache.n_head_kv;
  for_head_dim(who, cache.head_dim, [&](auto head_dim) {
    detail::Launch{.what = "kv_update_kernel",
                   .grid = static_cast<unsigned>((n_warp + detail::kKvStoreWarps - 1) / detail::kKvStoreWarps),
                   .block = 32 * detail::kKvStoreWarps,
                   .stream = stream}(detail::kv_update_kernel<decltype(head_dim)::value, TIn>, codec.params(), k, v,
                                     k_weight, positions.device, cache);
  });
}

/// Rows [n_head, rows, head_dim] that kv_unpack() fills, on the device; rows are whole records.
template <class TOut>
struct KvUnpacked {
  TOut* k = nullptr;
  TOut* v = nullptr;
  std::int64_t rows = 0;
};

/// K = w * V with c * R at the rotated places, c being their scales, and V, of the valid tokens of `n_head` KV heads of
/// a sequence from head0 on, neither of them rotated by the codec any more; rows of the last record behind kv_len are
/// whatever it holds.
/// @param k_weight [head_dim] on the device, 16-byte aligned: w, the weight of k's norm
/// @param kv_len   valid tokens; absent: as many as `to` has rows
/// @throws std::invalid_argument on a cache of another kind, or rows that are no whole records of it
template <class TOut>
void kv_unpack(const KvCodec& codec, const ConstKvRecords& cache, std::int64_t batch, std::int64_t head0,
               std::int64_t n_head, const float* k_weight, DeviceCount kv_len, const KvUnpacked<TOut>& to,
               cudaStream_t stream) {
  const char* const who = "kv_unpack";
  codec.require_fits(who, cache);
  require(k_weight != nullptr && reinterpret_cast<std::uintptr_t>(k_weight) % 16 == 0, who,
          ": k_weight is null or not aligned to 16 bytes");
  require(to.rows >= 1 && to.rows % kKvRecordTokens == 0 && to.rows <= cache.n_record() * kKvRecordTokens, who, ": ",
          to.rows, " rows, need whole records of 16 and at most ", cache.n_record() * kKvRecordTokens);
  require(batch >= 0 && batch < cache.batch && head0 >= 0 && head0 + n_head <= cache.n_head_kv, who, ": heads ", head0,
          " to ", head0 + n_head, " of sequence ", batch, ", the cache has ", cache.batch, " of ", cache.n_head_kv);
  detail::KvUnpackParams<TOut> params{
      .cache = cache, .codec = codec.params(), .k_weight = k_weight, .k = to.k, .v = to.v, .rows = to.rows};
  params.batch = static_cast<int>(batch);
  params.head0 = static_cast<int>(head0);
  params.kv_len = kv_len.device;
  params.kv_len_host = static_cast<int>(kv_len.known() ? kv_len.host : to.rows);
  constexpr std::int64_t kBlocks = 2048;  // of a head; more records than that take turns
  const dim3 grid(static_cast<unsigned>(std::min<std::int64_t>(to.rows / detail::kKvUnpackWarps, kBlocks)),
                  static_cast<unsigned>(n_head));
  for_head_dim(who, cache.head_dim, [&](auto head_dim) {
    detail::Launch{.what = "kv_unpack_kernel", .grid = grid, .block = 32 * detail::kKvUnpackWarps, .stream = stream}(
        detail::kv_unpack_kernel<decltype(head_dim)::value, TOut>, params);
  });
}

}  // namespace gemma4::cuda

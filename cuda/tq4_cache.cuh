// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>

#include "cuda/device/for_head_dim.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/ptx/warp_reduce.cuh"
#include "cuda/rotation.cuh"
#include "cuda/tq4_cache/layout.cuh"
#include "gemma4/cache_update.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/tq4_codebook.hpp"
#include "gemma4/tq4_format.hpp"
#include "gemma4/view.hpp"

/// Compression of K and V into a TQ4 cache on the device, and back.
///
/// Per vector x, one warp: length |x| in double, y = R (x / |x|), index = number of boundaries below y, norm = |x| /
/// |levels| (or |x|, raw), then its bits into the record of its token. K and V of all tokens and heads are one launch.
/// Other tokens of the record keep every bit: a K word belongs to one token and is stored; a V word holds 2 dims of 4
/// tokens, and a token flips its own bits in it with one atomic XOR of integers, whose result does not depend on order.
/// The arithmetic is that of reference::Tq4Codec<float>, stage by stage, so that codes agree away from rounding ties.
/// Bytes: 2 D (bf16) read and D / 2 + 2 written a vector, 8 times that as 16-byte pieces for V. Mirror:
/// reference/tq4_cache.hpp
namespace gemma4::cuda {

namespace detail {

/// Above every value, and nothing is above it: the missing boundaries of a table of 4 or 8 levels.
inline constexpr float kNoBoundary = std::numeric_limits<float>::infinity();

}  // namespace detail

/// One side's table as kernels take it; entries beyond n_level are such that no value reaches them.
struct Tq4SideParams {
  float boundaries[15];
  float centroids[16];
};

struct Tq4CodecParams {
  RotationParams rotation;
  Tq4SideParams k, v;
  bool corrected = true;
};
static_assert(std::is_trivially_copyable_v<Tq4CodecParams>);

/// Rotation and codebooks of a cache, ready for kernels.
class Tq4Codec {
 public:
  /// @throws std::invalid_argument unless head_dim is a power of two from 64 to 512 and both widths are 2, 3 or 4 bits
  Tq4Codec(std::int64_t head_dim, const Tq4Options& options)
      : Tq4Codec(Rotation::make(options.rotation, head_dim, options.seed),
                 solve_codebook(options.codebook, options.k_bits, head_dim),
                 solve_codebook(options.codebook, options.v_bits, head_dim), options.norm) {}

  /// A codec from given parts, as a golden file brings them.
  /// @throws std::invalid_argument when a codebook of 16 levels is not symmetric
  Tq4Codec(Rotation rotation, const Codebook& k_codebook, const Codebook& v_codebook, NormKind norm)
      : rotation_(std::move(rotation)), k_(k_codebook), v_(v_codebook), norm_(norm) {
    params_ = {.rotation = rotation_.params(),
               .k = side_params(k_),
               .v = side_params(v_),
               .corrected = norm == NormKind::kCorrected};
    static_cast<void>(level_table<F16>(k_));  // refuses what the layout cannot hold
    static_cast<void>(level_table<F16>(v_));
    k_bytes_ = byte_levels(k_);
    v_bytes_ = byte_levels(v_);
  }

  [[nodiscard]] const Rotation& rotation() const { return rotation_; }
  [[nodiscard]] std::int64_t head_dim() const { return rotation_.head_dim(); }
  [[nodiscard]] NormKind norm_kind() const { return norm_; }
  [[nodiscard]] const Codebook& k_codebook() const { return k_; }
  [[nodiscard]] const Codebook& v_codebook() const { return v_; }
  /// The codebooks as bytes, where that is as good as bf16.
  [[nodiscard]] const std::optional<ByteLevels>& k_bytes() const { return k_bytes_; }
  [[nodiscard]] const std::optional<ByteLevels>& v_bytes() const { return v_bytes_; }
  [[nodiscard]] const Tq4CodecParams& params() const { return params_; }

 private:
  [[nodiscard]] static Tq4SideParams side_params(const Codebook& codebook) {
    Tq4SideParams side{};
    for (int i = 0; i < 16; ++i) {
      side.centroids[i] = i < codebook.n_level ? codebook.centroids[static_cast<std::size_t>(i)] : 0.0f;
      if (i < 15) {
        side.boundaries[i] =
            i + 1 < codebook.n_level ? codebook.boundaries[static_cast<std::size_t>(i)] : detail::kNoBoundary;
      }
    }
    return side;
  }

  Rotation rotation_;
  Codebook k_, v_;
  NormKind norm_;
  std::optional<ByteLevels> k_bytes_, v_bytes_;
  Tq4CodecParams params_;
};

/// Where new tokens go: `count` positions in device memory. `host`, if given, is the same numbers and lets the call
/// refuse those outside the buffer or given twice. On the device a position outside the buffer is not written at all;
/// positions given twice leave codes of neither token.
struct DevicePositions {
  const std::int32_t* device = nullptr;
  std::int64_t count = 0;
  std::span<const std::int32_t> host = {};
};

namespace detail {

/// x / |x| in place (the zero vector stays), as the reference rounds it: the quotient in double, then to float.
/// @return |x|
template <int kHeadDim>
__device__ __forceinline__ double normalize_warp(float (&x)[kHeadDim / 32]) {
  constexpr int kValues = kHeadDim / 32;
  double squares = 0.0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) squares = fma(static_cast<double>(x[i]), static_cast<double>(x[i]), squares);
  const double length = sqrt(warp_sum(squares));
  const double inverse = 1.0 / (length == 0.0 ? 1.0 : length);
#pragma unroll
  for (float& value : x) value = static_cast<float>(static_cast<double>(value) * inverse);
  return length;
}

/// Codes of this lane's values; returns the length of the levels that the warp chose.
template <int kHeadDim>
__device__ __forceinline__ double quantize_warp(const Tq4SideParams& side, const float (&y)[kHeadDim / 32],
                                                int (&index)[kHeadDim / 32]) {
  constexpr int kValues = kHeadDim / 32;
#pragma unroll
  for (int& i : index) i = 0;
  float level[kValues];
#pragma unroll
  for (float& value : level) value = side.centroids[0];
#pragma unroll
  for (int b = 0; b < 15; ++b) {
    const float boundary = side.boundaries[b], centroid = side.centroids[b + 1];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const bool above = y[i] > boundary;  // a tie stays below, NaN gets index 0
      index[i] += above ? 1 : 0;
      level[i] = above ? centroid : level[i];
    }
  }
  double squares = 0.0;
#pragma unroll
  for (const float value : level) squares = fma(static_cast<double>(value), static_cast<double>(value), squares);
  return sqrt(warp_sum(squares));
}

/// The bits of a token's K codes into its words. Where a lane has less than a word, neighbours join.
template <int kHeadDim>
__device__ __forceinline__ void store_k_codes(std::uint32_t* words, int token, const int (&index)[kHeadDim / 32]) {
  constexpr int kValues = kHeadDim / 32, kSharing = kValues < 8 ? 8 / kValues : 1;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int w = 0; w < (kValues + 7) / 8; ++w) {
    std::uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < (kValues < 8 ? kValues : 8); ++i) {
      bits |= tq4_element_bits((lane % kSharing) * kValues + i, index[8 * w + i]);
    }
#pragma unroll
    for (int lane_bit = 1; lane_bit < kSharing; lane_bit *= 2) bits |= __shfl_xor_sync(~0u, bits, lane_bit);
    if (lane % kSharing == 0) words[tq4_k_place(kHeadDim, token, lane * kValues + 8 * w).word] = bits;
  }
}

/// This lane's part of a token's V codes: dims g and g + 8 of a fragment share a word, and where both are in one lane
/// they are written together.
template <int kHeadDim>
struct VCodes {
  static constexpr int kValues = kHeadDim / 32;
  static constexpr bool kPairs = kValues == 16;
  static constexpr int kWords = kPairs ? 8 : kValues;
  std::uint32_t old[kWords];

  [[nodiscard]] __device__ static Tq4Place place(int token, int w) {
    return tq4_v_place(token, static_cast<int>(threadIdx.x & 31) * kValues + w);
  }

  /// Starts the reads early: their latency hides behind the arithmetic.
  __device__ __forceinline__ void load(const std::uint32_t* words, int token) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) old[w] = __ldcg(words + place(token, w).word);
  }

  __device__ __forceinline__ void store(std::uint32_t* words, int token, const int (&index)[kValues]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const Tq4Place at = place(token, w);
      std::uint32_t bits = tq4_element_bits(at.element, index[w]), mask = tq4_element_mask(at.element);
      if constexpr (kPairs) {
        bits |= tq4_element_bits(at.element + 2, index[w + 8]);
        mask |= tq4_element_mask(at.element + 2);
      }
      atomicXor(words + at.word, (old[w] ^ bits) & mask);
    }
  }
};

/// Compresses the vector x in a warp into its place in a cache; x is used up. `position` lies in the buffer.
template <int kHeadDim>
__device__ __forceinline__ void tq4_store_vector(const Tq4CodecParams& codec, bool is_k, float (&x)[kHeadDim / 32],
                                                 const Tq4Records& cache, std::int64_t b, std::int64_t h,
                                                 std::int64_t position) {
  std::byte* const record = cache.record(b, h, position / kTq4RecordTokens);
  const int token = static_cast<int>(position % kTq4RecordTokens);
  auto* const words = reinterpret_cast<std::uint32_t*>(record + (is_k ? 0 : tq4_v_codes_offset(kHeadDim)));
  VCodes<kHeadDim> v_codes;
  if (!is_k) v_codes.load(words, token);

  const double length = normalize_warp<kHeadDim>(x);
  rotate_warp<kHeadDim>(codec.rotation, x);
  int index[kHeadDim / 32];
  const double levels = quantize_warp<kHeadDim>(is_k ? codec.k : codec.v, x, index);
  if (is_k) {
    store_k_codes<kHeadDim>(words, token, index);
  } else {
    v_codes.store(words, token, index);
  }
  if ((threadIdx.x & 31) == 0) {
    auto* const norms =
        reinterpret_cast<Tq4Norm*>(record + (is_k ? tq4_k_norms_offset(kHeadDim) : tq4_v_norms_offset(kHeadDim)));
    norms[token] = to_bf16(static_cast<float>(codec.corrected ? length / levels : length));
  }
}

/// One warp a vector: item = ((b * n_new + t) * n_head_kv + h) * 2 + (0: K, 1: V).
template <int kHeadDim, class TIn>
__global__ void __launch_bounds__(128)
    tq4_update_kernel(const __grid_constant__ Tq4CodecParams codec, const __grid_constant__ View<const TIn, 4> k,
                      const __grid_constant__ View<const TIn, 4> v, const std::int32_t* positions,
                      const __grid_constant__ Tq4Records cache) {
  constexpr int kValues = kHeadDim / 32;
  const std::int64_t item = blockIdx.x * std::int64_t{4} + threadIdx.x / 32;
  const bool is_k = (item & 1) == 0;
  const std::int64_t n_new = k.extent[1], h = item / 2 % cache.n_head_kv, t = item / 2 / cache.n_head_kv % n_new,
                     b = item / 2 / cache.n_head_kv / n_new;
  if (b >= cache.batch) return;
  const int lane = threadIdx.x & 31;
  const std::int32_t position = positions[t];
  float x[kValues];
  load_values(&(is_k ? k : v)(b, t, h, lane * kValues), x);
  if (position < 0 || position >= cache.buffer_len) return;  // of the whole warp
  tq4_store_vector<kHeadDim>(codec, is_k, x, cache, b, h, position);
}

/// One warp a stored vector of [batch, n_head_kv, buffer_len].
template <int kHeadDim, class TOut>
__global__ void __launch_bounds__(128)
    tq4_decompress_kernel(const __grid_constant__ Tq4CodecParams codec, const __grid_constant__ ConstTq4Records cache,
                          const __grid_constant__ View<TOut, 4> k, const __grid_constant__ View<TOut, 4> v) {
  constexpr int kValues = kHeadDim / 32;
  const std::int64_t item = blockIdx.x * std::int64_t{4} + threadIdx.x / 32;
  const bool is_k = (item & 1) == 0;
  const std::int64_t row = item / 2 % cache.buffer_len, head = item / 2 / cache.buffer_len;
  if (head >= cache.batch * cache.n_head_kv) return;
  const std::int64_t b = head / cache.n_head_kv, h = head % cache.n_head_kv;
  const int lane = threadIdx.x & 31, token = static_cast<int>(row % kTq4RecordTokens);
  const std::byte* const record = cache.record(b, h, row / kTq4RecordTokens);
  const auto* const words = reinterpret_cast<const std::uint32_t*>(record + (is_k ? 0 : tq4_v_codes_offset(kHeadDim)));
  const auto* const norms =
      reinterpret_cast<const Tq4Norm*>(record + (is_k ? tq4_k_norms_offset(kHeadDim) : tq4_v_norms_offset(kHeadDim)));
  const Tq4SideParams& side = is_k ? codec.k : codec.v;
  const float norm = to_float(norms[token]);
  float x[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int dim = lane * kValues + i;
    const Tq4Place at = is_k ? tq4_k_place(kHeadDim, token, dim) : tq4_v_place(token, dim);
    x[i] = norm * side.centroids[tq4_element_index(words[at.word], at.element)];
  }
  rotate_back_warp<kHeadDim>(codec.rotation, x);
  store_values(&(is_k ? k : v)(b, h, row, lane * kValues), x);
}

}  // namespace detail

/// Compresses k and v [batch, n_new, n_head_kv, head_dim] and stores them at `positions` of the cache, in one launch;
/// every other token keeps its bits. The contract is that of gemma4/cache_update.hpp. Nothing waits for the host: the
/// call can be captured, and a replay reads the positions and vectors of that moment. TIn is Bf16 or float; vectors
/// begin at multiples of 16 bytes.
/// @throws std::invalid_argument on extents that do not fit and, where the host knows the positions, on one outside the
///         buffer or given twice
template <class TIn>
void tq4_cache_update(const Tq4Codec& codec, const View<const TIn, 4>& k, const View<const TIn, 4>& v,
                      const DevicePositions& positions, const Tq4Records& cache, cudaStream_t stream) {
  const char* const who = "tq4_cache_update";
  require_tq4_records(who, cache);
  require(codec.head_dim() == cache.head_dim, who, ": codec of head_dim ", codec.head_dim(), ", the cache has ",
          cache.head_dim);
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
  const std::int64_t n_warp = 2 * cache.batch * positions.count * cache.n_head_kv;
  for_head_dim(who, cache.head_dim, [&](auto head_dim) {
    detail::Launch{
        .what = "tq4_update_kernel", .grid = static_cast<unsigned>((n_warp + 3) / 4), .block = 128, .stream = stream}(
        detail::tq4_update_kernel<decltype(head_dim)::value, TIn>, codec.params(), k, v, positions.device, cache);
  });
}

/// The stored vectors, rotated back: k, v [batch, n_head_kv, buffer_len, head_dim], float or Bf16.
/// @throws std::invalid_argument on extents that do not fit
template <class TOut>
void tq4_decompress(const Tq4Codec& codec, const ConstTq4Records& cache, const View<TOut, 4>& k, const View<TOut, 4>& v,
                    cudaStream_t stream) {
  const char* const who = "tq4_decompress";
  require_tq4_records(who, cache);
  require(codec.head_dim() == cache.head_dim, who, ": codec of head_dim ", codec.head_dim(), ", the cache has ",
          cache.head_dim);
  const std::int64_t extents[4] = {cache.batch, cache.n_head_kv, cache.buffer_len, cache.head_dim};
  require_extents(who, "k", k, extents);
  require_extents(who, "v", v, extents);
  require_contiguous_rows(who, "k", k);
  require_contiguous_rows(who, "v", v);
  const std::int64_t n_warp = 2 * cache.batch * cache.n_head_kv * cache.buffer_len;
  for_head_dim(who, cache.head_dim, [&](auto head_dim) {
    detail::Launch{.what = "tq4_decompress_kernel",
                   .grid = static_cast<unsigned>((n_warp + 3) / 4),
                   .block = 128,
                   .stream = stream}(detail::tq4_decompress_kernel<decltype(head_dim)::value, TOut>, codec.params(),
                                     cache, k, v);
  });
}

}  // namespace gemma4::cuda

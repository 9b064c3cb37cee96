// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "cuda/device/launch.cuh"
#include "cuda/ptx/cache_hint.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/residual_norm/row_norm.cuh"
#include "cuda/weights/activation_blocks.cuh"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/platform.hpp"
#include "gemma4/view.hpp"

/// What stands between two steps of a layer, for any number of tokens: the output that is pending is normalised, added
/// to the residual stream and scaled, and the stream is normalised for the next step. One launch, one block a row.
///
/// What was tried in its place, last at e1c3639d on an H200: that every block of the product behind it does this work
/// for itself made a decode step of the 31B 1.016 and 1.013 times as long at 512 and 32768 tokens (`ablation`,
/// norm_launch off), since this kernel lets that product in before it waits itself. That attn_output asks for the first
/// 8 MB of gate and up was not shown to pay: without it 1.00 and 0.99 (weight_fetch_ahead off). Both are in that
/// commit, with tests. Mirror: reference/decoder_layer.hpp, finish_and_normalise
namespace gemma4::cuda {

namespace detail {

inline constexpr int kMaxNormWidth = 8 * kRowPiece * kRowThreads;

template <class TPending, class TOut>
struct ResidualNormParams {
  View<float, 2> x;
  View<const TPending, 2> pending;  ///< data is null where nothing is pending
  View<TOut, 2> h;
  const float* post_norm;
  const float* norm;
  float scale, epsilon;
  bool whole_pieces;    ///< every piece has kRowPiece values, at a multiple of 16 bytes
  std::uint8_t* codes;  ///< of h, [n_token, n_group] blocks, where pieces are whole; null: none
  int n_group;
};

/// Eight values of a row as they are stored.
template <class T>
using StoredPiece = RawValues<kRowPiece, T>;

/// Values k to k + 7 of a row; zeros beyond its end. From the L2, since what an earlier kernel wrote may be read before
/// the kernel in front has ended.
template <class T>
__device__ __forceinline__ void load_row_piece(StoredPiece<T>& to, const T* row, int k, int width, bool whole_pieces) {
  if (whole_pieces && k < width) {
    to.load_from_l2(row + k);
  } else {
    to.load_some_from_l2(row + k, width - k);
  }
}

template <class T>
__device__ __forceinline__ void store_row_piece(T* row, int k, int width, bool whole_pieces,
                                                const float (&piece)[kRowPiece]) {
  if (whole_pieces && k < width) return store_values(row + k, piece);
#pragma unroll
  for (int i = 0; i < kRowPiece; ++i) {
    if (k + i < width) row[k + i] = from_float<T>(piece[i]);
  }
}

/// First value of this thread's piece `p`.
[[nodiscard]] __device__ __forceinline__ int piece_begin(int p) {
  return (static_cast<int>(threadIdx.x) + p * kRowThreads) * kRowPiece;
}

/// Pieces of a row of float that a thread holds.
template <int kPieces>
__device__ __forceinline__ void load_row_pieces(const float* row, int width, bool whole_pieces,
                                                StoredPiece<float> (&to)[kPieces]) {
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    load_row_piece(to[p], row, piece_begin(p), width, whole_pieces);
  }
}

/// x becomes x', which is also stored: what is pending, normalised, is added, and the sum scaled.
/// @param post_norm  there already where kAtRest
/// @param parts      shared memory of one sum
template <bool kAtRest, int kPieces, class TPending, class TOut>
__device__ __forceinline__ void add_pending(const ResidualNormParams<TPending, TOut>& params,
                                            StoredPiece<float> (&post_norm)[kPieces], float (&parts)[kRowWarps],
                                            float (&x)[kPieces][kRowPiece]) {
  const int width = static_cast<int>(params.x.extent[1]);
  const bool whole = params.whole_pieces;
  float* const x_row = params.x.data + blockIdx.x * params.x.stride[0];
  const TPending* const pending_row = params.pending.data + blockIdx.x * params.pending.stride[0];
  StoredPiece<TPending> stored[kPieces];
  float pending[kRowPiece], factor[kRowPiece], sum = 0.0f;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) load_row_piece(stored[p], pending_row, piece_begin(p), width, whole);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    stored[p].widen(pending);
    sum = add_squares(sum, pending);
  }
  const float scale = norm_scale(sum_of_row(sum, parts, static_cast<int>(threadIdx.x)), width, params.epsilon);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    if constexpr (!kAtRest) load_row_piece(post_norm[p], params.post_norm, piece_begin(p), width, whole);
    post_norm[p].widen(factor);
    stored[p].widen(pending);
#pragma unroll
    for (int i = 0; i < kRowPiece; ++i) x[p][i] = finished(x[p][i], pending[i], scale, factor[i], params.scale);
    store_row_piece(x_row, piece_begin(p), width, whole, x[p]);
  }
}

/// A piece of h becomes codes as it is stored, rounded. Every lane calls: four of them hold a block.
template <class TPending, class TOut>
__device__ __forceinline__ void store_piece_codes(const ResidualNormParams<TPending, TOut>& params, int p,
                                                  const float (&piece)[kRowPiece]) {
  float stored[kRowPiece];
#pragma unroll
  for (int i = 0; i < kRowPiece; ++i) stored[i] = to_float(from_float<TOut>(piece[i]));
  std::uint8_t* const row = params.codes + std::int64_t{blockIdx.x} * params.n_group * kActivationBytesPerGroup;
  const int k = piece_begin(p);
  quantize_eight(stored, row, params.n_group, k / 32, k < static_cast<int>(params.x.extent[1]));
}

/// Blocks of a multiprocessor: as many as the registers of a thread's pieces allow, of which those that are read early
/// need more than those that come when their turn is.
template <int kPieces, bool kAtRest, class TPending>
inline constexpr int kResidualBlocks = kPieces > 3             ? 1
                                       : kAtRest               ? 2
                                       : sizeof(TPending) == 2 ? 4
                                                               : 3;

/// @tparam kPieces pieces that a thread holds, at most
/// @tparam kAtRest all but what is pending comes, and the next kernel is let in, before the kernel in front has ended
template <int kPieces, bool kAtRest, class TPending, class TOut>
__global__ void __launch_bounds__(kRowThreads, kResidualBlocks<kPieces, kAtRest, TPending>)
    residual_norm_kernel(const __grid_constant__ ResidualNormParams<TPending, TOut> params) {
  __shared__ float parts[2][kRowWarps];
  const int width = static_cast<int>(params.x.extent[1]), thread = static_cast<int>(threadIdx.x);
  const bool whole = params.whole_pieces, is_pending = params.pending.data != nullptr;
  float* const x_row = params.x.data + blockIdx.x * params.x.stride[0];
  StoredPiece<float> stream[kPieces], post_norm[kPieces], norm[kPieces];
  if constexpr (kAtRest) {
    load_row_pieces(params.norm, width, whole, norm);
    if (is_pending) load_row_pieces(params.post_norm, width, whole, post_norm);
    if (is_pending) load_row_pieces(x_row, width, whole, stream);
    allow_next_kernel();
  } else {
    // The weights of the norms are not written by any kernel: they may be on their way before the wait.
    for (int k = thread * 32; k < width; k += kRowThreads * 32) {
      prefetch_line(params.norm + k);
      if (is_pending) prefetch_line(params.post_norm + k);
    }
  }
  wait_for_previous_kernel();
  if (!kAtRest || !is_pending) load_row_pieces(x_row, width, whole, stream);
  float x[kPieces][kRowPiece], factor[kRowPiece];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) stream[p].widen(x[p]);
  if (is_pending) add_pending<kAtRest>(params, post_norm, parts[0], x);
  if constexpr (!kAtRest) allow_next_kernel();
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) sum = add_squares(sum, x[p]);
  const float scale = norm_scale(sum_of_row(sum, parts[1], thread), width, params.epsilon);
  TOut* const h_row = params.h.data + blockIdx.x * params.h.stride[0];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    if constexpr (!kAtRest) load_row_piece(norm[p], params.norm, piece_begin(p), width, whole);
    norm[p].widen(factor);
#pragma unroll
    for (int i = 0; i < kRowPiece; ++i) factor[i] = normalised(x[p][i], scale, factor[i]);
    store_row_piece(h_row, piece_begin(p), width, whole, factor);
    if (params.codes != nullptr) store_piece_codes(params, p, factor);
  }
}

template <class T>
[[nodiscard]] bool has_whole_pieces(const View<T, 2>& view) {
  return reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 &&
         view.stride[0] * static_cast<std::int64_t>(sizeof(T)) % 16 == 0;
}

}  // namespace detail

/// How residual_norm() runs, and what it makes besides.
struct ResidualNormOptions {
  /// On sm_90, lets the kernel be set up while the one before it in the stream still runs.
  bool overlap = false;
  /// Where something is pending: x was written before the kernel in front of this one began, and what that one writes
  /// is not read by the next kernel before its own wait: a step of decoding, where a product stands in front and
  /// another behind. Then x and the weights of the norms are read, and the next kernel is let in, while the one in
  /// front still runs: products behind it fill their rings. For width up to 6144; wider rows do without.
  bool x_at_rest = false;
  /// Room for h as 8-bit integers too (cuda/weights/activation_blocks.cuh), for products of few tokens behind
  /// (LinearOptions::made), each block of which would otherwise make them for itself. None are made where pieces of 16
  /// bytes or blocks of 32 values do not divide the rows.
  LinearCodes codes = {};
};

/// x = (x + rms_norm(pending, post_norm)) * scale, then h = rms_norm(x, norm), row by row in float32, see
/// cuda/residual_norm/row_norm.cuh.
///
/// Rows of a chunk that nobody wants need not be given: views of the last rows finish and normalise those alone.
/// @param x          [n_token, hidden], the residual stream, in place
/// @param pending    [n_token, hidden] Bf16 or float; with null data nothing is pending, x stays and only h is made
/// @param post_norm  [hidden] on the device; not read where nothing is pending
/// @param norm       [hidden] on the device
/// @param h          [n_token, hidden] Bf16 or float; may be `pending` where the types agree, not x
/// @return whether there are codes of h
/// @throws std::invalid_argument when extents differ, a norm is missing, h is x, hidden is above 16384, or the room for
///         codes is too small
/// Error of x': (width / 256 + 20) * 2^-24 of the normalised pending, and 2^-23 of x'; of h the same again, and its
/// rounding. Bytes for each value: 8 of x, 2 or 4 of pending, 2 or 4 of h: 2048 rows of 5376 in bf16, 132 MB, 31 us at
/// 4.3 TB/s. Where rows do not begin at multiples of 16 bytes the same bits come in single values, more slowly.
template <class TPending, class TOut>
bool residual_norm(const View<float, 2>& x, const View<const TPending, 2>& pending, const float* post_norm, float scale,
                   const float* norm, float epsilon, const View<TOut, 2>& h, cudaStream_t stream,
                   const ResidualNormOptions& options = {}) {
  constexpr const char* kWho = "residual_norm";
  const std::int64_t n_token = x.extent[0], width = x.extent[1];
  const bool is_pending = pending.data != nullptr;
  require_extents(kWho, "h", h, {n_token, width});
  require_contiguous_rows(kWho, "x", x);
  require_contiguous_rows(kWho, "h", h);
  if (is_pending) {
    require_extents(kWho, "pending", pending, {n_token, width});
    require_contiguous_rows(kWho, "pending", pending);
  }
  require(width >= 1 && width <= detail::kMaxNormWidth, kWho, ": width ", width, ", need 1 to ", detail::kMaxNormWidth);
  require(n_token < (std::int64_t{1} << 31), kWho, ": ", n_token, " rows, need fewer than 2^31");
  require(norm != nullptr && (!is_pending || post_norm != nullptr), kWho, ": a norm has no weights");
  require(static_cast<const void*>(h.data) != x.data || n_token == 0, kWho, ": h takes the place of x");
  if (n_token == 0) return false;
  const bool whole =
      width % detail::kRowPiece == 0 && detail::has_whole_pieces(x) && detail::has_whole_pieces(h) &&
      detail::has_whole_pieces(make_view(norm, 1, width)) &&
      (!is_pending || (detail::has_whole_pieces(pending) && detail::has_whole_pieces(make_view(post_norm, 1, width))));
  const LinearCodes& codes = options.codes;
  const bool has_codes = codes.data != nullptr && whole && width % 32 == 0;
  const std::int64_t code_bytes = linear_codes_bytes(n_token, width);
  require(!has_codes || codes.n_bytes >= code_bytes, kWho, ": room for codes of ", codes.n_bytes, " B, need ",
          code_bytes, " B for ", n_token, " rows of ", width, " values");
  const detail::ResidualNormParams<TPending, TOut> params{
      .x = x,
      .pending = pending,
      .h = h,
      .post_norm = post_norm,
      .norm = norm,
      .scale = scale,
      .epsilon = epsilon,
      .whole_pieces = whole,
      .codes = has_codes ? codes.data : nullptr,
      .n_group = static_cast<int>(detail::activation_groups(width))};
  const auto launch = [&](auto kernel) {
    detail::Launch{.what = "residual_norm_kernel",
                   .grid = static_cast<unsigned>(n_token),
                   .block = detail::kRowThreads,
                   .stream = stream,
                   .overlap = options.overlap}(kernel, params);
  };
  constexpr int kBlockValues = detail::kRowPiece * detail::kRowThreads;
  const auto launch_pieces = [&]<int kPieces>() {
    options.x_at_rest ? launch(detail::residual_norm_kernel<kPieces, true, TPending, TOut>)
                      : launch(detail::residual_norm_kernel<kPieces, false, TPending, TOut>);
  };
  if (width <= kBlockValues) {
    launch_pieces.template operator()<1>();
  } else if (width <= 3 * kBlockValues) {
    launch_pieces.template operator()<3>();
  } else {
    launch(detail::residual_norm_kernel<8, false, TPending, TOut>);
  }
  return has_codes;
}

}  // namespace gemma4::cuda

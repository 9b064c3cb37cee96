// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/fused_mlp.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/quantized_linear.cuh"
#include "cuda/weights/dequantise.cuh"

/// Products with quantised weights for many tokens: a slice of rows is dequantised to bf16 in a scratch buffer of
/// bounded size, then cuBLASLt multiplies it with bf16 activations, accumulating in float; slice after slice.
///
/// Decoding costs 2 + 0.56 bytes a weight once for all tokens: some 20 ms for the whole 31B on an H200, a tenth of the
/// products of 2048 tokens and nearly half of those of 512. Error: weights and outputs rounded to bf16, sums in float.
/// Mirror: reference/quantized_linear.hpp
namespace gemma4::cuda {

namespace detail {

inline void check_blas(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) throw std::runtime_error(concat(what, ": cuBLASLt status ", int(status)));
}

struct BlasDeleter {
  void operator()(cublasLtHandle_t handle) const { cublasLtDestroy(handle); }
  void operator()(cublasLtMatmulDesc_t desc) const { cublasLtMatmulDescDestroy(desc); }
  void operator()(cublasLtMatrixLayout_t layout) const { cublasLtMatrixLayoutDestroy(layout); }
  void operator()(cublasLtMatmulPreference_t preference) const { cublasLtMatmulPreferenceDestroy(preference); }
};
template <class THandle>
using Blas = std::unique_ptr<std::remove_pointer_t<THandle>, BlasDeleter>;

}  // namespace detail

/// Rows of a slice, for `count` rows of `cols` weights and n_token tokens. Tiles of 128 rows by 256 tokens are dealt
/// out to sm_count multiprocessors: a slice has whole rounds of them, as alike as possible, and takes at most half of
/// the scratch where one round fits there, so that the next slice is dequantised while this one is multiplied.
[[nodiscard]] inline std::int64_t prefill_slice_rows(std::int64_t count, std::int64_t cols, std::int64_t n_token,
                                                     std::int64_t scratch_values, int sm_count) {
  constexpr std::int64_t kTileRows = 128, kTileTokens = 256;
  const auto divided_up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t round = kTileRows * std::max<std::int64_t>(1, sm_count / divided_up(n_token, kTileTokens));
  const std::int64_t half = scratch_values / 2 / cols, whole = scratch_values / cols;
  if (count <= half || (half < round && count <= whole)) return count;
  const std::int64_t fit = half < round ? whole : half;
  if (fit < round) return fit >= kTileRows ? fit / kTileRows * kTileRows : fit;
  const std::int64_t n_round = divided_up(count, round), n_slice = divided_up(n_round, fit / round);
  return divided_up(n_round, n_slice) * round;
}

/// Owns cuBLASLt's handle, and one algorithm for each shape: the same shape always runs the same one, without split
/// sums that depend on timing.
///
/// Slices are dequantised in a stream of its own, ahead of the products: dequantising waits for room in the scratch
/// alone, so that it fills what the products, or whatever else is in the caller's stream, leave idle. (Between products
/// alone that gains next to nothing on an H200: they keep all multiprocessors busy.) Hence weights must be there before
/// a call: nothing that still waits in the caller's stream may write them. In a recorded stream, or with `overlap`
/// false, dequantising and multiplying take turns. One object serves one stream at a time.
///
/// compute-sanitizer's racecheck reports hazards inside cuBLASLt's kernels (nvjet_*, in a program of nothing else too);
/// .ci/sanitize tells them from ours.
class LinearPrefill {
 public:
  static constexpr std::int64_t kBlasBytes = std::int64_t{32} << 20;
  static constexpr std::int64_t kDefaultScratchBytes = std::int64_t{21504} * 5376 * 2;  ///< gate or down in one slice

  /// Borrows device memory, at multiples of 16 bytes, that must outlive it. No call allocates any.
  /// @param scratch         for dequantised weights; at least one row must fit
  /// @param blas_workspace  kBlasBytes are wanted; with fewer cuBLASLt has fewer algorithms to choose from
  LinearPrefill(std::span<std::byte> scratch, std::span<std::byte> blas_workspace, bool overlap = false)
      : scratch_(reinterpret_cast<Bf16*>(scratch.data()), scratch.size() / sizeof(Bf16)),
        blas_workspace_(blas_workspace),
        overlap_(overlap),
        sm_count_(current_device().sm_count) {
    require(detail::is_aligned(scratch.data()) && detail::is_aligned(blas_workspace.data()),
            "LinearPrefill: scratch or workspace does not begin at a multiple of 16 bytes");
    cublasLtHandle_t handle = nullptr;
    detail::check_blas(cublasLtCreate(&handle), "creation of a cuBLASLt handle");
    handle_.reset(handle);
  }

  /// Owns its memory: scratch_bytes for dequantised weights and kBlasBytes.
  explicit LinearPrefill(std::int64_t scratch_bytes = kDefaultScratchBytes, bool overlap = false)
      : LinearPrefill(DeviceBuffer<std::byte>(scratch_bytes), DeviceBuffer<std::byte>(kBlasBytes), overlap) {}

  /// The caller has put work into `stream` that uses the scratch for something else: the next slice waits for it. (Work
  /// that comes after a product in the stream finds the scratch free.)
  void scratch_was_lent(cudaStream_t stream) {
    if (is_capturing(stream)) return;
    next_ = 0;
    take(static_cast<std::int64_t>(scratch_.size()), dequantiser_).done.record(stream);
    next_ = 0;
  }

  /// out = x * weight^T.
  /// @param x    [n_token, cols] bf16, rows at multiples of 16 bytes
  /// @param out  [n_token, rows] Bf16 or float; must not alias x
  /// @throws std::invalid_argument when shapes differ or not one row fits into the scratch
  template <class TOut>
  void linear(const View<const Bf16, 2>& x, const PackedMatrix& weight, const View<TOut, 2>& out, cudaStream_t stream) {
    detail::require_linear("quantized_linear", x, weight, out, weight.rows);
    rows(x, weight, 0, 1, weight.rows, out, stream);
  }

  /// out = gelu(x gate^T) * (x up^T); the two products in bf16, the rest in float. Fused weights (rows in turn) and
  /// separate ones take the same path over the same numbers, so that their bits agree.
  /// @param scratch  [2, n_token, ffn_hidden] Bf16
  /// @param out      [n_token, ffn_hidden], at most 65535 tokens; may be the beginning of the scratch, without gaps
  template <class TOut>
  void gate_up(const View<const Bf16, 2>& x, const GateUpWeights& weights, std::span<Bf16> scratch,
               const View<TOut, 2>& out, cudaStream_t stream) {
    const std::int64_t n_token = x.extent[0], width = weights.ffn_hidden(), count = n_token * width;
    require_extents("gate_up", "out", out, {n_token, width});
    require(static_cast<std::int64_t>(scratch.size()) >= 2 * count, "gate_up: scratch of ", scratch.size(),
            " values, need ", 2 * count);
    require(n_token <= 65535, "gate_up: ", n_token, " tokens, at most 65535 a call");
    if (count == 0) return;
    const auto gate = make_view(scratch.data(), n_token, width), up = make_view(scratch.data() + count, n_token, width);
    if (weights.is_fused()) {
      require(x.extent[1] == weights.hidden(), "gate_up: x has width ", x.extent[1], ", weight has ", weights.hidden(),
              " columns");
      rows(x, weights.joined, 0, 2, width, gate, stream);
      rows(x, weights.joined, 1, 2, width, up, stream);
    } else {
      linear(x, weights.gate, gate, stream);
      linear(x, weights.up, up, stream);
    }
    detail::gelu_times_rows<TOut>(gate, up, out, stream);
  }

 private:
  LinearPrefill(DeviceBuffer<std::byte> scratch, DeviceBuffer<std::byte> blas_workspace, bool overlap)
      : LinearPrefill({scratch.data(), static_cast<std::size_t>(scratch.bytes())},
                      {blas_workspace.data(), static_cast<std::size_t>(blas_workspace.bytes())}, overlap) {
    owned_scratch_ = std::move(scratch);
    owned_workspace_ = std::move(blas_workspace);
  }

  struct Product {
    detail::Blas<cublasLtMatmulDesc_t> operation;
    detail::Blas<cublasLtMatrixLayout_t> weight, x, out;
    cublasLtMatmulAlgo_t algo;
  };
  using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool>;

  /// Values of the scratch that are read until `done` has been reached.
  struct Place {
    std::int64_t begin = 0, end = 0;
    Event done;
  };

  /// Rows first, first + step, ... (`count`) of the weight, slice by slice.
  template <class TOut>
  void rows(const View<const Bf16, 2>& x, const PackedMatrix& weight, std::int64_t first, std::int64_t step,
            std::int64_t count, const View<TOut, 2>& out, cudaStream_t stream) {
    if (x.extent[0] == 0 || count == 0) return;
    const auto n_value = static_cast<std::int64_t>(scratch_.size());
    require(n_value >= weight.cols, "quantized_linear: scratch of ", scratch_.size_bytes(), " B, need at least ",
            2 * weight.cols, " B for one row");
    if (weight.type == TensorType::kBf16 && weight.cols % 8 == 0 && detail::is_aligned(weight.data)) {
      const Bf16* const values = reinterpret_cast<const Bf16*>(weight.data) + first * weight.cols;  // as they are
      return multiply(x, values, step * weight.cols, weight.cols, count, out.data, out.stride[0], stream);
    }
    const bool recorded = is_capturing(stream);
    const cudaStream_t dequantiser = overlap_ && !recorded ? static_cast<cudaStream_t>(dequantiser_) : stream;
    const std::int64_t slice = prefill_slice_rows(count, weight.cols, x.extent[0], n_value, sm_count_);
    for (std::int64_t row = 0; row < count; row += slice) {
      const std::int64_t n = std::min(slice, count - row);
      Place* const place = recorded ? nullptr : &take(n * weight.cols, dequantiser);
      Bf16* const dequantised = scratch_.data() + (recorded ? 0 : place->begin);
      dequantise_rows(weight, first + row * step, n, step, dequantised, dequantiser);
      if (dequantiser != stream) {
        dequantised_.record(dequantiser);
        dequantised_.delay(stream);
      }
      multiply(x, dequantised, weight.cols, weight.cols, n, out.data + row, out.stride[0], stream);
      if (!recorded) place->done.record(stream);
    }
  }

  [[nodiscard]] static bool is_capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &status), "question for a capture");
    return status != cudaStreamCaptureStatusNone;
  }

  /// Room for `count` values; `stream` waits for whoever still reads there. Places follow one another and begin again.
  [[nodiscard]] Place& take(std::int64_t count, cudaStream_t stream) {
    constexpr std::int64_t kAlign = 128;  // 256 bytes
    if (next_ + count > static_cast<std::int64_t>(scratch_.size())) next_ = 0;
    const std::int64_t begin = next_, end = begin + count;
    Place& taken = places_[n_taken_++ % places_.size()];
    for (Place& place : places_) {
      if (&place != &taken && (place.begin >= end || place.end <= begin)) continue;
      place.done.delay(stream);
      place.begin = place.end = 0;
    }
    taken.begin = begin, taken.end = end;
    next_ = (end + kAlign - 1) / kAlign * kAlign;
    return taken;
  }

  /// In cuBLAS's column-major words: out [n, n_token] = weight [cols, n]^T x [cols, n_token].
  template <class TOut>
  void multiply(const View<const Bf16, 2>& x, const Bf16* weight, std::int64_t weight_stride, std::int64_t cols,
                std::int64_t n, TOut* out, std::int64_t out_stride, cudaStream_t stream) {
    const Shape shape{n, x.extent[0], cols, weight_stride, x.stride[0], out_stride, std::is_same_v<TOut, Bf16>};
    auto found = products_.find(shape);
    if (found == products_.end()) found = products_.emplace(shape, make_product(shape)).first;
    const Product& product = found->second;
    const float one = 1.0f, zero = 0.0f;
    detail::check_blas(cublasLtMatmul(handle_.get(), product.operation.get(), &one, weight, product.weight.get(),
                                      x.data, product.x.get(), &zero, out, product.out.get(), out, product.out.get(),
                                      &product.algo, blas_workspace_.data(), blas_workspace_.size(), stream),
                       "cublasLtMatmul");
  }

  [[nodiscard]] static detail::Blas<cublasLtMatrixLayout_t> make_layout(cudaDataType_t type, std::int64_t n_row,
                                                                        std::int64_t n_col, std::int64_t stride) {
    cublasLtMatrixLayout_t layout = nullptr;
    detail::check_blas(cublasLtMatrixLayoutCreate(&layout, type, static_cast<std::uint64_t>(n_row),
                                                  static_cast<std::uint64_t>(n_col), stride),
                       "cublasLtMatrixLayoutCreate");
    return detail::Blas<cublasLtMatrixLayout_t>(layout);
  }

  [[nodiscard]] Product make_product(const Shape& shape) const {
    const auto& [n, n_token, cols, weight_stride, x_stride, out_stride, is_bf16] = shape;
    Product product;
    cublasLtMatmulDesc_t operation = nullptr;
    detail::check_blas(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                       "cublasLtMatmulDescCreate");
    product.operation.reset(operation);
    const cublasOperation_t transpose = CUBLAS_OP_T;
    detail::check_blas(
        cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)),
        "cublasLtMatmulDescSetAttribute");
    product.weight = make_layout(CUDA_R_16BF, cols, n, weight_stride);
    product.x = make_layout(CUDA_R_16BF, cols, n_token, n_token > 1 ? x_stride : cols);
    product.out = make_layout(is_bf16 ? CUDA_R_16BF : CUDA_R_32F, n, n_token, n_token > 1 ? out_stride : n);
    cublasLtMatmulPreference_t preference = nullptr;
    detail::check_blas(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    const detail::Blas<cublasLtMatmulPreference_t> owner(preference);
    const std::size_t workspace = blas_workspace_.size();
    // Split sums only through the workspace, added in order: no atomics.
    const std::uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    detail::check_blas(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                            &workspace, sizeof(workspace)),
                       "cublasLtMatmulPreferenceSetAttribute");
    detail::check_blas(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                            &reductions, sizeof(reductions)),
                       "cublasLtMatmulPreferenceSetAttribute");
    // The output of a slice begins where its rows do: only the alignment that every slice has may be used.
    const std::uint32_t alignment = n % 8 == 0 && out_stride % 8 == 0 ? 16 : is_bf16 ? 2 : 4;
    detail::check_blas(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                                                            &alignment, sizeof(alignment)),
                       "cublasLtMatmulPreferenceSetAttribute");
    detail::check_blas(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                                                            &alignment, sizeof(alignment)),
                       "cublasLtMatmulPreferenceSetAttribute");
    cublasLtMatmulHeuristicResult_t result{};
    int n_found = 0;
    detail::check_blas(
        cublasLtMatmulAlgoGetHeuristic(handle_.get(), operation, product.weight.get(), product.x.get(),
                                       product.out.get(), product.out.get(), preference, 1, &result, &n_found),
        "cublasLtMatmulAlgoGetHeuristic");
    require(n_found == 1, "quantized_linear: cuBLASLt has no algorithm for ", n, " x ", cols, " by ", n_token,
            " tokens");
    product.algo = result.algo;
    return product;
  }

  detail::Blas<cublasLtHandle_t> handle_;
  std::span<Bf16> scratch_;
  std::span<std::byte> blas_workspace_;
  DeviceBuffer<std::byte> owned_scratch_, owned_workspace_;
  bool overlap_;
  int sm_count_;
  Stream dequantiser_;
  Event dequantised_;
  std::array<Place, 16> places_;
  std::size_t n_taken_ = 0;
  std::int64_t next_ = 0;  ///< value of the scratch where the next place begins
  std::map<Shape, Product> products_;
};

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "cuda/device_buffer.cuh"
#include "cuda/fused_mlp.cuh"
#include "cuda/quantized_linear.cuh"
#include "cuda/weight_decode.cuh"

/// Products with quantised weights for many tokens: a slice of rows is decoded to bf16 in a scratch buffer of bounded
/// size, then cuBLASLt multiplies it with bf16 activations, accumulating in float; slice after slice.
///
/// Decoding costs 2 + 0.56 bytes a weight once for all tokens: some 18 ms for the whole 31B, a tenth of the products of
/// 2048 tokens. Error: weights and outputs rounded to bf16, sums in float. Mirror: reference/quantized_linear.hpp
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

/// Owns cuBLASLt's handle, its workspace, the scratch for decoded weights, and one algorithm for each shape: the same
/// shape always runs the same one, without split sums that depend on timing.
class LinearPrefill {
 public:
  static constexpr std::int64_t kBlasBytes = std::int64_t{32} << 20;
  static constexpr std::int64_t kDefaultScratchBytes = std::int64_t{21504} * 5376 * 2;  ///< gate or down in one slice

  /// @param scratch_bytes of decoded weights; at least one row must fit
  explicit LinearPrefill(std::int64_t scratch_bytes = kDefaultScratchBytes)
      : scratch_(scratch_bytes / 2), blas_workspace_(kBlasBytes) {
    cublasLtHandle_t handle = nullptr;
    detail::check_blas(cublasLtCreate(&handle), "creation of a cuBLASLt handle");
    handle_.reset(handle);
  }

  [[nodiscard]] std::int64_t device_bytes() const { return scratch_.bytes() + blas_workspace_.bytes(); }

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
  template <class TOut>
  void gate_up(const View<const Bf16, 2>& x, const GateUpWeights& weights, std::span<Bf16> scratch,
               const View<TOut, 2>& out, cudaStream_t stream) {
    const std::int64_t n_token = x.extent[0], width = weights.ffn_hidden(), count = n_token * width;
    require_extents("gate_up", "out", out, {n_token, width});
    require(static_cast<std::int64_t>(scratch.size()) >= 2 * count, "gate_up: scratch of ", scratch.size(),
            " values, need ", 2 * count);
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
    detail::gelu_times_kernel<<<static_cast<unsigned>((count + 255) / 256), 256, 0, stream>>>(
        static_cast<const Bf16*>(gate.data), static_cast<const Bf16*>(up.data), count, width, out.data, out.stride[0]);
    check_launch("gelu_times_kernel");
  }

 private:
  struct Product {
    detail::Blas<cublasLtMatmulDesc_t> operation;
    detail::Blas<cublasLtMatrixLayout_t> weight, x, out;
    cublasLtMatmulAlgo_t algo;
  };
  using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool>;

  /// Rows first, first + step, ... (`count`) of the weight, slice by slice.
  template <class TOut>
  void rows(const View<const Bf16, 2>& x, const PackedMatrix& weight, std::int64_t first, std::int64_t step,
            std::int64_t count, const View<TOut, 2>& out, cudaStream_t stream) {
    if (x.extent[0] == 0) return;
    const std::int64_t fit = scratch_.size() / weight.cols, kTile = 256;
    require(fit >= 1, "quantized_linear: scratch of ", scratch_.bytes(), " B, need at least ", 2 * weight.cols,
            " B for one row");
    const std::int64_t slice = std::min<std::int64_t>(fit >= kTile ? fit / kTile * kTile : fit, 65535 / kTile * kTile);
    for (std::int64_t row = 0; row < count; row += slice) {
      const std::int64_t n = std::min(slice, count - row);
      decode_rows(weight, first + row * step, n, step, scratch_.data(), stream);
      multiply(x, weight.cols, n, out.data + row, out.stride[0], stream);
    }
  }

  /// In cuBLAS's column-major words: out [n, n_token] = weight [cols, n]^T x [cols, n_token].
  template <class TOut>
  void multiply(const View<const Bf16, 2>& x, std::int64_t cols, std::int64_t n, TOut* out, std::int64_t out_stride,
                cudaStream_t stream) {
    const Shape shape{n, x.extent[0], cols, x.stride[0], out_stride, std::is_same_v<TOut, Bf16>};
    auto found = products_.find(shape);
    if (found == products_.end()) found = products_.emplace(shape, make_product(shape)).first;
    const Product& product = found->second;
    const float one = 1.0f, zero = 0.0f;
    detail::check_blas(
        cublasLtMatmul(handle_.get(), product.operation.get(), &one, scratch_.data(), product.weight.get(), x.data,
                       product.x.get(), &zero, out, product.out.get(), out, product.out.get(), &product.algo,
                       blas_workspace_.data(), static_cast<std::size_t>(kBlasBytes), stream),
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
    const auto& [n, n_token, cols, x_stride, out_stride, is_bf16] = shape;
    Product product;
    cublasLtMatmulDesc_t operation = nullptr;
    detail::check_blas(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                       "cublasLtMatmulDescCreate");
    product.operation.reset(operation);
    const cublasOperation_t transpose = CUBLAS_OP_T;
    detail::check_blas(
        cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)),
        "cublasLtMatmulDescSetAttribute");
    product.weight = make_layout(CUDA_R_16BF, cols, n, cols);
    product.x = make_layout(CUDA_R_16BF, cols, n_token, n_token > 1 ? x_stride : cols);
    product.out = make_layout(is_bf16 ? CUDA_R_16BF : CUDA_R_32F, n, n_token, n_token > 1 ? out_stride : n);
    cublasLtMatmulPreference_t preference = nullptr;
    detail::check_blas(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    const detail::Blas<cublasLtMatmulPreference_t> owner(preference);
    const std::size_t workspace = kBlasBytes;
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
  DeviceBuffer<Bf16> scratch_;
  DeviceBuffer<std::byte> blas_workspace_;
  std::map<Shape, Product> products_;
};

}  // namespace gemma4::cuda

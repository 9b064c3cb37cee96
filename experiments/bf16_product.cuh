// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/device/device_buffer.cuh"
#include "experiments/benchmark.cuh"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"

namespace gemma4::experiment {

/// out[t, n] = sum_k x[t, k] weight[n, k] in bf16 through cuBLASLt, by the algorithm that its heuristic names first:
/// what products with quantised weights are held against.
class Bf16Product {
 public:
  Bf16Product(std::int64_t n_out, std::int64_t n_in, std::int64_t n_token) : workspace_(kWorkspace) {
    detail::check_blas(cublasLtCreate(&handle_), "cublasLtCreate");
    detail::check_blas(cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                       "cublasLtMatmulDescCreate");
    const cublasOperation_t transpose = CUBLAS_OP_T;
    detail::check_blas(
        cublasLtMatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)),
        "cublasLtMatmulDescSetAttribute");
    const auto layout = [](cublasLtMatrixLayout_t& to, std::int64_t rows, std::int64_t cols) {
      detail::check_blas(cublasLtMatrixLayoutCreate(&to, CUDA_R_16BF, static_cast<std::uint64_t>(rows),
                                                    static_cast<std::uint64_t>(cols), rows),
                         "cublasLtMatrixLayoutCreate");
    };
    layout(weight_, n_in, n_out);
    layout(x_, n_in, n_token);
    layout(out_, n_out, n_token);
    cublasLtMatmulPreference_t preference = nullptr;
    detail::check_blas(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    detail::check_blas(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                            &kWorkspace, sizeof(kWorkspace)),
                       "cublasLtMatmulPreferenceSetAttribute");
    int n_found = 0;
    detail::check_blas(cublasLtMatmulAlgoGetHeuristic(handle_, operation_, weight_, x_, out_, out_, preference, 1,
                                                      &algorithm_, &n_found),
                       "cublasLtMatmulAlgoGetHeuristic");
    cublasLtMatmulPreferenceDestroy(preference);
    require(n_found == 1, "Bf16Product: cuBLAS has no algorithm for ", n_out, " x ", n_in, " x ", n_token);
  }
  ~Bf16Product() {
    cublasLtMatrixLayoutDestroy(out_);
    cublasLtMatrixLayoutDestroy(x_);
    cublasLtMatrixLayoutDestroy(weight_);
    cublasLtMatmulDescDestroy(operation_);
    cublasLtDestroy(handle_);
  }
  Bf16Product(const Bf16Product&) = delete;
  Bf16Product& operator=(const Bf16Product&) = delete;

  /// @param weight [n_out, n_in], x [n_token, n_in], out [n_token, n_out]
  void enqueue(const Bf16* weight, const Bf16* x, Bf16* out, cudaStream_t stream) {
    const float one = 1.0f, zero = 0.0f;
    detail::check_blas(cublasLtMatmul(handle_, operation_, &one, weight, weight_, x, x_, &zero, out, out_, out, out_,
                                      &algorithm_.algo, workspace_.data(), kWorkspace, stream),
                       "cublasLtMatmul");
  }

 private:
  static constexpr std::size_t kWorkspace = std::size_t{32} << 20;

  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t operation_ = nullptr;
  cublasLtMatrixLayout_t weight_ = nullptr, x_ = nullptr, out_ = nullptr;
  cublasLtMatmulHeuristicResult_t algorithm_{};
  cuda::DeviceBuffer<std::byte> workspace_;
};

}  // namespace gemma4::experiment

// SPDX-License-Identifier: Apache-2.0
// cuBLASLt as cuda/linear_prefill.cuh calls it: out = weight^T x, columns of bf16 in memory, sums in float in their
// order.
#include <cublasLt.h>

#include <cstdint>
#include <vector>

#include "tests/emulator/number_formats.hpp"
#include "tests/emulator/stream.hpp"

namespace {

using gemma4::emulator::fail;

struct Layout {
  cudaDataType_t type;
  std::int64_t n_row, n_col, stride;
};
struct Operation {
  cublasOperation_t weight = CUBLAS_OP_N;
};
struct Preference {};

/// Columns of bf16, one behind the other, as float.
std::vector<float> widened(const Layout& layout, const void* data) {
  std::vector<float> columns(static_cast<std::size_t>(layout.n_row * layout.n_col));
  auto* at = columns.data();
  for (std::int64_t col = 0; col < layout.n_col; ++col) {
    const auto* column = static_cast<const std::uint16_t*>(data) + col * layout.stride;
    for (std::int64_t row = 0; row < layout.n_row; ++row) *at++ = gemma4::emulator::bf16_value(column[row]);
  }
  return columns;
}

void store(const Layout& layout, void* data, std::int64_t row, std::int64_t col, float value) {
  const std::int64_t at = col * layout.stride + row;
  if (layout.type == CUDA_R_16BF) {
    static_cast<std::uint16_t*>(data)[at] = static_cast<std::uint16_t>(gemma4::emulator::bf16_bits(value));
  } else {
    static_cast<float*>(data)[at] = value;
  }
}

struct Product {
  Layout weight_layout, x_layout, out_layout;
  const void *weight, *x;
  void* out;

  void operator()() const {
    const std::vector<float> rows = widened(weight_layout, weight), columns = widened(x_layout, x);
    const std::int64_t n_sum = weight_layout.n_row;
    for (std::int64_t col = 0; col < out_layout.n_col; ++col) {
      for (std::int64_t row = 0; row < out_layout.n_row; ++row) {
        const float *a = rows.data() + row * n_sum, *b = columns.data() + col * n_sum;
        float sum = 0.0f;
        for (std::int64_t i = 0; i < n_sum; ++i) sum += a[i] * b[i];
        store(out_layout, out, row, col, sum);
      }
    }
  }
};

template <class THandle, class T>
cublasStatus_t create(THandle* handle, T value) {
  *handle = reinterpret_cast<THandle>(new T(value));
  return CUBLAS_STATUS_SUCCESS;
}
template <class T, class THandle>
cublasStatus_t destroy(THandle handle) {
  delete reinterpret_cast<T*>(handle);
  return CUBLAS_STATUS_SUCCESS;
}
template <class T, class THandle>
const T& behind(THandle handle) {
  return *reinterpret_cast<const T*>(handle);
}

}  // namespace

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  return create(handle, char{});
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  return destroy<char>(handle);
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type, std::uint64_t n_row,
                                          std::uint64_t n_col, std::int64_t stride) {
  return create(layout, Layout{type, static_cast<std::int64_t>(n_row), static_cast<std::int64_t>(n_col), stride});
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  return destroy<Layout>(layout);
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* operation, cublasComputeType_t, cudaDataType_t) {
  return create(operation, Operation{});
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t operation) {
  return destroy<Operation>(operation);
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, std::size_t) {
  if (attribute != CUBLASLT_MATMUL_DESC_TRANSA)
    fail("cuBLASLt: attribute ", attribute, " of a product is not emulated");
  reinterpret_cast<Operation*>(operation)->weight = *static_cast<const cublasOperation_t*>(value);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  return create(preference, Preference{});
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return destroy<Preference>(preference);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t,
                                                    const void*, std::size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t* result,
                                              int* n_found) {
  result->state = CUBLAS_STATUS_SUCCESS;
  result->workspaceSize = 0;
  *n_found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t operation, const void* alpha, const void* weight,
                              cublasLtMatrixLayout_t weight_layout, const void* x, cublasLtMatrixLayout_t x_layout,
                              const void* beta, const void*, cublasLtMatrixLayout_t, void* out,
                              cublasLtMatrixLayout_t out_layout, const cublasLtMatmulAlgo_t*, void*, std::size_t,
                              cudaStream_t stream) {
  const Product product{
      behind<Layout>(weight_layout), behind<Layout>(x_layout), behind<Layout>(out_layout), weight, x, out};
  if (behind<Operation>(operation).weight != CUBLAS_OP_T || *static_cast<const float*>(alpha) != 1.0f ||
      *static_cast<const float*>(beta) != 0.0f || product.weight_layout.type != CUDA_R_16BF ||
      product.x_layout.type != CUDA_R_16BF) {
    fail("cuBLASLt: only weight^T x of bf16 is emulated");
  }
  gemma4::emulator::enqueue(stream, product);
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"

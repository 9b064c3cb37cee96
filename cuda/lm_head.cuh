// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "cuda/device/launch.cuh"
#include "cuda/quantized_linear.cuh"

namespace gemma4::cuda {

namespace detail {

static __global__ void __launch_bounds__(256)
    softcap_kernel(float* logits, std::int64_t stride, std::int64_t width, float cap) {
  const std::int64_t at = blockIdx.x * std::int64_t{256} + threadIdx.x;
  if (at < width) logits[blockIdx.y * stride + at] = softcapped(logits[blockIdx.y * stride + at], cap);
}

}  // namespace detail

/// logits = softcap * tanh(x table^T / softcap), in float.
/// @param x       [n_row, hidden] Bf16 or float, after the output norm; the rows whose logits are wanted, 1 to 8 (16 on
///                int8 tensor cores)
/// @param table   [vocab, hidden], the tied embedding or an output matrix of its own
/// @param logits  [n_row, vocab]
/// @throws std::invalid_argument when a shape differs, the cap is not positive, or for more rows than those
/// Mirror: reference/lm_head.hpp
template <class TIn>
void lm_head(const View<const TIn, 2>& x, const PackedMatrix& table, float softcap, const View<float, 2>& logits,
             const DeviceInfo& device, cudaStream_t stream, const LinearOptions& options = {}) {
  require(softcap > 0, "lm_head: softcap is ", softcap, ", need a positive number");
  const std::int64_t most = detail::max_linear_tokens(x.extent[0], options);
  require(x.extent[0] <= most, "lm_head: ", x.extent[0], " rows, at most ", most, " a call");
  detail::require_linear("lm_head", x, table, logits, table.rows);
  if (x.extent[0] == 0) return;
  if (is_packed_type(table.type)) {
    detail::packed_decode<float>(detail::linear_source(x), std::span(&table, 1), std::span(&logits, 1),
                                 {.epilogue = LinearEpilogue::kSoftcap, .softcap = softcap, .options = options}, device,
                                 stream);
    return;
  }
  detail::plain_decode(x, table, logits, stream);
  const dim3 grid(static_cast<unsigned>((table.rows + 255) / 256), static_cast<unsigned>(x.extent[0]));
  detail::Launch{.what = "softcap_kernel", .grid = grid, .block = 256, .stream = stream}(
      detail::softcap_kernel, logits.data, logits.stride[0], table.rows, softcap);
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cfloat>
#include <climits>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/device/check.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/sequence_state.cuh"
#include "cuda/device/stream.cuh"
#include "gemma4/float16.hpp"
#include "gemma4/model/finite.hpp"
#include "gemma4/view.hpp"

/// Notes on the device which position first had numbers that are not finite. One pass over a chunk's residual stream:
/// 44 MB for 2048 tokens of the 31B, behind some hundred milliseconds of products. Decode steps are not passed over:
/// their logits are all looked at by the sampler.
namespace gemma4::cuda {

namespace detail {

inline constexpr int kFiniteThreads = 256;
inline constexpr std::int64_t kFiniteValues = 8192;  ///< of a row that one block looks at

/// grid: x = row, y = pieces of it. Row r belongs to position first + r; SequenceState::not_finite keeps the smallest
/// position, as INT_MAX minus it, so that zero is none.
template <class T>
__global__ void __launch_bounds__(kFiniteThreads)
    note_not_finite_kernel(const T* rows, std::int64_t row_len, std::int32_t first, SequenceState* state) {
  const T* const row = rows + blockIdx.x * row_len;
  const std::int64_t begin = blockIdx.y * kFiniteValues + threadIdx.x;
  const std::int64_t end = begin + kFiniteValues < row_len ? (blockIdx.y + std::int64_t{1}) * kFiniteValues : row_len;
  bool is_bad = false;
  for (std::int64_t i = begin; i < end; i += kFiniteThreads) is_bad |= !(fabsf(to_float(row[i])) <= FLT_MAX);
  if (__syncthreads_or(is_bad) == 0 || threadIdx.x != 0) return;
  atomicMax(&state->not_finite, INT_MAX - (first + static_cast<std::int32_t>(blockIdx.x)));
}

}  // namespace detail

/// Looks at rows that belong to the positions from `first` on. Waits for what is in front of it in the stream.
/// @param rows [n_row, row_len], without gaps, at most 65535 * 8192 values a row
template <class T>
void note_not_finite(const View<const T, 2>& rows, std::int64_t first, SequenceState* state, cudaStream_t stream) {
  if (rows.extent[0] == 0) return;
  require(rows.stride[0] == rows.extent[1], "note_not_finite: rows of ", rows.extent[1], " values, ", rows.stride[0],
          " apart");
  const dim3 grid(static_cast<unsigned>(rows.extent[0]),
                  static_cast<unsigned>((rows.extent[1] + detail::kFiniteValues - 1) / detail::kFiniteValues));
  detail::Launch{.what = "note_not_finite_kernel", .grid = grid, .block = detail::kFiniteThreads, .stream = stream}(
      detail::note_not_finite_kernel<T>, rows.data, rows.extent[1], static_cast<std::int32_t>(first), state);
}

/// The same of logits [n, vocab], which belong to the positions first + rows[i].
inline void note_not_finite_logits(const float* logits, std::int64_t vocab, std::int64_t first,
                                   std::span<const std::int64_t> rows, SequenceState* state, cudaStream_t stream) {
  for (const std::int64_t row : rows) {
    note_not_finite(make_view(logits, std::int64_t{1}, vocab), first + row, state, stream);
    logits += vocab;
  }
}

/// What has been noted; waits for the device.
[[nodiscard]] inline std::optional<NotFinite> noted_not_finite(const SequenceState* state, const Stream& stream) {
  std::int32_t noted = 0;
  check(cudaMemcpyAsync(&noted, &state->not_finite, sizeof(noted), cudaMemcpyDeviceToHost, stream), "copy to host");
  stream.synchronize();
  if (noted == 0) return std::nullopt;
  return NotFinite{.position = std::int64_t{INT_MAX} - noted};
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "cuda/device/check.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/weights/half_group.cuh"
#include "cuda/weights/layout.cuh"
#include "cuda/weights/packing.cuh"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"

/// Packed weights back to numbers, as block_dequantise.hpp makes them on the host, bit for bit: the products are exact
/// in float, and the one rounding is that of the sum or difference in the formats with a minimum or an offset, which a
/// fused product and sum makes too.
namespace gemma4::cuda {

namespace detail {

/// Plain rows are one chunk of numbers.
template <class TStored>
struct PlainHalfGroup {
  float values[2][8];

  __device__ __forceinline__ void load(const TStored* row, std::int64_t cols, int group, int half) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int at = kGroup * group + 8 * half + i / 8 * 16 + i % 8;
      values[i / 8][i % 8] = at < cols ? to_float(row[at]) : 0.0f;
    }
  }
  __device__ __forceinline__ void dequantise(int, int, float (&low)[8], float (&high)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) low[i] = values[0][i], high[i] = values[1][i];
  }
};
template <>
struct HalfGroup<TensorType::kBf16> : PlainHalfGroup<Bf16> {};
template <>
struct HalfGroup<TensorType::kF16> : PlainHalfGroup<F16> {};
template <>
struct HalfGroup<TensorType::kF32> : PlainHalfGroup<float> {};

[[nodiscard]] GEMMA4_HD constexpr std::int64_t n_half_group(std::int64_t cols) {
  return (cols + kGroup - 1) / kGroup * 2;
}

/// Where a thread's half group is in any row.
struct HalfGroupPlace {
  int group, half, groups;  ///< within the chunk, and groups of the chunk
  std::int64_t chunk_begin;
  int column;  ///< of low[0]; high[0] is 16 further on

  template <TensorType kType>
  [[nodiscard]] static __device__ __forceinline__ HalfGroupPlace of(int index, std::int64_t cols, int full_groups) {
    HalfGroupPlace place{index / 2, index % 2, 0, 0, index / 2 * kGroup + index % 2 * 8};
    if constexpr (is_packed_type(kType)) {
      const int chunk = place.group / full_groups;
      place.group -= chunk * full_groups;
      place.groups = min(static_cast<int>(cols / kGroup) - chunk * full_groups, full_groups);
      place.chunk_begin = chunk * chunk_bytes(kType, full_groups);
    }
    return place;
  }
};

template <TensorType kType>
__device__ __forceinline__ void load_half_group(const std::uint8_t* row, std::int64_t cols, const HalfGroupPlace& place,
                                                HalfGroup<kType>& bytes) {
  if constexpr (is_packed_type(kType)) {
    bytes.load(row + place.chunk_begin, place.groups, place.group, place.half);
  } else if constexpr (kType == TensorType::kBf16) {
    bytes.load(reinterpret_cast<const Bf16*>(row), cols, place.group, place.half);
  } else if constexpr (kType == TensorType::kF16) {
    bytes.load(reinterpret_cast<const F16*>(row), cols, place.group, place.half);
  } else {
    bytes.load(reinterpret_cast<const float*>(row), cols, place.group, place.half);
  }
}

/// Calls body.operator()<kType>() for the type. @throws std::invalid_argument for one that holds no weights
template <class TBody>
void for_weight_type(const char* who, TensorType type, TBody&& body) {
  if (for_packed_block(type, [&]<TensorType kType, class TBlock>() { body.template operator()<kType>(); })) return;
  switch (type) {
    case TensorType::kBf16:
      return body.template operator()<TensorType::kBf16>();
    case TensorType::kF16:
      return body.template operator()<TensorType::kF16>();
    case TensorType::kF32:
      return body.template operator()<TensorType::kF32>();
    default:
      require(false, who, ": ", type_name(type), " holds no weights");
  }
}

inline constexpr int kRowsAThread = 4;  ///< rows that a thread dequantises, side by side

/// Eight values from `column` on, rounded to bf16.
__device__ __forceinline__ void store_dequantised(Bf16* row, std::int64_t cols, int column, const float (&values)[8]) {
  if (cols % 8 == 0) {
    if (column < cols) store_values(row + column, values);
    return;
  }
  for (int i = 0; i < 8 && column + i < cols; ++i) row[column + i] = to_bf16(values[i]);
}

/// One thread a half group of kRowsAThread rows; neighbours write neighbouring 32 bytes.
template <TensorType kType>
__global__ void __launch_bounds__(512)
    dequantise_rows_kernel(const std::uint8_t* data, std::int64_t row_step_bytes, std::int64_t n_row, std::int64_t cols,
                           int full_groups, Bf16* out) {
  const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (index >= n_half_group(cols)) return;
  const auto place = HalfGroupPlace::of<kType>(index, cols, full_groups);
  const std::int64_t first = std::int64_t{kRowsAThread} * blockIdx.y;
  data += first * row_step_bytes;
  out += first * cols;
  const int count = static_cast<int>(min(n_row - first, std::int64_t{kRowsAThread}));
  HalfGroup<kType> bytes[kRowsAThread];
#pragma unroll
  for (int r = 0; r < kRowsAThread; ++r) {
    if (r < count) load_half_group<kType>(data + r * row_step_bytes, cols, place, bytes[r]);
  }
#pragma unroll
  for (int r = 0; r < kRowsAThread; ++r) {
    if (r >= count) break;
    float low[8], high[8];
    bytes[r].dequantise(place.group, place.half, low, high);
    store_dequantised(out + r * cols, cols, place.column, low);
    store_dequantised(out + r * cols, cols, place.column + 16, high);
  }
}

}  // namespace detail

/// Rows first, first + row_step, ... (`count` of them, at most 262140) of a matrix, rounded to bf16: out [count, cols],
/// 16-byte aligned.
inline void dequantise_rows(const PackedMatrix& matrix, std::int64_t first, std::int64_t count, std::int64_t row_step,
                            Bf16* out, cudaStream_t stream) {
  if (count == 0) return;
  require(first >= 0 && first + (count - 1) * row_step < matrix.rows && count <= 65535 * detail::kRowsAThread,
          "dequantise_rows: ", count, " rows from ", first, " in steps of ", row_step, " of ", matrix.rows,
          ", at most ", 65535 * detail::kRowsAThread, " a call");
  const std::int64_t bytes = matrix.row_bytes();
  const auto* const data = reinterpret_cast<const std::uint8_t*>(matrix.data) + first * bytes;
  // As few threads as possible without work: blocks of a row are alike, in whole warps.
  const std::int64_t n_thread = detail::n_half_group(matrix.cols), n_block = (n_thread + 511) / 512;
  const std::int64_t block = ((n_thread + n_block - 1) / n_block + 31) / 32 * 32;
  const dim3 grid(static_cast<unsigned>(n_block),
                  static_cast<unsigned>((count + detail::kRowsAThread - 1) / detail::kRowsAThread));
  detail::for_weight_type("dequantise_rows", matrix.type, [&]<TensorType kType>() {
    detail::Launch{
        .what = "dequantise_rows_kernel", .grid = grid, .block = static_cast<unsigned>(block), .stream = stream}(
        detail::dequantise_rows_kernel<kType>, data, row_step * bytes, count, matrix.cols, chunk_groups(matrix.cols),
        out);
  });
}

}  // namespace gemma4::cuda

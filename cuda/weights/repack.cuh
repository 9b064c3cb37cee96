// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/device/check.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/weights/layout.cuh"
#include "cuda/weights/packing.cuh"
#include "gemma4/error.hpp"
#include "gemma4/quantized_matrix.hpp"

/// Weights from the file's layout into that of cuda/weights/layout.cuh and back, on the device. Both are bit for bit:
/// the file can be had again from the packed rows.
namespace gemma4::cuda {

namespace detail {

struct RepackParams {
  const std::uint8_t* from;
  std::uint8_t* to;
  std::int64_t n_row, cols;
  std::int64_t file_row_bytes, packed_row_bytes;
  std::int64_t packed_row_step;  ///< packed rows from one to the next: 2 interleaves two matrices
};

/// One thread a block of the file. Loading is bound by the host link, so that coalescing is not worth its code here.
template <TensorType kType, class TBlock, bool kPack>
__global__ void __launch_bounds__(128) repack_kernel(const __grid_constant__ RepackParams params) {
  constexpr int kGroups = static_cast<int>(TBlock::kSize) / kGroup;
  const std::int64_t row_blocks = params.cols / TBlock::kSize;
  const std::int64_t index = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  if (index >= params.n_row * row_blocks) return;
  const std::int64_t row = index / row_blocks, block_index = index % row_blocks;
  const int full = chunk_groups(params.cols);
  const std::int64_t chunk_index = block_index * kGroups / full;
  const int groups = groups_of_chunk(params.cols, chunk_index);
  const int at = static_cast<int>(block_index - chunk_index * (full / kGroups));
  const std::int64_t packed_at = row * params.packed_row_step * params.packed_row_bytes;
  const std::int64_t file_at = row * params.file_row_bytes;
  const std::int64_t chunk_at = packed_at + chunk_index * chunk_bytes(kType, full);
  if constexpr (kPack) {
    std::uint8_t* const chunk = params.to + chunk_at;
    const TBlock block = reinterpret_cast<const TBlock*>(params.from + file_at)[block_index];
    BlockPacking<TBlock>::pack(block, chunk, groups, at);
    if ((at + 1) * kGroups == groups) {  // the last block of a chunk clears its padding
      const int end = static_cast<int>(chunk_bytes(kType, groups));
      for (int byte = (at + 1) * static_cast<int>(sizeof(TBlock)); byte < end; ++byte) chunk[byte] = 0;
    }
  } else {
    TBlock block;
    BlockPacking<TBlock>::unpack(params.from + chunk_at, groups, at, block);
    reinterpret_cast<TBlock*>(params.to + file_at)[block_index] = block;
  }
}

template <bool kPack>
void launch_repack(TensorType type, const RepackParams& params, cudaStream_t stream) {
  const std::int64_t n_block = params.n_row * (params.cols / block_size(type));
  if (n_block == 0) return;
  const Launch launch{
      .what = "repack_kernel", .grid = static_cast<unsigned>((n_block + 127) / 128), .block = 128, .stream = stream};
  const bool is_packed = for_packed_block(
      type, [&]<TensorType kType, class TBlock>() { launch(repack_kernel<kType, TBlock, kPack>, params); });
  if (is_packed) return;
  // Plain rows: one side is strided by packed_row_step.
  const std::int64_t step = params.packed_row_step * params.packed_row_bytes;
  check(cudaMemcpy2DAsync(params.to, static_cast<std::size_t>(kPack ? step : params.file_row_bytes), params.from,
                          static_cast<std::size_t>(kPack ? params.file_row_bytes : step),
                          static_cast<std::size_t>(params.file_row_bytes), static_cast<std::size_t>(params.n_row),
                          cudaMemcpyDeviceToDevice, stream),
        "copy of plain weight rows");
}

inline void require_repackable(const char* who, TensorType type, std::int64_t cols) {
  require(is_weight_type(type), who, ": ", type_name(type), " holds no weights");
  require(cols >= 1 && cols % block_size(type) == 0, who, ": ", cols, " columns, need a multiple of ", block_size(type),
          " for ", type_name(type));
}

}  // namespace detail

/// Rows of the file, in device memory, into packed rows.
/// @param from      [n_row, row_bytes(type, cols)] bytes, 2-byte aligned (F32: 4)
/// @param to        first packed row, 16-byte aligned; row i goes to packed row i * row_step, the rest is untouched
/// @param row_step  1, or 2 to interleave a gate with its up
/// @throws std::invalid_argument when the type holds no weights or cols is no multiple of its block
inline void pack_rows(TensorType type, std::int64_t n_row, std::int64_t cols, const std::byte* from, std::byte* to,
                      std::int64_t row_step, cudaStream_t stream) {
  detail::require_repackable("pack_rows", type, cols);
  detail::launch_repack<true>(type,
                              {reinterpret_cast<const std::uint8_t*>(from), reinterpret_cast<std::uint8_t*>(to), n_row,
                               cols, row_bytes(type, cols), packed_row_bytes(type, cols), row_step},
                              stream);
}

/// The inverse: packed rows 0, row_step, ... into rows of the file.
inline void unpack_rows(TensorType type, std::int64_t n_row, std::int64_t cols, const std::byte* from, std::byte* to,
                        std::int64_t row_step, cudaStream_t stream) {
  detail::require_repackable("unpack_rows", type, cols);
  detail::launch_repack<false>(type,
                               {reinterpret_cast<const std::uint8_t*>(from), reinterpret_cast<std::uint8_t*>(to), n_row,
                                cols, row_bytes(type, cols), packed_row_bytes(type, cols), row_step},
                               stream);
}

/// A matrix of the host into packed rows, through a staging buffer of any size that holds at least one row.
/// @param to  packed row 0, row i to packed row i * row_step
/// @throws std::invalid_argument as pack_rows(), or when not one row fits into the staging buffer
inline void upload_packed(const QuantizedMatrix& weight, std::byte* to, std::int64_t row_step,
                          DeviceBuffer<std::byte>& staging, cudaStream_t stream) {
  detail::require_repackable("upload_packed", weight.type, weight.cols);
  const std::int64_t bytes = row_bytes(weight.type, weight.cols), fit = staging.size() / bytes;
  require(weight.rows == 0 || fit >= 1, "upload_packed: a staging buffer of ", staging.size(), " B, need at least ",
          bytes, " B for one row");
  const std::int64_t step = row_step * packed_row_bytes(weight.type, weight.cols);
  for (std::int64_t row = 0; row < weight.rows; row += fit) {
    const std::int64_t count = std::min(fit, weight.rows - row);
    staging.from_host(
        weight.data.subspan(static_cast<std::size_t>(row * bytes), static_cast<std::size_t>(count * bytes)), stream);
    pack_rows(weight.type, count, weight.cols, staging.data(), to + row * step, row_step, stream);
  }
}

}  // namespace gemma4::cuda

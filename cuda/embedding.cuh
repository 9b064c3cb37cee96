// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "cuda/device/launch.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/weights/dequantise.cuh"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

namespace gemma4::cuda {

/// Which rows: `count` token ids in device memory. `host`, if given, is the same numbers and lets the call refuse those
/// outside the vocabulary. On the device such a token's row becomes NaN.
struct DeviceTokens {
  const std::int32_t* device = nullptr;
  std::int64_t count = 0;
  std::span<const std::int32_t> host = {};
};

namespace detail {

/// A block of the grid's y axis a token; one thread half a group, sixteen values.
template <TensorType kType, class TOut>
__global__ void __launch_bounds__(128)
    embedding_kernel(const std::int32_t* tokens, const std::uint8_t* data, std::int64_t row_bytes, std::int64_t vocab,
                     int full_groups, float scale, const View<TOut, 2> out) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const std::int64_t cols = out.extent[1], token = tokens[blockIdx.y];
  const int index = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
  if (index >= n_half_group(cols)) return;
  const bool known = token >= 0 && token < vocab;
  const auto place = HalfGroupPlace::of<kType>(index, cols, full_groups);
  HalfGroup<kType> bytes;
  load_half_group<kType>(data + (known ? token : 0) * row_bytes, cols, place, bytes);
  float values[2][8];
  bytes.dequantise(place.group, place.half, values[0], values[1]);
  TOut* const to = out.data + blockIdx.y * out.stride[0];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float value = known ? __fmul_rn(values[i / 8][i % 8], scale) : bit_cast<float>(0x7FC00000u);
    const int column = place.column + i / 8 * 16 + i % 8;
    if (column < cols) to[column] = from_float<TOut>(value);
  }
}

}  // namespace detail

/// out[t] = table[tokens[t]] * scale, from the rows that lm_head multiplies with: the table is in memory once.
/// @param tokens  ids on the device, each in [0, table.rows), at most 65535
/// @param scale   sqrt(hidden) in Gemma
/// @param out     [n_token, hidden] Bf16 or float
/// @param overlap on sm_90, lets the kernel be set up while the one before it in the stream still runs
/// @throws std::invalid_argument naming a token of tokens.host that is outside the vocabulary, or a shape that differs
/// Float results have the bits of the reference. Mirror: reference/embedding.hpp
template <class TOut>
void embedding(const DeviceTokens& tokens, const PackedMatrix& table, float scale, const View<TOut, 2>& out,
               cudaStream_t stream, bool overlap = false) {
  require_extents("embedding", "out", out, {tokens.count, table.cols});
  require_contiguous_rows("embedding", "out", out);
  require(tokens.count <= 65535, "embedding: ", tokens.count, " tokens, at most 65535 a call");
  require(tokens.host.empty() || static_cast<std::int64_t>(tokens.host.size()) == tokens.count,
          "embedding: ", tokens.host.size(), " tokens on the host, ", tokens.count, " on the device");
  for (std::size_t t = 0; t < tokens.host.size(); ++t) {
    require(tokens.host[t] >= 0 && tokens.host[t] < table.rows, "embedding: token ", tokens.host[t], " at ", t,
            " is outside the vocabulary [0, ", table.rows, ")");
  }
  if (tokens.count == 0) return;
  const dim3 grid(static_cast<unsigned>((detail::n_half_group(table.cols) + 127) / 128),
                  static_cast<unsigned>(tokens.count));
  detail::for_weight_type("embedding", table.type, [&]<TensorType kType>() {
    detail::Launch{.what = "embedding_kernel", .grid = grid, .block = 128, .stream = stream, .overlap = overlap}(
        detail::embedding_kernel<kType, TOut>, tokens.device, reinterpret_cast<const std::uint8_t*>(table.data),
        table.row_bytes(), table.rows, chunk_groups(table.cols), scale, out);
  });
}

}  // namespace gemma4::cuda

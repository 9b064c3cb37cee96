// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "cuda/check.cuh"
#include "cuda/linear_dot.cuh"
#include "cuda/mma.cuh"
#include "cuda/weight_layout.cuh"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"

/// Packed weights back to numbers, as block_decode.hpp makes them on the host, bit for bit: the products are exact in
/// float, and the one rounding is that of the difference in Q4_K and Q5_K.
namespace gemma4::cuda {

namespace detail {

/// Weights 8 * part to 8 * part + 7 of a group. kType selects the format at compile time.
template <TensorType kType>
__device__ __forceinline__ void decode_eight(const std::uint8_t* chunk, int groups, int group, int part,
                                             float (&out)[8]) {
  const std::uint8_t* const codes = chunk + 16 * group + 8 * (part & 1);
  const int high = part >> 1;
  if constexpr (kType == TensorType::kQ8_0) {
    const uint2 bytes = *reinterpret_cast<const uint2*>(codes + 16 * high * groups);
    const float d = __half2float(*reinterpret_cast<const __half*>(chunk + 32 * groups + 2 * group));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t word = i < 4 ? bytes.x : bytes.y;
      out[i] = __fmul_rn(d, static_cast<float>(static_cast<std::int8_t>(word >> (8 * (i % 4)))));
    }
    return;
  }
  const uint2 bytes = *reinterpret_cast<const uint2*>(codes);
  std::uint32_t upper =
      0;  // bits above the nibble, moved so that weight i has its own at 8 * (i % 4) + kBits * (i / 4)
  constexpr int kBits = kType == TensorType::kQ5K ? 1 : 2;
  if constexpr (kType == TensorType::kQ5K) {
    upper = *reinterpret_cast<const std::uint32_t*>(chunk + 16 * groups + 4 * group) >> (4 * high + 2 * (part & 1));
  } else if constexpr (kType == TensorType::kQ6K) {
    upper = *reinterpret_cast<const std::uint32_t*>(chunk + 16 * groups + 8 * group + 4 * high) >> (4 * (part & 1));
  }
  int code[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::uint32_t word = i < 4 ? bytes.x : bytes.y;
    code[i] = static_cast<int>((word >> (8 * (i % 4) + 4 * high)) & 15u);
    if constexpr (kType != TensorType::kQ4K) {
      code[i] |= static_cast<int>((upper >> (8 * (i % 4) + kBits * (i / 4))) & ((1u << kBits) - 1u)) << 4;
    }
  }
  if constexpr (kType == TensorType::kQ6K) {
    const auto scale = static_cast<std::int8_t>(chunk[24 * groups + 2 * group + high]);
    const float d = __half2float(*reinterpret_cast<const __half*>(chunk + 26 * groups + (group >> 3) * 2));
    const float step = __fmul_rn(d, static_cast<float>(scale));
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = __fmul_rn(step, static_cast<float>(code[i] - Q6KBlock::kOffset));
  } else {
    ScaledMeta meta;
    meta.load(chunk + (kType == TensorType::kQ4K ? 16 : 20) * groups, group);
    const float min = meta.min64 * 0x1p-6f;
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = __fsub_rn(__fmul_rn(meta.scale, static_cast<float>(code[i])), min);
  }
}

/// Values 8 * piece to 8 * piece + 7 of a packed or plain row of `cols` values.
template <TensorType kType>
__device__ __forceinline__ void decode_piece(const std::uint8_t* row, std::int64_t cols, int full_groups, int piece,
                                             float (&out)[8]) {
  if constexpr (kType == TensorType::kBf16 || kType == TensorType::kF16 || kType == TensorType::kF32) {
    using Stored =
        std::conditional_t<kType == TensorType::kBf16, Bf16, std::conditional_t<kType == TensorType::kF16, F16, float>>;
    const Stored* const values = reinterpret_cast<const Stored*>(row);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = 8 * piece + i < cols ? to_float(values[8 * piece + i]) : 0.0f;
  } else {
    const int group = piece / 4, chunk = group / full_groups;
    const int left = static_cast<int>(cols / kGroup) - chunk * full_groups;
    decode_eight<kType>(row + chunk * chunk_bytes(kType, full_groups), min(left, full_groups),
                        group - chunk * full_groups, piece % 4, out);
  }
}

/// Calls body.operator()<kType>() for the type. @throws std::invalid_argument for one that holds no weights
template <class TBody>
void for_weight_type(const char* who, TensorType type, TBody&& body) {
  switch (type) {
    case TensorType::kQ4K:
      return body.template operator()<TensorType::kQ4K>();
    case TensorType::kQ5K:
      return body.template operator()<TensorType::kQ5K>();
    case TensorType::kQ6K:
      return body.template operator()<TensorType::kQ6K>();
    case TensorType::kQ8_0:
      return body.template operator()<TensorType::kQ8_0>();
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

/// One thread eight values; neighbours write neighbouring 16 bytes.
template <TensorType kType>
__global__ void __launch_bounds__(256)
    decode_rows_kernel(const std::uint8_t* data, std::int64_t row_step_bytes, std::int64_t n_row, std::int64_t cols,
                       int full_groups, Bf16* out) {
  const int n_piece = static_cast<int>((cols + 7) / 8);
  const int piece = static_cast<int>(blockIdx.x * 256 + threadIdx.x);
  const std::int64_t row = blockIdx.y;
  if (piece >= n_piece) return;
  float values[8];
  decode_piece<kType>(data + row * row_step_bytes, cols, full_groups, piece, values);
  Bf16* const to = out + row * cols + 8 * piece;
  if (cols % 8 == 0) {
    uint4 words;
    words.x = pack_bf16(values[0], values[1]), words.y = pack_bf16(values[2], values[3]);
    words.z = pack_bf16(values[4], values[5]), words.w = pack_bf16(values[6], values[7]);
    *reinterpret_cast<uint4*>(to) = words;
    return;
  }
  for (int i = 0; i < 8 && 8 * piece + i < cols; ++i) to[i] = to_bf16(values[i]);
}

}  // namespace detail

/// Rows first, first + row_step, ... (`count` of them, at most 65535) of a matrix, rounded to bf16: out [count, cols],
/// 16-byte aligned.
inline void decode_rows(const PackedMatrix& matrix, std::int64_t first, std::int64_t count, std::int64_t row_step,
                        Bf16* out, cudaStream_t stream) {
  if (count == 0) return;
  require(first >= 0 && first + (count - 1) * row_step < matrix.rows && count <= 65535, "decode_rows: ", count,
          " rows from ", first, " in steps of ", row_step, " of ", matrix.rows, ", at most 65535 a call");
  const std::int64_t bytes = matrix.row_bytes();
  const auto* const data = reinterpret_cast<const std::uint8_t*>(matrix.data) + first * bytes;
  const dim3 grid(static_cast<unsigned>((matrix.cols + 2047) / 2048), static_cast<unsigned>(count));
  detail::for_weight_type("decode_rows", matrix.type, [&]<TensorType kType>() {
    detail::decode_rows_kernel<kType>
        <<<grid, 256, 0, stream>>>(data, row_step * bytes, count, matrix.cols, chunk_groups(matrix.cols), out);
  });
  check_launch("decode_rows_kernel");
}

}  // namespace gemma4::cuda

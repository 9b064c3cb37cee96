// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda/ptx/shared_memory.cuh"

/// Twin of cuda/ptx/matrix.cuh.
namespace gemma4::cuda {

namespace detail {

/// An 8x8 matrix of 16-bit values, and what a lane holds of it or of its transpose.
struct Matrix8x8 {
  std::uint16_t value[8][8];

  [[nodiscard]] std::uint32_t pair(int lane) const {
    const int row = lane / 4, col = lane % 4 * 2;
    return value[row][col] | std::uint32_t{value[row][col + 1]} << 16;
  }
  [[nodiscard]] std::uint32_t transposed_pair(int lane) const {
    const int row = lane / 4, col = lane % 4 * 2;
    return value[col][row] | std::uint32_t{value[col + 1][row]} << 16;
  }
};

struct FourPairs {
  std::uint32_t word[4];
};

inline void need_row_address(std::uint32_t address) {
  if (address % 16 != 0) emulator::fail("a row of a matrix at ", address, ", which is no multiple of 16");
}

template <bool kTransposed>
inline void load_matrices(std::uint32_t (&fragment)[4], std::uint32_t address) {
  need_row_address(address);
  const char* name = kTransposed ? "load_matrix_x4_transposed" : "load_matrix_x4";
  const auto load = [](const std::uint32_t* row_address, FourPairs* out) {
    for (int m = 0; m < 4; ++m) {
      Matrix8x8 matrix;
      for (int row = 0; row < 8; ++row) {
        std::memcpy(matrix.value[row], emulator::from_shared(row_address[8 * m + row]), sizeof(matrix.value[row]));
      }
      for (int lane = 0; lane < 32; ++lane) {
        out[lane].word[m] = kTransposed ? matrix.transposed_pair(lane) : matrix.pair(lane);
      }
    }
  };
  const auto pairs = emulator::warp_operation<FourPairs>(name, address, load);
  std::copy_n(pairs.word, 4, fragment);
}

}  // namespace detail

__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&fragment)[4], std::uint32_t address) {
  detail::load_matrices<false>(fragment, address);
}

__device__ __forceinline__ void load_matrix_x4_transposed(std::uint32_t (&fragment)[4], std::uint32_t address) {
  detail::load_matrices<true>(fragment, address);
}

__device__ __forceinline__ void store_matrix_x4(std::uint32_t address, std::uint32_t f0, std::uint32_t f1,
                                                std::uint32_t f2, std::uint32_t f3) {
  detail::need_row_address(address);
  struct In {
    std::uint32_t address, word[4];
  };
  const auto store = [](const In* in, char*) {
    for (int m = 0; m < 4; ++m) {
      for (int lane = 0; lane < 32; ++lane) {
        std::memcpy(emulator::from_shared(in[8 * m + lane / 4].address) + lane % 4 * 4, &in[lane].word[m], 4);
      }
    }
  };
  emulator::warp_operation<char>("store_matrix_x4", In{address, {f0, f1, f2, f3}}, store);
}

[[nodiscard]] __device__ __forceinline__ std::uint32_t transpose_matrix(std::uint32_t pair) {
  const auto transpose = [](const std::uint32_t* in, std::uint32_t* out) {
    detail::Matrix8x8 matrix;
    for (int lane = 0; lane < 32; ++lane) std::memcpy(&matrix.value[lane / 4][lane % 4 * 2], &in[lane], 4);
    for (int lane = 0; lane < 32; ++lane) out[lane] = matrix.transposed_pair(lane);
  };
  return emulator::warp_operation<std::uint32_t>("transpose_matrix", pair, transpose);
}

}  // namespace gemma4::cuda

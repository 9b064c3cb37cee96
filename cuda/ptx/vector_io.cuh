// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/convert.cuh"
#include "gemma4/float16.hpp"
#include "gemma4/platform.hpp"

/// Runs of values between memory and registers, up to 16 bytes an instruction, widened to float and rounded back. The
/// bytes of a run are a power of two, and it begins at a multiple of them up to 16.
///   load_values    reads and widens at once
///   RawValues      reads now and widens later, where latency is to be hidden without the registers of floats
///   store_values   rounds and writes
namespace gemma4::cuda {

namespace detail {

/// kCount values of T in pieces of up to 16 bytes, as they lie in memory.
template <int kCount, class T>
struct RunShape {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T)), kPiece = kBytes < 16 ? kBytes : 16;
  static constexpr int kEach = kPiece / static_cast<int>(sizeof(T));  ///< values of a piece
  static constexpr int kPieces = kCount / kEach;
};

/// Values 0 to kCount - 1 at `source`, widened.
template <int kCount, class T>
__device__ __forceinline__ void load_values(const T* source, float (&x)[kCount]) {
  using Shape = RunShape<kCount, T>;
  struct alignas(Shape::kPiece) Piece {
    T value[Shape::kEach];
  };
#pragma unroll
  for (int p = 0; p < Shape::kPieces; ++p) {
    const Piece piece = reinterpret_cast<const Piece*>(source)[p];
#pragma unroll
    for (int i = 0; i < Shape::kEach; ++i) x[p * Shape::kEach + i] = to_float(piece.value[i]);
  }
}

template <int kCount, class T>
__device__ __forceinline__ void store_values(T* target, const float (&x)[kCount]) {
  using Shape = RunShape<kCount, T>;
  constexpr int kEach = Shape::kEach;
#pragma unroll
  for (int p = 0; p < Shape::kPieces; ++p) {
    if constexpr (std::is_same_v<T, Bf16> && kEach > 1) {
      // One instruction rounds two values; in integers it takes ten.
      struct alignas(Shape::kPiece) Piece {
        std::uint32_t pair[kEach / 2];
      } piece;
#pragma unroll
      for (int i = 0; i < kEach / 2; ++i) piece.pair[i] = pack_bf16(x[p * kEach + 2 * i], x[p * kEach + 2 * i + 1]);
      reinterpret_cast<Piece*>(target)[p] = piece;
    } else {
      struct alignas(Shape::kPiece) Piece {
        T value[kEach];
      } piece;
#pragma unroll
      for (int i = 0; i < kEach; ++i) piece.value[i] = from_float<T>(x[p * kEach + i]);
      reinterpret_cast<Piece*>(target)[p] = piece;
    }
  }
}

/// A run as it lies in memory: read ahead, widened when it is its turn. At least four bytes.
template <int kCount, class T>
struct RawValues {
  using Shape = RunShape<kCount, T>;
  static_assert(Shape::kPiece >= 4, "pieces are words");
  struct alignas(Shape::kPiece) Piece {
    std::uint32_t word[Shape::kPiece / 4];
  } piece[Shape::kPieces];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int p = 0; p < Shape::kPieces; ++p) piece[p] = reinterpret_cast<const Piece*>(from)[p];
  }
  /// From the L2, for what an earlier kernel wrote: a multiprocessor's own cache is only known to be fresh after the
  /// wait for that kernel. At least 16 bytes.
  __device__ __forceinline__ void load_from_l2(const T* from) {
    static_assert(Shape::kPiece == 16);
#pragma unroll
    for (int p = 0; p < Shape::kPieces; ++p) {
      const uint4 words = __ldcg(reinterpret_cast<const uint4*>(from) + p);
      piece[p].word[0] = words.x, piece[p].word[1] = words.y, piece[p].word[2] = words.z, piece[p].word[3] = words.w;
    }
  }
  /// The same one by one: the first n_there values, which need not be aligned, and zeros for the others.
  __device__ __forceinline__ void load_some_from_l2(const T* from, int n_there) {
    constexpr int kEach = 4 / static_cast<int>(sizeof(T));
    using Bits = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>;
    clear();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const std::uint32_t bits = i < n_there ? __ldcg(reinterpret_cast<const Bits*>(from) + i) : Bits{0};
      piece[i / Shape::kEach].word[i % Shape::kEach / kEach] |= bits << (i % kEach * 8 * sizeof(T));
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (Piece& each : piece) {
#pragma unroll
      for (std::uint32_t& word : each.word) word = 0;
    }
  }
  __device__ __forceinline__ void widen(float (&x)[kCount]) const {
    constexpr int kEach = 4 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const std::uint32_t word = piece[i / Shape::kEach].word[i % Shape::kEach / kEach];
      if constexpr (std::is_same_v<T, float>) {
        x[i] = __uint_as_float(word);
      } else {
        static_assert(std::is_same_v<T, Bf16>);
        x[i] = __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xFFFF0000u);
      }
    }
  }
};

/// kCount consecutive words, aligned to their size up to 16 bytes.
template <int kCount>
__device__ __forceinline__ void load_words(const std::uint32_t* source, std::uint32_t (&words)[kCount]) {
  if constexpr (kCount == 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(source);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  } else if constexpr (kCount == 2) {
    const uint2 two = *reinterpret_cast<const uint2*>(source);
    words[0] = two.x, words[1] = two.y;
  } else {
    static_assert(kCount == 1);
    words[0] = *source;
  }
}

}  // namespace detail
}  // namespace gemma4::cuda

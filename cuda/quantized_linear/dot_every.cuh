// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx/arithmetic.cuh"
#include "cuda/quantized_linear/dot.cuh"
#include "cuda/weights/activation_blocks.cuh"
#include "cuda/weights/codes.cuh"
#include "gemma4/gguf/block_formats.hpp"
#include "gemma4/gguf/gguf.hpp"

/// A lane's product, as in dot.cuh, for the formats that the kernel of the K-quants does not know. Offsets of codes are
/// part of the integer sums, as multiples of the activations' sums; scales of 16 weights too, where two of them and
/// their products stay below 2^22. Steps, and offsets in float, are applied once a group.
namespace gemma4::cuda::detail {

/// Codes of 4 bits as they lie in memory: in bytes, those of the upper 16 weights 16 times.
struct NibbleCodes {
  std::uint32_t low[4], high[4];

  __device__ __forceinline__ void load(const std::uint8_t* from) {
    const uint4 codes = *reinterpret_cast<const uint4*>(from);
    const std::uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) low[i] = word[i] & 0x0F0F0F0Fu, high[i] = word[i] & 0xF0F0F0F0u;
  }
  /// 16 sum q x + offset; at most 2 * 16 * 240 * 127 < 2^22 without it.
  [[nodiscard]] __device__ __forceinline__ float products(const LaneActivation& x, int offset) const {
    int lower = 0, upper = kMagic + offset;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      lower = dot4(low[i], x.low[i], lower), upper = dot4_unsigned(high[i], x.high[i], upper);
    }
    return from_magic(16 * lower + upper);
  }
};

/// Codes of 8 bits at most, signed, in bytes.
struct ByteCodes {
  std::uint32_t low[4], high[4];

  /// Codes of 4 bits with a fifth.
  __device__ __forceinline__ void load_with_fifth(const std::uint8_t* from, const std::uint8_t* fifth_bits) {
    const uint4 codes = *reinterpret_cast<const uint4*>(from);
    const std::uint32_t fifth = *reinterpret_cast<const std::uint32_t*>(fifth_bits);
    const std::uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i] = (word[i] & 0x0F0F0F0Fu) | ((fifth << (4 - i)) & 0x10101010u);
      high[i] = ((word[i] >> 4) & 0x0F0F0F0Fu) | ((fifth >> i) & 0x10101010u);
    }
  }
  /// The values of table codes.
  __device__ __forceinline__ void load_table_codes(const std::uint8_t* from) {
    const uint4 codes = *reinterpret_cast<const uint4*>(from);
    look_up_codes(codes.x, low[0], high[0]);
    look_up_codes(codes.y, low[1], high[1]);
    look_up_codes(codes.z, low[2], high[2]);
    look_up_codes(codes.w, low[3], high[3]);
  }
  /// sum q x + offset; at most 32 * 127 * 127 < 2^22 without it.
  [[nodiscard]] __device__ __forceinline__ float products(const LaneActivation& x, int offset) const {
    int lower = 0, upper = kMagic + offset;
#pragma unroll
    for (int i = 0; i < 4; ++i) lower = dot4(low[i], x.low[i], lower), upper = dot4(high[i], x.high[i], upper);
    return from_magic(lower + upper);
  }
};

[[nodiscard]] __device__ __forceinline__ int block_sum(const LaneActivation& x) {
  return x.low_sum() + x.high_sum();
}

/// sum d (q - 8) x = s_x d (sum q x - 8 sum x)
template <>
struct LinearFormat<TensorType::kQ4_0> {
  struct Weights {
    NibbleCodes codes;
    float scale;
    __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group) {
      codes.load(chunk + 16 * group);
      scale = __half2float(*reinterpret_cast<const __half*>(chunk + 16 * groups + 2 * group));
    }
  };
  [[nodiscard]] static __device__ __forceinline__ float term(const Weights& w, const LaneActivation& x, float sum) {
    const float products = w.codes.products(x, -16 * Q40Block::kOffset * block_sum(x));
    return __fmaf_rn(__fmul_rn(w.scale, x.scale * 0x1p-4f), products, sum);
  }
};

/// sum (d q + m) x = s_x (d sum q x + m sum x)
template <>
struct LinearFormat<TensorType::kQ4_1> {
  struct Weights {
    NibbleCodes codes;
    float scale, offset;
    __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group) {
      codes.load(chunk + 16 * group);
      const float2 steps = __half22float2(*reinterpret_cast<const __half2*>(chunk + 16 * groups + 4 * group));
      scale = steps.x, offset = steps.y;
    }
  };
  [[nodiscard]] static __device__ __forceinline__ float term(const Weights& w, const LaneActivation& x, float sum) {
    const float offsets = __fmul_rn(x.scale, static_cast<float>(block_sum(x)));
    sum = __fmaf_rn(__fmul_rn(w.scale, x.scale * 0x1p-4f), w.codes.products(x, 0), sum);
    return __fmaf_rn(w.offset, offsets, sum);
  }
};

/// sum d (q - 16) x = s_x d (sum q x - 16 sum x)
template <>
struct LinearFormat<TensorType::kQ5_0> {
  struct Weights {
    ByteCodes codes;
    float scale;
    __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group) {
      codes.load_with_fifth(chunk + 16 * group, chunk + 16 * groups + 4 * group);
      scale = __half2float(*reinterpret_cast<const __half*>(chunk + 20 * groups + 2 * group));
    }
  };
  [[nodiscard]] static __device__ __forceinline__ float term(const Weights& w, const LaneActivation& x, float sum) {
    const float products = w.codes.products(x, -Q50Block::kOffset * block_sum(x));
    return __fmaf_rn(__fmul_rn(w.scale, x.scale), products, sum);
  }
};

/// sum (d q + m) x = s_x (d sum q x + m sum x)
template <>
struct LinearFormat<TensorType::kQ5_1> {
  struct Weights {
    ByteCodes codes;
    float scale, offset;
    __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group) {
      codes.load_with_fifth(chunk + 16 * group, chunk + 16 * groups + 4 * group);
      const float2 steps = __half22float2(*reinterpret_cast<const __half2*>(chunk + 20 * groups + 4 * group));
      scale = steps.x, offset = steps.y;
    }
  };
  [[nodiscard]] static __device__ __forceinline__ float term(const Weights& w, const LaneActivation& x, float sum) {
    const float offsets = __fmul_rn(x.scale, static_cast<float>(block_sum(x)));
    sum = __fmaf_rn(__fmul_rn(w.scale, x.scale), w.codes.products(x, 0), sum);
    return __fmaf_rn(w.offset, offsets, sum);
  }
};

/// A value that is known when compiled, in a register of each lane: what depends on the thread is not kept once a warp
/// and copied before each use. (Blocks have one layer, so nothing is added.)
[[nodiscard]] __device__ __forceinline__ std::uint32_t lane_register(std::uint32_t value) {
  return value + threadIdx.z;
}

/// Table codes as they lie in memory, for one token. Bit 3 of a code, as a byte permutation takes it, replicates a
/// sign: four codes select a byte of the table's lower half, which is negative, or -1; their complements select 0, or a
/// byte of the upper half from its end, which is positive, and 1 for the -1. So two products in the place of one do
/// what choosing between the halves does in four operations.
struct TableCodes {
  uint4 codes;

  __device__ __forceinline__ void load_table_codes(const std::uint8_t* from) {
    codes = *reinterpret_cast<const uint4*>(from);
  }
  /// sum t[q] x
  [[nodiscard]] __device__ __forceinline__ float products(const LaneActivation& x, int) const {
    const std::uint32_t lower0 = lane_register(kTableWord0), lower4 = lane_register(kTableWord4),
                        upper0 = lane_register(kUpperReversed0), upper4 = lane_register(kUpperReversed4),
                        minus_one = lane_register(~0u);
    const std::uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
    int sum = kMagic;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t second = word[i] >> 16;
      // The complement as a product, since the pipe of logic has the most to do.
      sum = dot4(permute_bytes(lower0, lower4, word[i]), x.low[i], sum);
      sum = dot4(permute_bytes(upper0, upper4, word[i] * minus_one + minus_one), x.low[i], sum);
      sum = dot4(permute_bytes(lower0, lower4, second), x.high[i], sum);
      sum = dot4(permute_bytes(upper0, upper4, second * minus_one + minus_one), x.high[i], sum);
    }
    return from_magic(sum);
  }
};

/// sum d t[q] x = s_x d sum t[q] x
template <class TCodes>
struct Iq4NlFormat {
  struct Weights {
    TCodes codes;
    float scale;
    __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group) {
      codes.load_table_codes(chunk + 16 * group);
      scale = __half2float(*reinterpret_cast<const __half*>(chunk + 16 * groups + 2 * group));
    }
  };
  [[nodiscard]] static __device__ __forceinline__ float term(const Weights& w, const LaneActivation& x, float sum) {
    return __fmaf_rn(__fmul_rn(w.scale, x.scale), w.codes.products(x, 0), sum);
  }
};
template <>
struct LinearFormat<TensorType::kIq4Nl> : Iq4NlFormat<ByteCodes> {};
template <>
struct LinearFormatFor<TensorType::kIq4Nl, 1> : Iq4NlFormat<TableCodes> {};

/// sum d (s - 32) t[q] x = s_x (d (s - 32)) sum t[q] x
template <class TCodes>
struct Iq4XsFormat {
  struct Weights {
    TCodes codes;
    float scale;
    __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group) {
      codes.load_table_codes(chunk + 16 * group);
      const uint2 meta = *reinterpret_cast<const uint2*>(chunk + 16 * groups + (group & ~7));
      // 2^23 and an integer below it: iq4_xs_scale(), in two operations where the exponent is in a register.
      const int j = group & 7;
      const std::uint32_t bits =
          ((meta.y >> (4 * j)) & 15u) | (((meta.x >> (12 + 2 * j)) & 0x30u) | lane_register(0x4B000000u));
      const float s = __fsub_rn(__uint_as_float(bits), 8388608.0f + float{Iq4XsBlock::kScaleOffset});
      scale = __fmul_rn(__low2float(reinterpret_cast<const __half2&>(meta.x)), s);
    }
  };
  [[nodiscard]] static __device__ __forceinline__ float term(const Weights& w, const LaneActivation& x, float sum) {
    return __fmaf_rn(__fmul_rn(w.scale, x.scale), w.codes.products(x, 0), sum);
  }
};
template <>
struct LinearFormat<TensorType::kIq4Xs> : Iq4XsFormat<ByteCodes> {};
template <>
struct LinearFormatFor<TensorType::kIq4Xs, 1> : Iq4XsFormat<TableCodes> {};

/// sum d s (q - 4) x = s_x d (s_0 (sum_low q x - 4 sum_low x) + s_1 (the same of the upper 16)), all but s_x d in
/// integers, 8 times, since some codes lie in memory so: at most 2 * 8 * 32 * 16 * 4 * 127 < 2^22.
template <>
struct LinearFormat<TensorType::kQ3K> {
  struct Weights {
    ThreeBitCodes codes;
    int low_scale, high_scale;
    float d;
    __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group) {
      codes = ThreeBitCodes(*reinterpret_cast<const uint2*>(chunk + 8 * group),
                            *reinterpret_cast<const std::uint32_t*>(chunk + 8 * groups + 4 * group));
      const std::uint32_t lower = chunk[12 * groups + group];
      const std::uint32_t upper = std::uint32_t{chunk[13 * groups + group / 2]} >> (4 * (group & 1));
      low_scale = static_cast<int>((lower & 15u) | ((upper & 3u) << 4)) - Q3KBlock::kScaleOffset;
      high_scale = static_cast<int>((lower >> 4) | ((upper & 12u) << 2)) - Q3KBlock::kScaleOffset;
      d = __half2float(*reinterpret_cast<const __half*>(chunk + 108 * (groups / 8) + 2 * (group / 8)));
    }
  };
  [[nodiscard]] static __device__ __forceinline__ float term(const Weights& w, const LaneActivation& x, float sum) {
    const ThreeBitCodes& q = w.codes;
    const int low = dot4(q.low[0], x.low[0], dot4(q.low[2], x.low[2], dot4(q.low[3], x.low[3], 0)));
    const int low_of_8 = dot4(q.low[1], x.low[1], -8 * Q3KBlock::kOffset * x.low_sum());
    const int high = dot4(q.high[0], x.high[0], dot4(q.high[2], x.high[2], 0));
    const int high_of_8 = dot4(q.high[1], x.high[1], dot4(q.high[3], x.high[3], -8 * Q3KBlock::kOffset * x.high_sum()));
    const int products = w.low_scale * (8 * low + low_of_8) + w.high_scale * (8 * high + high_of_8);
    return __fmaf_rn(__fmul_rn(w.d, x.scale * 0x1p-3f), from_magic(kMagic + products), sum);
  }
};

/// sum (d s q - dmin m) x = s_x (d (s_0 sum_low q x + s_1 sum_high q x) - dmin (m_0 sum_low x + m_1 sum_high x)), the
/// inner sums in integers, the first of them 4 times, the second 16 times: at most 2 * 4 * 15 * 16 * 3 * 127 < 2^22 and
/// 2 * 16 * 15 * 16 * 127 < 2^22. A half's products, 4 times 16 * 3 * 127 at most, are 16 bits with a sign.
template <>
struct LinearFormat<TensorType::kQ2K> {
  struct Weights {
    std::uint32_t low[4], high[4];    ///< those of odd index 4 times the codes
    std::uint32_t scales, minima_16;  ///< bytes 0 and 1; 16 times the minima
    float2 steps;
    __device__ __forceinline__ void load(const std::uint8_t* chunk, int groups, int group) {
      const uint2 codes = *reinterpret_cast<const uint2*>(chunk + 8 * group);
      const std::uint32_t pairs = *reinterpret_cast<const std::uint16_t*>(chunk + 8 * groups + 2 * group);
      steps = __half22float2(*reinterpret_cast<const __half2*>(chunk + 10 * groups + 4 * (group / 8)));
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const std::uint32_t x = codes.x >> (2 * i), y = codes.y >> (2 * i);
        low[i] = x & 0x03030303u, low[i + 1] = x & 0x0C0C0C0Cu;
        high[i] = y & 0x03030303u, high[i + 1] = y & 0x0C0C0C0Cu;
      }
      scales = pairs & 0x0F0Fu, minima_16 = pairs & 0xF0F0u;
    }
  };
  [[nodiscard]] static __device__ __forceinline__ float term(const Weights& w, const LaneActivation& x, float sum) {
    const int low = 4 * dot4(w.low[0], x.low[0], dot4(w.low[2], x.low[2], 0)) +
                    dot4(w.low[1], x.low[1], dot4(w.low[3], x.low[3], 0));
    const int high = 4 * dot4(w.high[0], x.high[0], dot4(w.high[2], x.high[2], 0)) +
                     dot4(w.high[1], x.high[1], dot4(w.high[3], x.high[3], 0));
    const std::uint32_t halves =
        permute_bytes(static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(high), 0x5410u);
    const float products = from_magic(dot2(halves, w.scales, kMagic));
    const float minima = from_magic(dot2(x.sums, w.minima_16, kMagic));
    sum = __fmaf_rn(__fmul_rn(w.steps.x, x.scale * 0x1p-2f), products, sum);
    return __fmaf_rn(-w.steps.y, __fmul_rn(x.scale * 0x1p-4f, minima), sum);
  }
};

}  // namespace gemma4::cuda::detail

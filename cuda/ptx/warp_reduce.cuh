// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Reductions over the lanes of a warp and the threads of a block, each in one fixed order.
///
/// A butterfly: at each lane bit a value meets that of the lane whose number differs in that bit, until every lane has
/// the result over all the bits. Floating-point sums depend on the order of the bits, so it is part of the name of what
/// is computed: <16, 1> is a whole warp, far lanes first; <1, 2> a quad; <4, 16> the eight lanes with the same place in
/// their quad (a column of an mma accumulator), near ones first, <16, 4> far ones first.
/// Source: the CUDA C++ programming guide, "Warp shuffle functions".
namespace gemma4::cuda {

/// The lane bits of a butterfly from kFirst to kLast, powers of two, up or down.
template <int kFirst, int kLast>
struct LaneBits {
  static constexpr bool kUp = kFirst <= kLast;
  [[nodiscard]] static __device__ constexpr bool has(int bit) { return kUp ? bit <= kLast : bit >= kLast; }
  [[nodiscard]] static __device__ constexpr int next(int bit) { return kUp ? 2 * bit : bit / 2; }
};

/// The sum in every lane. (In place, and with the loop spelled out for each operation: through a copy, or a function
/// object, ptxas gives the long-lived sums of the attention kernels other registers.)
template <int kFirst = 16, int kLast = 1, class T>
__device__ __forceinline__ void warp_sum_in_place(T& value) {
  using Bits = LaneBits<kFirst, kLast>;
#pragma unroll
  for (int bit = kFirst; Bits::has(bit); bit = Bits::next(bit)) value += __shfl_xor_sync(~0u, value, bit);
}

template <int kFirst = 16, int kLast = 1, class T>
[[nodiscard]] __device__ __forceinline__ T warp_sum(T value) {
  warp_sum_in_place<kFirst, kLast>(value);
  return value;
}

/// The largest in every lane; a NaN counts as less than any number.
template <int kFirst = 16, int kLast = 1>
[[nodiscard]] __device__ __forceinline__ float warp_max(float value) {
  using Bits = LaneBits<kFirst, kLast>;
#pragma unroll
  for (int bit = kFirst; Bits::has(bit); bit = Bits::next(bit)) value = fmaxf(value, __shfl_xor_sync(~0u, value, bit));
  return value;
}

[[nodiscard]] __device__ __forceinline__ float quad_sum(float value) {
  return warp_sum<1, 2>(value);
}
[[nodiscard]] __device__ __forceinline__ float quad_max(float value) {
  return warp_max<1, 2>(value);
}

/// The sum over kWarps warps in every one of their threads: a warp by warp_sum(), then the warps in order. `thread`
/// counts the threads, `meet` is a barrier of them all. `parts` is shared memory of this sum alone until the next
/// barrier of these threads after the call: two sums in a row take two in turn.
template <int kWarps, class TIndex, class TMeet>
__device__ __forceinline__ void block_sum_in_place(float& value, float (&parts)[kWarps], TIndex thread,
                                                   const TMeet& meet) {
  warp_sum_in_place(value);
  if ((thread & 31) == 0) parts[thread / 32] = value;
  meet();
  value = 0.0f;
#pragma unroll
  for (const float part : parts) value += part;
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>

#include "cuda/ptx/atomic.cuh"
#include "gemma4/platform.hpp"
#include "gemma4/sampler.hpp"

/// What the kernels of the sampler share: the memory between them, how a block walks its part of the vocabulary, how
/// tokens are compared, and where the chosen one goes.
namespace gemma4::cuda::detail {

inline constexpr int kSamplerThreads = 512;
inline constexpr int kSamplerWarps = kSamplerThreads / 32;
inline constexpr int kMaxSamplerBlocks = 128;
inline constexpr int kSelectBits = 11;
inline constexpr int kSelectBins = 1 << kSelectBits;
inline constexpr int kSelectLevels = 3;
inline constexpr int kMaxListed = 4096;  ///< candidates that one block sorts

/// Which bits of a key a level looks at.
[[nodiscard]] __host__ __device__ constexpr int select_shift(int level) {
  return level == 0 ? 21 : level == 1 ? 10 : 0;
}
[[nodiscard]] __host__ __device__ constexpr int select_bits(int level) {
  return level == 2 ? 10 : 11;
}

/// A token and what it is compared by, the first number first. All zero: no token.
struct alignas(16) Candidate {
  std::uint32_t high, low;  ///< grow with the score; kBadScore in `high`: a NaN or +inf was seen
  std::uint32_t place;      ///< ~index, so that the lowest index wins among equals
};
inline constexpr std::uint32_t kBadScore = 0xFFFFFFFFu;  ///< above the key of any number

/// Between kernels, and what the blocks of one hand each other. All zero before the first call; `arrivals` and the bins
/// are zero again after each kernel.
struct SamplerState {
  std::uint32_t arrivals;
  std::int32_t is_bad;         ///< no token can be chosen
  float largest;               ///< logit
  std::uint32_t prefix;        ///< upper bits of the key at which the end lies
  std::uint64_t n_before;      ///< tokens with a larger key than those of the prefix
  std::uint64_t mass_before;   ///< and their mass
  std::uint64_t n_wanted;      ///< tokens that stay
  double mass_wanted;          ///< mass that is enough
  std::uint64_t n_equal;       ///< tokens with the key of the end that stay
  std::int32_t last_index;     ///< of those
  std::uint32_t end_key;       ///< key of the end
  std::uint64_t n_candidates;  ///< tokens of the first level's prefix and before
  std::uint32_t n_listed;
  std::int32_t is_done;  ///< the token has been chosen from the list
  Candidate best[kMaxSamplerBlocks];
  std::uint32_t n_equal_in_block[kMaxSamplerBlocks];
  std::uint64_t list[kMaxListed];  ///< (key, ~index) of candidates, in no order
  std::uint64_t mass[kSelectBins];
  std::uint32_t count[kSelectBins];
};

struct SamplerParams {
  const float* logits;
  std::int32_t vocab;
  std::int32_t block_values;  ///< of each block, a multiple of 4
  float temperature, top_p;
  std::int32_t top_k;
  std::uint64_t seed;
  const std::int32_t* position;
  SamplerState* state;
  bool is_aligned;  ///< logits begin at a multiple of 16 bytes
};

/// Grows with the float; -0 counts as 0.
[[nodiscard]] __device__ __forceinline__ std::uint32_t order_key(float value) {
  const std::uint32_t bits = __float_as_uint(__fadd_rn(value, 0.0f));
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
[[nodiscard]] __device__ __forceinline__ float from_order_key(std::uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7FFFFFFFu : ~key);
}

/// body(index, logit) for the block's own range; a thread's indices grow.
template <class TBody>
__device__ __forceinline__ void for_each_logit(const SamplerParams& params, TBody&& body) {
  const std::int64_t begin = std::int64_t{params.block_values} * blockIdx.x;
  const int end = static_cast<int>(min(begin + params.block_values, std::int64_t{params.vocab}));
  for (std::int64_t first = begin + 4 * threadIdx.x; first < end; first += 4 * kSamplerThreads) {
    const int i = static_cast<int>(first);
    if (params.is_aligned && end - i >= 4) {
      const float4 four = *reinterpret_cast<const float4*>(params.logits + i);
      body(i, four.x), body(i + 1, four.y), body(i + 2, four.z), body(i + 3, four.w);
    } else {
      for (int k = 0; k < min(4, end - i); ++k) body(i + k, params.logits[i + k]);
    }
  }
}

/// Counts this block in; whether it is the last of the grid. One thread asks, after a barrier with those that wrote;
/// the others see what all blocks wrote after another barrier.
[[nodiscard]] __device__ __forceinline__ bool arrives_last(SamplerState* state) {
  return count_around(&state->arrivals, gridDim.x - 1) == gridDim.x - 1;
}

/// For a whole block: whether it is the last one; then all that the others wrote is visible to it.
[[nodiscard]] __device__ __forceinline__ bool is_last_block(SamplerState* state) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) is_last = arrives_last(state);
  __syncthreads();
  return is_last;
}

/// Mass of a logit, see gemma4/sampler.hpp.
[[nodiscard]] __device__ __forceinline__ std::uint64_t mass_of(const SamplerParams& params, float logit,
                                                               float largest) {
  const double temperature = static_cast<double>(params.temperature);
  return sampler_mass(static_cast<double>(logit) / temperature, static_cast<double>(largest) / temperature,
                      params.vocab);
}

/// Sum of the values of the threads before this one.
[[nodiscard]] __device__ __forceinline__ std::uint64_t sum_before(std::uint64_t value,
                                                                  std::uint64_t (&parts)[kSamplerWarps]) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  std::uint64_t sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const std::uint64_t other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) parts[warp] = sum;
  __syncthreads();
  std::uint64_t before = sum - value;
  for (int w = 0; w < warp; ++w) before += parts[w];
  return before;
}

/// Where the token goes and what follows from it.
struct SampledTokenParams {
  std::int32_t* token;
  std::int32_t* history;
  std::int64_t history_len;
  std::int32_t* text;
  std::int32_t* next_position;
  std::int32_t* kv_len;
};

[[nodiscard]] __device__ __forceinline__ bool is_better(const Candidate& a, const Candidate& b) {
  if (a.high != b.high) return a.high > b.high;
  return a.low != b.low ? a.low > b.low : a.place > b.place;
}

[[nodiscard]] __device__ __forceinline__ Candidate best_of_warp(const Candidate& mine) {
  Candidate best;
  best.high = __reduce_max_sync(~0u, mine.high);
  best.low = __reduce_max_sync(~0u, mine.high == best.high ? mine.low : 0u);
  best.place = __reduce_max_sync(~0u, mine.high == best.high && mine.low == best.low ? mine.place : 0u);
  return best;
}

/// By its logit.
[[nodiscard]] __device__ __forceinline__ Candidate candidate_of(float logit, std::int32_t index) {
  return {order_key(logit), 0, ~static_cast<std::uint32_t>(index)};
}

/// By a score in double; -0 counts as 0.
[[nodiscard]] __device__ __forceinline__ Candidate candidate_of(double score, std::int32_t index) {
  const auto bits = static_cast<std::uint64_t>(__double_as_longlong(__dadd_rn(score, 0.0)));
  const std::uint64_t key = bits >> 63 != 0 ? ~bits : bits | std::uint64_t{1} << 63;
  return {static_cast<std::uint32_t>(key >> 32), static_cast<std::uint32_t>(key), ~static_cast<std::uint32_t>(index)};
}

/// By its scaled logit and its noise.
[[nodiscard]] __device__ __forceinline__ Candidate drawn_candidate(const SamplerParams& params, std::int64_t position,
                                                                   float logit, std::int32_t index) {
  const double x = static_cast<double>(logit) / static_cast<double>(params.temperature);
  return candidate_of(x - std::log(-std::log(sampler_uniform(params.seed, position, index))), index);
}

/// In every thread of the first warp; nothing in the others.
[[nodiscard]] __device__ __forceinline__ Candidate best_of_block(const Candidate& mine) {
  __shared__ Candidate parts[kSamplerWarps];
  const Candidate best = best_of_warp(mine);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = best;
  __syncthreads();
  return threadIdx.x < 32 ? best_of_warp(parts[threadIdx.x % kSamplerWarps]) : Candidate{};
}

/// The end of a call.
__device__ inline void store_token(const SampledTokenParams& to, const std::int32_t* last_position,
                                   std::int32_t token) {
  *to.token = token;
  if (to.history == nullptr && to.next_position == nullptr && to.kv_len == nullptr) return;
  const std::int32_t position = *last_position;
  if (to.history != nullptr && position >= -1 && position + std::int64_t{1} < to.history_len) {
    to.history[position + 1] = token;
    if (to.text != nullptr) to.text[position + 1] = token;
  }
  if (to.next_position != nullptr) *to.next_position = position + 1;
  if (to.kv_len != nullptr) *to.kv_len = position + 2;
}

}  // namespace gemma4::cuda::detail

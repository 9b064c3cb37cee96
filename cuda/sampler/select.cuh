// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>

#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/sampler/state.cuh"

/// Which tokens may be chosen: the end of the order "larger logit first, lower index first" up to which top_k and top_p
/// let tokens stay, found without sorting. A float's bits are turned into a key that grows with it; three passes
/// over 11, 11 and 10 of its bits count tokens, or their masses, per value of those bits and pick the one in which
/// the end lies. A last pass finds the index among equal keys. All counts are whole numbers, so that no order of
/// addition shows. What a kernel finds is in SamplerState when the next one reads it.
namespace gemma4::cuda::detail {

/// The least number of tokens of equal mass that reach what is wanted.
[[nodiscard]] __device__ inline std::uint64_t equals_needed(std::uint64_t before, std::uint64_t mass,
                                                            std::uint64_t count, double wanted) {
  std::uint64_t low = 1, high = count;
  while (low < high) {
    const std::uint64_t middle = (low + high) / 2;
    if (static_cast<double>(before + middle * mass) >= wanted) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

/// What the last block does with the bins of a level. Bins go to threads from the largest key down.
template <bool kByMass>
__device__ inline void pick_bin(const SamplerParams& params, int level) {
  constexpr int kEach = kSelectBins / kSamplerThreads;
  __shared__ std::uint64_t count_parts[kSamplerWarps], mass_parts[kSamplerWarps], totals[2];
  SamplerState& state = *params.state;
  std::uint64_t count[kEach], mass[kEach], count_sum = 0, mass_sum = 0;
  const auto bin = [&](int i) { return kSelectBins - 1 - static_cast<int>(threadIdx.x) * kEach - i; };
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    count[i] = state.count[bin(i)], mass[i] = state.mass[bin(i)];
    state.count[bin(i)] = 0, state.mass[bin(i)] = 0;
    count_sum += count[i], mass_sum += mass[i];
  }
  std::uint64_t n_before = sum_before(count_sum, count_parts), mass_before = sum_before(mass_sum, mass_parts);
  if (threadIdx.x == kSamplerThreads - 1) totals[0] = n_before + count_sum, totals[1] = mass_before + mass_sum;
  __syncthreads();
  std::uint64_t n_wanted = state.n_wanted;
  double mass_wanted = state.mass_wanted;
  if (level == 0 && !kByMass) n_wanted = min(static_cast<std::uint64_t>(params.top_k), totals[0]);
  if (level == 0 && kByMass && params.top_k == 0) {
    mass_wanted = static_cast<double>(params.top_p) * static_cast<double>(totals[1]);
  }
  if (level > 0) n_before += state.n_before, mass_before += state.mass_before;
  __syncthreads();  // the state has been read
  const auto is_enough = [&](std::uint64_t n, std::uint64_t m) {
    return kByMass ? static_cast<double>(m) >= mass_wanted : n >= n_wanted;
  };
  if (state.is_bad || is_enough(n_before, mass_before) || !is_enough(n_before + count_sum, mass_before + mass_sum)) {
    return;
  }
  int at = 0;
  while (!is_enough(n_before + count[at], mass_before + mass[at])) {
    n_before += count[at], mass_before += mass[at];
    ++at;
  }
  const std::uint32_t prefix =
      (level == 0 ? 0 : state.prefix << select_bits(level)) | static_cast<std::uint32_t>(bin(at));
  state.n_wanted = n_wanted, state.mass_wanted = mass_wanted;
  state.prefix = prefix, state.n_before = n_before, state.mass_before = mass_before;
  if (level == 0) state.n_candidates = n_before + count[at];
  if (level < kSelectLevels - 1) return;
  state.end_key = prefix;
  const std::uint64_t mass_each = mass[at] / count[at];  // equal keys have equal masses
  if constexpr (kByMass) {
    state.n_equal = equals_needed(mass_before, mass_each, count[at], mass_wanted);
  } else {
    state.n_equal = n_wanted - n_before;
    state.mass_wanted =
        static_cast<double>(params.top_p) * static_cast<double>(mass_before + state.n_equal * mass_each);
  }
}

/// One level of the search for the end: by count (top_k), or by mass (top_p).
template <bool kByMass>
__global__ void __launch_bounds__(kSamplerThreads)
    sampler_select_kernel(const __grid_constant__ SamplerParams params, int level) {
  __shared__ unsigned long long mass[kSelectBins];
  __shared__ unsigned count[kSelectBins];
  SamplerState& state = *params.state;
  const bool with_mass = params.top_p < 1;
  for (int i = threadIdx.x; i < kSelectBins; i += kSamplerThreads) mass[i] = 0, count[i] = 0;
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();
  if (state.is_done) return;
  const std::uint32_t prefix = level > 0 ? state.prefix : 0;
  const float largest = state.largest;
  const int shift = select_shift(level), bits = select_bits(level);
  for_each_logit(params, [&](int, float logit) {
    const std::uint32_t key = order_key(logit);
    if (!(logit > -INFINITY) || (level > 0 && key >> (shift + bits) != prefix)) return;
    const unsigned bin = (key >> shift) & ((1u << bits) - 1u);
    atomicAdd(&count[bin], 1u);
    if (with_mass) atomicAdd(&mass[bin], static_cast<unsigned long long>(mass_of(params, logit, largest)));
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kSelectBins; i += kSamplerThreads) {
    if (count[i] == 0) continue;
    atomicAdd(&state.count[i], count[i]);
    if (mass[i] != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&state.mass[i]), mass[i]);
  }
  if (is_last_block(&state)) pick_bin<kByMass>(params, level);
}

/// The index of the last of the equal keys that stay.
static __global__ void __launch_bounds__(kSamplerThreads)
    sampler_equals_kernel(const __grid_constant__ SamplerParams params) {
  __shared__ std::uint64_t parts[kSamplerWarps];
  __shared__ int chosen_block;
  __shared__ std::uint64_t chosen_before;
  wait_for_previous_kernel();
  allow_next_kernel();
  SamplerState& state = *params.state;
  if (state.is_done) return;
  const std::uint32_t end_key = state.end_key;
  std::uint64_t n_equal = 0;
  for_each_logit(params, [&](int, float logit) { n_equal += order_key(logit) == end_key ? 1 : 0; });
  const std::uint64_t before = sum_before(n_equal, parts);
  if (threadIdx.x == kSamplerThreads - 1) {
    state.n_equal_in_block[blockIdx.x] = static_cast<std::uint32_t>(before + n_equal);
  }
  if (!is_last_block(&state) || state.is_bad) return;
  if (threadIdx.x == 0) {
    std::uint64_t passed = 0;
    int block = 0;
    while (passed + state.n_equal_in_block[block] < state.n_equal) passed += state.n_equal_in_block[block++];
    chosen_block = block;
    chosen_before = passed;
  }
  __syncthreads();
  // The range of that block in neighbouring parts, one a thread, so that the threads are in the order of the indices.
  const std::int64_t begin = std::int64_t{params.block_values} * chosen_block;
  const std::int64_t each = (params.block_values + kSamplerThreads - 1) / kSamplerThreads;
  const std::int64_t first = begin + each * threadIdx.x;
  const std::int64_t end = min(min(first + each, begin + params.block_values), std::int64_t{params.vocab});
  std::uint64_t mine = 0;
  for (std::int64_t i = first; i < end; ++i) mine += order_key(params.logits[i]) == end_key ? 1 : 0;
  std::uint64_t rank = chosen_before + sum_before(mine, parts);
  if (rank >= state.n_equal || rank + mine < state.n_equal) return;
  for (std::int64_t i = first; i < end; ++i) {
    if (order_key(params.logits[i]) != end_key) continue;
    if (++rank == state.n_equal) state.last_index = static_cast<std::int32_t>(i);
  }
}

}  // namespace gemma4::cuda::detail

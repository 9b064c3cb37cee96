// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/sampler/state.cuh"

/// The short way through top_k and top_p: where the first level of the search for the end leaves few tokens in
/// question, they are listed, and one block sorts them, cuts them off and draws. The rest of the kernels then has
/// nothing to do.
namespace gemma4::cuda::detail {

/// Descending; zeros fill up to a power of two.
__device__ inline void sort_items(std::uint64_t* items, int n_item) {
  for (int run = 2; run <= n_item; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int pair = threadIdx.x; pair < n_item / 2; pair += kSamplerThreads) {
        const int first = 2 * pair - (pair & (step - 1)), second = first + step;
        const std::uint64_t a = items[first], b = items[second];
        if ((a < b) == ((first & run) == 0)) items[first] = b, items[second] = a;
      }
      __syncthreads();
    }
  }
}

[[nodiscard]] __device__ __forceinline__ float logit_of_item(std::uint64_t item) {
  return from_order_key(static_cast<std::uint32_t>(item >> 32));
}

/// How many of the sorted items stay by top_p. (Within, a thread has neighbouring items.)
__device__ inline int nucleus_of(const SamplerParams& params, const std::uint64_t* items, int n_item) {
  __shared__ std::uint64_t parts[kSamplerWarps], total;
  __shared__ int n_kept;
  const int each = (n_item + kSamplerThreads - 1) / kSamplerThreads;
  const int first = min(n_item, static_cast<int>(threadIdx.x) * each), end = min(n_item, first + each);
  const float largest = params.state->largest;
  std::uint64_t sum = 0;
  for (int i = first; i < end; ++i) sum += mass_of(params, logit_of_item(items[i]), largest);
  std::uint64_t reached = sum_before(sum, parts);
  if (threadIdx.x == kSamplerThreads - 1) total = reached + sum;
  __syncthreads();
  const double wanted =
      params.top_k > 0 ? static_cast<double>(params.top_p) * static_cast<double>(total) : params.state->mass_wanted;
  const auto is_enough = [&](std::uint64_t mass) { return static_cast<double>(mass) >= wanted; };
  if (!is_enough(reached) && is_enough(reached + sum)) {
    int i = first;
    while (!is_enough(reached += mass_of(params, logit_of_item(items[i]), largest))) ++i;
    n_kept = i + 1;
  }
  __syncthreads();
  return n_kept;
}

static __global__ void __launch_bounds__(kSamplerThreads)
    sampler_list_kernel(const __grid_constant__ SamplerParams params, const __grid_constant__ SampledTokenParams to) {
  __shared__ std::uint64_t items[kMaxListed];
  wait_for_previous_kernel();
  allow_next_kernel();
  SamplerState& state = *params.state;
  if (state.is_bad || state.n_candidates > kMaxListed) return;
  const std::uint32_t prefix = state.prefix;
  for_each_logit(params, [&](int index, float logit) {
    const std::uint32_t key = order_key(logit);
    if (!(logit > -INFINITY) || key >> select_shift(0) < prefix) return;
    state.list[atomicAdd(&state.n_listed, 1u)] = std::uint64_t{key} << 32 | ~static_cast<std::uint32_t>(index);
  });
  if (!is_last_block(&state)) return;
  int n_item = static_cast<int>(state.n_candidates), n_sorted = 1;
  while (n_sorted < n_item) n_sorted *= 2;
  for (int i = threadIdx.x; i < n_sorted; i += kSamplerThreads) items[i] = i < n_item ? __ldcg(&state.list[i]) : 0;
  __syncthreads();
  sort_items(items, n_sorted);
  if (params.top_k > 0) n_item = min(n_item, params.top_k);
  if (params.top_p < 1) n_item = nucleus_of(params, items, n_item);
  const std::int64_t position = *params.position;
  Candidate best{};
  for (int i = threadIdx.x; i < n_item; i += kSamplerThreads) {
    const auto index = static_cast<std::int32_t>(~static_cast<std::uint32_t>(items[i]));
    const Candidate candidate = drawn_candidate(params, position, logit_of_item(items[i]), index);
    if (is_better(candidate, best)) best = candidate;
  }
  best = best_of_block(best);
  if (threadIdx.x != 0) return;
  state.is_done = 1;
  store_token(to, params.position, static_cast<std::int32_t>(~best.place));
}

}  // namespace gemma4::cuda::detail

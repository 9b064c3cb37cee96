// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "cuda/check.cuh"
#include "cuda/sampler_select.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/view.hpp"

/// The next token, chosen on the device by the contract in gemma4/sampler.hpp. The host waits for nothing and need not
/// know the position or the token, so that a recorded step can be replayed. Mirror: reference/sampler.hpp
namespace gemma4::cuda {

namespace detail {

/// Where the token goes and what follows from it.
struct SampledTokenParams {
  std::int32_t* token;
  std::int32_t* history;
  std::int64_t history_len;
  std::int32_t* next_position;
  std::int32_t* kv_len;
};

/// What a token is compared by.
enum class SamplerScore {
  kLogit,    ///< ends with the token
  kLargest,  ///< the logit, ends with the largest one in the state
  kDraw,     ///< its scaled logit and its noise, of all tokens
  kDrawKept  ///< the same, of those that stayed
};

/// The better of two: a larger score, the lower index among equals.
[[nodiscard]] __device__ __forceinline__ Candidate better(const Candidate& a, const Candidate& b) {
  const bool b_wins = b.index >= 0 && (a.index < 0 || b.score > a.score || (b.score == a.score && b.index < a.index));
  Candidate best = b_wins ? b : a;
  best.is_bad = a.is_bad | b.is_bad;
  return best;
}

[[nodiscard]] __device__ __forceinline__ Candidate best_of_warp(Candidate best) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    Candidate other;
    other.score = __shfl_xor_sync(~0u, best.score, step);
    other.index = __shfl_xor_sync(~0u, best.index, step);
    other.is_bad = __shfl_xor_sync(~0u, best.is_bad, step);
    best = better(best, other);
  }
  return best;
}

/// In every thread of the first warp.
[[nodiscard]] __device__ __forceinline__ Candidate best_of_block(Candidate best) {
  __shared__ Candidate parts[kSamplerWarps];
  best = best_of_warp(best);
  __syncthreads();  // whoever read the parts before has done so
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = best;
  __syncthreads();
  return threadIdx.x < 32 ? best_of_warp(parts[threadIdx.x % kSamplerWarps]) : best;
}

template <SamplerScore kScore>
[[nodiscard]] __device__ __forceinline__ Candidate best_of_range(const SamplerParams& params) {
  constexpr bool kKept = kScore == SamplerScore::kDrawKept, kDraw = kScore == SamplerScore::kDraw || kKept;
  const SamplerState& state = *params.state;
  const std::uint32_t end_key = kKept ? state.end_key : 0;
  const std::int32_t last_index = kKept ? state.last_index : 0;
  const std::int64_t position = kDraw ? *params.position : 0;
  Candidate best = no_candidate();
  best.is_bad = kKept ? state.is_bad : 0;
  for_each_logit(params, [&](int index, float logit) {
    if (!(logit < INFINITY)) best.is_bad = 1;
    if (!(logit > -INFINITY)) return;
    double score = static_cast<double>(logit);
    if constexpr (kDraw) {
      if constexpr (kKept) {
        const std::uint32_t key = order_key(logit);
        if (key < end_key || (key == end_key && index > last_index)) return;
      }
      score = score / static_cast<double>(params.temperature) -
              std::log(-std::log(sampler_uniform(params.seed, position, index)));
    }
    best = better(best, {score, index, 0});
  });
  return best;
}

/// The best token of the vocabulary: each block finds that of its range, the last one to end that of the blocks.
template <SamplerScore kScore>
__global__ void __launch_bounds__(kSamplerThreads)
    sampler_best_kernel(const __grid_constant__ SamplerParams params, const __grid_constant__ SampledTokenParams to) {
  wait_for_previous_kernel();
  allow_next_kernel();
  SamplerState& state = *params.state;
  Candidate best = best_of_block(best_of_range<kScore>(params));
  if (threadIdx.x == 0) state.best[blockIdx.x] = best;
  if (!is_last_block(&state)) return;
  best = best_of_block(threadIdx.x < gridDim.x ? state.best[threadIdx.x] : no_candidate());
  if (threadIdx.x != 0) return;
  const bool is_bad = best.is_bad != 0 || best.index < 0;
  if constexpr (kScore == SamplerScore::kLargest) {
    state.is_bad = is_bad ? 1 : 0;
    state.largest = static_cast<float>(best.score);
  } else {
    const std::int32_t token = is_bad ? -1 : best.index;
    *to.token = token;
    if (to.history == nullptr && to.next_position == nullptr && to.kv_len == nullptr) return;
    const std::int32_t position = *params.position;
    if (to.history != nullptr && position >= -1 && position + std::int64_t{1} < to.history_len) {
      to.history[position + 1] = token;
    }
    if (to.next_position != nullptr) *to.next_position = position + 1;
    if (to.kv_len != nullptr) *to.kv_len = position + 2;
  }
}

}  // namespace detail

/// Device memory that sample() needs, for any vocabulary. One for each stream.
inline constexpr std::int64_t kSamplerWorkspaceBytes = 32 * 1024;
static_assert(sizeof(detail::SamplerState) <= kSamplerWorkspaceBytes);

/// Makes a workspace ready: once, and after a replay that was broken off. Calls leave it ready.
inline void clear_sampler(std::span<std::byte> workspace, cudaStream_t stream) {
  require(static_cast<std::int64_t>(workspace.size()) >= kSamplerWorkspaceBytes, "sampler: workspace of ",
          workspace.size(), " B, need ", kSamplerWorkspaceBytes);
  check(cudaMemsetAsync(workspace.data(), 0, static_cast<std::size_t>(kSamplerWorkspaceBytes), stream),
        "clearing of the sampler's workspace");
}

/// Where the chosen token goes, all of it device memory, and what may be counted on with it.
struct SampledToken {
  std::int32_t* token = nullptr;          ///< the token, or -1: see sample()
  std::int32_t* history = nullptr;        ///< optional: history[position + 1] = token, if there is such a place
  std::int64_t history_len = 0;           ///< places of it
  std::int32_t* next_position = nullptr;  ///< optional: position + 1; may be `position` itself
  std::int32_t* kv_len = nullptr;         ///< optional: position + 2, the keys that the token will see, itself included
};

/// The token to follow the one at *position. The same token as reference::sample() for the same logits, settings and
/// position, but for what the contract says of exp and log in double.
///
/// Launches: greedy 1, without top_k and top_p 1, with one of them 6, with both 9.
/// @param logits    [1, vocab]; -inf forbids a token
/// @param position  on the device, at least 0: of the token that gave the logits. Greedy without `to`'s counters reads
///                  none, and it may be null
/// @param to        token -1 says that the logits hold a NaN or +inf, or no finite number: what the reference throws
/// @param overlap   on sm_90, lets kernels be set up while the one before them in the stream still runs
/// @throws std::invalid_argument on bad settings, a vocabulary of 0 or 2^31, a missing pointer, a small workspace
inline void sample(const View<const float, 2>& logits, const SamplerSettings& settings, const std::int32_t* position,
                   const SampledToken& to, std::span<std::byte> workspace, cudaStream_t stream, bool overlap = false) {
  constexpr const char* kWho = "sampler";
  validate(settings);
  const std::int64_t vocab = logits.extent[1];
  require_extents(kWho, "logits", logits, {1, vocab});
  require_contiguous_rows(kWho, "logits", logits);
  require(vocab >= 1 && vocab <= std::numeric_limits<std::int32_t>::max(), kWho, ": ", vocab,
          " logits, expected 1 to 2^31 - 1");
  require(static_cast<std::int64_t>(workspace.size()) >= kSamplerWorkspaceBytes &&
              reinterpret_cast<std::uintptr_t>(workspace.data()) % alignof(detail::SamplerState) == 0,
          kWho, ": workspace of ", workspace.size(), " B, need ", kSamplerWorkspaceBytes, ", at a multiple of ",
          alignof(detail::SamplerState), " bytes");
  const bool reads_position =
      settings.temperature > 0 || to.history != nullptr || to.next_position != nullptr || to.kv_len != nullptr;
  require(to.token != nullptr && (position != nullptr || !reads_position), kWho,
          ": the token or the position has no address");
  constexpr std::int64_t kThreadValues = 8;
  const std::int64_t n_block =
      std::clamp<std::int64_t>(vocab / (kThreadValues * detail::kSamplerThreads), 1, detail::kMaxSamplerBlocks);
  const std::int64_t block_values = ((vocab + n_block - 1) / n_block + 3) / 4 * 4;
  const detail::SamplerParams params{.logits = logits.data,
                                     .vocab = static_cast<std::int32_t>(vocab),
                                     .block_values = static_cast<std::int32_t>(block_values),
                                     .temperature = settings.temperature,
                                     .top_p = settings.top_p,
                                     .top_k = settings.top_k,
                                     .seed = settings.seed,
                                     .position = position,
                                     .state = reinterpret_cast<detail::SamplerState*>(workspace.data()),
                                     .is_aligned = reinterpret_cast<std::uintptr_t>(logits.data) % 16 == 0};
  const detail::SampledTokenParams target{to.token, to.history, to.history_len, to.next_position, to.kv_len};
  const auto launch = [&](auto kernel, const auto&... arguments) {
    detail::launch_in_chain("sampler kernels", kernel, dim3(static_cast<unsigned>(n_block)),
                            dim3(detail::kSamplerThreads), stream, overlap, params, arguments...);
  };
  using detail::SamplerScore;
  if (settings.temperature == 0) return launch(detail::sampler_best_kernel<SamplerScore::kLogit>, target);
  if (settings.top_k == 0 && settings.top_p == 1)
    return launch(detail::sampler_best_kernel<SamplerScore::kDraw>, target);
  launch(detail::sampler_best_kernel<SamplerScore::kLargest>, target);
  for (int level = 0; settings.top_k > 0 && level < detail::kSelectLevels; ++level) {
    launch(detail::sampler_select_kernel<false>, level);
  }
  for (int level = 0; settings.top_p < 1 && level < detail::kSelectLevels; ++level) {
    launch(detail::sampler_select_kernel<true>, level);
  }
  launch(detail::sampler_equals_kernel);
  launch(detail::sampler_best_kernel<SamplerScore::kDrawKept>, target);
}

}  // namespace gemma4::cuda

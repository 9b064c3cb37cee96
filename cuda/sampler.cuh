// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "cuda/device/check.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/sampler/list.cuh"
#include "cuda/sampler/select.cuh"
#include "cuda/sampler/state.cuh"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/view.hpp"

/// The next token, chosen on the device by the contract in gemma4/sampler.hpp. The host waits for nothing and need not
/// know the position or the token, so that a recorded step can be replayed. Mirror: reference/sampler.hpp
namespace gemma4::cuda {

namespace detail {

/// What a token is compared by.
enum class SamplerScore {
  kLogit,    ///< ends with the token
  kLargest,  ///< the logit, ends with the largest one in the state
  kDraw,     ///< its scaled logit and its noise, of all tokens
  kDrawKept  ///< the same, of those that stayed
};

template <SamplerScore kScore>
[[nodiscard]] __device__ __forceinline__ Candidate best_of_range(const SamplerParams& params) {
  constexpr bool kKept = kScore == SamplerScore::kDrawKept, kDraw = kScore == SamplerScore::kDraw || kKept;
  const SamplerState& state = *params.state;
  const std::uint32_t end_key = kKept ? state.end_key : 0;
  const std::int32_t last_index = kKept ? state.last_index : 0;
  const std::int64_t position = kDraw ? *params.position : 0;
  Candidate best{};
  if (kKept && state.is_bad != 0) best.high = kBadScore;
  for_each_logit(params, [&](int index, float logit) {
    if (!(logit < INFINITY)) best.high = kBadScore;
    if (!(logit > -INFINITY)) return;
    Candidate candidate;
    if constexpr (kDraw) {
      if constexpr (kKept) {
        const std::uint32_t key = order_key(logit);
        if (key < end_key || (key == end_key && index > last_index)) return;
      }
      candidate = drawn_candidate(params, position, logit, index);
    } else {
      candidate = candidate_of(logit, index);
    }
    if (is_better(candidate, best)) best = candidate;
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
  if (kScore == SamplerScore::kDrawKept && state.is_done) return;
  const int lane = threadIdx.x & 31;
  Candidate best = best_of_block(best_of_range<kScore>(params));
  if (threadIdx.x >= 32) return;
  bool is_last = false;
  if (lane == 0) {
    state.best[blockIdx.x] = best;
    is_last = arrives_last(&state);
  }
  if (!__shfl_sync(~0u, is_last, 0)) return;
  __syncwarp();
  best = {};
  for (int block = lane; block < static_cast<int>(gridDim.x); block += 32) {
    const uint4 words = __ldcg(reinterpret_cast<const uint4*>(&state.best[block]));
    const Candidate other{words.x, words.y, words.z};
    if (is_better(other, best)) best = other;
  }
  best = best_of_warp(best);
  if (lane != 0) return;
  const bool is_bad = best.high == kBadScore || best.high == 0;
  if constexpr (kScore == SamplerScore::kLargest) {
    state.is_bad = is_bad ? 1 : 0;
    state.largest = from_order_key(best.high);
    state.is_done = 0;
    state.n_listed = 0;
  } else {
    store_token(to, params.position, is_bad ? -1 : static_cast<std::int32_t>(~best.place));
  }
}

}  // namespace detail

/// Device memory that sample() needs, for any vocabulary. One for each stream.
inline constexpr std::int64_t kSamplerWorkspaceBytes = 64 * 1024;
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
  std::int32_t* text = nullptr;           ///< optional, beside a history: the same again, elsewhere
  std::int32_t* next_position = nullptr;  ///< optional: position + 1; may be `position` itself
  std::int32_t* kv_len = nullptr;         ///< optional: position + 2, the keys that the token will see, itself included
};

/// The token to follow the one at *position. The same token as reference::sample() for the same logits, settings and
/// position, but for what the contract says of exp and log in double.
///
/// Launches: greedy 1, without top_k and top_p 1, with one of them 7, with both 10, of which all but the first three
/// have nothing to do where few tokens come into question.
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
  constexpr std::int64_t kThreadValues = 4;
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
  const detail::SampledTokenParams target{to.token, to.history, to.history_len, to.text, to.next_position, to.kv_len};
  const auto launch = [&](auto kernel, const auto&... arguments) {
    detail::Launch{.what = "sampler kernels",
                   .grid = static_cast<unsigned>(n_block),
                   .block = detail::kSamplerThreads,
                   .stream = stream,
                   .overlap = overlap}(kernel, params, arguments...);
  };
  using detail::SamplerScore;
  if (settings.temperature == 0) return launch(detail::sampler_best_kernel<SamplerScore::kLogit>, target);
  if (settings.top_k == 0 && settings.top_p == 1)
    return launch(detail::sampler_best_kernel<SamplerScore::kDraw>, target);
  launch(detail::sampler_best_kernel<SamplerScore::kLargest>, target);
  const bool by_count = settings.top_k > 0, by_mass = settings.top_p < 1;
  const auto select = [&](bool is_mass, int level) {
    is_mass ? launch(detail::sampler_select_kernel<true>, level) : launch(detail::sampler_select_kernel<false>, level);
  };
  select(!by_count, 0);
  launch(detail::sampler_list_kernel, target);
  for (int level = 1; level < detail::kSelectLevels; ++level) select(!by_count, level);
  for (int level = 0; by_count && by_mass && level < detail::kSelectLevels; ++level) select(true, level);
  launch(detail::sampler_equals_kernel);
  launch(detail::sampler_best_kernel<SamplerScore::kDrawKept>, target);
}

}  // namespace gemma4::cuda

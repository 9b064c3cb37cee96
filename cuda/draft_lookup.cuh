// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/device/check.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/ptx/atomic.cuh"
#include "gemma4/draft/drafter.hpp"
#include "gemma4/draft/lookup.hpp"
#include "gemma4/error.hpp"

/// Prompt lookup on the device: what followed the last tokens where they stood before is proposed again, by the
/// contract of draft::LookupDrafter. It walks the whole sequence, 4 bytes a token: 0.5 MB of 131072 tokens. A host
/// index finds the same in O(1), but the host does not know the sequence: the step that is drafted for is one of
/// several under way.
namespace gemma4::cuda {

namespace detail {

inline constexpr int kLookupThreads = 256;
inline constexpr int kMaxLookupBlocks = 128;

/// A suffix that stood before, as one number to be maximised: its length, then where it ended. 0: none.
[[nodiscard]] __host__ __device__ constexpr std::uint64_t lookup_key(std::int64_t length, std::int64_t end) {
  return static_cast<std::uint64_t>(length) << 32 | static_cast<std::uint64_t>(end);
}

/// What the blocks hand to the last of them. `arrivals` is zero before and after each call.
struct LookupState {
  std::uint32_t arrivals;
  std::uint64_t best[kMaxLookupBlocks];
};

struct LookupParams {
  const std::int32_t* tokens;    ///< the sequence
  const std::int32_t* position;  ///< of its last token
  std::int32_t* drafts;          ///< [n_draft]
  std::int32_t* n_proposed;
  LookupState* state;
  int n_draft;
};

[[nodiscard]] __device__ __forceinline__ std::uint64_t largest_of_warp(std::uint64_t value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = max(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

/// In every thread of the first warp.
[[nodiscard]] __device__ inline std::uint64_t largest_of_block(std::uint64_t value) {
  __shared__ std::uint64_t parts[kLookupThreads / 32];
  value = largest_of_warp(value);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  return largest_of_warp(parts[threadIdx.x % (kLookupThreads / 32)]);
}

/// What followed `end`; where that runs into the end of the sequence it goes on with what has been proposed.
__device__ inline void propose_after(const LookupParams& params, std::int64_t end, std::int64_t last) {
  for (int i = 0; i < params.n_draft; ++i) {
    const std::int64_t at = end + 1 + i;
    params.drafts[i] = at <= last ? params.tokens[at] : params.drafts[at - last - 1];
  }
}

static __global__ void __launch_bounds__(kLookupThreads)
    draft_lookup_kernel(const __grid_constant__ LookupParams params) {
  const std::int64_t last = *params.position;
  std::int32_t suffix[draft::kMaxSuffix];
#pragma unroll
  for (int i = 0; i < draft::kMaxSuffix; ++i) suffix[i] = i <= last ? params.tokens[last - i] : -1;
  std::uint64_t best = 0;
  for (std::int64_t end = blockIdx.x * std::int64_t{kLookupThreads} + threadIdx.x; end < last;
       end += gridDim.x * std::int64_t{kLookupThreads}) {
    int length = 0;
#pragma unroll
    for (int i = 0; i < draft::kMaxSuffix; ++i) {
      if (length == i && i <= end && params.tokens[end - i] == suffix[i]) ++length;
    }
    if (length > 0) best = max(best, lookup_key(length, end));
  }
  best = largest_of_block(best);
  if (threadIdx.x >= 32) return;
  bool is_last = false;
  if (threadIdx.x == 0) {
    params.state->best[blockIdx.x] = best;
    is_last = count_around(&params.state->arrivals, gridDim.x - 1) == gridDim.x - 1;
  }
  if (!__shfl_sync(~0u, is_last, 0)) return;
  __syncwarp();
  best = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += 32) {
    best = max(best, static_cast<std::uint64_t>(
                         __ldcg(reinterpret_cast<const unsigned long long*>(&params.state->best[block]))));
  }
  best = largest_of_warp(best);
  if (threadIdx.x != 0) return;
  *params.n_proposed = best != 0 ? params.n_draft : 0;
  // Drafts that nobody proposed are verified all the same, and not accepted: a recorded step has a number of rows.
  propose_after(params, best != 0 ? static_cast<std::int64_t>(best & 0xFFFFFFFFu) : last - 1, last);
}

}  // namespace detail

/// Device memory that draft_lookup() needs; zeros before the first call, and after a replay that was broken off.
inline constexpr std::int64_t kLookupWorkspaceBytes = 2048;
static_assert(sizeof(detail::LookupState) <= kLookupWorkspaceBytes);

/// Where proposed tokens go, device memory.
struct ProposedTokens {
  std::int32_t* tokens = nullptr;  ///< [n_draft]
  std::int32_t* n_proposed =
      nullptr;               ///< n_draft, or 0 where the last token is new; the tokens are then its repetition
  std::int64_t n_draft = 0;  ///< 1 to draft::kMaxDrafts
};

/// Proposes the tokens to follow tokens[0 .. *position], as draft::LookupDrafter of gemma4/draft/lookup.hpp does.
/// @param tokens     [max_token] on the device, of which those up to *position are read
/// @param position   on the device, at least 0 and below max_token
/// @param max_token  of any sequence that is looked through: the size of the grid
/// @throws std::invalid_argument naming a pointer that is missing or a number that is out of range
inline void draft_lookup(const std::int32_t* tokens, const std::int32_t* position, std::int64_t max_token,
                         const ProposedTokens& to, std::span<std::byte> workspace, cudaStream_t stream) {
  constexpr const char* kWho = "draft_lookup";
  require(tokens != nullptr && position != nullptr && to.tokens != nullptr && to.n_proposed != nullptr, kWho,
          ": the tokens, the position or the drafts have no address");
  require(to.n_draft >= 1 && to.n_draft <= draft::kMaxDrafts, kWho, ": ", to.n_draft, " drafts, need 1 to ",
          draft::kMaxDrafts);
  require(max_token >= 1 && max_token < (std::int64_t{1} << 31), kWho, ": max_token ", max_token,
          ", need 1 to 2^31 - 1");
  require(static_cast<std::int64_t>(workspace.size()) >= kLookupWorkspaceBytes &&
              reinterpret_cast<std::uintptr_t>(workspace.data()) % alignof(detail::LookupState) == 0,
          kWho, ": workspace of ", workspace.size(), " B, need ", kLookupWorkspaceBytes, ", at a multiple of ",
          alignof(detail::LookupState), " bytes");
  const std::int64_t n_block =
      std::clamp<std::int64_t>(max_token / (4 * detail::kLookupThreads), 1, detail::kMaxLookupBlocks);
  detail::Launch{.what = "draft_lookup_kernel",
                 .grid = static_cast<unsigned>(n_block),
                 .block = detail::kLookupThreads,
                 .stream = stream}(
      detail::draft_lookup_kernel,
      detail::LookupParams{.tokens = tokens,
                           .position = position,
                           .drafts = to.tokens,
                           .n_proposed = to.n_proposed,
                           .state = reinterpret_cast<detail::LookupState*>(workspace.data()),
                           .n_draft = static_cast<int>(to.n_draft)});
}

}  // namespace gemma4::cuda

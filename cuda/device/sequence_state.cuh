// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "cuda/device/launch.cuh"
#include "gemma4/error.hpp"

/// Where a sequence stands, as the device knows it: a recorded step reads and moves it without the host.
namespace gemma4::cuda {

struct SequenceState {
  std::int32_t token;     ///< the one that was sampled last
  std::int32_t position;  ///< of the last token that went, or is going, through the model
  std::int32_t kv_len;    ///< position + 1
  std::int32_t
      not_finite;  ///< INT_MAX minus the first position whose numbers were not finite; 0: none (backend/finite.cuh)
};

namespace detail {

static __global__ void set_state_kernel(SequenceState* state, std::int32_t position) {
  state->position = position;
  state->kv_len = position + 1;
}

static __global__ void list_positions_kernel(std::int32_t first, std::int32_t* positions, std::int64_t count) {
  const std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  if (i < count) positions[i] = first + static_cast<std::int32_t>(i);
}

static __global__ void show_tokens_kernel(const SequenceState* state, std::uint8_t* mask, std::int64_t count) {
  const std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  if (i < count) mask[i] = i < state->kv_len;
}

[[nodiscard]] inline unsigned blocks_for(std::int64_t count) {
  return static_cast<unsigned>((count + 255) / 256);
}

}  // namespace detail

/// The last token of the sequence, or of the forward pass that follows, stands at `position`.
inline void set_sequence_state(SequenceState* state, std::int64_t position, cudaStream_t stream) {
  require(position >= 0 && position < (std::int64_t{1} << 30), "sequence: position ", position, ", need 0 to 2^30");
  detail::Launch{.what = "set_state_kernel", .stream = stream}(detail::set_state_kernel, state,
                                                               static_cast<std::int32_t>(position));
}

/// positions[i] = first + i
inline void list_positions(std::int64_t first, std::int64_t count, std::int32_t* positions, cudaStream_t stream) {
  detail::Launch{.what = "list_positions_kernel", .grid = detail::blocks_for(count), .block = 256, .stream = stream}(
      detail::list_positions_kernel, static_cast<std::int32_t>(first), positions, count);
}

/// mask[i] = 1 below kv_len, else 0
inline void show_tokens(const SequenceState* state, std::span<std::uint8_t> mask, cudaStream_t stream) {
  const auto count = static_cast<std::int64_t>(mask.size());
  detail::Launch{.what = "show_tokens_kernel", .grid = detail::blocks_for(count), .block = 256, .stream = stream}(
      detail::show_tokens_kernel, state, mask.data(), count);
}

}  // namespace gemma4::cuda

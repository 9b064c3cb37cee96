// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/cache/chunk.cuh"
#include "cuda/device/device_count.cuh"
#include "cuda/qkv_prologue.cuh"
#include "cuda/rms_norm.cuh"
#include "cuda/rope.cuh"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

namespace gemma4::cuda::detail {

/// The same as qkv_prologue(), a launch for each thing it does; what is handed on is rounded to bf16.
template <class TIn>
void prepare_step_by_step(const ProjectedHeads<TIn>& heads, const QkNorms& norms, const DeviceCount& position,
                          const RopeParams& rope_of_layer, cudaStream_t stream) {
  const auto rows = [](const auto& view) {
    return make_view(view.data, view.extent[0] * view.extent[1], view.extent[2]);
  };
  const auto norm = [&](const View<TIn, 3>& from, const float* weight, const View<Bf16, 3>& to) {
    rms_norm<TIn, Bf16>(rows(from), weight, norms.epsilon, rows(to), stream);
  };
  norm(heads.v, nullptr, heads.v_out);  // first: where v is k, k_out may be k
  norm(heads.k, norms.k, heads.k_out);
  norm(heads.q, norms.q, heads.q_out);
  rope<Bf16>(heads.k_out, position, rope_of_layer, stream);
  rope<Bf16>(heads.q_out, position, rope_of_layer, stream);
}

}  // namespace gemma4::cuda::detail

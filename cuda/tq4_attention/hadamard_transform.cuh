// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "cuda/rotation.cuh"

namespace gemma4::cuda::detail {

/// The signed Hadamard rotation as a transform of the flash engine (cuda/flash/wgmma.cuh, NoTransform): queries into
/// the rotated space, results back, with the arithmetic of rotate_forward and rotate_inverse, bit for bit.
struct HadamardTransform {
  static constexpr bool kIsIdentity = false;
  RotationParams rotation;

  template <int kHeadDim>
  __device__ __forceinline__ void forward(float (&x)[kHeadDim / 32]) const {
    flip_signs<kHeadDim>(rotation, x);
    hadamard_warp<kHeadDim>(x);
#pragma unroll
    for (float& value : x) value *= rotation.scale;
  }

  template <int kHeadDim>
  __device__ __forceinline__ void inverse(float (&x)[kHeadDim / 32]) const {
    hadamard_warp<kHeadDim>(x);
#pragma unroll
    for (float& value : x) value *= rotation.scale;
    flip_signs<kHeadDim>(rotation, x);
  }
};
static_assert(std::is_trivially_copyable_v<HadamardTransform>);

}  // namespace gemma4::cuda::detail

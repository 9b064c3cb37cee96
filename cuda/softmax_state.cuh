// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/ptx/arithmetic.cuh"

/// The running softmax of one row, in base 2: the maximum of the scores seen and the sum of 2^(score - maximum). What
/// is summed with the same weights (the output) lies in the registers of each kernel as its tiles want it, and takes
/// the same factors.
///   keys arrive     factor = raise(maximum of the new scores); everything summed before is multiplied by it
///   parts meet      maximum = max_i maximum_i; part i is multiplied by 2^(maximum_i - reference of maximum)
///   in the end      out = weighted sum * inverse()
/// A score of -inf says that the row does not see the key, and softmax_reference() is the only place that knows about
/// it: a part without keys has factor 0 and leaves every bit of the others, and a row that saw no key gives zeros.
/// TQ4 decode starts its maximum at kFarBelow instead, where no guard is needed.
/// Source: arXiv:1805.02867. Mirror: reference/softmax_state.hpp
namespace gemma4::cuda {

/// A maximum of no key that is finite, so that a difference of two is a number; a score that low has no weight beside
/// any other.
inline constexpr float kFarBelow = -1e30f;

/// What scores and maxima are subtracted from: the maximum, and 0 where there is none, since (-inf) - (-inf) is not a
/// number.
[[nodiscard]] __device__ __forceinline__ float softmax_reference(float maximum) {
  return maximum == -INFINITY ? 0.0f : maximum;
}

/// 1 / sum, and 0 for a row that saw no key. A sum that is no number stays none.
[[nodiscard]] __device__ __forceinline__ float softmax_inverse(float sum) {
  return sum == 0.0f ? 0.0f : 1.0f / sum;
}

struct alignas(8) SoftmaxState {
  float maximum = -INFINITY;
  float sum = 0.0f;

  [[nodiscard]] __device__ __forceinline__ float reference() const { return softmax_reference(maximum); }
  [[nodiscard]] __device__ __forceinline__ float inverse() const { return softmax_inverse(sum); }

  /// Takes the largest of some new scores into the maximum. @return the factor of everything summed before
  [[nodiscard]] __device__ __forceinline__ float raise(float largest) {
    const float raised = fmaxf(maximum, largest);
    const float factor = exp2_approx(maximum - softmax_reference(raised));
    maximum = raised;
    return factor;
  }
};

}  // namespace gemma4::cuda

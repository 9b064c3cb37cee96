// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/for_head_dim.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/rotation.hpp"
#include "gemma4/tq4_format.hpp"
#include "gemma4/view.hpp"

/// The seeded orthogonal transform of head vectors (gemma4/rotation.hpp says what a seed means).
///
/// A vector of D = head_dim values lives in one warp: lane l holds values (D / 32) l to (D / 32)(l + 1) - 1. The signed
/// Hadamard transform is log2(D / 32) butterfly stages within a lane and five across lanes, in the same order as the
/// reference, so that in float both give the same bits. It costs D / 32 * log2(D) additions and 5 D / 32 shuffles a
/// lane and reads no table, which is why every kernel that needs it does it on the spot.
/// The dense transform reads D * D floats a vector and is for parity with a peer, not for speed.
/// Mirror: reference/rotation.hpp
namespace gemma4::cuda {

/// What kernels take of a rotation.
struct RotationParams {
  RotationKind kind = RotationKind::kSignedHadamard;
  float scale = 1.0f;                 ///< 1 / sqrt(head_dim)
  std::uint32_t negative[16] = {};    ///< bit i % 32 of word i / 32: the sign of value i is -1
  const float* matrix = nullptr;      ///< R [D, D], dense only
  const float* transposed = nullptr;  ///< R^T [D, D], dense only
};
static_assert(std::is_trivially_copyable_v<RotationParams>);

/// y = R x and x = R^T y for one seed and head_dim. Owns the dense matrices on the device.
class Rotation {
 public:
  /// @throws std::invalid_argument unless head_dim is a power of two from 16 (a part of a head) to 512
  [[nodiscard]] static Rotation signed_hadamard(std::int64_t head_dim, std::uint64_t seed) {
    Rotation rotation(head_dim);
    const std::vector<std::int8_t> signs = hadamard_signs(seed, head_dim);
    for (std::size_t i = 0; i < signs.size(); ++i) {
      if (signs[i] < 0) rotation.params_.negative[i / 32] |= 1u << (i % 32);
    }
    return rotation;
  }

  [[nodiscard]] static Rotation dense_haar(std::int64_t head_dim, std::uint64_t seed) {
    require_head_dim(head_dim);
    const std::vector<double> wide = haar_matrix(seed, head_dim);
    return dense(head_dim, std::vector<float>(wide.begin(), wide.end()));
  }

  /// A given R, row-major [head_dim, head_dim], taken to be orthogonal.
  /// @throws std::invalid_argument on another number of values
  [[nodiscard]] static Rotation dense(std::int64_t head_dim, const std::vector<float>& matrix) {
    Rotation rotation(head_dim);
    require(static_cast<std::int64_t>(matrix.size()) == head_dim * head_dim, "Rotation::dense: ", matrix.size(),
            " values, need head_dim^2 = ", head_dim * head_dim);
    std::vector<float> both(2 * matrix.size());
    const auto n = static_cast<std::size_t>(head_dim);
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < n; ++j) both[i * n + j] = both[n * n + j * n + i] = matrix[i * n + j];
    }
    rotation.matrices_ = DeviceBuffer<float>(both);
    rotation.params_.kind = RotationKind::kDenseHaar;
    rotation.params_.matrix = rotation.matrices_.data();
    rotation.params_.transposed = rotation.matrices_.data() + n * n;
    return rotation;
  }

  [[nodiscard]] static Rotation make(RotationKind kind, std::int64_t head_dim, std::uint64_t seed) {
    return kind == RotationKind::kSignedHadamard ? signed_hadamard(head_dim, seed) : dense_haar(head_dim, seed);
  }

  [[nodiscard]] RotationKind kind() const { return params_.kind; }
  [[nodiscard]] std::int64_t head_dim() const { return head_dim_; }
  [[nodiscard]] const RotationParams& params() const { return params_; }

 private:
  explicit Rotation(std::int64_t head_dim) : head_dim_(head_dim) {
    require_head_dim(head_dim);
    params_.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  }
  static void require_head_dim(std::int64_t head_dim) {
    require(is_power_of_two(head_dim) && head_dim >= 16 && head_dim <= 512, "Rotation: head_dim ", head_dim,
            ", need a power of two from 16 to 512");
  }

  std::int64_t head_dim_;
  RotationParams params_;
  DeviceBuffer<float> matrices_;
};

namespace detail {

/// The unnormalised Hadamard transform of a vector in a warp.
template <int kHeadDim>
__device__ __forceinline__ void hadamard_warp(float (&x)[kHeadDim / 32]) {
  constexpr int kValues = kHeadDim / 32;
#pragma unroll
  for (int half = 1; half < kValues; half *= 2) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if ((i & half) != 0) continue;
      const float upper = x[i], lower = x[i + half];
      x[i] = upper + lower;
      x[i + half] = upper - lower;
    }
  }
#pragma unroll
  for (int lane_bit = 1; lane_bit < 32; lane_bit *= 2) {
    const float sign = (threadIdx.x & lane_bit) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[i] = fmaf(sign, x[i], __shfl_xor_sync(~0u, x[i], lane_bit));
  }
}

/// The signs of this lane's values: bit i is set where value i is negated.
template <int kHeadDim>
[[nodiscard]] __device__ __forceinline__ std::uint32_t sign_bits(const RotationParams& rotation) {
  const int first = static_cast<int>(threadIdx.x & 31) * (kHeadDim / 32);
  return rotation.negative[first / 32] >> (first % 32);
}

template <int kHeadDim>
__device__ __forceinline__ void flip_signs(std::uint32_t negative, float (&x)[kHeadDim / 32]) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 32; ++i) x[i] = (negative >> i) & 1u ? -x[i] : x[i];
}

template <int kHeadDim>
__device__ __forceinline__ void flip_signs(const RotationParams& rotation, float (&x)[kHeadDim / 32]) {
  flip_signs<kHeadDim>(sign_bits<kHeadDim>(rotation), x);
}

/// x becomes M x for a row-major M whose transpose is at `transposed`.
template <int kHeadDim>
__device__ inline void multiply_warp(const float* transposed, float (&x)[kHeadDim / 32]) {
  constexpr int kValues = kHeadDim / 32;
  const int first = (threadIdx.x & 31) * kValues;
  float y[kValues] = {};
  for (int lane = 0; lane < 32; ++lane) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float factor = __shfl_sync(~0u, x[i], lane);
      const float* column = transposed + (lane * kValues + i) * kHeadDim + first;
#pragma unroll
      for (int j = 0; j < kValues; ++j) y[j] = fmaf(column[j], factor, y[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) x[i] = y[i];
}

/// y = R x of a vector in a warp, all lanes taking part. `negative`: sign_bits(), read ahead.
template <int kHeadDim>
__device__ __forceinline__ void rotate_warp(const RotationParams& rotation, std::uint32_t negative,
                                            float (&x)[kHeadDim / 32]) {
  if (rotation.kind == RotationKind::kDenseHaar) return multiply_warp<kHeadDim>(rotation.transposed, x);
  flip_signs<kHeadDim>(negative, x);
  hadamard_warp<kHeadDim>(x);
#pragma unroll
  for (float& value : x) value *= rotation.scale;
}

template <int kHeadDim>
__device__ __forceinline__ void rotate_warp(const RotationParams& rotation, float (&x)[kHeadDim / 32]) {
  rotate_warp<kHeadDim>(rotation, sign_bits<kHeadDim>(rotation), x);
}

/// x = R^T y of a vector in a warp.
template <int kHeadDim>
__device__ __forceinline__ void rotate_back_warp(const RotationParams& rotation, float (&y)[kHeadDim / 32]) {
  if (rotation.kind == RotationKind::kDenseHaar) return multiply_warp<kHeadDim>(rotation.matrix, y);
  hadamard_warp<kHeadDim>(y);
#pragma unroll
  for (float& value : y) value *= rotation.scale;
  flip_signs<kHeadDim>(rotation, y);
}

/// One warp a row of a [batch, n_token, n_head, head_dim] tensor.
template <int kHeadDim, bool kForward, class TIn, class TOut>
__global__ void __launch_bounds__(128)
    rotate_kernel(const __grid_constant__ RotationParams rotation, const __grid_constant__ View<const TIn, 4> in,
                  const __grid_constant__ View<TOut, 4> out) {
  constexpr int kValues = kHeadDim / 32;
  const std::int64_t row = blockIdx.x * std::int64_t{4} + threadIdx.x / 32;
  if (row >= in.extent[0] * in.extent[1] * in.extent[2]) return;
  const std::int64_t h = row % in.extent[2], t = row / in.extent[2] % in.extent[1],
                     b = row / in.extent[2] / in.extent[1];
  const int first = static_cast<int>(threadIdx.x & 31) * kValues;
  float x[kValues];
  load_values(&in(b, t, h, first), x);
  if constexpr (kForward) {
    rotate_warp<kHeadDim>(rotation, x);
  } else {
    rotate_back_warp<kHeadDim>(rotation, x);
  }
  store_values(&out(b, t, h, first), x);
}

/// Sixteen rows a block and head_dim / 256 dims a thread: one pass over the matrix serves sixteen rows.
/// `transposed` is the transpose of the matrix that multiplies.
template <int kHeadDim, class TIn, class TOut>
__global__ void __launch_bounds__(kHeadDim < 256 ? kHeadDim : 256)
    multiply_rows_kernel(const float* transposed, const __grid_constant__ View<const TIn, 4> in,
                         const __grid_constant__ View<TOut, 4> out) {
  constexpr int kThreads = kHeadDim < 256 ? kHeadDim : 256, kDims = kHeadDim / kThreads, kRows = 16;
  __shared__ __align__(16) float x[kHeadDim][kRows];
  const std::int64_t n_row = in.extent[0] * in.extent[1] * in.extent[2], row0 = blockIdx.x * std::int64_t{kRows};
  const auto address = [](const auto& view, std::int64_t row, int dim) {
    const std::int64_t n_head = view.extent[2], n_token = view.extent[1];
    return &view(row / n_head / n_token, row / n_head % n_token, row % n_head, dim);
  };
  for (int item = threadIdx.x; item < kRows * kHeadDim; item += kThreads) {
    const int r = item / kHeadDim, dim = item % kHeadDim;
    x[dim][r] = row0 + r < n_row ? to_float(*address(in, row0 + r, dim)) : 0.0f;
  }
  __syncthreads();
  float y[kDims][kRows] = {};
  for (int k = 0; k < kHeadDim; ++k) {
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
      const float factor = transposed[k * kHeadDim + d * kThreads + threadIdx.x];
#pragma unroll
      for (int r = 0; r < kRows; ++r) y[d][r] = fmaf(factor, x[k][r], y[d][r]);
    }
  }
#pragma unroll
  for (int d = 0; d < kDims; ++d) {
    for (int r = 0; r < kRows; ++r) {
      if (row0 + r < n_row) *address(out, row0 + r, d * kThreads + threadIdx.x) = from_float<TOut>(y[d][r]);
    }
  }
}

template <bool kForward, class TIn, class TOut>
void rotate(const char* who, const Rotation& rotation, const View<const TIn, 4>& in, const View<TOut, 4>& out,
            cudaStream_t stream) {
  require(in.extent[3] == rotation.head_dim(), who, ": rows of ", in.extent[3], " values, need head_dim ",
          rotation.head_dim());
  require_extents(who, "out", out, {in.extent[0], in.extent[1], in.extent[2], in.extent[3]});
  require_contiguous_rows(who, "in", in);
  require_contiguous_rows(who, "out", out);
  const std::int64_t n_row = in.extent[0] * in.extent[1] * in.extent[2];
  if (n_row == 0) return;
  const bool dense = rotation.kind() == RotationKind::kDenseHaar;
  const std::int64_t rows = dense ? 16 : 4;  // of a block
  Launch launch{.what = who, .grid = static_cast<unsigned>((n_row + rows - 1) / rows), .stream = stream};
  for_head_dim(who, rotation.head_dim(), [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    launch.block = dense ? std::min(kHeadDim, 256) : 128;
    if (dense) {
      const float* transposed = kForward ? rotation.params().transposed : rotation.params().matrix;
      launch(multiply_rows_kernel<kHeadDim, TIn, TOut>, transposed, in, out);
    } else {
      launch(rotate_kernel<kHeadDim, kForward, TIn, TOut>, rotation.params(), in, out);
    }
  });
}

}  // namespace detail

/// out = R in for every row of in [batch, n_token, n_head, head_dim]; out may be in. TIn and TOut are float or Bf16;
/// rows begin at multiples of 16 bytes. Float arithmetic.
/// @throws std::invalid_argument on extents that do not fit
template <class TIn, class TOut>
void rotate_forward(const Rotation& rotation, const View<const TIn, 4>& in, const View<TOut, 4>& out,
                    cudaStream_t stream) {
  detail::rotate<true>("rotate_forward", rotation, in, out, stream);
}

/// out = R^T in; otherwise like rotate_forward.
template <class TIn, class TOut>
void rotate_inverse(const Rotation& rotation, const View<const TIn, 4>& in, const View<TOut, 4>& out,
                    cudaStream_t stream) {
  detail::rotate<false>("rotate_inverse", rotation, in, out, stream);
}

}  // namespace gemma4::cuda

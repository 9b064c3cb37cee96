// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <span>

#include "cuda/device/check.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/quantized_linear.cuh"
#include "cuda/rotation.cuh"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// The gated half of an MLP: out = gelu(x gate^T) * (x up^T), gelu in its tanh form, in float.
///
/// Where gate and up have one packed type their rows lie in turn in one matrix (pack_rows() with row_step 2), the
/// activations are quantised once, and the product is made where the two sums end: nothing in between is stored. The
/// bits are those of the unfused form, which also serves pairs of different types: a plan says which. The other half of
/// the MLP is quantized_linear with `down`. Mirror: reference/fused_mlp.hpp
namespace gemma4::cuda {

/// Gate and up of a layer, and how they run.
struct GateUpWeights {
  PackedMatrix joined;    ///< [2 ffn_hidden, hidden], rows gate 0, up 0, gate 1, ...; empty when not fused
  PackedMatrix gate, up;  ///< [ffn_hidden, hidden] each; empty when fused

  [[nodiscard]] bool is_fused() const { return joined.rows > 0; }
  [[nodiscard]] std::int64_t ffn_hidden() const { return is_fused() ? joined.rows / 2 : gate.rows; }
  [[nodiscard]] std::int64_t hidden() const { return is_fused() ? joined.cols : gate.cols; }
};

/// Whether a pair of these types is stored as one matrix.
[[nodiscard]] constexpr bool gate_up_is_fused(TensorType gate, TensorType up) {
  return gate == up && is_packed_type(gate);
}

namespace detail {

/// A block of the grid's y axis a token; one thread eight values, which it reads before it writes them.
template <class TIn, class TOut>
__global__ void __launch_bounds__(256) gelu_times_rows_kernel(const TIn* gate, const TIn* up, std::int64_t width,
                                                              TOut* out, std::int64_t out_stride, bool whole_pieces) {
  const int first = static_cast<int>(8 * (blockIdx.x * 256 + threadIdx.x));
  if (first >= width) return;
  gate += blockIdx.y * width, up += blockIdx.y * width, out += blockIdx.y * out_stride;
  float g[8], u[8];
  if (whole_pieces) {
    load_values(gate + first, g);
    load_values(up + first, u);
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] = gelu_times(g[i], u[i]);
    store_values(out + first, g);
    return;
  }
  for (int k = first; k < min(width, first + std::int64_t{8}); ++k) {
    out[k] = from_float<TOut>(gelu_times(to_float(gate[k]), to_float(up[k])));
  }
}

[[nodiscard]] inline bool is_aligned(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

/// out = gelu(gate) * up, [n_token, width], at most 65535 tokens; gate and up without gaps between rows. For the paths
/// that do not multiply where the sums end; the same bits.
template <class TIn, class TOut>
void gelu_times_rows(const View<const TIn, 2>& gate, const View<const TIn, 2>& up, const View<TOut, 2>& out,
                     cudaStream_t stream) {
  const std::int64_t n_token = gate.extent[0], width = gate.extent[1];
  const bool whole_pieces =
      width % 8 == 0 && out.stride[0] % 8 == 0 && is_aligned(gate.data) && is_aligned(up.data) && is_aligned(out.data);
  const dim3 grid(static_cast<unsigned>((width + 2047) / 2048), static_cast<unsigned>(n_token));
  Launch{.what = "gelu_times_rows_kernel", .grid = grid, .block = 256, .stream = stream}(
      gelu_times_rows_kernel<TIn, TOut>, gate.data, up.data, width, out.data, out.stride[0], whole_pieces);
}

}  // namespace detail

/// @param x        [n_token, hidden] Bf16 or float, 1 to 8 tokens (16 on int8 tensor cores)
/// @param scratch  [2, n_token, ffn_hidden] float on the device; may be empty when fused
/// @param out      [n_token, ffn_hidden] Bf16 or float
/// @throws std::invalid_argument when a shape differs, the scratch is too small, or for more tokens
template <class TIn, class TOut>
void gate_up_decode(const View<const TIn, 2>& x, const GateUpWeights& weights, std::span<float> scratch,
                    const View<TOut, 2>& out, const DeviceInfo& device, cudaStream_t stream,
                    const LinearOptions& options = {}) {
  const std::int64_t n_token = x.extent[0], ffn_hidden = weights.ffn_hidden();
  const std::int64_t most = detail::max_linear_tokens(n_token, options);
  require(n_token <= most, "gate_up_decode: ", n_token, " tokens, at most ", most);
  require_extents("gate_up_decode", "out", out, {n_token, ffn_hidden});
  if (n_token == 0) return;
  if (weights.is_fused()) {
    detail::require_linear("gate_up_decode", x, weights.joined, out, ffn_hidden);
    require(is_packed_type(weights.joined.type) && weights.joined.rows % 2 == 0,
            "gate_up_decode: the joined matrix has ", weights.joined.rows, " rows of ", type_name(weights.joined.type),
            ", need pairs of a packed type");
    detail::packed_decode<TOut>(detail::linear_source(x), std::span(&weights.joined, 1), std::span(&out, 1),
                                {.epilogue = LinearEpilogue::kGeluUp, .options = options}, device, stream);
    return;
  }
  require(weights.gate.rows == weights.up.rows && weights.gate.cols == weights.up.cols, "gate_up_decode: gate is ",
          weights.gate.rows, " x ", weights.gate.cols, ", up is ", weights.up.rows, " x ", weights.up.cols);
  const std::int64_t count = n_token * ffn_hidden;
  require(static_cast<std::int64_t>(scratch.size()) >= 2 * count, "gate_up_decode: scratch of ", scratch.size(),
          " floats, need ", 2 * count, " where gate and up have different types");
  const std::array<PackedMatrix, 2> pair{weights.gate, weights.up};
  const std::array<View<float, 2>, 2> halves{make_view(scratch.data(), n_token, ffn_hidden),
                                             make_view(scratch.data() + count, n_token, ffn_hidden)};
  quantized_linear_decode<TIn, float>(x, std::span<const PackedMatrix>(pair), std::span<const View<float, 2>>(halves),
                                      device, stream, options);
  const auto half = [&](int i) { return make_view(static_cast<const float*>(halves[i].data), n_token, ffn_hidden); };
  detail::gelu_times_rows(half(0), half(1), out, stream);
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "cuda/device/check.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/quantized_linear/few_tokens.cuh"
#include "cuda/quantized_linear/plain.cuh"
#include "cuda/weights/layout.cuh"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// Products with quantised weights for 1 to 8 tokens: out[t, n] = sum_k x[t, k] weight[n, k].
///
/// Activations become 8-bit integers in blocks of 32 (activation_blocks.cuh), products of integers are exact, and sums
/// are float in an order that depends on the number of columns alone. So a token's result has the same bits however
/// many tokens, matrices or blocks take part. BF16, F16 and F32 weights are multiplied in float.
/// Error: |out - exact| <= sum over blocks of s_x / 2 * sum_k |w_k|, with s_x = max|x| / 127 of the block, and float
/// rounding. Bytes: the weights once. Mirror: reference/quantized_linear.hpp
namespace gemma4::cuda {

inline constexpr std::int64_t kMaxDecodeTokens = 8;

/// How a call for few tokens runs.
struct LinearPlan {
  int n_token = 1;        ///< that one launch takes: 1, 2, 4 or 8; wide rows leave room for fewer than 8
  int n_slot = 0;         ///< stages in flight
  bool is_tall = false;   ///< stages of more rows, see detail::stage_rows()
  bool is_every = false;  ///< by the kernel that knows all formats, see detail::is_of_four_formats()
  std::int64_t slot_bytes = 0;
  std::int64_t smem_bytes = 0;
  std::int64_t smem_limit_bytes = 0;  ///< what the kernel is allowed, whatever it uses: one value for all launches
  int n_block = 1;
  bool overlap = false;  ///< with the kernel before: from sm_90 on
};

/// How a product for few tokens may run; the same bits in any case.
struct LinearOptions {
  /// For dynamic row scheduling: 8 bytes of device memory, zero before the first launch, from which blocks that end
  /// early take rows (tickets). Null: each block has an equal share. Products of one stream may share it.
  LinearTickets* tickets = nullptr;
  bool overlap = true;  ///< programmatic dependent launch, where the device has it
};

namespace detail {

/// Shared memory with which two blocks share a multiprocessor. (1 KB of each block is the system's.)
[[nodiscard]] constexpr std::int64_t half_of_smem(std::int64_t limit) {
  return (limit + 1024) / 2 - 1024;
}

/// Slots of the ring that fit into `smem_limit` bytes.
[[nodiscard]] constexpr int linear_slots(std::int64_t cols, int n_token, std::int64_t slot_bytes,
                                         std::int64_t smem_limit) {
  int n_slot = 0;
  while (n_slot < kMaxLinearSlots &&
         linear_smem(cols, n_token, n_slot + 1, static_cast<int>(slot_bytes)).total <= smem_limit) {
    ++n_slot;
  }
  return n_slot;
}

}  // namespace detail

/// @param types of the matrices that share the input; only packed types count
/// @throws std::invalid_argument when not even one token fits into the device's shared memory
[[nodiscard]] inline LinearPlan plan_linear_decode(std::int64_t cols, std::int64_t n_token,
                                                   std::span<const TensorType> types, const DeviceInfo& device) {
  LinearPlan plan{.smem_limit_bytes = device.smem_limit_bytes, .overlap = device.compute_capability >= 90};
  const std::int64_t half = detail::half_of_smem(device.smem_limit_bytes);
  plan.is_tall = n_token == 1 && row_chunks(cols) == 1 &&
                 std::all_of(types.begin(), types.end(), [](TensorType type) { return type == TensorType::kQ6K; });
  plan.is_every = !std::all_of(types.begin(), types.end(), detail::is_of_four_formats);
  for (const TensorType type : types) {
    const std::int64_t bytes = detail::stage_rows(type, plan.is_tall) * chunk_bytes(type, chunk_groups(cols));
    plan.slot_bytes = std::max(plan.slot_bytes, (bytes + 127) / 128 * 128);
  }
  plan.n_token = static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(std::clamp<std::int64_t>(n_token, 1, 8))));
  for (; plan.n_token >= 1; plan.n_token /= 2) {
    plan.n_slot = plan.n_token > 2 ? 0 : detail::linear_slots(cols, plan.n_token, plan.slot_bytes, half);
    if (plan.n_slot < 3) {
      plan.n_slot = detail::linear_slots(cols, plan.n_token, plan.slot_bytes, device.smem_limit_bytes);
    }
    if (plan.n_slot >= 2) break;
  }
  require(plan.n_token >= 1, "quantized_linear: rows of ", cols, " columns do not fit into ", device.smem_limit_bytes,
          " B of shared memory a block");
  plan.smem_bytes = detail::linear_smem(cols, plan.n_token, plan.n_slot, static_cast<int>(plan.slot_bytes)).total;
  plan.n_block = plan.n_token <= 2 && plan.smem_bytes <= half ? 2 * device.sm_count : device.sm_count;
  return plan;
}

namespace detail {

template <int kTokens>
void launch_linear_tokens(const LinearParams& params, const LinearPlan& plan, cudaStream_t stream) {
  Launch{.what = "linear_decode_kernel",
         .grid = static_cast<unsigned>(plan.n_block),
         .block = kLinearThreads,
         .stream = stream,
         .overlap = plan.overlap,
         .smem_bytes = plan.smem_bytes,
         .smem_limit_bytes = plan.smem_limit_bytes}(
      plan.is_every ? linear_decode_kernel<kTokens, true> : linear_decode_kernel<kTokens, false>, params);
}

inline void launch_linear_decode(const LinearParams& params, const LinearPlan& plan, cudaStream_t stream) {
  switch (plan.n_token) {
    case 1:
      return launch_linear_tokens<1>(params, plan, stream);
    case 2:
      return launch_linear_tokens<2>(params, plan, stream);
    case 4:
      return launch_linear_tokens<4>(params, plan, stream);
    default:
      return launch_linear_tokens<8>(params, plan, stream);
  }
}

template <class TIn, class TOut>
void plain_decode(const View<const TIn, 2>& x, const PackedMatrix& weight, const View<TOut, 2>& out,
                  cudaStream_t stream) {
  const auto launch = [&]<class TWeight>(const TWeight* data) {
    launch_plain_linear<TWeight>({.weight = data,
                                  .x = x.data,
                                  .out = out.data,
                                  .rows = weight.rows,
                                  .cols = weight.cols,
                                  .x_stride = x.stride[0],
                                  .out_stride = out.stride[0],
                                  .n_token = static_cast<int>(x.extent[0]),
                                  .x_is_bf16 = std::is_same_v<TIn, Bf16>,
                                  .out_is_bf16 = std::is_same_v<TOut, Bf16>},
                                 stream);
  };
  switch (weight.type) {
    case TensorType::kBf16:
      return launch(reinterpret_cast<const Bf16*>(weight.data));
    case TensorType::kF16:
      return launch(reinterpret_cast<const F16*>(weight.data));
    case TensorType::kF32:
      return launch(reinterpret_cast<const float*>(weight.data));
    default:
      require(false, "quantized_linear: weights of type ", type_name(weight.type), "; known are ", weight_type_names());
  }
}

/// What a launch for few tokens does besides its products.
struct LinearFrame {
  LinearEpilogue epilogue = LinearEpilogue::kNone;
  float softcap = 0.0f;
  LinearOptions options = {};
};

/// An input of n_token rows, as the kernel takes it.
struct LinearSource {
  std::int64_t n_token = 0, cols = 0;
  LinearInput input = {};
};

template <class TIn>
[[nodiscard]] LinearSource linear_source(const View<const TIn, 2>& x) {
  LinearSource source{.n_token = x.extent[0], .cols = x.extent[1]};
  source.input.x = x.data;
  source.input.x_stride = x.stride[0];
  source.input.x_is_bf16 = std::is_same_v<TIn, Bf16>;
  return source;
}

/// The same rows from `token` on.
[[nodiscard]] inline LinearInput input_from(LinearInput input, std::int64_t token) {
  input.x = input.x_is_bf16 ? static_cast<const void*>(static_cast<const Bf16*>(input.x) + token * input.x_stride)
                            : static_cast<const void*>(static_cast<const float*>(input.x) + token * input.x_stride);
  return input;
}

inline constexpr int kSharePercent = 80;

/// Rows of the last matrix that each block has before the rest of them is dealt: whole stages. (On an H200 a step of
/// the 31B was slower with 90 %, and slower with 60 %; `ablation`, dynamic_rows, has it with equal shares of
/// everything.)
[[nodiscard]] inline std::int32_t share_of_rows(std::span<const PackedMatrix> weights, const LinearPlan& plan) {
  const PackedMatrix& last = weights.back();
  const int step = stage_rows(last.type, plan.is_tall);
  const std::int64_t shared = last.rows * kSharePercent / 100;
  return static_cast<std::int32_t>(shared / plan.n_block / step * step);
}

/// Packed matrices that share their input, in one launch for each plan.n_token tokens.
template <class TOut>
void packed_decode(const LinearSource& source, std::span<const PackedMatrix> weights,
                   std::span<const View<TOut, 2>> outs, const LinearFrame& frame, const DeviceInfo& device,
                   cudaStream_t stream) {
  LinearParams params{};
  TensorType types[kMaxLinearMatrices] = {};  // no std::array: the code that nvcc writes for the host breaks on it
  params.n_matrix = static_cast<std::int32_t>(weights.size());
  const std::int64_t cols = source.cols;
  params.n_piece = static_cast<std::int32_t>(cols / 8);
  params.n_group = static_cast<std::int32_t>(activation_groups(cols));
  params.n_chunk = static_cast<std::int32_t>(row_chunks(cols));
  params.full_groups = chunk_groups(cols);
  params.last_groups = groups_of_chunk(cols, params.n_chunk - 1);
  params.n_task = (params.full_groups + 31) / 32;
  params.out_is_bf16 = std::is_same_v<TOut, Bf16>;
  params.epilogue = frame.epilogue;
  params.softcap = frame.softcap;
  params.row_align = frame.epilogue == LinearEpilogue::kGeluUp ? 2 : 1;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const PackedMatrix& weight = weights[i];
    types[i] = weight.type;
    params.matrix[i] = {.data = reinterpret_cast<const std::uint8_t*>(weight.data),
                        .out = nullptr,
                        .out_stride = outs[i].stride[0],
                        .row_bytes = weight.row_bytes(),
                        .chunk_bytes = static_cast<std::int32_t>(chunk_bytes(weight.type, params.full_groups)),
                        .last_bytes = static_cast<std::int32_t>(chunk_bytes(weight.type, params.last_groups)),
                        .rows = static_cast<std::int32_t>(weight.rows),
                        .type = weight.type};
  }
  LinearPlan plan =
      plan_linear_decode(cols, source.n_token, std::span<const TensorType>(types, weights.size()), device);
  plan.overlap = plan.overlap && frame.options.overlap;
  params.n_slot = plan.n_slot;
  params.is_tall = plan.is_tall;
  params.tickets = frame.options.tickets;
  if (params.tickets != nullptr) params.share_rows = share_of_rows(weights, plan);
  params.slot_bytes = static_cast<std::int32_t>(plan.slot_bytes);
  params.smem = linear_smem(cols, plan.n_token, plan.n_slot, params.slot_bytes);
  for (std::int64_t token = 0; token < source.n_token; token += plan.n_token) {
    params.input = input_from(source.input, token);
    params.n_token = static_cast<std::int32_t>(std::min<std::int64_t>(plan.n_token, source.n_token - token));
    for (std::size_t i = 0; i < weights.size(); ++i) params.matrix[i].out = outs[i].data + token * outs[i].stride[0];
    launch_linear_decode(params, plan, stream);
  }
}

inline void require_weight(const char* who, const PackedMatrix& weight, std::int64_t cols) {
  require(cols == weight.cols, who, ": x has width ", cols, ", weight has ", weight.cols, " columns");
  require(weight.rows >= 1 && weight.rows < (1 << 22) && weight.cols < (1 << 22), who, ": weight is ", weight.rows,
          " x ", weight.cols, ", need 1 to 2^22 each way");
}

template <class TIn, class TOut>
void require_linear(const char* who, const View<const TIn, 2>& x, const PackedMatrix& weight, const View<TOut, 2>& out,
                    std::int64_t out_cols) {
  require_weight(who, weight, x.extent[1]);
  require_extents(who, "out", out, {x.extent[0], out_cols});
  require_contiguous_rows(who, "x", x);
  require_contiguous_rows(who, "out", out);
  constexpr std::int64_t kPiece = 16 / sizeof(TIn);
  require(!is_packed_type(weight.type) ||
              (reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && (x.stride[0] % kPiece == 0 || x.extent[0] <= 1)),
          who, ": rows of x must begin at multiples of 16 bytes; row stride ", x.stride[0], " elements");
}

inline void require_matrices(std::int64_t n_token, std::size_t n_weight, std::size_t n_out) {
  require(n_weight == n_out && n_weight <= kMaxLinearMatrices, "quantized_linear: ", n_weight, " matrices and ", n_out,
          " outputs, need as many of both, at most ", kMaxLinearMatrices);
  require(n_token <= kMaxDecodeTokens, "quantized_linear_decode: ", n_token, " tokens, at most ", kMaxDecodeTokens,
          "; more go through quantized_linear_prefill()");
}

}  // namespace detail

/// Several matrices of one input in one launch (q, k and v; gate and up), their types as they are. Same bits as one
/// call each.
/// @param x        [n_token, cols] Bf16 or float, finite, rows at multiples of 16 bytes
/// @param weights  up to four matrices [rows_i, cols]
/// @param outs     [n_token, rows_i] Bf16 or float; must not alias x
/// @throws std::invalid_argument when shapes differ, or for more than 8 tokens
template <class TIn, class TOut>
void quantized_linear_decode(const View<const TIn, 2>& x, std::span<const PackedMatrix> weights,
                             std::span<const View<TOut, 2>> outs, const DeviceInfo& device, cudaStream_t stream,
                             const LinearOptions& options = {}) {
  detail::require_matrices(x.extent[0], weights.size(), outs.size());
  for (std::size_t i = 0; i < weights.size(); ++i) {
    detail::require_linear("quantized_linear", x, weights[i], outs[i], weights[i].rows);
  }
  if (x.extent[0] == 0) return;
  std::array<PackedMatrix, detail::kMaxLinearMatrices> packed{};
  std::array<View<TOut, 2>, detail::kMaxLinearMatrices> packed_outs{};
  std::size_t n_packed = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (is_packed_type(weights[i].type)) {
      packed[n_packed] = weights[i];
      packed_outs[n_packed++] = outs[i];
    } else {
      detail::plain_decode(x, weights[i], outs[i], stream);
    }
  }
  if (n_packed == 0) return;
  detail::packed_decode<TOut>(detail::linear_source(x), std::span<const PackedMatrix>(packed).first(n_packed),
                              std::span<const View<TOut, 2>>(packed_outs).first(n_packed), {.options = options}, device,
                              stream);
}

/// One matrix.
template <class TIn, class TOut>
void quantized_linear_decode(const View<const TIn, 2>& x, const PackedMatrix& weight, const View<TOut, 2>& out,
                             const DeviceInfo& device, cudaStream_t stream, const LinearOptions& options = {}) {
  quantized_linear_decode<TIn, TOut>(x, std::span(&weight, 1), std::span(&out, 1), device, stream, options);
}

}  // namespace gemma4::cuda

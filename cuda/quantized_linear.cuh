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
#include "cuda/quantized_linear/codes_ahead.cuh"
#include "cuda/quantized_linear/few_tokens.cuh"
#include "cuda/quantized_linear/int8_tokens.cuh"
#include "cuda/quantized_linear/plain.cuh"
#include "cuda/quantized_linear/plan.cuh"
#include "cuda/weights/layout.cuh"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// Products with quantised weights for 1 to 8 tokens (1 to 16 on int8 tensor cores): out[t, n] = sum_k x[t, k]
/// weight[n, k].
///
/// Activations become 8-bit integers in blocks of 32 (activation_blocks.cuh), products of integers are exact, and sums
/// are float in an order that depends on the number of columns alone. So a token's result has the same bits however
/// many tokens, matrices or blocks take part. BF16, F16 and F32 weights are multiplied in float.
/// Error: |out - exact| <= sum over blocks of s_x / 2 * sum_k |w_k|, with s_x = max|x| / 127 of the block, and float
/// rounding. Bytes: the weights once. Mirror: reference/quantized_linear.hpp
namespace gemma4::cuda {

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

template <int kSet, int kWarps>
void launch_linear_int8(const LinearParams& params, const LinearPlan& plan, cudaStream_t stream) {
  Launch{.what = "linear_int8_kernel",
         .grid = static_cast<unsigned>(plan.n_block),
         .block = 32 * (kWarps + 2),
         .stream = stream,
         .overlap = plan.overlap,
         .smem_bytes = plan.smem_bytes,
         .smem_limit_bytes = plan.smem_limit_bytes}(linear_int8_kernel<kSet, kWarps>, params);
}

inline void launch_linear_decode(const LinearParams& params, const LinearPlan& plan, cudaStream_t stream) {
  if (plan.path == LinearPath::kInt8) {
    if (plan.n_token > 4) return launch_linear_int8<8, 14>(params, plan, stream);
    return plan.n_warp == 8 ? launch_linear_int8<4, 8>(params, plan, stream)
                            : launch_linear_int8<4, 14>(params, plan, stream);
  }
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
    for (std::int64_t token = 0; token < x.extent[0]; token += kPlainTokens) {
      launch_plain_linear<TWeight>(
          {.weight = data,
           .x = x.data + token * x.stride[0],
           .out = out.data + token * out.stride[0],
           .rows = weight.rows,
           .cols = weight.cols,
           .x_stride = x.stride[0],
           .out_stride = out.stride[0],
           .n_token = static_cast<int>(std::min<std::int64_t>(kPlainTokens, x.extent[0] - token)),
           .x_is_bf16 = std::is_same_v<TIn, Bf16>,
           .out_is_bf16 = std::is_same_v<TOut, Bf16>},
          stream);
    }
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
[[nodiscard]] inline LinearInput input_from(LinearInput input, std::int64_t token, std::int64_t cols) {
  if (input.codes != nullptr) input.codes += linear_codes_bytes(token, cols);
  input.x = input.x_is_bf16 ? static_cast<const void*>(static_cast<const Bf16*>(input.x) + token * input.x_stride)
                            : static_cast<const void*>(static_cast<const float*>(input.x) + token * input.x_stride);
  return input;
}

inline constexpr int kSharePercent = 80;

/// How rows of the last matrix are dealt.
struct LinearDeal {
  std::int32_t share_rows;   ///< that each block has before the rest of them is dealt: as many as whole stages
  std::int32_t ticket_rows;  ///< those of a stage, or fewer
};

/// (On an H200 a step of the 31B was slower with 90 % shared, and slower with 60 %; `ablation`, dynamic_rows, has it
/// with equal shares of everything.)
[[nodiscard]] inline LinearDeal deal_rows(std::span<const PackedMatrix> weights, const LinearVariant& variant,
                                          const LinearPlan& plan) {
  const PackedMatrix& last = weights.back();
  const bool is_int8 = plan.path == LinearPath::kInt8;
  const int step = is_int8 ? kInt8StageRows : plan.rows_of_stage(last.type);
  std::int64_t shared = last.rows * kSharePercent / 100;
  if (variant.deals_of_launch && !is_int8) {
    std::int64_t rows = 0;
    for (const PackedMatrix& weight : weights) rows += weight.rows;
    shared = std::max<std::int64_t>(0, last.rows - rows * (100 - kSharePercent) / 100);
  }
  return {.share_rows = static_cast<std::int32_t>(shared / plan.n_block / step * step),
          .ticket_rows = variant.half_tickets && !is_int8 ? std::min(step, kTaskRows) : step};
}

/// A matrix as the kernels take it, without its output.
[[nodiscard]] inline LinearMatrix linear_matrix(const PackedMatrix& weight, std::int32_t full_groups,
                                                std::int32_t last_groups) {
  const std::int64_t full = chunk_bytes(weight.type, full_groups), last = chunk_bytes(weight.type, last_groups);
  return {.data = reinterpret_cast<const std::uint8_t*>(weight.data),
          .out = nullptr,
          .out_stride = 0,
          .row_bytes = weight.row_bytes(),
          .chunk_bytes = static_cast<std::int32_t>(full),
          .last_bytes = static_cast<std::int32_t>(last),
          .chunk_pitch = static_cast<std::int32_t>(int8_pitch(full)),
          .last_pitch = static_cast<std::int32_t>(int8_pitch(last)),
          .rows = static_cast<std::int32_t>(weight.rows),
          .type = weight.type};
}

/// What the plan decides about a launch.
inline void set_plan(LinearParams& params, std::int64_t cols, std::span<const PackedMatrix> weights,
                     const LinearOptions& options, const LinearPlan& plan) {
  const bool is_int8 = plan.path == LinearPath::kInt8;
  params.n_slot = plan.n_slot;
  params.is_tall = plan.is_tall;
  params.slot_bytes = static_cast<std::int32_t>(plan.slot_bytes);
  params.most_rows = plan.most_rows;
  params.is_by_chunk = plan.is_by_chunk;
  params.n_set = plan.n_token > 8 ? 2 : 1;
  params.pass_rows = plan.is_by_chunk ? kInt8PassRows : kInt8StageRows;
  params.n_group =
      static_cast<std::int32_t>(is_int8 ? int8_held_groups(cols, plan.is_by_chunk) : activation_groups(cols));
  params.smem = is_int8 ? int8_smem(cols, plan.n_token, plan.is_by_chunk, plan.n_slot, plan.slot_bytes)
                        : linear_smem(cols, plan.n_token, plan.n_slot, params.slot_bytes);
  // A ticket is a stage of rows, whose chunks would have to be there at once.
  params.tickets = plan.is_by_chunk ? nullptr : options.tickets;
  if (params.tickets == nullptr) return;
  const LinearDeal deal = deal_rows(weights, options.variant, plan);
  params.ticket_rows = deal.ticket_rows, params.share_rows = deal.share_rows;
}

/// The input, with the codes that are there, or made by a launch of their own where there is room and that is faster.
[[nodiscard]] inline LinearInput with_codes_ahead(const LinearSource& source, const LinearOptions& options,
                                                  bool overlap, cudaStream_t stream) {
  LinearInput input = source.input;
  const std::int64_t need = linear_codes_bytes(source.n_token, source.cols);
  if (options.made.data != nullptr) {
    require(options.made.n_bytes >= need, "quantized_linear: codes of ", options.made.n_bytes, " B, need ", need,
            " B for ", source.n_token, " tokens of ", source.cols, " values");
    input.codes = options.made.data;
    return input;
  }
  if (options.codes.data == nullptr || source.n_token * source.cols < options.codes_from) return input;
  require(options.codes.n_bytes >= need, "quantized_linear: room for codes of ", options.codes.n_bytes, " B, need ",
          need, " B for ", source.n_token, " tokens of ", source.cols, " values");
  launch_linear_codes(input, source.n_token, source.cols, options.codes.data, overlap, stream);
  input.codes = options.codes.data;
  return input;
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
  params.n_chunk = static_cast<std::int32_t>(row_chunks(cols));
  params.full_groups = chunk_groups(cols);
  params.last_groups = groups_of_chunk(cols, params.n_chunk - 1);
  params.n_task = (params.full_groups + 31) / 32;
  params.out_is_bf16 = std::is_same_v<TOut, Bf16>;
  params.epilogue = frame.epilogue;
  params.softcap = frame.softcap;
  params.row_align = frame.epilogue == LinearEpilogue::kGeluUp ? 2 : 1;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    types[i] = weights[i].type;
    params.matrix[i] = linear_matrix(weights[i], params.full_groups, params.last_groups);
    params.matrix[i].out_stride = outs[i].stride[0];
  }
  LinearPlan plan = plan_linear(frame.options.path(source.n_token), cols, source.n_token,
                                std::span<const TensorType>(types, weights.size()), device, frame.options.variant);
  plan.overlap = plan.overlap && frame.options.overlap;
  set_plan(params, cols, weights, frame.options, plan);
  const LinearInput input = with_codes_ahead(source, frame.options, plan.overlap, stream);
  for (std::int64_t token = 0; token < source.n_token; token += plan.n_token) {
    params.input = input_from(input, token, cols);
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

/// Tokens that a call of n_token may have.
[[nodiscard]] inline std::int64_t max_linear_tokens(std::int64_t n_token, const LinearOptions& options) {
  return options.path(n_token) == LinearPath::kInt8 ? kMaxInt8Tokens : kMaxDecodeTokens;
}

inline void require_matrices(std::int64_t n_token, std::size_t n_weight, std::size_t n_out,
                             const LinearOptions& options) {
  require(n_weight == n_out && n_weight <= kMaxLinearMatrices, "quantized_linear: ", n_weight, " matrices and ", n_out,
          " outputs, need as many of both, at most ", kMaxLinearMatrices);
  const std::int64_t most = max_linear_tokens(n_token, options);
  require(n_token <= most, "quantized_linear_decode: ", n_token, " tokens, at most ", most,
          "; more go through quantized_linear_prefill()");
}

}  // namespace detail

/// Several matrices of one input in one launch (q, k and v; gate and up), their types as they are. Same bits as one
/// call each.
/// @param x        [n_token, cols] Bf16 or float, finite, rows at multiples of 16 bytes
/// @param weights  up to four matrices [rows_i, cols]
/// @param outs     [n_token, rows_i] Bf16 or float; must not alias x
/// @throws std::invalid_argument when shapes differ, or for more than 8 tokens (16 on int8 tensor cores)
template <class TIn, class TOut>
void quantized_linear_decode(const View<const TIn, 2>& x, std::span<const PackedMatrix> weights,
                             std::span<const View<TOut, 2>> outs, const DeviceInfo& device, cudaStream_t stream,
                             const LinearOptions& options = {}) {
  detail::require_matrices(x.extent[0], weights.size(), outs.size(), options);
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

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>

#include "cuda/device/device_info.cuh"
#include "cuda/quantized_linear/codes_ahead.cuh"
#include "cuda/quantized_linear/int8_activations.cuh"
#include "cuda/quantized_linear/int8_tokens.cuh"
#include "cuda/quantized_linear/stages.cuh"
#include "cuda/weights/layout.cuh"
#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf.hpp"

/// How a product for few tokens runs: which kernel, how much of it a launch takes, and how a block's shared memory is
/// divided. Host code alone.
namespace gemma4::cuda {

inline constexpr std::int64_t kMaxDecodeTokens = 8;  ///< of a call, as the kernel with a dot product a token takes them
inline constexpr std::int64_t kMaxInt8Tokens = 16;   ///< of a call on int8 tensor cores

/// The threshold: tokens from which products run on int8 tensor cores, with the same bits. By measurement (`linear`,
/// column path): the chain of a Q4_K_M step takes 12.0 ms there with 8 tokens on an H100 against 16.1, and 10.1 with 4
/// against 9.0; 5 to 8 tokens are one kernel on either path, and dot products take 16.0 with 5.
inline constexpr std::int64_t kInt8FromTokens = 5;

/// What multiplies.
enum class LinearPath : std::int32_t {
  kDot,   ///< few_tokens.cuh: four products an instruction, for each token by itself
  kInt8,  ///< int8_tokens.cuh: tensor cores, one unpacking of a weight for four or eight tokens
};

/// How a call for few tokens runs.
struct LinearPlan {
  LinearPath path = LinearPath::kDot;
  int n_token = 1;  ///< that one launch takes: 1, 2, 4 or 8; wide rows leave room for fewer than 8 (kInt8: 4 to 16)
  int n_slot = 0;   ///< stages in flight
  bool is_tall = false;                   ///< stages of more rows, see detail::stage_rows()
  int most_rows = detail::kMaxStageRows;  ///< of a stage, whatever its type
  bool is_by_chunk = false;               ///< kInt8: activations are in shared memory chunk by chunk
  bool is_every = false;                  ///< by the kernel that knows all formats, see detail::is_of_four_formats()
  std::int64_t slot_bytes = 0;
  std::int64_t smem_bytes = 0;
  std::int64_t smem_limit_bytes = 0;  ///< what the kernel is allowed, whatever it uses: one value for all launches
  int n_block = 1;
  int n_warp = 8;        ///< of a block, that multiply
  bool overlap = false;  ///< with the kernel before: from sm_90 on

  [[nodiscard]] int rows_of_stage(TensorType type) const {
    return std::min(detail::stage_rows(type, is_tall), most_rows);
  }
};

/// Values of a call, of all its tokens, from which their codes are made ahead by a launch of their own, where there is
/// room for them (`linear`, --codes-from). That launch is some 3.5 us whatever it makes; in its place the blocks of a
/// product make codes of 21504 values in some 4 us (an H100: one token of ffn_down gains 0.7 us, one of 16384 columns
/// nothing, and a chain of one token nothing either), and of four tokens in four times that.
inline constexpr std::int64_t kCodesFromValues = 40'000;

/// Tokens from which the norm in front of a product leaves its rows as codes too, which costs their bytes (`linear`,
/// --norm-codes-from). One token is not among them: its codes are made while the ring fills.
inline constexpr std::int64_t kNormCodesFromTokens = 2;

/// What may be done otherwise in products; the same bits in any case (`linear`, --variant: 1, 2, 4, 8 and 16, added). 8
/// is of int8, the others of dot products. On an H100 half_tickets takes 0.5 % off a chain with the norms between, of
/// Q4_K_M and of Q4_0 alike, though attn_output by itself takes 5 % longer; deals_of_launch nothing; 2 was not timed.
///
/// By arithmetic, for ffn_down of the 31B in Q4_0 or Q4_K (5376 rows of four chunks, 97 KB for eight): 264 blocks have
/// 16 rows each, and 144 of them a ticket of eight more, which the others do not help with; and a ring of three stages
/// is 73 KB, one of seven stages of four rows 85 KB.
struct LinearVariant {
  bool half_tickets = false;     ///< 1: dealt rows come four at a time where stages have eight
  bool low_stages = false;       ///< 2: all stages of one token are of four rows, where rows are several chunks
  bool deals_of_launch = false;  ///< 4: dealt rows are a share of the launch's rows, not of its last matrix
  bool int8_whole = false;       ///< 8: one block with all activations, before two with a chunk of them
  bool one_block = false;        ///< 16: of three and four tokens a multiprocessor has one block, not two

  static constexpr int kMost = 31;
  [[nodiscard]] static constexpr LinearVariant of(int sum) {
    return {(sum & 1) != 0, (sum & 2) != 0, (sum & 4) != 0, (sum & 8) != 0, (sum & 16) != 0};
  }
};
inline constexpr int kLinearVariantSum = 1;
inline constexpr LinearVariant kLinearVariant = LinearVariant::of(kLinearVariantSum);

/// How a product for few tokens may run; the same bits in any case.
struct LinearOptions {
  /// For dynamic row scheduling: 8 bytes of device memory, zero before the first launch, from which blocks that end
  /// early take rows (tickets). Null: each block has an equal share. Products of one stream may share it.
  LinearTickets* tickets = nullptr;
  LinearVariant variant = kLinearVariant;
  bool overlap = true;                         ///< programmatic dependent launch, where the device has it
  LinearCodes codes = {};                      ///< room for codes that are made ahead
  LinearCodes made = {};                       ///< the rows' codes, where a launch in front has made them
  std::int64_t codes_from = kCodesFromValues;  ///< values of a call from which that is done
  std::int64_t int8_from =
      kInt8FromTokens;  ///< tokens of a call from which it takes LinearPath::kInt8, where that fits

  [[nodiscard]] LinearPath path(std::int64_t n_token) const {
    return n_token >= int8_from ? LinearPath::kInt8 : LinearPath::kDot;
  }
};

namespace detail {

/// Shared memory with which two blocks share a multiprocessor. (1 KB of each block is the system's.)
[[nodiscard]] constexpr std::int64_t half_of_smem(std::int64_t limit) {
  return (limit + 1024) / 2 - 1024;
}

/// Bytes that a multiprocessor has on their way at least: 1.3 us of an H200's memory.
inline constexpr std::int64_t kBytesAhead = 44 * 1024;

/// Those of a block, whose warps have one and a half stages in hand.
[[nodiscard]] constexpr std::int64_t bytes_ahead(int n_slot, std::int64_t slot_bytes) {
  return (2 * n_slot - 3) * slot_bytes / 2;
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

/// By a dot product a token.
/// @param types of the matrices that share the input; only packed types count
/// @throws std::invalid_argument when not even one token fits into the device's shared memory
[[nodiscard]] inline LinearPlan plan_linear_decode(std::int64_t cols, std::int64_t n_token,
                                                   std::span<const TensorType> types, const DeviceInfo& device,
                                                   const LinearVariant& variant = kLinearVariant) {
  LinearPlan plan{.smem_limit_bytes = device.smem_limit_bytes, .overlap = device.compute_capability >= 90};
  const std::int64_t half = detail::half_of_smem(device.smem_limit_bytes);
  plan.is_tall = n_token == 1 && row_chunks(cols) == 1 &&
                 std::all_of(types.begin(), types.end(), [](TensorType type) { return type == TensorType::kQ6K; });
  plan.is_every = !std::all_of(types.begin(), types.end(), detail::is_of_four_formats);
  if (variant.low_stages && n_token == 1 && row_chunks(cols) > 1) plan.most_rows = detail::kTaskRows;
  for (const TensorType type : types) {
    const std::int64_t bytes = plan.rows_of_stage(type) * chunk_bytes(type, chunk_groups(cols));
    plan.slot_bytes = std::max(plan.slot_bytes, (bytes + 127) / 128 * 128);
  }
  plan.n_token = static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(std::clamp<std::int64_t>(n_token, 1, 8))));
  for (; plan.n_token >= 1; plan.n_token /= 2) {
    // Two blocks share a multiprocessor where their rings do for it: the next kernel's then begin under their end.
    const int most_of_two = variant.one_block ? 2 : 4;
    plan.n_slot = plan.n_token > most_of_two ? 0 : detail::linear_slots(cols, plan.n_token, plan.slot_bytes, half);
    const bool is_enough =
        plan.n_token <= 2 || 2 * detail::bytes_ahead(plan.n_slot, plan.slot_bytes) >= detail::kBytesAhead;
    if (plan.n_slot < 3 || !is_enough) {
      plan.n_slot = detail::linear_slots(cols, plan.n_token, plan.slot_bytes, device.smem_limit_bytes);
    }
    if (plan.n_slot >= 2) break;
  }
  require(plan.n_token >= 1, "quantized_linear: rows of ", cols, " columns do not fit into ", device.smem_limit_bytes,
          " B of shared memory a block");
  plan.smem_bytes = detail::linear_smem(cols, plan.n_token, plan.n_slot, static_cast<int>(plan.slot_bytes)).total;
  plan.n_block = plan.n_token <= 4 && plan.smem_bytes <= half ? 2 * device.sm_count : device.sm_count;
  return plan;
}

namespace detail {

/// Groups of a token that shared memory holds at a time on the path of kInt8.
[[nodiscard]] constexpr std::int64_t int8_held_groups(std::int64_t cols, bool is_by_chunk) {
  return int8_groups(static_cast<int>(is_by_chunk ? chunk_groups(cols) : row_groups(cols)));
}

/// @param n_column 4, 8 or 16
[[nodiscard]] constexpr LinearSmem int8_smem(std::int64_t cols, int n_column, bool is_by_chunk, int n_slot,
                                             std::int64_t slot_bytes) {
  const int groups = static_cast<int>(int8_held_groups(cols, is_by_chunk));
  const std::int64_t activations = n_slot * slot_bytes;
  const std::int64_t sums = activations + (n_column == 4 ? Int8Columns<4>::bytes(groups)
                                                         : n_column / 8 * std::int64_t{Int8Columns<8>::bytes(groups)});
  const std::int64_t pass_rows = row_chunks(cols) == 1 ? 0 : is_by_chunk ? kInt8PassRows : kInt8StageRows;
  const std::int64_t partials = sums + pass_rows * n_column * 4;
  const std::int64_t n_task = (chunk_groups(cols) + 31) / 32;
  const std::int64_t barriers = partials + n_slot * n_task * n_column * kMaxStageRows * 4;
  const std::int64_t notes = barriers + 2 * 8 * n_slot;
  return {.activations = static_cast<std::int32_t>(activations),
          .partials = static_cast<std::int32_t>(partials),
          .barriers = static_cast<std::int32_t>(barriers),
          .notes = static_cast<std::int32_t>(notes),
          .total = static_cast<std::int32_t>(notes + 2 * 4 * n_slot),
          .sums = static_cast<std::int32_t>(sums)};
}

/// The most slots for one way to lay out a block; whether that leaves enough bytes on their way.
inline bool fit_int8(LinearPlan& plan, std::int64_t cols, std::int64_t limit, int blocks_of_one) {
  plan.n_slot = 0;
  while (plan.n_slot < kMaxLinearSlots &&
         int8_smem(cols, plan.n_token, plan.is_by_chunk, plan.n_slot + 1, plan.slot_bytes).total <= limit) {
    ++plan.n_slot;
  }
  const std::int64_t ahead = bytes_ahead(plan.n_slot, plan.slot_bytes);
  return plan.n_slot == kMaxLinearSlots || blocks_of_one * ahead >= (blocks_of_one == 1 ? 2 : 1) * kBytesAhead;
}

}  // namespace detail

/// On int8 tensor cores. For up to four tokens two blocks share a multiprocessor where enough bytes are on their way
/// then, with all activations there or a chunk of them. Otherwise it has one block, of more warps: eight tokens would
/// each be made codes twice, and take the room of the ring. Where a call's tokens do not fit, fewer a launch; where not
/// even four do (Q8_0 on devices of 99 KB), a plan of LinearPath::kDot.
[[nodiscard]] inline LinearPlan plan_linear_int8(std::int64_t cols, std::int64_t n_token,
                                                 std::span<const TensorType> types, const DeviceInfo& device,
                                                 const LinearVariant& variant = kLinearVariant) {
  LinearPlan plan{.path = LinearPath::kInt8,
                  .smem_limit_bytes = device.smem_limit_bytes,
                  .overlap = device.compute_capability >= 90};
  for (const TensorType type : types) {
    const std::int64_t pitch = detail::int8_pitch(chunk_bytes(type, chunk_groups(cols)));
    plan.slot_bytes = std::max(plan.slot_bytes, (detail::kInt8StageRows * pitch + 127) / 128 * 128);
  }
  const bool is_wide_row = row_chunks(cols) > 1;
  const auto fits = [&](int blocks_of_one, bool is_by_chunk, bool is_last) {
    plan.is_by_chunk = is_by_chunk;
    plan.n_block = blocks_of_one * device.sm_count;
    plan.n_warp = blocks_of_one == 2 ? 8 : 14;
    const std::int64_t limit =
        blocks_of_one == 2 ? detail::half_of_smem(device.smem_limit_bytes) : device.smem_limit_bytes;
    const bool is_enough = detail::fit_int8(plan, cols, limit, blocks_of_one);
    return plan.n_slot >= 2 && (is_enough || is_last);
  };
  for (plan.n_token = n_token <= 4 ? 4 : n_token <= 8 ? 8 : 16; plan.n_token >= 4; plan.n_token /= 2) {
    if ((plan.n_token == 4 && fits(2, false, false)) || (variant.int8_whole && fits(1, false, false)) ||
        (plan.n_token == 4 && fits(2, is_wide_row, false)) || fits(1, false, false) || fits(1, is_wide_row, true)) {
      plan.smem_bytes = detail::int8_smem(cols, plan.n_token, plan.is_by_chunk, plan.n_slot, plan.slot_bytes).total;
      return plan;
    }
  }
  return plan_linear_decode(cols, n_token, types, device);
}

/// @param path where it fits
[[nodiscard]] inline LinearPlan plan_linear(LinearPath path, std::int64_t cols, std::int64_t n_token,
                                            std::span<const TensorType> types, const DeviceInfo& device,
                                            const LinearVariant& variant = kLinearVariant) {
  return path == LinearPath::kInt8 ? plan_linear_int8(cols, n_token, types, device, variant)
                                   : plan_linear_decode(cols, n_token, types, device, variant);
}

}  // namespace gemma4::cuda

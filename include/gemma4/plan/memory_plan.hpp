// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "gemma4/cache_formats.hpp"
#include "gemma4/config.hpp"
#include "gemma4/error.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/plan/cache_bytes.hpp"
#include "gemma4/plan/cache_fit.hpp"
#include "gemma4/plan/packed_rows.hpp"
#include "gemma4/quantized_matrix.hpp"
#include "gemma4/session/checkpoint_policy.hpp"
#include "gemma4/step_limits.hpp"
#include "gemma4/tq4_format.hpp"

/// The bytes of every buffer of a run, from the config alone: no device is asked and nothing is allocated.
/// GB is 1e9 bytes, GiB is 2^30.
namespace gemma4 {

enum class PlanTarget { kReference, kCuda };

struct PlannedBuffer {
  std::string name;
  std::int64_t bytes = 0;
  std::string formula;
};

struct MemoryPlanOptions {
  PlanTarget target = PlanTarget::kCuda;
  std::int64_t context = 131072;  ///< positions that the caches hold
  std::int64_t chunk = 2048;      ///< tokens of the longest prefill chunk
  CacheSpec cache = Tq4Format{};
  std::int64_t n_logit_row = 1;  ///< rows whose logits are kept
  std::int64_t max_draft = 0;    ///< tokens that a step drafts, at most; each has logits of its own
  std::int64_t sm_count = 132;   ///< multiprocessors of the device: split keys leave a part in each (an H100 or H200)
  std::int64_t n_thread = 0;     ///< of the reference; 0: the hardware's
  std::vector<PlannedBuffer> drafter = {};  ///< what a drafter takes beside it (gemma4/plan/drafter_plan.hpp)
  CheckpointPolicy checkpoints = {};        ///< of the rings, in the host's memory: of the reference
};

struct MemoryPlan {
  std::vector<PlannedBuffer> buffers;

  [[nodiscard]] std::int64_t total_bytes() const {
    std::int64_t sum = 0;
    for (const PlannedBuffer& buffer : buffers) sum += buffer.bytes;
    return sum;
  }
  [[nodiscard]] bool fits(std::int64_t limit_bytes) const { return total_bytes() <= limit_bytes; }
  /// @throws std::invalid_argument when there is no such buffer
  [[nodiscard]] std::int64_t bytes(std::string_view name) const {
    for (const PlannedBuffer& buffer : buffers) {
      if (buffer.name == name) return buffer.bytes;
    }
    require(false, "memory plan: no buffer '", name, "'");
    return 0;
  }
};

/// Every buffer on a device begins at a multiple of this.
inline constexpr std::int64_t kDeviceAlignment = 256;

namespace detail {

[[nodiscard]] constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace detail

/// Whether a tensor goes to the device as a vector. The layers' scales and RoPE's factors stay with the host, which
/// hands them to kernels.
[[nodiscard]] inline bool is_device_vector(const ModelTensor& tensor) {
  return tensor.dims.size() == 1 && tensor.dims[0] > 1 && tensor.name != "rope_freqs.weight";
}

/// Bytes of a tensor on the device.
[[nodiscard]] inline std::int64_t device_bytes(const ModelTensor& tensor) {
  if (tensor.dims.size() == 1)
    return is_device_vector(tensor) ? detail::round_up(4 * tensor.size(), kDeviceAlignment) : 0;
  return detail::round_up(tensor.rows() * packed_row_bytes(tensor.type, tensor.row_len()), kDeviceAlignment);
}

/// The activations of a chunk that takes the path of decoding, in bytes; each begins at kDeviceAlignment.
struct DecodeActivations {
  std::int64_t pending = 0;     ///< f32
  std::int64_t qkv = 0;         ///< f32, as projected
  std::int64_t attended = 0;    ///< bf16: q, then the result of attention
  std::int64_t fresh = 0;       ///< bf16, K and V of a sliding layer
  std::int64_t activation = 0;  ///< bf16
  std::int64_t gate_up = 0;     ///< f32, for layers whose gate and up have different types

  [[nodiscard]] std::int64_t total() const { return pending + qkv + attended + fresh + activation + gate_up; }
};

namespace detail {

/// Widest q, k, v and all three of them, over the layers.
struct QkvWidths {
  std::int64_t q = 0, kv = 0, all = 0;
};

[[nodiscard]] inline QkvWidths qkv_widths(const ModelConfig& config) {
  QkvWidths widths;
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    const AttentionConfig& attention = config.attention(layer);
    widths.q = std::max(widths.q, config.n_head * attention.head_dim);
    widths.kv = std::max(widths.kv, attention.n_head_kv * attention.head_dim);
    widths.all = std::max(widths.all, (config.n_head + 2 * attention.n_head_kv) * attention.head_dim);
  }
  return widths;
}

}  // namespace detail

/// @param chunk the longest of the run
[[nodiscard]] inline DecodeActivations decode_activations(const ModelConfig& config, std::int64_t chunk) {
  constexpr std::int64_t kBf16 = 2, kF32 = 4;
  const std::int64_t n_token = std::min(chunk, kDecodeChunk);
  const detail::QkvWidths widths = detail::qkv_widths(config);
  const auto bytes = [&](std::int64_t width, std::int64_t size) {
    return detail::round_up(n_token * width * size, kDeviceAlignment);
  };
  return {.pending = bytes(config.hidden, kF32),
          .qkv = bytes(widths.all, kF32),
          .attended = bytes(widths.q, kBf16),
          .fresh = bytes(2 * widths.kv, kBf16),
          .activation = bytes(config.ffn_hidden, kBf16),
          .gate_up = bytes(2 * config.ffn_hidden, kF32)};
}

/// What the blocks leave that share the keys of a few queries, in bytes; no plan of an attention asks for more, and the
/// backend holds each to it. At most two blocks a multiprocessor share keys, each with a tile of 16 query rows:
/// head_dim sums, a maximum and a sum of weights a row, f32. A decode kernel that does not split leaves its tiles of 8
/// rows alike.
[[nodiscard]] inline std::int64_t attention_partials_bytes(const ModelConfig& config, std::int64_t sm_count) {
  constexpr std::int64_t kBlocksPerSm = 2, kTileRows = 16, kRowTile = 8, kMaxDecodeQueries = kDecodeChunk;
  std::int64_t bytes = 0;
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    const AttentionConfig& attention = config.attention(layer);
    const std::int64_t group = config.n_head / attention.n_head_kv;
    const std::int64_t unsplit = attention.n_head_kv * detail::round_up(kMaxDecodeQueries * group, kRowTile);
    const std::int64_t rows = std::max(kBlocksPerSm * sm_count * kTileRows, unsplit);
    bytes = std::max(bytes, rows * (attention.head_dim + 2) * static_cast<std::int64_t>(sizeof(float)));
  }
  return detail::round_up(bytes, kDeviceAlignment);
}

/// Of a step that drafts on a device, beside the text (cuda/backend/drafting.cuh).
inline constexpr std::int64_t kDraftStateBytes = 4096;

namespace detail {

/// Adds buffers one by one; the shapes that several of them share are computed once.
class MemoryPlanner {
 public:
  MemoryPlanner(const ModelConfig& config, const std::vector<ModelTensor>& tensors, const MemoryPlanOptions& options)
      : config_(config), tensors_(tensors), options_(options) {
    require(options.context >= 1, "memory plan: context ", options.context, ", need at least 1");
    require(options.chunk >= 1, "memory plan: chunk ", options.chunk, ", need at least 1");
    require(options.n_logit_row >= 1, "memory plan: n_logit_row ", options.n_logit_row, ", need at least 1");
    require(options.max_draft >= 0 && options.max_draft < kDecodeChunk, "memory plan: max_draft ", options.max_draft,
            ", need 0 to ", kDecodeChunk - 1);
    require_cache_suits(options.cache, config, tensors);
    validate(options.checkpoints);
    for (const ModelTensor& tensor : tensors) {
      if (tensor.dims.size() == 1 || is_weight_type(tensor.type)) continue;
      require(false, "memory plan: tensor '", tensor.name, "' ", unsupported_weight_type(tensor.type));
    }
    n_sliding_ = config.n_layer() - config.n_full_layer();
    const QkvWidths widths = qkv_widths(config);
    q_dim_ = widths.q, kv_dim_ = widths.kv, qkv_dim_ = widths.all;
  }

  [[nodiscard]] MemoryPlan plan() {
    options_.target == PlanTarget::kCuda ? add_cuda() : add_reference();
    plan_.buffers.insert(plan_.buffers.end(), options_.drafter.begin(), options_.drafter.end());
    return std::move(plan_);
  }

 private:
  void add(std::string name, std::int64_t bytes, std::string formula) {
    if (bytes > 0) plan_.buffers.push_back({std::move(name), bytes, std::move(formula)});
  }

  template <class TPredicate>
  [[nodiscard]] std::int64_t sum_device_bytes(TPredicate&& wanted) const {
    std::int64_t sum = 0;
    for (const ModelTensor& tensor : tensors_) sum += wanted(tensor) ? device_bytes(tensor) : 0;
    return sum;
  }

  /// Rounded up on a device, so that the buffers fill their allocation without gaps.
  void add_device(std::string name, std::int64_t bytes, std::string formula) {
    const bool is_device = options_.target == PlanTarget::kCuda;
    add(std::move(name), is_device ? round_up(bytes, kDeviceAlignment) : bytes, std::move(formula));
  }

  [[nodiscard]] static bool is_embedding(const ModelTensor& tensor) { return tensor.name == "token_embd.weight"; }
  [[nodiscard]] static bool is_output(const ModelTensor& tensor) { return tensor.name == "output.weight"; }

  /// Rows are repacked losslessly; those of Q4_K need no padding, Q6_K rows of 5376 values grow from 4410 to 4416 B.
  void add_cuda_weights() {
    for (const TensorTypeInfo& info : kTensorTypes) {
      const std::int64_t bytes = sum_device_bytes([&](const ModelTensor& tensor) {
        return tensor.type == info.type && tensor.dims.size() > 1 && !is_token_matrix(tensor.name);
      });
      add(concat("weights_", info.name), bytes, "matrices of the layers, rows repacked");
    }
    const std::int64_t output_bytes = sum_device_bytes(is_output);
    add("weights_token_embd", sum_device_bytes(is_embedding),
        output_bytes > 0 ? "embedding" : "embedding and output matrix, one copy");
    add("weights_output", output_bytes, "output matrix, which is not the embedding");
    add("weights_vectors", sum_device_bytes([](const ModelTensor& tensor) { return tensor.dims.size() == 1; }),
        "norms, f32");
  }

  template <class TFormat>
  void add_caches(const TFormat& format, std::int64_t context) {
    const std::int64_t n_slot = ring_slots(config_.window);
    const AttentionConfig& full = config_.full;
    if (config_.n_full_layer() > 0) {
      const std::int64_t k = format.allocated_row_bytes(CacheSide::kKey, full.head_dim);
      const std::int64_t v = format.allocated_row_bytes(CacheSide::kValue, full.head_dim);
      add_device("cache_full", config_.n_full_layer() * full.n_head_kv * context * (k + v),
                 concat(config_.n_full_layer(), " layers x ", full.n_head_kv, " heads x ", context,
                        context == options_.context ? " tokens"
                                                    : concat(" tokens (whole records of ", TFormat::kRecordTokens, ")"),
                        TFormat::kReadsKeysFromValues ? " x (turned quarter of K " : " x (K ", k, " B + V ", v, " B)"));
    }
    if (n_sliding_ > 0) {
      const AttentionConfig& sliding = config_.sliding;
      add_device("cache_sliding",
                 n_sliding_ * sliding.n_head_kv * n_slot * sliding.head_dim * 2 * TFormat::kRingValueBytes,
                 concat(n_sliding_, " layers x ", sliding.n_head_kv, " heads x ", n_slot, " slots x ", sliding.head_dim,
                        " x 2 (K, V) x ", TFormat::kRingValueBytes, " B"));
    }
  }

  /// The caches of a device, and what else depends on the format. @return values of the scratch that K and V of a head
  /// take as bf16
  template <class TFormat>
  std::int64_t add_cuda_caches(const TFormat& format) {
    const std::int64_t context = round_up(options_.context, TFormat::kRecordTokens);
    add_caches(format, context);
    if (config_.n_full_layer() == 0) return 0;
    rotation_bytes_ = format.rotation_bytes(config_.full.head_dim);
    fresh_k_dim_ = TFormat::kStoredByPrologue ? 0 : config_.full.n_head_kv * config_.full.head_dim;
    return TFormat::kUnpacksForPrefill ? 2 * context * config_.full.head_dim : 0;
  }

  void add_cuda() {
    constexpr std::int64_t kBf16 = 2, kF32 = 4, kMiB = std::int64_t{1} << 20;
    const std::int64_t t = options_.chunk, hidden = config_.hidden, rows = logit_rows();
    add_cuda_weights();
    const std::int64_t unpacked_kv =
        std::visit([&](const auto& format) { return add_cuda_caches(format); }, options_.cache);
    add_device("residual", t * hidden * kF32, "chunk x hidden x f32");
    add_device("normed", t * hidden * kBf16, "chunk x hidden x bf16");
    add_device("pending", t * hidden * kBf16, "chunk x hidden x bf16");
    const std::int64_t qkv = qkv_dim_ + fresh_k_dim_;
    add_device("activations", t * std::max(2 * config_.ffn_hidden, qkv) * kBf16,
               concat("chunk x max(gate + up: 2 x ", config_.ffn_hidden, ", q + k + v: ", qkv, ") x bf16"));
    add_device("scratch", std::max(largest_matrix(), unpacked_kv) * kBf16,
               "max(largest matrix of a layer, K and V of one full-attention head) x bf16, dequantised for a chunk");
    add_device("attention_partials", attention_partials_bytes(config_, options_.sm_count),
               concat("of keys that are split over the blocks of ", options_.sm_count, " multiprocessors"));
    add_device("logits", rows * config_.vocab * kF32, concat(rows, " rows x vocab x f32"));
    add_device("logit_rows", rows * hidden * kBf16, concat(rows, " rows x hidden x bf16"));
    add("decode_activations", decode_activations(config_, options_.chunk).total(),
        concat("of up to ", kDecodeChunk, " tokens that take the path of decoding"));
    add_device("tokens", 2 * round_up(t * 4, kDeviceAlignment) + kDeviceAlignment + options_.context,
               "ids and positions of a chunk, the state of decoding, a mask of the context for runs without kv_len");
    if (options_.max_draft > 0) {
      add_device("draft", kDraftStateBytes + options_.context * 4,
                 "the state of a step that drafts, and the text that it looks through");
    }
    add("linear_tickets", kDeviceAlignment, "by which rows of products are dealt in decoding");
    add("sampler_workspace", kMiB, "candidates of the sampler");
    add("gemm_workspace", 32 * kMiB, "of the GEMM library");
    add("rotation", rotation_bytes_, "dense, and its transpose, f32");
    add("cuda_context", 536 * kMiB, "driver, modules and graphs; measured on an H200");
  }

  [[nodiscard]] std::int64_t logit_rows() const { return std::max(options_.n_logit_row, options_.max_draft + 1); }

  [[nodiscard]] std::int64_t largest_matrix() const {
    std::int64_t largest = 0;
    for (const ModelTensor& tensor : tensors_) {
      if (!is_token_matrix(tensor.name)) largest = std::max(largest, tensor.size());
    }
    return largest;
  }

  /// Activations of the reference are float32 and live until the step that made them runs again; a step builds its
  /// result before the old one goes, hence the factors of two.
  void add_reference() {
    constexpr std::int64_t kF32 = 4;
    constexpr std::int64_t kTileRows = 128, kBlock = 256;  // of a weight tile, and of an attention tile
    const std::int64_t t = options_.chunk;
    const std::int64_t n_thread =
        options_.n_thread > 0 ? options_.n_thread : std::max<std::int64_t>(1, std::thread::hardware_concurrency());
    add("weights", total_bytes(tensors_), "the file as mapped; read in place, reclaimable");
    std::visit([&](const auto& format) { add_caches(format, options_.context); }, options_.cache);
    add("ring_checkpoints", ring_checkpoint_bytes(config_, options_.cache, options_.context, options_.checkpoints),
        ring_checkpoint_formula(config_, options_.cache, options_.context, options_.checkpoints));
    add("residual", 3 * t * config_.hidden * kF32, "3 (stream, normalised, pending) x chunk x hidden x f32");
    add("qkv", 2 * t * (q_dim_ + 2 * kv_dim_) * kF32, "2 (old, new) x chunk x (q + k + v) x f32");
    add("attended", 4 * t * q_dim_ * kF32, "4 (rotated q, result, old, new) x chunk x q x f32");
    add("mlp", 2 * t * config_.ffn_hidden * kF32, "2 (old, new) x chunk x ffn_hidden x f32");
    add("logits", 2 * logit_rows() * config_.vocab * kF32,
        concat("2 (raw, capped) x ", logit_rows(), " rows x vocab x f32"));
    std::int64_t widest = 0;
    for (const ModelTensor& tensor : tensors_) widest = std::max(widest, tensor.row_len());
    add("weight_tiles", n_thread * 2 * kTileRows * (widest + t) * kF32,
        concat(n_thread, " threads x 2 x ", kTileRows, " dequantised rows and their products x f32"));
    const std::int64_t head_dim = std::max(config_.sliding.head_dim, config_.full.head_dim);
    add("attention_tiles", n_thread * (5 * kBlock * head_dim + kBlock * kBlock) * kF32,
        concat(n_thread, " threads x (K, V, q, sums, result) of ", kBlock, " rows and their scores x f32"));
  }

  const ModelConfig& config_;
  const std::vector<ModelTensor>& tensors_;
  MemoryPlanOptions options_;
  std::int64_t n_sliding_ = 0, q_dim_ = 0, kv_dim_ = 0, qkv_dim_ = 0, rotation_bytes_ = 0;
  std::int64_t fresh_k_dim_ = 0;  ///< of a full layer, beside k as projected, where the prologue does not store it
  MemoryPlan plan_;
};

}  // namespace detail

/// The plan of a run of a model with these tensors: model_tensors(file), or model_tensors(config) for a model that is
/// not at hand. A sliding ring holds ring_slots(window) slots: a chunk attends before it is committed, so that what is
/// more than the window serves to go back.
/// @throws std::invalid_argument for a context or chunk below 1, a cache format that the layers cannot have, or naming
/// a matrix whose type no backend can run
[[nodiscard]] inline MemoryPlan plan_memory(const ModelConfig& config, const std::vector<ModelTensor>& tensors,
                                            const MemoryPlanOptions& options) {
  return detail::MemoryPlanner(config, tensors, options).plan();
}

namespace detail {

/// The largest value of `field` from 1 to `upper` whose plan fits; nothing when not even 1 does. Plans grow with it.
[[nodiscard]] inline std::optional<std::int64_t> largest_that_fits(const ModelConfig& config,
                                                                   const std::vector<ModelTensor>& tensors,
                                                                   MemoryPlanOptions options, std::int64_t limit_bytes,
                                                                   std::int64_t MemoryPlanOptions::*field,
                                                                   std::int64_t upper) {
  std::int64_t fitting = 0, failing = upper + 1;
  while (failing - fitting > 1) {
    options.*field = fitting + (failing - fitting) / 2;
    (plan_memory(config, tensors, options).fits(limit_bytes) ? fitting : failing) = options.*field;
  }
  return fitting > 0 ? std::optional(fitting) : std::nullopt;
}

}  // namespace detail

/// The longest context, up to the model's, that fits with the other options as they are.
[[nodiscard]] inline std::optional<std::int64_t> largest_context(const ModelConfig& config,
                                                                 const std::vector<ModelTensor>& tensors,
                                                                 const MemoryPlanOptions& options,
                                                                 std::int64_t limit_bytes) {
  return detail::largest_that_fits(config, tensors, options, limit_bytes, &MemoryPlanOptions::context, config.context);
}

/// The longest chunk, up to the one asked for, that fits with the other options as they are.
[[nodiscard]] inline std::optional<std::int64_t> largest_chunk(const ModelConfig& config,
                                                               const std::vector<ModelTensor>& tensors,
                                                               const MemoryPlanOptions& options,
                                                               std::int64_t limit_bytes) {
  return detail::largest_that_fits(config, tensors, options, limit_bytes, &MemoryPlanOptions::chunk, options.chunk);
}

/// A table for the eye: name, bytes, GiB, formula, and the sum.
inline void print_memory_plan(std::ostream& stream, const MemoryPlan& plan) {
  const auto line = [&](const std::string& name, std::int64_t bytes, const std::string& formula) {
    char text[96];
    std::snprintf(text, sizeof(text), "%-20s %14lld B %8.3f GiB", name.c_str(), static_cast<long long>(bytes),
                  static_cast<double>(bytes) / static_cast<double>(std::int64_t{1} << 30));
    stream << text << (formula.empty() ? "" : "  ") << formula << '\n';
  };
  for (const PlannedBuffer& buffer : plan.buffers) line(buffer.name, buffer.bytes, buffer.formula);
  line("total", plan.total_bytes(), "");
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/device/device_arena.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/model_weights.cuh"
#include "gemma4/cache_formats.hpp"
#include "gemma4/config.hpp"
#include "gemma4/draft/drafter.hpp"
#include "gemma4/error.hpp"
#include "gemma4/gguf/config_from_gguf.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/plan/execution.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "gemma4/ring_format.hpp"

/// What a run asks of a device, and whether it fits.
namespace gemma4::cuda {

struct BackendOptions {
  CacheSpec cache = Tq4Format{};
  std::int64_t context = 131072;  ///< positions that the caches hold
  std::int64_t max_chunk = 2048;
  std::int64_t n_logit_row = 1;  ///< rows whose logits one forward pass may keep
  std::int64_t max_draft = 0;    ///< tokens that a step may draft; 0: none, and nothing is kept for it
  ExecutionPolicy policy = {};
  /// The whole plan must stay within it: weights, context and all. 0: what the device has free.
  std::int64_t memory_limit_bytes = 0;
  RingSpec ring = {};  ///< of the sliding layers
  /// The rows of a step that drafts go through a sliding layer in launches of up to four, where they fit. The bits are
  /// the same.
  bool sliding_rows = true;
  /// Proposes what a step drafts, in place of lookup; made for the model's shape, and outlives the backend. Null: none.
  const PackedAssistant* assistant = nullptr;
};

/// @param sm_count multiprocessors of the device
[[nodiscard]] inline MemoryPlanOptions memory_plan_options(const BackendOptions& options, std::int64_t sm_count) {
  return {.target = PlanTarget::kCuda,
          .context = options.context,
          .chunk = options.max_chunk,
          .cache = options.cache,
          .n_logit_row = options.n_logit_row,
          .max_draft = options.max_draft,
          .sm_count = sm_count,
          .drafter = options.assistant != nullptr ? options.assistant->buffers() : std::vector<PlannedBuffer>{}};
}

/// Refuses a run that does not fit into `limit_bytes`, before anything is loaded.
/// @throws std::invalid_argument that says which context or chunk would fit
inline void require_fits(const ModelConfig& config, const std::vector<ModelTensor>& tensors,
                         const BackendOptions& options, std::int64_t sm_count, std::int64_t limit_bytes) {
  const MemoryPlanOptions wanted = memory_plan_options(options, sm_count);
  const MemoryPlan plan = plan_memory(config, tensors, wanted);
  if (plan.fits(limit_bytes)) return;
  const std::optional<std::int64_t> context = largest_context(config, tensors, wanted, limit_bytes);
  const std::optional<std::int64_t> chunk = largest_chunk(config, tensors, wanted, limit_bytes);
  std::string remedy;
  if (context) remedy += concat("; a context of ", *context, " would fit");
  if (chunk) remedy += concat(context ? ", or" : ";", " a chunk of ", *chunk);
  if (!context && !chunk) remedy = "; no context and no chunk would fit: a smaller model or cache format is needed";
  require(false, "backend: a context of ", options.context, " in chunks of ", options.max_chunk, " needs ",
          plan.total_bytes(), " B of device memory, there are ", limit_bytes, " B", remedy);
}

/// Buffers of a plan that are a backend's own: neither the model's, the drafter's nor the driver's.
[[nodiscard]] inline bool is_run_buffer(const std::string& name) {
  return !PackedModel::is_weight_buffer(name) && !PackedAssistant::is_weight_buffer(name) && name != "cuda_context" &&
         name != "rotation";
}

/// The plan of a backend over a model that is on the device, once all of it is known to be possible.
/// @throws std::invalid_argument naming what is not, or with what would fit
[[nodiscard]] inline MemoryPlan checked_plan(const PackedModel& model, const BackendOptions& options,
                                             const DeviceInfo& device) {
  const ModelConfig& config = model.config();
  const std::int64_t most = std::min(draft::kMaxDrafts, options.max_chunk - 1);
  require(options.context >= 1 && options.context <= config.context, "backend: context ", options.context,
          ", need 1 to the model's ", config.context);
  require(options.max_chunk >= 1 && options.max_chunk <= 65535, "backend: max_chunk ", options.max_chunk,
          ", need 1 to 65535");
  require(options.n_logit_row >= 1, "backend: n_logit_row ", options.n_logit_row, ", need at least 1");
  require(options.max_draft >= 0 && options.max_draft <= most, "backend: max_draft ", options.max_draft, ", need 0 to ",
          most);
  require(options.assistant == nullptr || options.max_draft > 0,
          "backend: an assistant, but max_draft 0: set BackendOptions::max_draft");
  require(options.assistant == nullptr || !keeps_a_tail(options.cache), "backend: the cache ", to_string(options.cache),
          " keeps its newest tokens exact, and no drafter can read it");
  const MemoryPlan plan = plan_memory(config, model.tensors(), memory_plan_options(options, device.sm_count));
  // The weights and the context are there already, and no longer count as free.
  const std::int64_t drafter = options.assistant != nullptr ? options.assistant->bytes() : 0;
  const std::int64_t limit = device_bytes_free() + model.bytes() + drafter + plan.bytes("cuda_context");
  require_fits(config, model.tensors(), options, device.sm_count,
               options.memory_limit_bytes > 0 ? std::min(options.memory_limit_bytes, limit) : limit);
  return plan;
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "experiments/support/any_backend.hpp"
#include "gemma4/cache_formats.hpp"
#include "gemma4/config.hpp"
#include "gemma4/draft/step.hpp"
#include "gemma4/plan/execution.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "gemma4/plan/step_plan.hpp"
#include "gemma4/report/progress.hpp"
#include "gemma4/report/run_info.hpp"
#include "gemma4/ring_format.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/session/checkpoint_policy.hpp"
#include "gemma4/session/session_info.hpp"
#include "gemma4/session/session_reader.hpp"

/// The CUDA model as drivers use it, without a header of CUDA: it is compiled once for all of them, and a driver is
/// built with or without nvcc. Where it was built without, whatever needs a device throws and says so.
namespace gemma4::experiment {

/// Tokens and the time that the device took for them, by events.
struct Stretch {
  std::int64_t n_token = 0;
  double us = 0;
  [[nodiscard]] double tokens_per_second() const { return 1e6 * static_cast<double>(n_token) / us; }
};

/// What one component took; a profiled run is eager, and its components do not overlap.
struct ComponentTime {
  std::string name;
  double us = 0;
  std::int64_t n_call = 0;
};

struct CudaSettings {
  CacheSpec cache = Tq4Format{};
  std::int64_t context = 131072;
  std::int64_t max_chunk = 2048;
  std::int64_t n_logit_row = 1;
  ExecutionPolicy policy = {};
  RingSpec ring = {};                 ///< of the sliding layers
  CheckpointPolicy checkpoints = {};  ///< on the host, from which a session can go back anywhere
  /// Tokens that a step of a session drafts, at most, by the model's drafter or by lookup; 0: none.
  std::int64_t max_draft = 0;
  bool auto_drafts = false;  ///< how many of them, draft::AutoDrafts decides
  std::int64_t lag = 4;      ///< steps of a session that are under way while the host looks at a token
  bool sliding_rows = true;  ///< the rows of such a step go through a sliding layer at once
};

/// A sequence on the device.
class CudaSession {
 public:
  CudaSession() = default;
  CudaSession(const CudaSession&) = delete;
  CudaSession& operator=(const CudaSession&) = delete;
  virtual ~CudaSession() = default;

  virtual Stretch prefill(std::span<const std::int32_t> tokens, std::int64_t chunk,
                          const std::function<void(std::int64_t)>& on_chunk) = 0;
  /// @param on_token may be empty; returns false to stop
  virtual Stretch decode(std::int64_t n_token, const SamplerSettings& sampler,
                         const std::function<bool(std::int32_t)>& on_token) = 0;
  /// From the next step on, max_draft at most; by lookup also where the model has a drafter.
  virtual void set_drafts(std::int64_t n_draft, bool is_auto, bool is_lookup) = 0;
  /// Of all steps so far while drafts were on.
  [[nodiscard]] virtual const draft::Counts& draft_counts() const = 0;
  [[nodiscard]] virtual std::int64_t position() const = 0;
  /// The last tokens, max_rewind() at most, never were.
  virtual void rewind(std::int64_t n_token) = 0;
  /// How many rewind() can take back, now.
  [[nodiscard]] virtual std::int64_t max_rewind() const = 0;
  virtual void reset() = 0;
  /// All of it to a file, and back: cuda::Session::save() and restore().
  virtual void save(const std::filesystem::path& path, SessionInfo info) = 0;
  virtual SessionInfo restore(const SessionFile& file, std::uint64_t model_hash) = 0;
  /// From here on; the sequence goes on. Whether gate and up are one matrix was decided when the model was loaded.
  virtual void set_policy(const ExecutionPolicy& policy) = 0;
  /// How a decode step and the longest chunk run.
  [[nodiscard]] virtual std::vector<StepPlan> step_plans() const = 0;
  /// Runs `work` with an event around every component.
  [[nodiscard]] virtual std::vector<ComponentTime> profile(const std::function<void()>& work) = 0;
  virtual void copy_logits(std::int64_t row, std::span<float> out) const = 0;
  [[nodiscard]] virtual const MemoryPlan& plan() const = 0;
};

/// A model in device memory; sessions and backends borrow it.
class CudaModel {
 public:
  CudaModel() = default;
  CudaModel(const CudaModel&) = delete;
  CudaModel& operator=(const CudaModel&) = delete;
  virtual ~CudaModel() = default;

  [[nodiscard]] virtual const ModelConfig& config() const = 0;
  [[nodiscard]] virtual double load_seconds() const = 0;
  [[nodiscard]] virtual std::int64_t load_peak_bytes() const = 0;  ///< device_bytes_in_use() at its highest
  [[nodiscard]] virtual std::unique_ptr<CudaSession> make_session(const CudaSettings& settings) const = 0;
  [[nodiscard]] virtual std::unique_ptr<AnyBackend> make_backend(const CudaSettings& settings) const = 0;
};

struct CudaLoadSettings {
  ProgressOptions progress = {};
  std::filesystem::path drafter = {};  ///< GGUF file of one that is loaded beside the model; empty: none
};

/// Loads a GGUF file. `planned` are the sequences that will live beside the weights: when they do not fit, this refuses
/// before it loads, and says what would. Its policy decides whether gate and up are one matrix.
[[nodiscard]] std::unique_ptr<CudaModel> load_cuda_model(const std::filesystem::path& path,
                                                         const CudaLoadSettings& settings, const CudaSettings& planned);

/// Why there is no device to run on; nothing when there is one.
[[nodiscard]] std::optional<std::string> missing_device();

/// Total minus free, as the driver counts: contexts and all, of every process.
[[nodiscard]] std::int64_t device_bytes_in_use();
[[nodiscard]] std::int64_t device_bytes_free();

/// GB/s of a copy on the device, bytes read plus bytes written. Takes 4 GiB of the device while it measures.
[[nodiscard]] double device_copy_gb_per_s();

/// run_info() of a run on the current GPU.
[[nodiscard]] RunInfo device_run_info(std::string experiment, int argc, const char* const* argv, std::uint64_t seed);

}  // namespace gemma4::experiment

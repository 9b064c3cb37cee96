// SPDX-License-Identifier: Apache-2.0
#include "experiments/support/cuda_model.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "cuda/device/check.cuh"
#include "cuda/session.cuh"
#include "experiments/benchmark.cuh"
#include "experiments/gpu_run_info.cuh"
#include "experiments/support/notes.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/model/weights.hpp"

namespace gemma4::experiment {
namespace {

cuda::BackendOptions backend_options(const CudaSettings& settings, const cuda::PackedAssistant* assistant) {
  return {.cache = settings.cache,
          .context = settings.context,
          .max_chunk = settings.max_chunk,
          .n_logit_row = settings.n_logit_row,
          .max_draft = settings.max_draft,
          .policy = settings.policy,
          .ring = settings.ring,
          .sliding_rows = settings.sliding_rows,
          .assistant = settings.max_draft > 0 ? assistant : nullptr};
}

struct MemoryInfo {
  std::int64_t free = 0;
  std::int64_t total = 0;
};

MemoryInfo memory_info() {
  std::size_t free = 0, total = 0;
  cuda::check(cudaMemGetInfo(&free, &total), "question for the free memory of the device");
  return {static_cast<std::int64_t>(free), static_cast<std::int64_t>(total)};
}

class Session final : public CudaSession {
 public:
  Session(const cuda::PackedModel& model, const cuda::PackedAssistant* assistant, const CudaSettings& settings)
      : backend_(model, backend_options(settings, assistant)),
        session_(backend_, {.use_graph = settings.policy.graph,
                            .lag = settings.lag,
                            .n_draft = settings.max_draft,
                            .auto_drafts = settings.auto_drafts,
                            .checkpoints = settings.checkpoints}) {}

  Stretch prefill(std::span<const std::int32_t> tokens, std::int64_t chunk,
                  const std::function<void(std::int64_t)>& on_chunk) override {
    const cuda::Timing timing = session_.prefill(tokens, chunk, [&](std::int64_t done) {
      if (on_chunk) on_chunk(done);
    });
    return {timing.n_token, timing.us};
  }

  Stretch decode(std::int64_t n_token, const SamplerSettings& sampler,
                 const std::function<bool(std::int32_t)>& on_token) override {
    const cuda::DecodeResult result =
        session_.decode(n_token, sampler, [&](std::int32_t token) { return !on_token || on_token(token); });
    counts_.add(result.drafts);
    return {result.timing.n_token, result.timing.us};
  }

  void set_drafts(std::int64_t n_draft, bool is_auto, bool is_lookup) override {
    if (backend_.options().max_draft > 0) backend_.drafting().use_lookup(is_lookup);
    session_.set_drafts(n_draft, is_auto);
  }
  [[nodiscard]] const draft::Counts& draft_counts() const override { return counts_; }
  [[nodiscard]] std::int64_t position() const override { return session_.position(); }
  void rewind(std::int64_t n_token) override { session_.rewind(n_token); }
  [[nodiscard]] std::int64_t max_rewind() const override { return session_.max_rewind(); }
  void reset() override { session_.reset(); }
  void save(const std::filesystem::path& path, SessionInfo info) override { session_.save(path, std::move(info)); }
  SessionInfo restore(const SessionFile& file, std::uint64_t model_hash) override {
    return session_.restore(file, model_hash);
  }
  void set_policy(const ExecutionPolicy& policy) override {
    session_.set_policy(policy);
    session_.set_use_graph(policy.graph);
  }
  [[nodiscard]] std::vector<StepPlan> step_plans() const override { return backend_.step_plans(); }

  [[nodiscard]] std::vector<ComponentTime> profile(const std::function<void()>& work) override {
    cuda::Profile profile;
    backend_.set_profile(&profile);
    try {
      work();
    } catch (...) {
      backend_.set_profile(nullptr);
      throw;
    }
    backend_.set_profile(nullptr);
    std::vector<ComponentTime> times;
    for (const cuda::ProfileRow& row : profile.rows()) times.push_back({std::string(row.name), row.us, row.count});
    return times;
  }

  void copy_logits(std::int64_t row, std::span<float> out) const override { backend_.copy_logits(row, out); }
  [[nodiscard]] const MemoryPlan& plan() const override { return backend_.plan(); }

 private:
  cuda::Backend backend_;
  cuda::Session session_;
  draft::Counts counts_;
};

class Model final : public CudaModel {
 public:
  Model(cuda::PackedModel model, std::optional<cuda::PackedAssistant> assistant, std::int64_t load_peak_bytes)
      : model_(std::move(model)), assistant_(std::move(assistant)), load_peak_bytes_(load_peak_bytes) {}

  [[nodiscard]] const ModelConfig& config() const override { return model_.config(); }
  [[nodiscard]] double load_seconds() const override { return model_.load_seconds(); }
  [[nodiscard]] std::int64_t load_peak_bytes() const override { return load_peak_bytes_; }
  [[nodiscard]] std::unique_ptr<CudaSession> make_session(const CudaSettings& settings) const override {
    return std::make_unique<Session>(model_, assistant_ ? &*assistant_ : nullptr, settings);
  }
  [[nodiscard]] std::unique_ptr<AnyBackend> make_backend(const CudaSettings& settings) const override {
    return std::make_unique<HeldBackend<cuda::Backend>>(model_, backend_options(settings, nullptr));
  }

 private:
  cuda::PackedModel model_;
  std::optional<cuda::PackedAssistant> assistant_;
  std::int64_t load_peak_bytes_;
};

}  // namespace

std::unique_ptr<CudaModel> load_cuda_model(const std::filesystem::path& path, const CudaLoadSettings& settings,
                                           const CudaSettings& planned) {
  if (const auto reason = missing_device()) require(false, *reason);
  const GgufFile file = GgufFile::open(path);
  const ModelWeights weights = weights_from_gguf(file);
  show_notes(model_notes(file));
  const cuda::LoadOptions load{.join_gate_up = planned.policy.gate_up_fusion};
  std::optional<cuda::PackedAssistant> assistant;
  if (!settings.drafter.empty()) {
    assistant.emplace(cuda::load_assistant(GgufFile::open(settings.drafter), weights.config, load));
  }
  // The drafter is there already, and no longer counts as free.
  cuda::require_fits(weights.config, model_tensors(file), backend_options(planned, assistant ? &*assistant : nullptr),
                     cuda::current_device().sm_count, device_bytes_free() + (assistant ? assistant->bytes() : 0));
  std::int64_t peak = 0;
  cuda::UploadOptions upload{.progress = settings.progress};
  upload.on_progress = [&](std::int64_t) { peak = std::max(peak, device_bytes_in_use()); };
  cuda::PackedModel model(weights, model_tensors(file), {.join_gate_up = load.join_gate_up, .upload = upload});
  return std::make_unique<Model>(std::move(model), std::move(assistant), peak);
}

std::optional<std::string> missing_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return std::nullopt;
  (void)cudaGetLastError();
  return concat("this needs a CUDA device, and there is none: ",
                status == cudaSuccess ? "the driver lists none" : cudaGetErrorString(status));
}

std::int64_t device_bytes_in_use() {
  const MemoryInfo info = memory_info();
  return info.total - info.free;
}

std::int64_t device_bytes_free() {
  return memory_info().free;
}

double device_copy_gb_per_s() {
  if (const auto reason = missing_device()) require(false, *reason);
  const cuda::Stream stream;
  return copy_gb_per_s(stream);
}

RunInfo device_run_info(std::string experiment, int argc, const char* const* argv, std::uint64_t seed) {
  if (const auto reason = missing_device()) require(false, *reason);
  return gpu_run_info(std::move(experiment), argc, argv, seed);
}

}  // namespace gemma4::experiment

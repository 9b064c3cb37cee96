// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "experiments/driver.hpp"
#include "experiments/support/cuda_model.hpp"
#include "experiments/support/drafting.hpp"
#include "experiments/support/notes.hpp"
#include "experiments/support/sequence.hpp"
#include "gemma4/draft/step.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/plan/execution.hpp"
#include "reference/backend.hpp"

/// One sequence that is continued in several ways, by either room: what drivers that compare them need of a model.
namespace gemma4::experiment {

/// A sequence on which one drafter after another writes.
class Writer {
 public:
  Writer() = default;
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;
  virtual ~Writer() = default;

  [[nodiscard]] virtual Sequence& sequence() = 0;
  /// From here on this drafter writes.
  virtual void use(const DraftSettings& drafting) = 0;
  /// From the next step on. A host has no switches.
  virtual void set_policy(const ExecutionPolicy& policy) = 0;
  /// Of all steps since use().
  [[nodiscard]] virtual draft::Counts counts() const = 0;
  /// That the drafter took since use(); on a device it is a part of the step.
  [[nodiscard]] virtual double propose_us() const = 0;
};

/// By steps of the host.
class HostWriter final : public Writer {
 public:
  HostWriter(const ModelWeights& weights, const reference::BackendOptions& options, std::int64_t checkpoint_interval)
      : config_(weights.config), sequence_(weights, options, {}, checkpoint_interval) {}

  [[nodiscard]] Sequence& sequence() override { return sequence_; }
  void use(const DraftSettings& drafting) override {
    auto next = std::make_unique<Drafting<reference::Backend<float>>>(drafting, config_);
    drafting_ = next.get();
    (void)sequence_.exchange(std::move(next));
  }
  void set_policy(const ExecutionPolicy& /*policy*/) override {}
  [[nodiscard]] draft::Counts counts() const override { return drafting_->counts; }
  [[nodiscard]] double propose_us() const override { return drafting_->propose_us; }

 private:
  const ModelConfig& config_;
  ReferenceSequence sequence_;
  Drafting<reference::Backend<float>>* drafting_ = nullptr;  ///< the sequence's
};

/// By recorded steps of a device.
class DeviceWriter final : public Writer {
 public:
  DeviceWriter(const CudaModel& model, const CudaSettings& settings) : sequence_(model, settings) {}

  [[nodiscard]] Sequence& sequence() override { return sequence_; }
  void use(const DraftSettings& drafting) override {
    const std::int64_t most = drafting.is_on() ? drafting.n_draft.value_or(draft::kMaxDrafts) : 0;
    sequence_.set_drafts(most, !drafting.n_draft);
    before_ = sequence_.draft_counts().value_or(draft::Counts{});
  }
  void set_policy(const ExecutionPolicy& policy) override { sequence_.set_policy(policy); }
  [[nodiscard]] draft::Counts counts() const override {
    return sequence_.draft_counts().value_or(draft::Counts{}).since(before_);
  }
  [[nodiscard]] double propose_us() const override { return 0; }

 private:
  DeviceSequence sequence_;
  draft::Counts before_;
};

/// A model that makes them, in the room that --backend names.
class WriterSource {
 public:
  /// @param first what will be asked for first: refused here, before anything is loaded, where it does not fit a device
  WriterSource(const DriverOptions& options, const CudaSettings& first) {
    if (options.backend == "cuda") {
      device_ = load_cuda_model(options.model, {.progress = progress_options(options, "B")}, first);
      return;
    }
    file_.emplace(GgufFile::open(options.model));
    weights_.emplace(weights_from_gguf(*file_));
    show_notes(model_notes(*file_));
  }

  [[nodiscard]] const ModelConfig& config() const { return device_ ? device_->config() : weights_->config; }
  [[nodiscard]] std::int64_t vocab() const { return config().vocab; }
  /// @param wish with max_draft > 0 where drafts are to be had
  [[nodiscard]] std::unique_ptr<Writer> make(const CudaSettings& wish) const {
    if (device_) return std::make_unique<DeviceWriter>(*device_, wish);
    return std::make_unique<HostWriter>(
        *weights_, reference::BackendOptions{.cache = wish.cache, .context = wish.context, .max_chunk = wish.max_chunk},
        wish.checkpoint_interval);
  }

 private:
  std::optional<GgufFile> file_;
  std::optional<ModelWeights> weights_;
  std::unique_ptr<CudaModel> device_;
};

}  // namespace gemma4::experiment

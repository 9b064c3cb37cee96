// SPDX-License-Identifier: Apache-2.0
#include "experiments/support/writer.hpp"

#include <optional>
#include <utility>

#include "experiments/support/host_sequence.hpp"
#include "experiments/support/notes.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/model/weights.hpp"
#include "reference/backend.hpp"

namespace gemma4::experiment {
namespace {

/// By steps of the host.
class HostWriter final : public Writer {
 public:
  HostWriter(const ModelWeights& weights, const reference::BackendOptions& options, const CheckpointPolicy& checkpoints)
      : config_(weights.config), sequence_(weights, options, {}, checkpoints) {}

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
    sequence_.set_drafts(most, !drafting.n_draft, !drafting.is_file());
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

/// A model on the processor.
class HostSource final : public WriterSource {
 public:
  explicit HostSource(const std::filesystem::path& model)
      : file_(GgufFile::open(model)), weights_(weights_from_gguf(file_)) {
    show_notes(model_notes(file_));
  }
  [[nodiscard]] std::int64_t vocab() const override { return weights_.config.vocab; }
  [[nodiscard]] std::unique_ptr<Writer> make(const CudaSettings& wish) const override {
    const reference::BackendOptions options{.cache = wish.cache, .context = wish.context, .max_chunk = wish.max_chunk};
    return std::make_unique<HostWriter>(weights_, options, wish.checkpoints);
  }

 private:
  GgufFile file_;
  ModelWeights weights_;
};

/// A model on a device.
class DeviceSource final : public WriterSource {
 public:
  explicit DeviceSource(std::unique_ptr<CudaModel> model) : model_(std::move(model)) {}
  [[nodiscard]] std::int64_t vocab() const override { return model_->config().vocab; }
  [[nodiscard]] std::unique_ptr<Writer> make(const CudaSettings& wish) const override {
    return std::make_unique<DeviceWriter>(*model_, wish);
  }

 private:
  std::unique_ptr<CudaModel> model_;
};

}  // namespace

std::unique_ptr<WriterSource> load_writer_source(const DriverOptions& options, const CudaSettings& first,
                                                 const std::filesystem::path& drafter) {
  if (options.backend != "cuda") return std::make_unique<HostSource>(options.model);
  return std::make_unique<DeviceSource>(
      load_cuda_model(options.model, {.progress = progress_options(options, "B"), .drafter = drafter}, first));
}

}  // namespace gemma4::experiment

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "experiments/support/cuda_model.hpp"
#include "gemma4/cache_formats.hpp"
#include "gemma4/draft/step.hpp"
#include "gemma4/error.hpp"
#include "gemma4/plan/execution.hpp"
#include "gemma4/plan/step_plan.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/session/session_reader.hpp"
#include "gemma4/text/conversation.hpp"

/// A text that is read and continued, by either room: what generate needs of a model.
namespace gemma4::experiment {

class Sequence {
 public:
  Sequence() = default;
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;
  virtual ~Sequence() = default;

  /// Appends a prompt, in chunks. Where on_chunk(n_done) throws, what was read until then is held.
  virtual Stretch prefill(std::span<const std::int32_t> tokens, std::int64_t chunk,
                          const std::function<void(std::int64_t)>& on_chunk) = 0;
  /// Appends up to n_token sampled tokens; on_token(token) ends it by returning false, and that token is held.
  virtual Stretch decode(std::int64_t n_token, const SamplerSettings& sampler,
                         const std::function<bool(std::int32_t)>& on_token) = 0;
  /// Tokens that take_back() can take, now.
  [[nodiscard]] virtual std::int64_t max_back() const = 0;
  /// The last tokens never were. A prompt must follow.
  virtual void take_back(std::int64_t n_token) = 0;
  virtual void reset() = 0;
  /// Writes all of it to a file (gemma4/session/session_info.hpp).
  /// @param info what the sequence does not know: the model's hash, the sampler, a note
  virtual void save(const std::filesystem::path& path, SessionInfo info) = 0;
  /// Becomes what was saved. @throws as SequenceStore::restore(): as it was then, or empty
  virtual SessionInfo restore(const SessionFile& file, std::uint64_t model_hash) = 0;
  /// Of all steps so far; empty where nothing is drafted.
  [[nodiscard]] virtual std::optional<draft::Counts> draft_counts() const { return std::nullopt; }
  [[nodiscard]] virtual std::int64_t context() const = 0;
  [[nodiscard]] virtual std::vector<StepPlan> step_plans() const = 0;
  /// Runs `work` with an event around every component.
  [[nodiscard]] virtual std::vector<ComponentTime> profile(const std::function<void()>& work) = 0;

  /// All tokens that were read and written.
  [[nodiscard]] std::span<const std::int32_t> held() const { return held_; }
  [[nodiscard]] std::int64_t n_free() const { return context() - static_cast<std::int64_t>(held_.size()); }

 protected:
  void hold(std::span<const std::int32_t> tokens) { held_.insert(held_.end(), tokens.begin(), tokens.end()); }
  /// Holds what restore() brought; nothing where it failed halfway.
  template <class TRestore, class TPosition>
  SessionInfo restored(TPosition&& position, TRestore&& restore) {
    try {
      SessionInfo info = restore();
      held_ = info.tokens;
      return info;
    } catch (...) {
      if (position() == 0) held_.clear();
      throw;
    }
  }
  std::vector<std::int32_t> held_;
};

/// Makes a sequence hold `wanted`, and reads what it does not hold yet: what both begin with stays, where the caches
/// can go back to where the two part. Where on_chunk(n_done) throws, what was read until then is held.
inline Stretch read_rest(Sequence& sequence, std::span<const std::int32_t> wanted, std::int64_t chunk,
                         const std::function<void(std::int64_t)>& on_chunk) {
  const CacheSteps steps = cache_steps(sequence.held(), wanted, sequence.max_back());
  if (steps.reset) {
    sequence.reset();
  } else if (steps.n_back > 0) {
    sequence.take_back(steps.n_back);
  }
  return sequence.prefill(steps.append, chunk, on_chunk);
}

/// On a device, where the chosen token stays: the host sees it some steps later.
class DeviceSequence final : public Sequence {
 public:
  /// @throws std::invalid_argument for drafts with a cache that cannot go back
  DeviceSequence(const CudaModel& model, const CudaSettings& settings)
      : session_(model.make_session(settings)), context_(settings.context), is_drafted_(settings.max_draft > 0) {
    require(!is_drafted_ || !keeps_a_tail(settings.cache), "--drafter: the cache ", to_string(settings.cache),
            " keeps its newest tokens exact and cannot go back");
  }

  Stretch prefill(std::span<const std::int32_t> tokens, std::int64_t chunk,
                  const std::function<void(std::int64_t)>& on_chunk) override {
    const std::int64_t first = session_->position();
    try {
      const Stretch took = session_->prefill(tokens, chunk, on_chunk);
      hold(tokens);
      return took;
    } catch (...) {
      hold(tokens.first(static_cast<std::size_t>(session_->position() - first)));
      throw;
    }
  }

  Stretch decode(std::int64_t n_token, const SamplerSettings& sampler,
                 const std::function<bool(std::int32_t)>& on_token) override {
    return session_->decode(n_token, sampler, [&](std::int32_t token) {
      held_.push_back(token);
      return on_token(token);
    });
  }

  [[nodiscard]] std::int64_t max_back() const override { return session_->max_rewind(); }
  void take_back(std::int64_t n_token) override {
    session_->rewind(n_token);
    held_.resize(held_.size() - static_cast<std::size_t>(n_token));
  }
  void reset() override {
    session_->reset();
    held_.clear();
  }
  void save(const std::filesystem::path& path, SessionInfo info) override { session_->save(path, std::move(info)); }
  SessionInfo restore(const SessionFile& file, std::uint64_t model_hash) override {
    return restored([&] { return session_->position(); }, [&] { return session_->restore(file, model_hash); });
  }
  void set_policy(const ExecutionPolicy& policy) { session_->set_policy(policy); }
  /// From the next step on, as many as the settings had at most; by lookup also where the model has a drafter.
  void set_drafts(std::int64_t n_draft, bool is_auto, bool is_lookup) {
    session_->set_drafts(n_draft, is_auto, is_lookup);
  }
  [[nodiscard]] std::optional<draft::Counts> draft_counts() const override {
    return is_drafted_ ? std::optional(session_->draft_counts()) : std::nullopt;
  }
  [[nodiscard]] std::int64_t context() const override { return context_; }
  [[nodiscard]] std::vector<StepPlan> step_plans() const override { return session_->step_plans(); }
  [[nodiscard]] std::vector<ComponentTime> profile(const std::function<void()>& work) override {
    return session_->profile(work);
  }

 private:
  std::unique_ptr<CudaSession> session_;
  std::int64_t context_;
  bool is_drafted_;
};

}  // namespace gemma4::experiment

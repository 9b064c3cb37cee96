// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "experiments/support/cuda_model.hpp"
#include "gemma4/config.hpp"
#include "gemma4/error.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/plan/step_plan.hpp"
#include "gemma4/sampler.hpp"
#include "reference/backend.hpp"
#include "reference/sampler.hpp"

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
  [[nodiscard]] virtual std::int64_t context() const = 0;
  [[nodiscard]] virtual std::vector<StepPlan> step_plans() const = 0;
  /// Runs `work` with an event around every component.
  [[nodiscard]] virtual std::vector<ComponentTime> profile(const std::function<void()>& work) = 0;

  /// All tokens that were read and written.
  [[nodiscard]] std::span<const std::int32_t> held() const { return held_; }
  [[nodiscard]] std::int64_t n_free() const { return context() - static_cast<std::int64_t>(held_.size()); }

 protected:
  void hold(std::span<const std::int32_t> tokens) { held_.insert(held_.end(), tokens.begin(), tokens.end()); }
  std::vector<std::int32_t> held_;
};

/// On a device, where the chosen token stays: the host sees it some steps later.
class DeviceSequence final : public Sequence {
 public:
  DeviceSequence(const CudaModel& model, const CudaSettings& settings)
      : session_(model.make_session(settings)), context_(settings.context) {}

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
  [[nodiscard]] std::int64_t context() const override { return context_; }
  [[nodiscard]] std::vector<StepPlan> step_plans() const override { return session_->step_plans(); }
  [[nodiscard]] std::vector<ComponentTime> profile(const std::function<void()>& work) override {
    return session_->profile(work);
  }

 private:
  std::unique_ptr<CudaSession> session_;
  std::int64_t context_;
};

/// On the processor. The last token that was written goes through the model when another is asked for, or with the next
/// prompt: after the last one nobody waits for logits that nobody wants.
class ReferenceSequence final : public Sequence {
 public:
  ReferenceSequence(const ModelWeights& weights, const reference::BackendOptions& options)
      : backend_(weights, options), model_(backend_), logits_(static_cast<std::size_t>(weights.config.vocab)) {}

  Stretch prefill(std::span<const std::int32_t> tokens, std::int64_t chunk,
                  const std::function<void(std::int64_t)>& on_chunk) override {
    const Clock::time_point start = Clock::now();
    const std::int64_t n_late = n_held() - model_.position();
    std::vector<std::int32_t> all(held_.end() - n_late, held_.end());
    all.insert(all.end(), tokens.begin(), tokens.end());
    const auto settle = [&] {
      held_.resize(held_.size() - static_cast<std::size_t>(n_late));
      hold(std::span(all).first(static_cast<std::size_t>(model_.position() - n_held())));
    };
    try {
      model_.prefill(all, chunk, [&](std::int64_t done) {
        if (on_chunk) on_chunk(std::max<std::int64_t>(0, done - n_late));
      });
    } catch (...) {
      settle();
      throw;
    }
    settle();
    return {static_cast<std::int64_t>(tokens.size()), us_since(start)};
  }

  Stretch decode(std::int64_t n_token, const SamplerSettings& sampler,
                 const std::function<bool(std::int32_t)>& on_token) override {
    require(n_token <= n_free(), "generate: ", n_token, " tokens after ", n_held(), ", the caches hold ", context());
    const Clock::time_point start = Clock::now();
    Stretch took;
    for (std::int64_t n = 0; n < n_token; ++n) {
      if (model_.position() < n_held()) {
        model_.decode(held_.back());
        ++took.n_token;
      }
      backend_.copy_logits(0, logits_);
      held_.push_back(reference::sample(logits_, sampler, n_held() - 1));
      if (!on_token(held_.back())) break;
    }
    took.us = us_since(start);
    return took;
  }

  /// One less than the caches can go back: the token that is then the last goes through the model once more.
  [[nodiscard]] std::int64_t max_back() const override {
    const std::int64_t n_late = n_held() - model_.position();
    return std::max(n_late, std::min(n_held(), n_late + model_.max_rewind() - 1));
  }
  void take_back(std::int64_t n_token) override {
    require(n_token >= 0 && n_token <= max_back(), "generate: take back ", n_token, " tokens, at most ", max_back());
    if (n_token == 0) return;
    held_.resize(held_.size() - static_cast<std::size_t>(n_token));
    const std::int64_t n_back = model_.position() - std::max<std::int64_t>(0, n_held() - 1);
    model_.rewind(std::clamp<std::int64_t>(n_back, 0, model_.max_rewind()));
  }
  void reset() override {
    model_.reset();
    held_.clear();
  }
  [[nodiscard]] std::int64_t context() const override { return backend_.context(); }
  [[nodiscard]] std::vector<StepPlan> step_plans() const override { return backend_.step_plans(); }
  [[nodiscard]] std::vector<ComponentTime> profile(const std::function<void()>& work) override {
    work();
    return {};
  }

 private:
  using Clock = std::chrono::steady_clock;
  [[nodiscard]] static double us_since(Clock::time_point start) {
    return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
  }
  [[nodiscard]] std::int64_t n_held() const { return static_cast<std::int64_t>(held_.size()); }

  reference::Backend<float> backend_;
  Model<reference::Backend<float>> model_;
  std::vector<float> logits_;
};

}  // namespace gemma4::experiment

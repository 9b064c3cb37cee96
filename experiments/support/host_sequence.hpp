// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "experiments/support/drafting.hpp"
#include "experiments/support/sequence.hpp"
#include "gemma4/cache_formats.hpp"
#include "gemma4/config.hpp"
#include "gemma4/draft/step.hpp"
#include "gemma4/error.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/session/checkpoint_policy.hpp"
#include "gemma4/session/sequence_store.hpp"
#include "reference/acceptance.hpp"
#include "reference/backend.hpp"
#include "reference/sampler.hpp"

/// A Sequence of the reference.
namespace gemma4::experiment {

/// Step by step by the host, which chooses the tokens. The last
/// token that was written goes through the model when another is asked for, or with the next prompt: after the last one
/// nobody waits for logits that nobody wants.
template <class TBackend>
class HostSequence : public Sequence {
 public:
  /// @param backend with logits of draft::kMaxDrafts + 1 rows, and as long a chunk, where tokens are drafted
  /// @throws std::invalid_argument for drafts with a cache that cannot go back
  /// @param checkpoints of the rings, from which it can go back anywhere
  HostSequence(std::unique_ptr<TBackend> backend, const CacheSpec& cache, const DraftSettings& drafting,
               const CheckpointPolicy& checkpoints)
      : backend_(std::move(backend)),
        model_(*backend_),
        store_(model_, checkpoints),
        logits_(static_cast<std::size_t>(backend_->config().vocab)),
        drafting_(std::make_unique<Drafting<TBackend>>(drafting, backend_->config())),
        is_drafted_(drafting.is_on()) {
    require(!drafting.is_on() || !keeps_a_tail(cache), "--drafter ", drafting.drafter, ": the cache ", to_string(cache),
            " keeps its newest tokens exact and cannot go back");
  }

  /// From the next step on by another drafter, and back again: each goes on from the sequence that it knew, which must
  /// be the beginning of the one that there is. @return the one before
  std::unique_ptr<Drafting<TBackend>> exchange(std::unique_ptr<Drafting<TBackend>> drafting) {
    return std::exchange(drafting_, std::move(drafting));
  }

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
        store_.noted();
        if (on_chunk) on_chunk(std::max<std::int64_t>(0, done - n_late));
      });
    } catch (...) {
      settle();
      throw;
    }
    settle();
    if constexpr (!requires { TBackend::kNoticesAtOnce; }) model_.require_finite(held_);
    return {static_cast<std::int64_t>(tokens.size()), us_since(start)};
  }

  Stretch decode(std::int64_t n_token, const SamplerSettings& sampler,
                 const std::function<bool(std::int32_t)>& on_token) override {
    require(n_token <= n_free(), "generate: ", n_token, " tokens after ", n_held(), ", the caches hold ", context());
    const Clock::time_point start = Clock::now();
    Stretch took;
    bool goes_on = true;
    for (std::int64_t n = 0; n < n_token && goes_on;) {
      const bool is_first = model_.position() == n_held();  // the logits at hand are those of the last token
      const std::vector<std::int32_t> tokens = is_first ? first_token(sampler) : step(sampler, n_token - n);
      n += static_cast<std::int64_t>(tokens.size());
      try {
        for (std::size_t i = 0; i < tokens.size() && goes_on; ++i) {
          held_.push_back(tokens[i]);
          hidden_row_ = static_cast<std::int64_t>(i);
          if (!is_first) ++took.n_token;
          goes_on = on_token(tokens[i]);
        }
      } catch (...) {
        forget_what_is_not_held();
        throw;
      }
      forget_what_is_not_held();
      store_.noted();
    }
    took.us = us_since(start);
    return took;
  }

  /// All, where there are checkpoints. Else one less than the caches can go back: the token that is then the last goes
  /// through the model once more.
  [[nodiscard]] std::int64_t max_back() const override {
    if (store_.policy().is_on()) return n_held();
    const std::int64_t n_late = n_held() - model_.position();
    return std::max(n_late, std::min(n_held(), n_late + model_.max_rewind() - 1));
  }
  void take_back(std::int64_t n_token) override {
    require(n_token >= 0 && n_token <= max_back(), "generate: take back ", n_token, " tokens, at most ", max_back());
    if (n_token == 0) return;
    const std::int64_t to = std::min(model_.position(), std::max<std::int64_t>(0, n_held() - n_token - 1));
    store_.rewind(held_, to);
    held_.resize(held_.size() - static_cast<std::size_t>(n_token));
    drafting_->drafter->keep(n_held());
    hidden_row_.reset();
  }
  void reset() override {
    model_.reset();
    store_.reset();
    held_.clear();
    drafting_->drafter->keep(0);
  }
  void save(const std::filesystem::path& path, SessionInfo info) override {
    info.tokens = held_;
    info.logits.clear();
    if (!held_.empty() && model_.position() == n_held()) {
      backend_->copy_logits(0, logits_);
      info.logits = logits_;
    }
    store_.save(path, std::move(info));
  }
  SessionInfo restore(const SessionFile& file, std::uint64_t model_hash) override {
    drafting_->drafter->keep(0);
    hidden_row_.reset();
    return restored([&] { return model_.position(); }, [&] { return store_.restore(file, model_hash); });
  }
  [[nodiscard]] std::optional<draft::Counts> draft_counts() const override {
    return is_drafted_ ? std::optional(drafting_->counts) : std::nullopt;
  }
  [[nodiscard]] std::int64_t context() const override { return backend_->context(); }
  [[nodiscard]] std::vector<StepPlan> step_plans() const override { return backend_->step_plans(); }
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

  [[nodiscard]] std::vector<std::int32_t> first_token(const SamplerSettings& sampler) {
    backend_->copy_logits(0, logits_);
    return {reference::sample(logits_, sampler, n_held() - 1)};
  }

  /// @param n_wanted tokens that are still asked for: a step gives no more
  [[nodiscard]] std::vector<std::int32_t> step(const SamplerSettings& sampler, std::int64_t n_wanted) {
    const std::int64_t n_draft = hidden_row_ ? std::min(drafting_->n_draft.next(), n_wanted - 1) : 0;
    TimedDrafter drafter{*drafting_};
    const auto judge = [&](const TBackend& target, const draft::Proposal& proposal, const SamplerSettings& settings,
                           std::int64_t position) {
      const auto row = [&](std::int64_t i) {
        target.copy_logits(i, logits_);
        return std::span<const float>(logits_);
      };
      return reference::judge(row, proposal, settings, position);
    };
    draft::Step step = draft::run_step(model_, drafter, held_, n_draft, sampler, hidden_row_.value_or(0), judge);
    drafting_->n_draft.saw(step);
    drafting_->counts.add(step);
    return std::move(step.tokens);
  }

  struct TimedDrafter {
    Drafting<TBackend>& drafting;
    void propose(TBackend& target, const draft::Request& request, draft::Proposal& proposal) {
      const Clock::time_point start = Clock::now();
      drafting.drafter->propose(target, request, proposal);
      drafting.propose_us += us_since(start);
    }
    void keep(std::int64_t n_token) { drafting.drafter->keep(n_token); }
  };

  /// A step that was ended by a token in its middle: what went through the model behind that token never was, and the
  /// token itself has not been through it.
  void forget_what_is_not_held() { model_.rewind(std::max<std::int64_t>(0, model_.position() - (n_held() - 1))); }

  std::unique_ptr<TBackend> backend_;
  Model<TBackend> model_;
  SequenceStore<TBackend> store_;
  std::vector<float> logits_;
  std::unique_ptr<Drafting<TBackend>> drafting_;
  bool is_drafted_;
  /// Of the last lm_head, the row that gave the last token; none where that was taken back.
  std::optional<std::int64_t> hidden_row_;
};

class ReferenceSequence final : public HostSequence<reference::Backend<float>> {
 public:
  ReferenceSequence(const ModelWeights& weights, const reference::BackendOptions& options,
                    const DraftSettings& drafting = {}, const CheckpointPolicy& checkpoints = {})
      : HostSequence(std::make_unique<reference::Backend<float>>(weights, options), options.cache, drafting,
                     checkpoints) {}
};

}  // namespace gemma4::experiment

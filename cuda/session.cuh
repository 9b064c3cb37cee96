// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <iterator>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/backend.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/session/steps_under_way.cuh"
#include "gemma4/draft/auto_drafts.hpp"
#include "gemma4/draft/drafter.hpp"
#include "gemma4/draft/step.hpp"
#include "gemma4/error.hpp"
#include "gemma4/model/finite.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/session/sequence_store.hpp"

/// A sequence that is read and continued on the device: prefill in chunks, decoding as replays of captured steps, of
/// one token or of what is accepted of some drafts.
namespace gemma4::cuda {

struct SessionOptions {
  bool use_graph = true;  ///< false: every step launches its kernels anew; the same kernels, the same bits
  /// Steps that are under way while the host looks at a token. A stop is seen so late, and taken back.
  std::int64_t lag = 4;
  /// Drafts of a step, at most BackendOptions::max_draft; 0: none. Text and logits are the same with any number.
  std::int64_t n_draft = 0;
  /// n_draft is the most; how many of them, draft::AutoDrafts decides, by what was accepted and by what steps took.
  bool auto_drafts = false;
  CheckpointPolicy checkpoints = {};  ///< of the rings on the host, from which rewind() can go back anywhere
};

/// What a stretch of work took on the device, by events.
struct Timing {
  std::int64_t n_token = 0;
  double us = 0;
  [[nodiscard]] double tokens_per_second() const { return us > 0 ? 1e6 * static_cast<double>(n_token) / us : 0; }
};

struct DecodeResult {
  std::vector<std::int32_t> tokens;  ///< also the one that ended it
  bool stopped = false;              ///< by on_token, not by the count
  Timing timing;                     ///< of all steps, those taken back included
  draft::Counts drafts;              ///< of all steps, where drafts are on
};

/// Tokens may be appended by prefill() and decode() in any order; one after another they give what one call would.
/// A decode step is: the next token from the logits at hand, and that token through the model. So between calls the
/// caches hold every token of the sequence and the logits are those of the next one.
class Session {
 public:
  /// @param backend outlives the session; one session at a time
  explicit Session(Backend& backend, const SessionOptions& options = {})
      : model_(backend),
        store_(model_, options.checkpoints),
        options_(options),
        done_(static_cast<std::size_t>(options.lag + 2)) {
    require(options.lag >= 1 && options.lag < kMaxRewind, "session: lag ", options.lag, ", need 1 to ", kMaxRewind - 1);
    set_drafts(options.n_draft, options.auto_drafts);
    reset();
  }

  [[nodiscard]] std::int64_t position() const { return model_.position(); }
  [[nodiscard]] Backend& backend() const { return model_.backend(); }
  /// What it goes back with.
  [[nodiscard]] const SequenceStore<Backend>& store() const { return store_; }
  /// Kernels and copies of the captured step; 0 before the first.
  [[nodiscard]] std::size_t n_graph_node(std::int64_t n_draft = 0) const {
    const std::optional<Step>& step = steps_[step_index(n_draft)];
    return step ? step->graph.n_node() : 0;
  }

  /// From the next step on. The captured step is kept, and good for later.
  void set_use_graph(bool use_graph) { options_.use_graph = use_graph; }

  /// From the next step on.
  /// @throws std::invalid_argument for more than the backend has room for, or so many that the steps under way could
  /// not all be taken back
  /// @param is_auto the number is decided from step to step, by what was accepted before: the rule begins anew, what
  ///                steps cost stays known
  void set_drafts(std::int64_t n_draft, bool is_auto = false) {
    const std::int64_t most = backend().options().max_draft;
    require(n_draft >= 0 && n_draft <= most, "session: ", n_draft, " drafts a step, need 0 to max_draft ", most);
    require(n_draft == 0 || (options_.lag + 1) * (n_draft + 1) + n_draft < kMaxRewind, "session: ", options_.lag + 1,
            " steps under way of ", n_draft + 1, " tokens, and ", n_draft, " rejected ones, need fewer than ",
            kMaxRewind);
    options_.n_draft = n_draft;
    options_.auto_drafts = is_auto;
    rule_.reset();
    if (is_auto && n_draft > 0) rule_.emplace(clock().costs(), n_draft);
  }

  /// What steps have cost so far with the drafter at hand, whatever decided how many they draft.
  [[nodiscard]] draft::StepCosts step_costs() const { return clock().costs(); }

  /// Other ways to the same tokens, from here on: the sequence and its caches stay, the step is captured anew.
  void set_policy(const ExecutionPolicy& policy) {
    stream().synchronize();
    for (std::optional<Step>& step : steps_) step.reset();
    clocks_ = {};
    backend().set_policy(policy);
  }

  void reset() {
    model_.reset();
    store_.reset();
    tokens_.clear();
    has_logits_ = false;
  }

  /// Appends a prompt in chunks of at most `chunk` tokens. `on_chunk(n_done)` is called when a chunk is enqueued.
  /// @throws std::invalid_argument before any work when the prompt does not fit
  /// @throws NotFiniteError when the numbers at one of its positions are not finite, with the layer; reset() then
  template <class TOnChunk>
  Timing prefill(std::span<const std::int32_t> tokens, std::int64_t chunk, TOnChunk&& on_chunk) {
    const std::int64_t first = position();
    begin_.record(stream());
    try {
      model_.prefill(tokens, chunk, [&](std::int64_t done) {
        store_.noted();
        on_chunk(done);
      });
    } catch (...) {  // the chunks before are part of the sequence
      append(tokens.first(static_cast<std::size_t>(position() - first)));
      has_logits_ = has_logits_ && position() == first;
      throw;
    }
    end_.record(stream());
    append(tokens);
    has_logits_ = true;
    end_.synchronize();
    try {
      model_.require_finite(tokens_);
    } catch (...) {
      has_logits_ = false;
      throw;
    }
    return {static_cast<std::int64_t>(tokens.size()), end_.us_since(begin_)};
  }
  Timing prefill(std::span<const std::int32_t> tokens, std::int64_t chunk) {
    return prefill(tokens, chunk, [](std::int64_t) {});
  }

  /// Appends up to `n_token` sampled tokens. `on_token(token)` sees each of them in order, some steps after the device
  /// has gone on, and ends the decoding by returning false: that token is the last of the sequence, and what the device
  /// did beyond it is taken back, exactly. Where a checkpoint is due the steps under way are waited for, and the timing
  /// holds the copy.
  /// @throws std::invalid_argument before any work when they do not fit, or when there are no logits to begin with
  /// @throws NotFiniteError when the logits of a step hold no token: a NaN, an infinity, or nothing finite; with the
  /// layer
  template <class TOnToken>
  DecodeResult decode(std::int64_t n_token, const SamplerSettings& settings, TOnToken&& on_token) {
    validate(settings);
    require(n_token >= 1, "session: ", n_token, " tokens to decode, need at least 1");
    require(has_logits_, "session: nothing to continue; prefill() first");
    model_.require_room(n_token);
    DecodeResult result;
    begin_.record(stream());
    while (std::ssize(result.tokens) < n_token && !result.stopped) {
      const std::int64_t n_left = n_token - std::ssize(result.tokens);
      decode_stretch(std::min(n_left, store_.policy().n_until_due(position())), settings, on_token, result);
    }
    return result;
  }
  DecodeResult decode(std::int64_t n_token, const SamplerSettings& settings) {
    return decode(n_token, settings, [](std::int32_t) { return true; });
  }

  /// Tokens that rewind() can take back, now.
  [[nodiscard]] std::int64_t max_rewind() const {
    if (store_.policy().is_on()) return std::max<std::int64_t>(0, position() - 1);
    return std::max<std::int64_t>(0, std::min(position() - 1, kMaxRewind - 1 - (model_.farthest() - position())));
  }

  /// The last `n_token` tokens never were. The token that is now the last goes through the model once more, as a decode
  /// step, for its logits. Beyond what the rings remember, kMaxRewind tokens more than the window, counted from the
  /// farthest that the sequence ever was, tokens since the nearest checkpoint do so too.
  /// @throws std::invalid_argument when no token would stay, or what the rings have forgotten without checkpoints
  void rewind(std::int64_t n_token) {
    require(n_token >= 0 && n_token < position(), "session: rewind by ", n_token, " tokens of ", position(),
            ", one must stay");
    const std::int64_t farthest = model_.farthest();
    const bool remembers = farthest - (position() - n_token) < kMaxRewind;
    require(remembers || store_.policy().is_on(), "session: rewind by ", n_token, " tokens to position ",
            position() - n_token, ", the sequence has been at ", farthest, " and can go back ", kMaxRewind - 1);
    if (n_token == 0) return;
    if (remembers) {
      model_.rewind(n_token);
    } else {
      has_logits_ = false;
      store_.rewind(tokens_, position() - n_token - 1);
      model_.decode(tokens_[static_cast<std::size_t>(position())]);
    }
    tokens_.resize(static_cast<std::size_t>(position()));
    if (remembers) refresh_logits();
    has_logits_ = true;
  }

  /// Writes the sequence to a file (gemma4/session/session_info.hpp), in blocks: an old file stays where this fails.
  /// @param info the model's hash, the sampler and a note
  void save(const std::filesystem::path& path, SessionInfo info) {
    stream().synchronize();
    info.tokens = tokens_;
    info.logits.clear();
    if (has_logits_) {
      info.logits.resize(static_cast<std::size_t>(backend().config().vocab));
      backend().copy_logits(0, info.logits);
    }
    store_.save(path, std::move(info));
  }

  /// Makes the sequence what was saved; a token that had not been through the model goes through it now.
  /// @throws as SequenceStore::restore(); where a block was damaged the sequence is empty
  SessionInfo restore(const SessionFile& file, std::uint64_t model_hash) {
    stream().synchronize();
    SessionInfo info;
    try {
      info = store_.restore(file, model_hash);
    } catch (...) {
      if (position() == 0) reset();
      throw;
    }
    tokens_ = info.tokens;
    if (backend().options().max_draft > 0) backend().drafting().set_text(tokens_, 0, stream());
    // What a file does not hold: the state that an assistant begins with.
    has_logits_ = !info.logits.empty() && !by_assistant();
    if (!has_logits_ && position() > 0 && position() == static_cast<std::int64_t>(tokens_.size())) refresh_logits();
    while (position() < static_cast<std::int64_t>(tokens_.size())) {
      model_.decode(tokens_[static_cast<std::size_t>(position())]);
      has_logits_ = true;
    }
    return info;
  }

  /// The whole sequence.
  [[nodiscard]] std::span<const std::int32_t> tokens() const { return tokens_; }

 private:
  /// A captured step, and the settings that are part of it.
  struct Step {
    SamplerSettings settings;
    Graph graph;
  };

  [[nodiscard]] const Stream& stream() const { return backend().stream(); }
  [[nodiscard]] bool by_assistant() const {
    return backend().options().max_draft > 0 && backend().drafting().by_assistant();
  }
  [[nodiscard]] draft::StepClock& clock() const {
    return clocks_.of(by_assistant(), backend().options().max_draft > 0 ? backend().drafting().cost() : 0);
  }
  [[nodiscard]] std::size_t step_index(std::int64_t n_draft) const {
    return static_cast<std::size_t>(n_draft > 0 && by_assistant() ? n_draft + draft::kMaxDrafts : n_draft);
  }
  [[nodiscard]] const Event& done(std::int64_t step) const {
    return done_[static_cast<std::size_t>(step) % done_.size()];
  }

  void append(std::span<const std::int32_t> tokens) { tokens_.insert(tokens_.end(), tokens.begin(), tokens.end()); }

  [[nodiscard]] std::int64_t n_draft_of_next(const StepsUnderWay& way) const {
    if (!rule_) return options_.n_draft;
    if (!clock().knows_plain()) return 0;
    double at_stake = 0;
    for (const std::int64_t n_draft : way.drafts) at_stake += rule_->stake(n_draft);
    return rule_->next(at_stake);
  }

  /// As many steps as may be under way. Each gives at least one token, so that none is begun in vain; one drafts no
  /// more than are wanted behind it, or than there is room for.
  void enqueue_what_may(StepsUnderWay& way, const SamplerSettings& settings) {
    while (way.n_under_way() <= options_.lag && way.n_known() + way.n_under_way() < way.n_wanted) {
      const std::int64_t n_wanted = way.n_wanted - way.n_known() - way.n_under_way();
      const std::int64_t n_room = backend().context() - way.end();
      if (n_room < 1) return;  // once the steps under way have ended, there will be
      const std::int64_t n_draft = std::min({n_draft_of_next(way), n_wanted - 1, n_room - 1});
      enqueue(settings, n_draft, way.n_step++);
      way.drafts.push_back(n_draft);
    }
  }

  /// Waits for the oldest step under way, and learns what it gave.
  void finish_oldest(StepsUnderWay& way, draft::Counts& counts) {
    const std::int64_t n_draft = way.drafts.front(), step = way.n_step - way.n_under_way();
    done(step).synchronize();
    way.farthest = std::max(way.farthest, way.known + n_draft + 1);
    std::int64_t n_accepted = 0;
    if (n_draft > 0) {
      const auto n_later = std::ranges::count_if(way.drafts, [](std::int64_t n) { return n > 0; });
      const DraftOutcome outcome = backend().drafting().outcome(backend().drafting().n_step() - n_later);
      n_accepted = outcome.n_accepted;
      counts.add(outcome.n_proposed, outcome.n_accepted);
    } else if (options_.n_draft > 0) {
      counts.add(0, 0);  // the rule, or the end of the text, wanted none
    }
    if (step > 0 && backend().options().max_draft > 0) clock().saw(n_draft, done(step).us_since(done(step - 1)));
    if (rule_) {
      rule_->set_costs(clock().costs());
      rule_->saw(n_draft, n_accepted);  // what was verified was paid for, proposed or not
    }
    way.known += n_accepted + 1;
    way.drafts.pop_front();
  }

  /// A step: replayed once it has been captured, which is after its kernels have been loaded by a run.
  void enqueue(const SamplerSettings& settings, std::int64_t n_draft, std::int64_t number) {
    std::optional<Step>& step = steps_[step_index(n_draft)];
    const auto launch = [&] {
      n_draft > 0 ? model_.enqueue_draft_step(settings, n_draft) : model_.enqueue_step(settings);
    };
    if (options_.use_graph && step && step->settings == settings) {
      step->graph.launch(stream());
      backend().note_replay();
    } else {
      launch();
      if (options_.use_graph) {
        step.reset();
        step.emplace(Step{settings, Graph::capture(stream(), launch)});
      }
    }
    if (n_draft > 0) backend().drafting().note_step();
    done(number).record(stream());
  }

  /// A part of decode(): `n_token` more of `result`.
  template <class TOnToken>
  void decode_stretch(std::int64_t n_token, const SamplerSettings& settings, TOnToken& on_token, DecodeResult& result) {
    StepsUnderWay way{.first = position(), .n_wanted = n_token, .n_before = result.tokens.size()};
    std::exception_ptr failure;
    while (way.n_known() < n_token && !result.stopped && !failure) {
      enqueue_what_may(way, settings);
      const std::int64_t from = way.known;
      finish_oldest(way, result.drafts);
      for (std::int64_t at = from; at < way.known && way.n_known(at) < n_token && !result.stopped && !failure; ++at) {
        const std::int32_t token = backend().sampled(at);
        if (token < 0) {
          settle(way, result);
          has_logits_ = false;
          throw NotFiniteError(model_.locate(tokens_, at - 1), backend().config().n_layer());
        }
        result.tokens.push_back(token);
        try {
          result.stopped = !on_token(token);
        } catch (...) {
          failure = std::current_exception();
        }
      }
    }
    const std::int64_t n_back = settle(way, result);  // behind which all steps have ended
    result.timing = {result.timing.n_token + position() - way.first + n_back, done(way.n_step - 1).us_since(begin_)};
    if (n_back > 0) refresh_logits();
    store_.noted();
    if (failure) std::rethrow_exception(failure);
  }

  /// Of all steps the tokens that they gave to `result` stay. @return how many tokens were taken back
  std::int64_t settle(StepsUnderWay& way, DecodeResult& result) {
    stream().synchronize();
    while (!way.drafts.empty()) finish_oldest(way, result.drafts);
    const std::span<const std::int32_t> given = std::span(result.tokens).subspan(way.n_before);
    const std::int64_t n_back = way.n_known() - static_cast<std::int64_t>(given.size());
    model_.advance(way.n_known(), way.farthest - way.known);
    append(given);
    model_.rewind(n_back);
    return n_back;
  }

  /// The last token through the model once more: the same bits into the caches, and the logits after it.
  void refresh_logits() {
    model_.rewind(1);
    model_.decode(tokens_.back());
    has_logits_ = true;
  }

  Model<Backend> model_;
  SequenceStore<Backend> store_;
  SessionOptions options_;
  std::array<std::optional<Step>, 2 * draft::kMaxDrafts + 1> steps_;  ///< see step_index()
  std::optional<draft::AutoDrafts> rule_;
  mutable StepClocks clocks_;
  std::vector<std::int32_t> tokens_;
  bool has_logits_ = false;
  Event begin_, end_;
  std::vector<Event> done_;  ///< of the steps under way, and the one before them
};

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/backend.cuh"
#include "cuda/device/stream.cuh"
#include "gemma4/error.hpp"
#include "gemma4/model/finite.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/session/sequence_store.hpp"

/// A sequence that is read and continued on the device: prefill in chunks, decoding as replays of one captured step.
namespace gemma4::cuda {

struct SessionOptions {
  bool use_graph = true;  ///< false: every step launches its kernels anew; the same kernels, the same bits
  /// Steps that are under way while the host looks at a token. A stop is seen so late, and taken back.
  std::int64_t lag = 4;
  /// Tokens between copies of the rings on the host, from which rewind() can go back anywhere; 0: none.
  std::int64_t checkpoint_interval = 0;
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
};

/// Tokens may be appended by prefill() and decode() in any order; one after another they give what one call would.
/// A decode step is: the next token from the logits at hand, and that token through the model. So between calls the
/// caches hold every token of the sequence and the logits are those of the next one.
class Session {
 public:
  /// @param backend outlives the session; one session at a time
  explicit Session(Backend& backend, const SessionOptions& options = {})
      : model_(backend),
        store_(model_, options.checkpoint_interval),
        options_(options),
        done_(static_cast<std::size_t>(options.lag + 1)) {
    require(options.lag >= 1 && options.lag < kMaxRewind, "session: lag ", options.lag, ", need 1 to ", kMaxRewind - 1);
    reset();
  }

  [[nodiscard]] std::int64_t position() const { return model_.position(); }
  [[nodiscard]] Backend& backend() const { return model_.backend(); }
  /// Kernels and copies of the captured step; 0 before the first.
  [[nodiscard]] std::size_t n_graph_node() const { return step_ ? step_->graph.n_node() : 0; }

  /// From the next step on. The captured step is kept, and good for later.
  void set_use_graph(bool use_graph) { options_.use_graph = use_graph; }

  /// Other ways to the same tokens, from here on: the sequence and its caches stay, the step is captured anew.
  void set_policy(const ExecutionPolicy& policy) {
    stream().synchronize();
    step_.reset();
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
  /// did beyond it is taken back, exactly.
  /// @throws std::invalid_argument before any work when they do not fit, or when there are no logits to begin with
  /// @throws NotFiniteError when the logits of a step hold no token: a NaN, an infinity, or nothing finite; with the
  /// layer
  template <class TOnToken>
  DecodeResult decode(std::int64_t n_token, const SamplerSettings& settings, TOnToken&& on_token) {
    validate(settings);
    require(n_token >= 1, "session: ", n_token, " tokens to decode, need at least 1");
    require(has_logits_, "session: nothing to continue; prefill() first");
    model_.require_room(n_token);
    const std::int64_t first = position();
    DecodeResult result;
    std::int64_t n_enqueued = 0;
    std::exception_ptr failure;
    begin_.record(stream());
    for (std::int64_t n_seen = 0; n_seen < n_token && !result.stopped; ++n_seen) {
      for (; n_enqueued < n_token && n_enqueued <= n_seen + options_.lag; ++n_enqueued) enqueue(settings, n_enqueued);
      done(n_seen).synchronize();
      const std::int32_t token = backend().sampled(first + n_seen);
      if (token < 0) {
        settle(n_enqueued, result.tokens);
        has_logits_ = false;
        throw NotFiniteError(model_.locate(tokens_, first + n_seen - 1), backend().config().n_layer());
      }
      result.tokens.push_back(token);
      try {
        result.stopped = !on_token(token);
      } catch (...) {
        failure = std::current_exception();
        break;
      }
    }
    const Event& last = done(n_enqueued - 1);
    last.synchronize();
    result.timing = {n_enqueued, last.us_since(begin_)};
    if (settle(n_enqueued, result.tokens) > 0) refresh_logits();
    store_.noted();
    if (failure) std::rethrow_exception(failure);
    return result;
  }
  DecodeResult decode(std::int64_t n_token, const SamplerSettings& settings) {
    return decode(n_token, settings, [](std::int32_t) { return true; });
  }

  /// Tokens that rewind() can take back, now.
  [[nodiscard]] std::int64_t max_rewind() const {
    if (store_.checkpoint_interval() > 0) return std::max<std::int64_t>(0, position() - 1);
    return std::max<std::int64_t>(0, std::min(position() - 1, kMaxRewind - 1 - (model_.farthest() - position())));
  }

  /// The last `n_token` tokens never were. The token that is now the last goes through the model once more, as a decode
  /// step, for its logits. Beyond what the rings remember, kMaxRewind tokens more than the window, counted from the
  /// farthest that the sequence ever was, tokens since the nearest checkpoint do so too.
  /// @throws std::invalid_argument when no token would stay, or when the rings have forgotten what is needed and there
  ///         are no checkpoints
  void rewind(std::int64_t n_token) {
    require(n_token >= 0 && n_token < position(), "session: rewind by ", n_token, " tokens of ", position(),
            ", one must stay");
    const std::int64_t farthest = model_.farthest();
    const bool remembers = farthest - (position() - n_token) < kMaxRewind;
    require(remembers || store_.checkpoint_interval() > 0, "session: rewind by ", n_token, " tokens to position ",
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
    has_logits_ = !info.logits.empty();
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
  [[nodiscard]] const Event& done(std::int64_t step) const {
    return done_[static_cast<std::size_t>(step) % done_.size()];
  }

  void append(std::span<const std::int32_t> tokens) { tokens_.insert(tokens_.end(), tokens.begin(), tokens.end()); }

  /// A step: replayed once it has been captured, which is after its kernels have been loaded by a run.
  void enqueue(const SamplerSettings& settings, std::int64_t step) {
    if (options_.use_graph && step_ && same(step_->settings, settings)) {
      step_->graph.launch(stream());
      backend().note_replay();
    } else {
      model_.enqueue_step(settings);
      if (options_.use_graph) {
        step_.reset();
        step_.emplace(Step{settings, Graph::capture(stream(), [&] { model_.enqueue_step(settings); })});
      }
    }
    done(step).record(stream());
  }

  [[nodiscard]] static bool same(const SamplerSettings& a, const SamplerSettings& b) {
    return a.temperature == b.temperature && a.top_k == b.top_k && a.top_p == b.top_p && a.seed == b.seed;
  }

  /// Of `n_enqueued` steps the tokens `kept` stay. @return how many steps were taken back
  std::int64_t settle(std::int64_t n_enqueued, std::span<const std::int32_t> kept) {
    stream().synchronize();
    const std::int64_t n_back = n_enqueued - static_cast<std::int64_t>(kept.size());
    model_.advance(n_enqueued);
    append(kept);
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
  std::optional<Step> step_;
  std::vector<std::int32_t> tokens_;
  bool has_logits_ = false;
  Event begin_, end_;
  std::vector<Event> done_;
};

}  // namespace gemma4::cuda

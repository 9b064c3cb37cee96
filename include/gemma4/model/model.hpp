// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/error.hpp"
#include "gemma4/model/finite.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/step_limits.hpp"

/// The model graph, once, for every backend.
///
///   x = embed(tokens) * sqrt(hidden)
///   per layer:  x = x + norm(W_o attention(norm(x)))
///               x = (x + norm(W_down(gelu(W_gate h) * (W_up h)))) * scale,   h = norm(x)
///   logits = softcap(W_embed norm(x))
///
/// The graph is cut where a fast backend wants to fuse: a layer is five steps, each of which begins by finishing the
/// residual that the step before left pending (post-norm, add, layer scale) and normalising. A backend may do a step
/// in one launch or in ten; it may not reorder steps.
namespace gemma4 {

/// What the graph asks of a backend. A backend owns the weights, the caches and the activations of one sequence.
template <class TBackend>
concept Backend = requires(TBackend& backend, const TBackend& constant, std::span<const std::int32_t> tokens,
                           std::span<const std::int64_t> rows, std::int64_t position, std::int64_t layer,
                           std::span<float> host) {
  { constant.config() } -> std::convertible_to<const ModelConfig&>;
  { constant.context() } -> std::convertible_to<std::int64_t>;    // positions that the caches hold
  { constant.max_chunk() } -> std::convertible_to<std::int64_t>;  // tokens that one forward pass takes
  backend.embed(tokens, position);      // the residual stream of the chunk that starts at `position`
  backend.project_qkv(layer);           // q, k, v: normalised, rotated by position
  backend.attend(layer);                // over the cache and the chunk; then the chunk is in the cache
  backend.project_output(layer);        // W_o, pending
  backend.gate_up(layer);               // gelu(W_gate h) * (W_up h)
  backend.down(layer);                  // W_down, pending
  backend.lm_head(rows);                // logits of the given rows of the chunk; none: nothing to do
  backend.copy_logits(position, host);  // logits of one of those rows, to the host
  backend.reset();                      // forget the sequence
  backend.range("prefill");             // a scope that a profiler shows; any type, named and kept by the graph
};

/// A backend that notices what is no number (gemma4/model/finite.hpp). It asks nobody to wait: a device notes, and is
/// asked when its work is waited for anyway.
template <class TBackend>
concept WatchedBackend = Backend<TBackend> &&
    requires(TBackend& backend, std::span<const std::int64_t> rows, std::span<float> host) {
  backend.watch(rows);          // behind a forward pass that gave logits of these rows
  backend.copy_residual(host);  // [n_token, hidden], between two layers
  { backend.first_not_finite() } -> std::same_as<std::optional<NotFinite>>;  // of all passes since reset(); waits
};

/// A backend that chooses the next token and feeds it to itself: the host need not know it, so that a step can be
/// recorded once and replayed. Its position is its own too: it counts the tokens that went through it.
template <class TBackend>
concept SelfFeedingBackend = Backend<TBackend> && requires(TBackend& backend, const SamplerSettings& settings) {
  backend.sample(settings);  // the token after the last one, from row 0 of the last logits
  backend.embed_sampled();   // that token, at the next position: what embed() does for a token that the host knows
};

/// One that also drafts: it proposes tokens behind the one that it chose, and says itself how many of them stay.
template <class TBackend>
concept DraftingBackend = SelfFeedingBackend<TBackend> &&
    requires(TBackend& backend, const SamplerSettings& settings, std::int64_t n_draft) {
  backend.propose(n_draft);           // behind the token that sample() chose
  backend.embed_proposed(n_draft);    // that token and the drafts, at the positions that follow
  backend.accept(settings, n_draft);  // from the logits of all rows; the position moves, the last logits are row 0's
};

template <Backend TBackend>
class Model {
 public:
  explicit Model(TBackend& backend) : backend_(backend) {}

  /// Tokens that the caches hold: the position of the next one.
  [[nodiscard]] std::int64_t position() const { return position_; }
  [[nodiscard]] TBackend& backend() const { return backend_; }

  /// Tokens that rewind() can take back, now: the caches count from the farthest that the sequence has been.
  [[nodiscard]] std::int64_t max_rewind() const {
    std::int64_t limit = kMaxRewind;
    if constexpr (requires { backend_.max_rewind(); }) limit = backend_.max_rewind();
    return std::clamp<std::int64_t>(limit - (farthest_ - position_), 0, position_);
  }

  void reset() {
    backend_.reset();
    position_ = 0;
    farthest_ = 0;
    lowest_ = 0;
    chunks_.clear();
  }

  /// One chunk through the model. Logits of rows `logit_rows` (indices into the chunk) are the backend's afterwards.
  /// `on_layer(layer)` is called after each layer.
  /// @throws std::invalid_argument before any work when the chunk is empty, too long, or does not fit the context
  /// @throws NotFiniteError by a backend that knows at once, as the reference does: reset() before going on. Of others
  ///         ask require_finite()
  template <class TOnLayer>
  void forward(std::span<const std::int32_t> tokens, std::span<const std::int64_t> logit_rows, TOnLayer&& on_layer) {
    const auto n_token = static_cast<std::int64_t>(tokens.size());
    require(n_token >= 1 && n_token <= backend_.max_chunk(), "model: a chunk of ", n_token, " tokens, need 1 to ",
            backend_.max_chunk());
    require_room(n_token);
    const ModelConfig& config = backend_.config();
    for (std::int64_t t = 0; t < n_token; ++t) {
      const std::int32_t token = tokens[static_cast<std::size_t>(t)];
      require(token >= 0 && token < config.vocab, "model: token ", token, " at position ", position_ + t,
              " is outside the vocabulary [0, ", config.vocab, ")");
    }
    for (const std::int64_t row : logit_rows) {
      require(row >= 0 && row < n_token, "model: logits of row ", row, ", the chunk has ", n_token);
    }
    run_graph([&] { backend_.embed(tokens, position_); }, logit_rows, on_layer);
    if constexpr (WatchedBackend<TBackend>) backend_.watch(logit_rows);
    if constexpr (requires { TBackend::kNoticesAtOnce; }) {
      const std::optional<NotFinite> noticed = backend_.first_not_finite();
      if (noticed) throw NotFiniteError(*noticed, config.n_layer());
    }
    position_ += n_token;
    farthest_ = std::max(farthest_, position_);
    chunks_.push_back(n_token);
  }
  void forward(std::span<const std::int32_t> tokens, std::span<const std::int64_t> logit_rows) {
    forward(tokens, logit_rows, nothing);
  }

  /// A prompt of any length in chunks of at most `chunk` tokens, the last one ragged; with logits of its last token.
  /// Continues the sequence: the prompt starts at position(). `on_chunk(n_done)` is called after each chunk.
  /// @throws std::invalid_argument before any work when the prompt does not fit
  template <class TOnChunk>
  void prefill(std::span<const std::int32_t> tokens, std::int64_t chunk, TOnChunk&& on_chunk) {
    require(!tokens.empty(), "model: the prompt is empty");
    require(chunk >= 1 && chunk <= backend_.max_chunk(), "model: chunk ", chunk, ", need 1 to ", backend_.max_chunk());
    const auto n_token = static_cast<std::int64_t>(tokens.size());
    require_room(n_token);
    [[maybe_unused]] const auto range = backend_.range("prefill");
    for (std::int64_t done = 0; done < n_token;) {
      const std::int64_t count = std::min(chunk, n_token - done);
      const std::array<std::int64_t, 1> last = {count - 1};
      const bool is_last = done + count == n_token;
      forward(tokens.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(count)),
              std::span<const std::int64_t>(last).first(is_last ? 1 : 0));
      done += count;
      on_chunk(done);
    }
  }

  /// Waits for the backend, and asks whether every pass since reset() was of numbers.
  /// @param tokens of the whole sequence: where the backend cannot say in which layer it began, they go through it
  /// again
  /// @throws NotFiniteError with the position and the layer; reset() before going on
  void require_finite(std::span<const std::int32_t> tokens) requires WatchedBackend<TBackend> {
    const std::optional<NotFinite> noticed = backend_.first_not_finite();
    if (!noticed) return;
    throw NotFiniteError(noticed->layer ? *noticed : locate(tokens, noticed->position), backend_.config().n_layer());
  }

  /// Where it began: the tokens go through the backend again, from the first, in the chunks that they came in, and
  /// behind each layer the residual streams of the chunk of `position` are looked at. The first layer behind which one
  /// of them is not finite counts, and of its positions the first: attention that multiplies a masked value by zero
  /// takes a NaN to positions in front of it, but never to a layer in front.
  [[nodiscard]] NotFinite locate(std::span<const std::int32_t> tokens,
                                 std::int64_t position) requires WatchedBackend<TBackend> {
    NotFinite where{.position = position};
    backend_.reset();
    std::int64_t first = 0;
    for (const std::int64_t count : chunks_) {
      const auto chunk = tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
      const std::array<std::int64_t, 1> row = {position - first};
      const bool is_here = row[0] < count;
      const auto look = [&](std::int64_t layer) {
        if (!is_here || where.layer) return;
        if (const auto bad = first_row_not_finite(count)) where = {.position = first + *bad, .layer = layer};
      };
      const auto embed = [&] {
        backend_.embed(chunk, first);
        look(-1);
      };
      run_graph(embed, std::span<const std::int64_t>(row).first(is_here ? 1 : 0), look);
      first += count;
      if (!is_here) continue;
      std::vector<float> logits(static_cast<std::size_t>(backend_.config().vocab));
      backend_.copy_logits(0, logits);
      if (!where.layer && !all_finite(logits)) where.layer = backend_.config().n_layer();
      break;
    }
    return where;
  }

  /// One token; its logits are the backend's afterwards.
  void decode(std::int32_t token) {
    [[maybe_unused]] const auto range = backend_.range("decode");
    forward(std::span(&token, 1), kFirstRow);
  }

  /// One step of a backend that feeds itself: the next token from the logits at hand, and that token through the same
  /// graph, so that its logits are at hand. It can be recorded and replayed, hence nothing is checked and nothing is
  /// counted here: the caller asks require_room() before and tells advance() after.
  void enqueue_step(const SamplerSettings& settings) requires SelfFeedingBackend<TBackend> {
    [[maybe_unused]] const auto range = backend_.range("decode");
    step("sample", [&] { backend_.sample(settings); });
    run_graph([&] { backend_.embed_sampled(); }, kFirstRow, nothing);
  }

  /// One step that may give several tokens: that of enqueue_step() and what is accepted of `n_draft` drafts behind it.
  /// The caller asks for room for n_draft + 1.
  void enqueue_draft_step(const SamplerSettings& settings, std::int64_t n_draft) requires DraftingBackend<TBackend> {
    [[maybe_unused]] const auto range = backend_.range("draft step");
    std::array<std::int64_t, kDecodeChunk> rows;
    std::iota(rows.begin(), rows.end(), 0);
    step("sample", [&] { backend_.sample(settings); });
    step("propose", [&] { backend_.propose(n_draft); });
    run_graph([&] { backend_.embed_proposed(n_draft); },
              std::span<const std::int64_t>(rows).first(static_cast<std::size_t>(n_draft + 1)), nothing);
    step("accept", [&] { backend_.accept(settings, n_draft); });
  }

  /// `n_token` tokens went through the backend by such steps.
  /// @param n_beyond positions behind them that rejected drafts took
  void advance(std::int64_t n_token, std::int64_t n_beyond = 0) {
    require_room(n_token);
    position_ += n_token;
    farthest_ = std::max(farthest_, position_ + n_beyond);
    chunks_.insert(chunks_.end(), static_cast<std::size_t>(n_token), 1);
  }

  /// Lengths of the passes that the sequence came in; their sum is position().
  [[nodiscard]] std::span<const std::int64_t> passes() const { return chunks_; }
  /// The position that the sequence had at most, as far as the caches still show it.
  [[nodiscard]] std::int64_t farthest() const { return farthest_; }
  /// The least position that it has been at since this was asked before.
  [[nodiscard]] std::int64_t take_lowest() { return std::exchange(lowest_, position_); }

  /// The backend's caches hold a sequence that came in these passes, put there by other means than forward().
  /// @param farthest what the caches hold of rings is as if the sequence had been there; at least its position
  void resume(std::vector<std::int64_t> passes, std::int64_t farthest) {
    std::int64_t position = 0;
    for (const std::int64_t n_token : passes) {
      require(n_token >= 1 && n_token <= backend_.context() - position, "model: resume at ", position,
              " with a pass of ", n_token, " tokens, the caches hold ", backend_.context());
      position += n_token;
    }
    require(farthest >= position, "model: resume at ", position, ", the farthest position is ", farthest);
    position_ = position;
    farthest_ = farthest;
    lowest_ = position;
    chunks_ = std::move(passes);
  }

  /// The last `n_token` tokens never were. The caller knows that the backend's caches can go back so far: max_rewind().
  void rewind(std::int64_t n_token) {
    require(n_token >= 0 && n_token <= position_, "model: rewind by ", n_token, " tokens, there are ", position_);
    position_ -= n_token;
    lowest_ = std::min(lowest_, position_);
    while (n_token > 0) {
      const std::int64_t some = std::min(n_token, chunks_.back());
      n_token -= some;
      if ((chunks_.back() -= some) == 0) chunks_.pop_back();
    }
  }

  /// @throws std::invalid_argument unless n_token more tokens fit the caches
  void require_room(std::int64_t n_token) const {
    require(n_token <= backend_.context() - position_, "model: the context is full: position ", position_, " + ",
            n_token, " tokens, the caches hold ", backend_.context());
  }

 private:
  static constexpr std::array<std::int64_t, 1> kFirstRow = {0};
  static void nothing(std::int64_t /*layer*/) {}

  /// Of the `n_row` rows of the residual stream.
  [[nodiscard]] std::optional<std::int64_t> first_row_not_finite(std::int64_t n_row) const {
    const auto hidden = static_cast<std::size_t>(backend_.config().hidden);
    std::vector<float> values(static_cast<std::size_t>(n_row) * hidden);
    backend_.copy_residual(values);
    for (std::int64_t row = 0; row < n_row; ++row) {
      if (!all_finite(std::span(values).subspan(static_cast<std::size_t>(row) * hidden, hidden))) return row;
    }
    return std::nullopt;
  }

  /// The steps of a forward pass, whoever knows its tokens.
  template <class TEmbed, class TOnLayer>
  void run_graph(TEmbed&& embed, std::span<const std::int64_t> logit_rows, TOnLayer&& on_layer) {
    step("embed", embed);
    for (std::int64_t layer = 0; layer < backend_.config().n_layer(); ++layer) {
      run_layer(layer);
      on_layer(layer);
    }
    if (!logit_rows.empty()) step("lm_head", [&] { backend_.lm_head(logit_rows); });
  }

  void run_layer(std::int64_t layer) {
    [[maybe_unused]] const auto range = backend_.range("layer");
    step("project_qkv", [&] { backend_.project_qkv(layer); });
    step("attend", [&] { backend_.attend(layer); });
    step("project_output", [&] { backend_.project_output(layer); });
    step("gate_up", [&] { backend_.gate_up(layer); });
    step("down", [&] { backend_.down(layer); });
  }

  template <class TStep>
  void step(const char* name, TStep&& body) {
    [[maybe_unused]] const auto range = backend_.range(name);
    body();
  }

  TBackend& backend_;
  std::int64_t position_ = 0;
  std::int64_t farthest_ = 0;         ///< position that the sequence had at most
  std::int64_t lowest_ = 0;           ///< and at least, since take_lowest()
  std::vector<std::int64_t> chunks_;  ///< lengths of the passes that the sequence came in
};

}  // namespace gemma4

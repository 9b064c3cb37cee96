// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/session/checkpoint_policy.hpp"
#include "gemma4/session/ring_checkpoints.hpp"
#include "gemma4/session/session_info.hpp"
#include "gemma4/session/session_reader.hpp"
#include "gemma4/session/session_writer.hpp"
#include "gemma4/session/stored_part.hpp"

namespace gemma4 {

/// The memory of one sequence beside its model: takes it back to any position, gives it to another, writes it to a
/// file and reads it back. All of it is exact: what is computed afterwards has the bits that it would have had.
///
/// Full layers keep every token, so that going back is forgetting. A ring forgets: within its spare slots it can go
/// back too; farther it takes the nearest checkpoint before the position, and the tokens from there on go through the
/// model again, in the passes that they came in, the last one cut (and those that are longer than this run's chunk).
/// That is as many as the checkpoints are apart there, at most, and the chunk in which one fell due: CheckpointPolicy
/// says how many are kept where. So the sequence is then what a fresh one would be that took those passes.
///
/// The owner of the model tells noted() after passes and reset() after a reset; it keeps the tokens.
template <StoringBackend TBackend>
class SequenceStore {
 public:
  /// @param model outlives this; nothing is in it
  /// @throws std::invalid_argument for a policy that contradicts itself
  SequenceStore(Model<TBackend>& model, const CheckpointPolicy& policy) : model_(model), policy_(policy) {
    validate(policy);
  }

  [[nodiscard]] const std::vector<RingCheckpoint>& checkpoints() const { return checkpoints_; }
  [[nodiscard]] const CheckpointPolicy& policy() const { return policy_; }

  void reset() { checkpoints_.clear(); }

  /// After passes. Keeps the rings where a checkpoint is due, and lets those go first that have grown too old for their
  /// number: never are there more than n_checkpoint(). Where the model itself went back since, what was kept beyond is
  /// forgotten.
  void noted() {
    forget_after(model_.take_lowest());
    const std::int64_t position = model_.position();
    if (!policy_.is_due(checkpoints_.empty() ? 0 : checkpoints_.back().position, position)) return;
    const std::vector<StoredLayer> layers = backend().stored_layers();
    if (checkpoint_bytes(layers, window(), position) == 0) return;  // nothing is ever forgotten
    std::vector<std::int64_t> at = checkpoint_positions();
    at.push_back(position);
    at = staying_checkpoints(policy_, at, position);
    std::erase_if(checkpoints_,
                  [&](const RingCheckpoint& kept) { return !std::ranges::binary_search(at, kept.position); });
    checkpoints_.push_back(take_checkpoint(backend(), layers, window(), position));
  }

  /// Tokens that would go through the model again to be at `to`.
  [[nodiscard]] std::int64_t n_replay(std::int64_t to) const {
    return is_direct(to, backend().stored_layers()) ? 0 : to - start_of(to);
  }

  /// The tokens from `to` on never were.
  /// @param tokens of the sequence, at least those before `to`
  /// @param on_pass called with the position after each pass that is replayed; where it throws, the sequence is there
  /// @throws std::invalid_argument when `to` is not between 0 and the model's position
  template <class TOnPass>
  void rewind(std::span<const std::int32_t> tokens, std::int64_t to, TOnPass&& on_pass) {
    require_position(tokens, to);
    forget_after(model_.take_lowest());
    const std::vector<StoredLayer> layers = backend().stored_layers();
    if (is_direct(to, layers)) return settle(to);
    const std::vector<std::int64_t> passes = passes_until(to);
    go_back_to_checkpoint(checkpoints_, start_of(to), layers);
    replay(tokens, passes, on_pass);
  }
  void rewind(std::span<const std::int32_t> tokens, std::int64_t to) {
    rewind(tokens, to, [](std::int64_t) {});
  }

  /// Makes another sequence of the same model what this one was at `to`. They share nothing: what either does later
  /// the other does not see.
  /// @throws std::invalid_argument when `to` is beyond this one or the other's context, or the caches are of other
  /// kinds
  template <class TOther>
  void fork_to(SequenceStore<TOther>& other, std::span<const std::int32_t> tokens, std::int64_t to) {
    require_position(tokens, to);
    require(to <= other.backend().context(), "session: fork at ", to, ", the other context is ",
            other.backend().context());
    require(backend().cache() == other.backend().cache() && backend().ring() == other.backend().ring(),
            "session: fork of '", to_string(backend().cache()), "' with '", to_string(backend().ring()), "' into '",
            to_string(other.backend().cache()), "' with '", to_string(other.backend().ring()), "'");
    forget_after(model_.take_lowest());
    const std::vector<StoredLayer> from = backend().stored_layers();
    const std::int64_t held = ring_first(from);
    const bool direct = is_direct(to, from);
    const std::int64_t start = direct ? to : start_of(to);
    const std::vector<std::int64_t> passes = passes_until(to);
    other.begin_anew();
    const std::vector<StoredLayer> into = other.backend().stored_layers();
    for (std::size_t layer = 0; layer < from.size(); ++layer) {
      if (from[layer].is_ring && !direct) continue;
      const std::int64_t first = from[layer].is_ring ? std::min(held, to) : 0;
      for (std::size_t part = 0; part < from[layer].parts.size(); ++part) {
        carry(rows_of_tokens(from[layer].parts[part], from[layer].is_ring, first, to), other,
              rows_of_tokens(into[layer].parts[part], from[layer].is_ring, first, to));
      }
    }
    other.take_over(checkpoints_, to);
    other.resume(passes, to, std::min(held, to));
    if (direct) {
      other.forget_after(to);
    } else {
      other.go_back_to_checkpoint(checkpoints_, start, into);
      other.replay(tokens, passes, [](std::int64_t) {});
    }
  }

  /// Writes the sequence to a file: an old one stays where this fails.
  /// @param info the caller's part: the model's hash, tokens, sampler, note and logits
  void save(const std::filesystem::path& path, SessionInfo info) {
    require(static_cast<std::int64_t>(info.tokens.size()) >= model_.position(), "session: ", info.tokens.size(),
            " tokens to save, the caches hold ", model_.position());
    forget_after(model_.take_lowest());
    info.cache = to_string(CacheSpec(backend().cache())), info.cache_seed = seed_of(CacheSpec(backend().cache()));
    info.ring = to_string(RingSpec(backend().ring())), info.ring_seed = seed_of(RingSpec(backend().ring()));
    info.context = backend().context();
    info.position = model_.position();
    info.ring_first = std::min(ring_first(backend().stored_layers()), info.position);
    info.checkpoint_policy = policy_;
    info.checkpoints = checkpoint_positions();
    info.passes.assign(model_.passes().begin(), model_.passes().end());
    std::vector<SessionTensor> tensors;
    for (Saved& saved : saved_rows(info)) {
      tensors.push_back({.name = saved.name, .dims = saved.dims, .read = [this, rows = saved.rows](auto at, auto room) {
                           copy_rows(backend(), rows, at, room);
                         }});
    }
    for (const RingCheckpoint& kept : checkpoints_) {
      tensors.push_back({.name = checkpoint_name(kept.position),
                         .dims = {static_cast<std::int64_t>(kept.bytes.size())},
                         .host = kept.bytes});
    }
    write_session(path, info, std::move(tensors));
  }

  /// Makes the sequence what was saved. The context may be larger than it was. Checkpoints go on by this sequence's
  /// policy: of the file's those that would stay by it are read.
  /// @return what save() was given, and the rest of what the file says
  /// @throws std::invalid_argument naming what differs: model, formats, context; FormatError naming what is wrong in
  ///         the file. The sequence is as it was then, or, where a block of a cache was damaged, empty
  SessionInfo restore(const SessionFile& file, std::uint64_t model_hash) {
    const SessionInfo& info = file.info();
    require_session_suits(file.name(), info, model_hash, backend().cache(), backend().ring(), backend().context());
    require_tokens(file);
    const std::vector<Saved> rows = saved_rows(info);
    std::vector<const GgufTensor*> tensors;
    for (const Saved& saved : rows) {
      const bool is_there = saved.rows.bytes() > 0;
      tensors.push_back(is_there ? &file.tensor(saved.name, saved.dims) : nullptr);
    }
    const std::vector<const GgufTensor*> kept = checkpoint_tensors(file);
    const std::vector<std::int64_t> staying = staying_checkpoints(policy_, info.checkpoints, info.position);
    begin_anew();
    try {
      const std::vector<Saved> into = saved_rows(info);  // a reset may have moved them
      std::vector<SessionTarget> targets;
      for (std::size_t i = 0; i < into.size(); ++i) {
        if (tensors[i] == nullptr) continue;
        targets.push_back({.tensor = tensors[i], .visit = [this, &rows = into[i].rows](auto offset, auto bytes) {
                             set_rows(backend(), rows, offset, bytes);
                           }});
      }
      checkpoints_.reserve(staying.size());
      for (std::size_t i = 0; i < kept.size(); ++i) {
        if (!std::ranges::binary_search(staying, info.checkpoints[i])) continue;
        checkpoints_.push_back({.position = info.checkpoints[i], .bytes = HostBytes(kept[i]->data.size())});
        targets.push_back({.tensor = kept[i], .host = checkpoints_.back().bytes});
      }
      file.read(targets);
      if (!info.logits.empty()) backend().set_logits(info.logits);
      resume(info.passes, info.position, info.ring_first);
    } catch (...) {
      begin_anew();
      throw;
    }
    return info;
  }

 private:
  template <StoringBackend TOther>
  friend class SequenceStore;

  /// Rows of a cache as a file names them.
  struct Saved {
    std::string name;
    std::vector<std::int64_t> dims;
    PartRows rows;
  };

  [[nodiscard]] TBackend& backend() const { return model_.backend(); }
  [[nodiscard]] std::int64_t window() const { return backend().config().window; }

  void require_position(std::span<const std::int32_t> tokens, std::int64_t to) const {
    require(to >= 0 && to <= model_.position(), "session: back to ", to, ", the sequence is at ", model_.position());
    require(static_cast<std::int64_t>(tokens.size()) >= to, "session: back to ", to, " with ", tokens.size(),
            " of its tokens");
  }

  /// Whether the caches hold all that a token at `to` looks at, in its final form.
  [[nodiscard]] bool is_direct(std::int64_t to, std::span<const StoredLayer> layers) const {
    const std::int64_t position = model_.position();
    if (to == position) return true;
    const bool changed = std::ranges::any_of(
        layers, [&](const StoredLayer& layer) { return !layer.is_ring && layer.n_unsettled(to) > 0; });
    return !changed && ring_first(layers) <= std::max<std::int64_t>(0, to - window() + 1);
  }

  /// The nearest checkpoint at or before `to`, or the beginning.
  [[nodiscard]] std::int64_t start_of(std::int64_t to) const {
    std::int64_t start = 0;
    for (const RingCheckpoint& kept : checkpoints_) start = kept.position <= to ? kept.position : start;
    return start;
  }

  [[nodiscard]] std::vector<std::int64_t> passes_until(std::int64_t to) const {
    std::vector<std::int64_t> passes;
    for (const std::int64_t pass : model_.passes()) {
      if (to == 0) break;
      passes.push_back(std::min(pass, to));
      to -= passes.back();
    }
    return passes;
  }

  [[nodiscard]] std::vector<std::int64_t> checkpoint_positions() const {
    std::vector<std::int64_t> positions;
    for (const RingCheckpoint& kept : checkpoints_) positions.push_back(kept.position);
    return positions;
  }

  /// Of another sequence's checkpoints those up to `to` that stay here.
  void take_over(const std::vector<RingCheckpoint>& from, std::int64_t to) {
    std::vector<std::int64_t> at;
    for (const RingCheckpoint& kept : from) {
      if (kept.position <= to) at.push_back(kept.position);
    }
    at = staying_checkpoints(policy_, at, to);
    std::ranges::copy_if(from, std::back_inserter(checkpoints_),
                         [&](const RingCheckpoint& kept) { return std::ranges::binary_search(at, kept.position); });
  }

  void forget_after(std::int64_t position) {
    std::erase_if(checkpoints_, [&](const RingCheckpoint& kept) { return kept.position > position; });
  }

  void settle(std::int64_t to) {
    // Rings that still hold all tokens from the first on can go back to each of them.
    resume(passes_until(to), to, ring_first(backend().stored_layers()));
    forget_after(to);
  }

  /// Tokens that the rings can go back from the farthest position.
  [[nodiscard]] std::int64_t n_spare() const {
    if constexpr (requires { backend().max_rewind(); }) return backend().max_rewind();
    return kMaxRewind;
  }

  /// The first position that the rings hold for certain: the window of the earliest position that they can go back to.
  [[nodiscard]] std::int64_t ring_first(std::span<const StoredLayer> layers) const {
    if (std::ranges::none_of(layers, &StoredLayer::is_ring)) return 0;
    return std::max<std::int64_t>(0, model_.farthest() - n_spare() - window() + 1);
  }

  /// The caches hold `position` tokens, and the rings those from `first` on, or as many as they have slots.
  void resume(const std::vector<std::int64_t>& passes, std::int64_t position, std::int64_t first) {
    const std::int64_t farthest = first > 0 ? std::max(position, first + window() - 1 + n_spare()) : position;
    model_.resume(passes, farthest);
    backend().set_position(position, farthest);
  }

  void begin_anew() {
    model_.reset();
    reset();
  }

  void go_back_to_checkpoint(const std::vector<RingCheckpoint>& from, std::int64_t start,
                             std::span<const StoredLayer> layers) {
    for (const RingCheckpoint& kept : from) {
      if (kept.position == start) put_checkpoint(backend(), layers, window(), kept);
    }
    resume(passes_until(start), start, start - std::min(start, window()));
    forget_after(start);
  }

  /// The passes of a sequence, of which those up to the model's position are done.
  template <class TOnPass>
  void replay(std::span<const std::int32_t> tokens, std::span<const std::int64_t> passes, TOnPass&& on_pass) {
    std::int64_t end = 0;
    for (const std::int64_t pass : passes) {
      end += pass;
      while (model_.position() < end) {
        const auto at = static_cast<std::size_t>(model_.position());
        const std::int64_t n_token = std::min(end - model_.position(), backend().max_chunk());
        model_.forward(tokens.subspan(at, static_cast<std::size_t>(n_token)), {});
        noted();
        on_pass(model_.position());
      }
    }
  }

  /// Rows of this backend's memory into those of another's.
  template <class TOther>
  void carry(const PartRows& from, SequenceStore<TOther>& other, const PartRows& to) {
    require(from.part().name == to.part().name && from.bytes() == to.bytes(), "session: fork of '", from.part().name,
            "' of ", from.bytes(), " B into '", to.part().name, "' of ", to.bytes(), " B");
    std::vector<std::byte> block(std::min(kSessionBlock, from.bytes()));
    for (std::size_t offset = 0; offset < from.bytes(); offset += kSessionBlock) {
      const auto room = std::span(block).first(std::min(kSessionBlock, from.bytes() - offset));
      copy_rows(backend(), from, offset, room);
      set_rows(other.backend(), to, offset, room);
    }
  }

  /// What a file holds of the caches, in order.
  [[nodiscard]] std::vector<Saved> saved_rows(const SessionInfo& info) const {
    std::vector<Saved> saved;
    const std::vector<StoredLayer> layers = backend().stored_layers();
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      const std::int64_t first = layers[layer].is_ring ? info.ring_first : 0;
      for (const StoredPart& part : layers[layer].parts) {
        const PartRows rows = rows_of_tokens(part, layers[layer].is_ring, first, info.position);
        saved.push_back({concat("layer.", layer, '.', part.name), {part.row_bytes, rows.count(), part.n_head}, rows});
      }
    }
    return saved;
  }

  [[nodiscard]] static std::string checkpoint_name(std::int64_t position) { return concat("checkpoint.", position); }

  [[nodiscard]] std::vector<const GgufTensor*> checkpoint_tensors(const SessionFile& file) const {
    std::vector<const GgufTensor*> tensors;
    const std::vector<StoredLayer> layers = backend().stored_layers();
    for (const std::int64_t position : file.info().checkpoints) {
      const auto bytes = static_cast<std::int64_t>(checkpoint_bytes(layers, window(), position));
      tensors.push_back(&file.tensor(checkpoint_name(position), {bytes}));
    }
    return tensors;
  }

  void require_tokens(const SessionFile& file) const {
    const SessionInfo& info = file.info();
    const ModelConfig& config = backend().config();
    for (const std::int32_t token : info.tokens) {
      require_format(token >= 0 && token < config.vocab, file.name(), ": token ", token, ", the vocabulary has ",
                     config.vocab);
    }
    require_format(info.logits.empty() || static_cast<std::int64_t>(info.logits.size()) == config.vocab, file.name(),
                   ": ", info.logits.size(), " logits, the vocabulary has ", config.vocab);
    require_format(info.ring_first <= std::max<std::int64_t>(0, info.position - window() + 1), file.name(),
                   ": session.ring_first ", info.ring_first, " is too late for position ", info.position,
                   " and a window of ", window());
  }

  Model<TBackend>& model_;
  CheckpointPolicy policy_;
  std::vector<RingCheckpoint> checkpoints_;
};

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/backend/assistant.cuh"
#include "cuda/backend/path.cuh"
#include "cuda/device/check.cuh"
#include "cuda/device/device_arena.cuh"
#include "cuda/device/pinned_buffer.cuh"
#include "cuda/device/sequence_state.cuh"
#include "cuda/draft_lookup.cuh"
#include "cuda/draft_step.cuh"
#include "cuda/sampler.cuh"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/view.hpp"

/// What a backend that drafts keeps: the state of a step, the text on the device, and the outcomes for the host.
namespace gemma4::cuda {

/// @throws std::invalid_argument for a step of more drafts than a backend was made for
inline void require_drafts(std::int64_t n_draft, std::int64_t max_draft) {
  require(n_draft >= 1 && n_draft <= max_draft, "backend: ", n_draft, " drafts, need 1 to max_draft ", max_draft);
}

class Drafting {
 public:
  /// @param arena of a memory plan with max_draft > 0
  Drafting(DeviceArena& arena, std::int64_t context) : context_(context), outcomes_(kMaxDraftSteps) {
    Carver carver(arena.buffer("draft"));
    state_ = carver.take<DraftState>(1);
    lookup_ = {carver.take<std::byte>(kLookupWorkspaceBytes), static_cast<std::size_t>(kLookupWorkspaceBytes)};
    text_ = carver.take<std::int32_t>(context);
  }

  [[nodiscard]] DraftState* state() const { return state_; }
  [[nodiscard]] std::int32_t* text() const { return text_; }
  [[nodiscard]] std::int64_t n_text() const { return context_; }

  /// Tokens of the text from `position` on, those that sample() did not choose. They may go when this returns.
  void set_text(std::span<const std::int32_t> tokens, std::int64_t position, cudaStream_t stream) const {
    check(cudaMemcpyAsync(text_ + position, tokens.data(), tokens.size_bytes(), cudaMemcpyHostToDevice, stream),
          "copy of a text to the device");
  }

  /// Another drafter than lookup, for tests; see draft_from_script(). Null: lookup again. A recorded step keeps what it
  /// was recorded with.
  void set_script(const std::int32_t* script) { script_ = script; }

  /// From here on drafts are those of options.assistant. @param target and the others as Assistant has them
  /// @throws as Assistant does, and as its plan()
  void set_assistant(const BackendOptions& options, const PathContext& target, DeviceArena& arena, const Bf16* hidden) {
    assistant_.emplace(*options.assistant, target, arena, hidden);
    (void)assistant_->plan(options);
  }
  [[nodiscard]] const Assistant* assistant() const { return assistant_ ? &*assistant_ : nullptr; }
  /// Lookup beside an assistant, and back again, from the next step on. A recorded step keeps its own.
  void use_lookup(bool is_lookup) { is_lookup_ = is_lookup; }
  [[nodiscard]] bool by_assistant() const { return assistant_ && !is_lookup_; }
  /// Of a proposed token, in plain steps.
  [[nodiscard]] double cost() const { return by_assistant() ? assistant_->cost() : 0; }

  /// The chunk of a step: the sampled token and what is proposed behind it.
  void propose(const SequenceState* sequence, std::int64_t n_draft, const AssistantRun& run,
               cudaStream_t stream) const {
    draft_begin(sequence, state_, n_draft, stream);
    if (script_ != nullptr) return draft_from_script(script_, sequence, state_, n_draft, stream);
    if (by_assistant()) return assistant_->propose(sequence, state_, n_draft, run);
    draft_lookup(text_, &sequence->position, context_,
                 {.tokens = state_->tokens + 1, .n_proposed = &state_->n_proposed, .n_draft = n_draft}, lookup_,
                 stream);
  }

  /// The sampled token and the drafts behind it as one chunk, whose rows have the bits that each would have alone.
  /// @param rows plan of the caches for them
  [[nodiscard]] Pass pass(std::int64_t n_draft, const LayerCachePlan& rows, bool overlap, bool dynamic_rows) const {
    return {.chunk = {.n_token = n_draft + 1,
                      .position = DeviceCount::on_device(state_->positions),
                      .kv_len = DeviceCount::on_device(state_->kv_lens + n_draft),
                      .positions = state_->positions},
            .caches = rows,
            .row_positions = state_->positions,
            .row_kv_lens = state_->kv_lens,
            .overlap = overlap,
            .dynamic_rows = dynamic_rows};
  }

  /// What the pass left: the rows of its chunk.
  struct Verified {
    SequenceState* sequence;
    std::int32_t* history;  ///< of the host's, by position
    View<float, 2> logits;  ///< [n_draft + 1, vocab]
    View<Bf16, 2> hidden;   ///< [n_draft + 1, hidden]
  };

  /// What the target would have chosen behind each row, and how many drafts are that; the position moves by so many,
  /// and the last row that stays becomes row 0.
  void accept(const Verified& rows, const SamplerSettings& settings, std::span<std::byte> workspace,
              cudaStream_t stream, bool overlap) {
    const std::int64_t n_row = rows.logits.extent[0], vocab = rows.logits.extent[1];
    for (std::int64_t row = 0; row + 1 < n_row; ++row) {
      sample(make_view(static_cast<const float*>(rows.logits.data + row * vocab), std::int64_t{1}, vocab), settings,
             &state_->positions[row], {.token = &state_->chosen[row]}, workspace, stream, overlap);
    }
    draft_accept(rows.sequence, state_, {.text = text_, .history = rows.history, .size = context_}, outcomes_.data(),
                 rows.logits.data, vocab, rows.hidden.data, rows.hidden.extent[1], stream);
  }

  /// What came of a step, counted from the first, that has ended: the device puts it where the host reads, by turns.
  [[nodiscard]] DraftOutcome outcome(std::int64_t step) const {
    const volatile DraftOutcome& at = outcomes_.data()[step % kMaxDraftSteps];
    return {at.position, at.n_proposed, at.n_accepted};
  }
  /// Steps that were launched, one by one or by a replay. The device counts the same ones.
  [[nodiscard]] std::int64_t n_step() const { return n_step_; }
  void note_step() { ++n_step_; }

 private:
  std::int64_t context_;
  PinnedBuffer<DraftOutcome> outcomes_;
  DraftState* state_ = nullptr;
  std::span<std::byte> lookup_;
  std::int32_t* text_ = nullptr;
  const std::int32_t* script_ = nullptr;
  std::optional<Assistant> assistant_;
  bool is_lookup_ = false;
  std::int64_t n_step_ = 0;
};
static_assert(sizeof(DraftState) <= 512 && 512 + kLookupWorkspaceBytes + 512 <= kDraftStateBytes);

}  // namespace gemma4::cuda

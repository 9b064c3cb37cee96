// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/device/device_arena.cuh"
#include "cuda/device/pinned_buffer.cuh"
#include "cuda/device/sequence_state.cuh"
#include "cuda/draft_lookup.cuh"
#include "cuda/draft_step.cuh"
#include "gemma4/plan/memory_plan.hpp"

/// What a backend that drafts keeps: the state of a step, the text on the device, and the outcomes for the host.
namespace gemma4::cuda {

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

  /// Another drafter than lookup, for tests; see draft_from_script(). Null: lookup again. A recorded step keeps what it
  /// was recorded with.
  void set_script(const std::int32_t* script) { script_ = script; }

  /// The chunk of a step: the sampled token and what is proposed behind it.
  void propose(const SequenceState* sequence, std::int64_t n_draft, cudaStream_t stream) const {
    draft_begin(sequence, state_, n_draft, stream);
    if (script_ != nullptr) return draft_from_script(script_, sequence, state_, n_draft, stream);
    draft_lookup(text_, &sequence->position, context_,
                 {.tokens = state_->tokens + 1, .n_proposed = &state_->n_proposed, .n_draft = n_draft}, lookup_,
                 stream);
  }

  /// Where the device puts what came of the steps, by turns. @return of a step, counted from the first, that has ended
  [[nodiscard]] DraftOutcome* outcomes() { return outcomes_.data(); }
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
  std::int64_t n_step_ = 0;
};
static_assert(sizeof(DraftState) <= 512 && 512 + kLookupWorkspaceBytes + 512 <= kDraftStateBytes);

}  // namespace gemma4::cuda

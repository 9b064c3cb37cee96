// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/device/launch.cuh"
#include "cuda/device/sequence_state.cuh"
#include "gemma4/draft/drafter.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/step_limits.hpp"

/// The ends of a step that drafts, on the device: the chunk that is verified, and how much of it stays. The host knows
/// neither tokens nor positions, so that the step can be recorded; it reads what came of it some steps later.
///
///   begin    tokens[0] = the sampled one at P, tokens[1 ...] = drafts; the chunk stands at P, P + 1, ..., P + n_draft
///   accept   the longest beginning of the drafts that the target would have chosen itself, row by row; a of them stay:
///            the sequence ends at P + a, and the logits and the hidden state of row a become those of row 0
///
/// Drafts that were not drawn at random: where the target's own token is the drafted one, it stays, so that the text is
/// that of plain decoding with the same seed (gemma4/draft/acceptance.hpp). Mirror: reference/acceptance.hpp
namespace gemma4::cuda {

/// Steps under way at a time, at most, whose outcome the host has not read.
inline constexpr std::int64_t kMaxDraftSteps = 64;

/// What came of a step, for the host.
struct DraftOutcome {
  std::int32_t position;    ///< of the last token that stays
  std::int32_t n_proposed;  ///< of the drafts
  std::int32_t n_accepted;
};

/// Of the step that is running; device memory, zeros before the first.
struct DraftState {
  std::int32_t tokens[kDecodeChunk];     ///< the chunk
  std::int32_t positions[kDecodeChunk];  ///< of it
  std::int32_t kv_lens[kDecodeChunk];    ///< keys that each row sees
  std::int32_t chosen[kDecodeChunk];     ///< by the target behind each row
  std::int32_t n_proposed;
  std::int32_t n_accepted;
  std::uint32_t n_step;  ///< that have ended
  std::int32_t newest;   ///< position of the last token in the caches: that in front of the chunk
};

/// Where accepted tokens go beside the state; both by position. `text` is on the device, `history` where the host
/// reads.
struct DraftText {
  std::int32_t* text = nullptr;
  std::int32_t* history = nullptr;
  std::int64_t size = 0;
};

namespace detail {

static __global__ void draft_begin_kernel(const SequenceState* sequence, DraftState* draft, int n_draft) {
  const int row = static_cast<int>(threadIdx.x);
  if (row > n_draft) return;
  draft->positions[row] = sequence->position + row;
  draft->kv_lens[row] = sequence->position + row + 1;
  if (row != 0) return;
  draft->tokens[0] = sequence->token;
  draft->n_proposed = n_draft;
  draft->newest = sequence->position - 1;
}

/// One warp: a lane a draft.
static __global__ void draft_accept_kernel(SequenceState* sequence, DraftState* draft, const DraftText to,
                                           DraftOutcome* outcomes) {
  const int i = static_cast<int>(threadIdx.x);
  const std::int32_t position = sequence->position, n_proposed = draft->n_proposed;
  const bool stays = i < n_proposed && draft->chosen[i] == draft->tokens[i + 1];
  const int n_accepted = __ffs(static_cast<int>(~__ballot_sync(~0u, stays))) - 1;
  if (i < n_accepted && position + std::int64_t{1} + i < to.size) {
    to.text[position + 1 + i] = draft->tokens[i + 1];
    to.history[position + 1 + i] = draft->tokens[i + 1];
  }
  __syncwarp();
  if (i != 0) return;
  if (n_accepted > 0) sequence->token = draft->tokens[n_accepted];
  sequence->position = position + n_accepted;
  sequence->kv_len = position + n_accepted + 1;
  draft->n_accepted = n_accepted;
  outcomes[draft->n_step % kMaxDraftSteps] = {position + n_accepted, n_proposed, n_accepted};
  ++draft->n_step;
}

/// Row n_accepted of both matrices becomes row 0.
static __global__ void __launch_bounds__(256)
    draft_keep_row_kernel(const DraftState* draft, float* logits, std::int64_t vocab, Bf16* hidden_rows,
                          std::int64_t hidden) {
  const std::int64_t row = draft->n_accepted;
  if (row == 0) return;
  const std::int64_t stride = gridDim.x * std::int64_t{256};
  for (std::int64_t i = blockIdx.x * std::int64_t{256} + threadIdx.x; i < vocab + hidden; i += stride) {
    if (i < vocab) {
      logits[i] = logits[row * vocab + i];
    } else {
      hidden_rows[i - vocab] = hidden_rows[row * hidden + i - vocab];
    }
  }
}

/// drafts[i] = script[position + 1 + i]
static __global__ void draft_script_kernel(const std::int32_t* script, const SequenceState* sequence, DraftState* draft,
                                           int n_draft) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < n_draft) draft->tokens[i + 1] = script[sequence->position + 1 + i];
  if (i == 0) draft->n_proposed = n_draft;
}

inline void require_drafts(const char* who, std::int64_t n_draft) {
  require(n_draft >= 1 && n_draft <= draft::kMaxDrafts, who, ": ", n_draft, " drafts, need 1 to ", draft::kMaxDrafts);
}

}  // namespace detail

/// Behind the sampled token, which stands at sequence->position: sets the chunk's first token, where its rows stand,
/// and that all drafts are proposed, which a drafter may take back.
/// @throws std::invalid_argument for n_draft out of range
inline void draft_begin(const SequenceState* sequence, DraftState* draft, std::int64_t n_draft, cudaStream_t stream) {
  detail::require_drafts("draft_begin", n_draft);
  detail::Launch{.what = "draft_begin_kernel", .block = 32, .stream = stream}(detail::draft_begin_kernel, sequence,
                                                                              draft, static_cast<int>(n_draft));
}

/// A drafter for tests: proposes what `script` has for the positions, right or wrong.
/// @param script [context + draft::kMaxDrafts] on the device, token ids of the vocabulary
inline void draft_from_script(const std::int32_t* script, const SequenceState* sequence, DraftState* draft,
                              std::int64_t n_draft, cudaStream_t stream) {
  detail::require_drafts("draft_from_script", n_draft);
  require(script != nullptr, "draft_from_script: the script has no address");
  detail::Launch{.what = "draft_script_kernel", .block = 32, .stream = stream}(
      detail::draft_script_kernel, script, sequence, draft, static_cast<int>(n_draft));
}

/// The end of a step: draft->chosen holds the target's own token behind each row but the last.
/// @param outcomes [kMaxDraftSteps], where the host reads them
/// @param logits [n_draft + 1, vocab], `hidden_rows` [n_draft + 1, hidden]: the rows of the chunk
inline void draft_accept(SequenceState* sequence, DraftState* draft, const DraftText& to, DraftOutcome* outcomes,
                         float* logits, std::int64_t vocab, Bf16* hidden_rows, std::int64_t hidden,
                         cudaStream_t stream) {
  detail::Launch{.what = "draft_accept_kernel", .block = 32, .stream = stream}(detail::draft_accept_kernel, sequence,
                                                                               draft, to, outcomes);
  detail::Launch{.what = "draft_keep_row_kernel", .grid = 128, .block = 256, .stream = stream}(
      detail::draft_keep_row_kernel, draft, logits, vocab, hidden_rows, hidden);
}

}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include "cuda/draft_step.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

/// The ends of a drafting step against the rule, counted by hand.
namespace gemma4::cuda {
namespace {

constexpr std::int64_t kVocab = 1000, kHidden = 96;

/// A step of which everything is known.
struct Case {
  std::int32_t position = 0;
  std::vector<std::int32_t> chunk, chosen;  ///< [n_draft + 1], [n_draft]
  std::int32_t n_proposed = 0;
  std::int64_t n_text = 0;

  [[nodiscard]] std::int64_t n_draft() const { return static_cast<std::int64_t>(chosen.size()); }
  [[nodiscard]] std::int32_t n_accepted() const {
    std::int32_t count = 0;
    while (count < n_proposed && chosen[static_cast<std::size_t>(count)] == chunk[static_cast<std::size_t>(count) + 1])
      ++count;
    return count;
  }
};

Case any_case() {
  const auto n_draft = *rc::gen::inRange<std::size_t>(1, draft::kMaxDrafts + 1);
  const auto tokens = [](std::size_t count) {
    return *rc::gen::container<std::vector<std::int32_t>>(count, rc::gen::inRange<std::int32_t>(0, 9));
  };
  Case one{.position = *rc::gen::inRange<std::int32_t>(0, 50), .chunk = tokens(n_draft + 1), .chosen = tokens(n_draft)};
  const auto n_right = *rc::gen::inRange<std::size_t>(0, n_draft + 1);
  for (std::size_t i = 0; i < n_right; ++i) one.chosen[i] = one.chunk[i + 1];
  one.n_proposed = *rc::gen::weightedElement<std::int32_t>({{4, static_cast<std::int32_t>(n_draft)}, {1, 0}});
  one.n_text = one.position + 1 + *rc::gen::inRange<std::int64_t>(0, 12);
  return one;
}

struct Ended {
  SequenceState sequence;
  DraftState state;
  std::vector<std::int32_t> text, history;
  std::vector<float> logits;
  std::vector<Bf16> hidden;
  DraftOutcome outcome;
};

/// The value that tells a row of the logits from the others.
float logit(std::int64_t row, std::int64_t i) {
  return static_cast<float>(row * kVocab + i);
}

Ended accept(const Case& one, std::uint32_t n_step) {
  const Stream stream;
  SequenceState sequence{.token = one.chunk[0], .position = one.position, .kv_len = one.position + 1, .not_finite = 0};
  DraftState state{};
  std::ranges::copy(one.chunk, state.tokens);
  std::ranges::copy(one.chosen, state.chosen);
  state.n_proposed = one.n_proposed;
  state.n_step = n_step;
  std::vector<float> logits;
  std::vector<Bf16> hidden;
  for (std::int64_t row = 0; row <= one.n_draft(); ++row) {
    for (std::int64_t i = 0; i < kVocab; ++i) logits.push_back(logit(row, i));
    for (std::int64_t i = 0; i < kHidden; ++i) hidden.push_back(from_float<Bf16>(static_cast<float>(row + 1)));
  }
  DeviceBuffer<SequenceState> d_sequence(std::vector{sequence});
  DeviceBuffer<DraftState> d_state(std::vector{state});
  DeviceBuffer<std::int32_t> text(std::vector<std::int32_t>(static_cast<std::size_t>(one.n_text), -7));
  DeviceBuffer<std::int32_t> history(std::vector<std::int32_t>(static_cast<std::size_t>(one.n_text), -7));
  DeviceBuffer<DraftOutcome> outcomes(kMaxDraftSteps);
  DeviceBuffer<float> d_logits(logits);
  DeviceBuffer<Bf16> d_hidden(hidden);
  draft_accept(d_sequence.data(), d_state.data(), {text.data(), history.data(), one.n_text}, outcomes.data(),
               d_logits.data(), kVocab, d_hidden.data(), kHidden, stream);
  return {d_sequence.to_host(stream)[0],
          d_state.to_host(stream)[0],
          text.to_host(stream),
          history.to_host(stream),
          d_logits.to_host(stream),
          d_hidden.to_host(stream),
          outcomes.to_host(stream)[n_step % kMaxDraftSteps]};
}

RC_GTEST_PROP(DraftStep, AcceptsTheLongestBeginningThatTheTargetChoseItself, ()) {
  const Case one = any_case();
  const auto n_step = *rc::gen::inRange<std::uint32_t>(0, 1000);
  const Ended ended = accept(one, n_step);
  const std::int32_t count = one.n_accepted();
  RC_ASSERT(ended.state.n_accepted == count && ended.state.n_step == n_step + 1);
  RC_ASSERT(ended.sequence.position == one.position + count && ended.sequence.kv_len == one.position + count + 1);
  RC_ASSERT(ended.sequence.token == one.chunk[static_cast<std::size_t>(count)]);
  RC_ASSERT(ended.outcome.position == one.position + count && ended.outcome.n_accepted == count &&
            ended.outcome.n_proposed == one.n_proposed);
  for (std::int64_t at = 0; at < one.n_text; ++at) {
    const std::int64_t place = at - one.position;  // of the chunk; the sampled token is there already
    const std::int32_t expected = place >= 1 && place <= count ? one.chunk[static_cast<std::size_t>(place)] : -7;
    RC_ASSERT(ended.text[static_cast<std::size_t>(at)] == expected);
    RC_ASSERT(ended.history[static_cast<std::size_t>(at)] == expected);
  }
}

RC_GTEST_PROP(DraftStep, TheLastRowThatStaysBecomesTheFirst, ()) {
  const Case one = any_case();
  const Ended ended = accept(one, 0);
  const std::int64_t count = one.n_accepted();
  for (std::int64_t i = 0; i < kVocab; ++i) RC_ASSERT(ended.logits[static_cast<std::size_t>(i)] == logit(count, i));
  for (std::int64_t i = 0; i < kHidden; ++i) {
    RC_ASSERT(to_float(ended.hidden[static_cast<std::size_t>(i)]) == static_cast<float>(count + 1));
  }
  for (std::int64_t row = 1; row <= one.n_draft(); ++row) {  // the others stay what they were
    RC_ASSERT(ended.logits[static_cast<std::size_t>(row * kVocab + 5)] == logit(row, 5));
  }
}

RC_GTEST_PROP(DraftStep, TheChunkBeginsWithTheSampledToken, ()) {
  const Stream stream;
  const auto n_draft = *rc::gen::inRange<std::int64_t>(1, draft::kMaxDrafts + 1);
  const auto position = *rc::gen::inRange<std::int32_t>(0, 100);
  const DeviceBuffer<SequenceState> sequence(std::vector{SequenceState{17, position, position + 1, 0}});
  DeviceBuffer<DraftState> state(std::vector{DraftState{}});
  std::vector<std::int32_t> script(static_cast<std::size_t>(position + 1 + draft::kMaxDrafts));
  for (std::size_t i = 0; i < script.size(); ++i) script[i] = static_cast<std::int32_t>(1000 + i);
  const DeviceBuffer<std::int32_t> d_script(script);
  draft_begin(sequence.data(), state.data(), n_draft, stream);
  draft_from_script(d_script.data(), sequence.data(), state.data(), n_draft, stream);
  const DraftState found = state.to_host(stream)[0];
  RC_ASSERT(found.tokens[0] == 17 && found.n_proposed == n_draft);
  for (std::int32_t row = 0; row <= n_draft; ++row) {
    RC_ASSERT(found.positions[row] == position + row && found.kv_lens[row] == position + row + 1);
    if (row > 0) RC_ASSERT(found.tokens[row] == 1000 + position + row);
  }
}

TEST(DraftStep, RefusesMoreDraftsThanAChunkHas) {
  DeviceBuffer<DraftState> state(1);
  const DeviceBuffer<SequenceState> sequence(1);
  const DeviceBuffer<std::int32_t> script(16);
  for (const std::int64_t n_draft : {0, 8}) {
    EXPECT_TRUE(testkit::refuses([&] { draft_begin(sequence.data(), state.data(), n_draft, nullptr); },
                                 {"draft_begin", "need 1 to 7"}));
    EXPECT_TRUE(testkit::refuses(
        [&] { draft_from_script(script.data(), sequence.data(), state.data(), n_draft, nullptr); }, {"need 1 to 7"}));
  }
  EXPECT_TRUE(testkit::refuses([&] { draft_from_script(nullptr, sequence.data(), state.data(), 1, nullptr); },
                               {"the script has no address"}));
}

}  // namespace
}  // namespace gemma4::cuda

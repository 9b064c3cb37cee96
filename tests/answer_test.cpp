// SPDX-License-Identifier: Apache-2.0
#include "experiments/support/answer.hpp"

#include <gtest/gtest.h>
#include <signal.h>

#include <csignal>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <iostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/toy_vocabulary.hpp"

namespace {

using namespace gemma4;
using namespace gemma4::experiment;
using Ids = std::vector<std::int32_t>;

const Tokenizer& toy() {
  static const Tokenizer tokenizer([] {
    VocabularyData data = testkit::toy_vocabulary();
    testkit::add_token(data, "<|tool_response>", TokenType::kNormal);
    return data;
  }());
  return tokenizer;
}

Ids ids_of(const char* text) {
  return toy().encode(text, {.add_bos = false, .parse_special = true});
}

/// A model that says what it was told to; `at_token` sees the place of each token before it is given.
class Scripted final : public Sequence {
 public:
  Scripted(Ids script, std::int64_t context, std::function<void(std::size_t)> at_token = {})
      : script_(std::move(script)), context_(context), at_token_(std::move(at_token)) {}

  Stretch prefill(std::span<const std::int32_t> tokens, std::int64_t /*chunk*/,
                  const std::function<void(std::int64_t)>& /*on_chunk*/) override {
    hold(tokens);
    return {};
  }
  Stretch decode(std::int64_t n_token, const SamplerSettings& /*sampler*/,
                 const std::function<bool(std::int32_t)>& on_token) override {
    for (std::size_t at = 0; at < static_cast<std::size_t>(n_token); ++at) {
      if (at_token_) at_token_(at);
      held_.push_back(script_.at(at));
      if (!on_token(held_.back())) break;
    }
    return {};
  }
  [[nodiscard]] std::int64_t max_back() const override { return 0; }
  void take_back(std::int64_t /*n_token*/) override {}
  void reset() override {}
  void save(const std::filesystem::path& /*path*/, SessionInfo /*info*/) override {}
  SessionInfo restore(const SessionFile& /*file*/, std::uint64_t /*model_hash*/) override { return {}; }
  [[nodiscard]] std::int64_t context() const override { return context_; }
  [[nodiscard]] std::vector<StepPlan> step_plans() const override { return {}; }
  [[nodiscard]] std::vector<ComponentTime> profile(const std::function<void()>& /*work*/) override { return {}; }

 private:
  Ids script_;
  std::int64_t context_;
  std::function<void(std::size_t)> at_token_;
};

struct Written {
  Answer answer;
  std::string output, thoughts, end;
};

Written write(Scripted& sequence, std::int64_t max_tokens, bool is_chat = true, const Ids& prompt = {2}) {
  Written written;
  std::ostringstream output, thoughts;
  std::streambuf* const before = std::cout.rdbuf(output.rdbuf());
  sequence.prefill(prompt, 1, {});
  AnswerPrinter printer(toy(), is_chat, &thoughts);
  printer.begin(prompt);
  write_answer(sequence, toy(), max_tokens, {}, printer, written.answer);
  std::cout.rdbuf(before);
  written.output = output.str();
  written.thoughts = thoughts.str();
  written.end = end_text(written.answer, toy(), max_tokens, sequence.context());
  return written;
}

Written write(const char* script, std::int64_t max_tokens = 100, std::int64_t context = 1000, bool is_chat = true) {
  Scripted sequence(ids_of(script), context);
  return write(sequence, max_tokens, is_chat);
}

TEST(Answer, EndsAreNamedAndNotWritten) {
  for (const char* end : {"<turn|>", "<eos>", "<|tool_response>"}) {
    for (const bool is_chat : {false, true}) {
      const Written written = write((std::string("ab") + end).c_str(), 100, 1000, is_chat);
      EXPECT_EQ(written.output, "ab\n") << end;
      EXPECT_EQ(written.answer.end, AnswerEnd::kToken);
      EXPECT_EQ(written.end, end);
    }
  }
}

TEST(Answer, ALimitAndAFullContextAreToldApart) {
  const Written limit = write("abcabcabc", 2, 3), full = write("abcabcabc", 3, 3);
  EXPECT_EQ(limit.end, "token limit, --max-tokens 2");
  EXPECT_EQ(full.end, "context full, all 3 positions are taken");
  EXPECT_EQ(full.answer.tokens.size(), 2U);
  EXPECT_EQ(write("abc", 0).end, "token limit, --max-tokens 0");
}

TEST(Answer, AnInterruptionEndsItBehindTheTokenThatCame) {
  std::signal(SIGINT, SIG_DFL);  // whoever runs this in the background has it ignored, and Interruptions leaves it so
  const Interruptions interruptions;
  Scripted sequence(ids_of("a\nb\nc\nab"), 1000, [](std::size_t at) {
    if (at == 2) ::raise(SIGINT);
  });
  const Written written = write(sequence, 100);
  EXPECT_EQ(written.end, "interrupted");
  EXPECT_EQ(written.output, "a\nb\n");
  EXPECT_EQ(sequence.held().size(), 4U) << "the prompt and three tokens";
  EXPECT_FALSE(Interruptions::pending()) << "it was taken, and does not end the next";
}

TEST(Answer, ThoughtsGoElsewhereAndMarkersNowhere) {
  const Written written = write("<|channel>ab<channel|>xyz<|turn>c<turn|>");
  EXPECT_EQ(written.output, "xyzc\n");
  EXPECT_EQ(written.thoughts, "[ab]\n");
  const Written open = write("<|channel>ab", 2);
  EXPECT_EQ(open.output, "\n");
  EXPECT_EQ(open.thoughts, "[ab]\n") << "closed for whoever reads it";
  EXPECT_EQ(write("<|channel>ab<channel|>xyz<turn|>", 100, 1000, false).output, "<|channel>ab<channel|>xyz\n")
      << "the control: outside of a chat what is no control token is text";
}

TEST(Answer, APromptMayEndInsideAThought) {
  Scripted sequence(ids_of("ab<channel|>c<turn|>"), 1000);
  const Written written = write(sequence, 100, true, ids_of("a<|channel>"));
  EXPECT_EQ(written.output, "c\n");
  EXPECT_EQ(written.thoughts, "ab]\n");
  Scripted closed(ids_of("ab<turn|>"), 1000);
  EXPECT_EQ(write(closed, 100, true, ids_of("a<|channel><channel|>")).output, "ab\n");
}

}  // namespace

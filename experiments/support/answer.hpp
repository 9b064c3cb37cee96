// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "experiments/support/interruptions.hpp"
#include "experiments/support/sequence.hpp"
#include "gemma4/error.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/text/tokenizer.hpp"

/// A prompt read and its answer written, token by token, and what is said of it afterwards.
namespace gemma4::experiment {

/// Writes an answer as it comes. In a chat the text goes to stdout, thoughts to `thoughts`, and markers nowhere; else
/// every token that is no control token goes to stdout. Ends are never written.
class AnswerPrinter {
 public:
  /// @param thoughts nullptr: not shown
  AnswerPrinter(const Tokenizer& tokenizer, bool is_chat, std::ostream* thoughts)
      : tokenizer_(tokenizer),
        is_chat_(is_chat),
        thoughts_(thoughts),
        open_(tokenizer.vocabulary().find("<|channel>")),
        close_(tokenizer.vocabulary().find("<channel|>")) {}

  /// Before an answer; a prompt may end inside a thought.
  void begin(std::span<const std::int32_t> prompt) {
    is_thought_ = false;
    for (const std::int32_t id : prompt) is_thought_ = id == open_ || (is_thought_ && id != close_);
  }

  void write(std::int32_t id) {
    if (!is_chat_) {
      std::cout << tokenizer_.decode_piece(id, {.skip_control = true}) << std::flush;
    } else if (id == open_ || (id == close_ && is_thought_)) {
      is_thought_ = id == open_;
      if (thoughts_ != nullptr) *thoughts_ << (is_thought_ ? "[" : "]\n") << std::flush;
    } else if (!tokenizer_.vocabulary().is_marker(id) && !tokenizer_.is_end(id)) {
      if (is_thought_ && thoughts_ != nullptr) *thoughts_ << tokenizer_.decode_piece(id) << std::flush;
      if (!is_thought_) std::cout << tokenizer_.decode_piece(id) << std::flush;
    }
  }

  void end() {
    if (is_thought_ && thoughts_ != nullptr) *thoughts_ << "]" << std::endl;
    std::cout << std::endl;
  }

 private:
  const Tokenizer& tokenizer_;
  bool is_chat_;
  std::ostream* thoughts_;
  std::optional<std::int32_t> open_, close_;
  bool is_thought_ = false;
};

/// Why an answer ended.
enum class AnswerEnd { kToken, kLimit, kFull, kInterrupted };

struct Answer {
  std::vector<std::int32_t> tokens;  ///< also the end token
  AnswerEnd end = AnswerEnd::kLimit;
  Stretch prompt, decode;  ///< what was read and written, and how long it took
};

/// Up to max_tokens tokens after what the sequence holds. An interruption ends it where there are Interruptions.
inline void write_answer(Sequence& sequence, const Tokenizer& tokenizer, std::int64_t max_tokens,
                         const SamplerSettings& sampler, AnswerPrinter& printer, Answer& answer) {
  const std::int64_t room = sequence.n_free();
  const std::int64_t n_token = std::min(max_tokens, room);
  answer.end = room < max_tokens ? AnswerEnd::kFull : AnswerEnd::kLimit;
  if (n_token > 0) {
    answer.decode = sequence.decode(n_token, sampler, [&](std::int32_t token) {
      answer.tokens.push_back(token);
      if (tokenizer.is_end(token)) {
        answer.end = AnswerEnd::kToken;
        return false;
      }
      printer.write(token);
      if (!Interruptions::take()) return true;
      answer.end = AnswerEnd::kInterrupted;
      return false;
    });
  }
  printer.end();
}

/// The end token as the vocabulary spells it, or what else it was.
[[nodiscard]] inline std::string end_text(const Answer& answer, const Tokenizer& tokenizer, std::int64_t max_tokens,
                                          std::int64_t context) {
  switch (answer.end) {
    case AnswerEnd::kToken:
      return gemma4::detail::printable(tokenizer.vocabulary().text(answer.tokens.back()));
    case AnswerEnd::kLimit:
      return concat("token limit, --max-tokens ", max_tokens);
    case AnswerEnd::kFull:
      return concat("context full, all ", context, " positions are taken");
    case AnswerEnd::kInterrupted:
      break;
  }
  return "interrupted";
}

inline void print_rate(const char* what, const Stretch& took) {
  if (took.n_token == 0) return;
  std::cerr << what << ": " << took.n_token << " tokens in " << 1e-6 * took.us << " s, " << took.tokens_per_second()
            << " tokens/s\n";
}

}  // namespace gemma4::experiment

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/text/chat_template.hpp"
#include "gemma4/text/tokenizer.hpp"

namespace gemma4 {

/// A dialogue that goes on: what the model reads before each answer, so that a cache which holds what came before need
/// not read that again.
///
/// The first prompt is encode_chat() of the messages. Every later one begins with the tokens of the prompt before it
/// and of the answer to it, as the model wrote them, and is followed by what the template puts between an answer and
/// the next: nothing is read twice. It differs from encode_chat() of all messages in two things, both deliberate: the
/// empty thought that opened an answer (thinking off) stays in front of it, and an answer keeps its own cut into tokens
/// and the blanks around it. Where the model wrote thoughts the template wants them gone once the user speaks again,
/// and tokens in the middle of a cache cannot go: the prompt is then encode_chat() of all messages, and what follows
/// the first difference is read anew (cache_steps() says how much). keep_thoughts leaves them where they are instead.
class Conversation {
 public:
  /// @param start what was said before, such as the system's message; may end with a user's, which is answered first
  /// @param tokenizer outlives the conversation
  /// @throws FormatError when the vocabulary lacks a marker of the template, std::invalid_argument as chat_parts()
  Conversation(const Tokenizer& tokenizer, const ChatOptions& options, std::vector<ChatMessage> start = {},
               bool keep_thoughts = false)
      : tokenizer_(tokenizer), options_(options), keep_thoughts_(keep_thoughts), start_(std::move(start)) {
    options_.generate = true;
    std::vector<ChatMessage> trial = start_;
    trial.push_back({.role = "user"});
    require_markers(tokenizer_.vocabulary(), chat_parts(start_, options_));
    require_markers(tokenizer_.vocabulary(), chat_parts(trial, options_));
    empty_thought_ = tokenizer_.encode("<|channel>thought\n<channel|>", {.add_bos = false, .parse_special = true});
    reset();
  }

  /// Back to where it started.
  void reset() {
    messages_ = start_;
    read_.clear();
    closed_ = false;
    prompt_ = encode_chat(tokenizer_, messages_, options_);
  }

  [[nodiscard]] const std::vector<ChatMessage>& messages() const { return messages_; }

  /// What a dialogue is besides the tokens that a cache holds of it.
  struct State {
    std::vector<ChatMessage> messages = {};
    std::int64_t n_read = 0;  ///< tokens up to the end of the last answer; the cache holds them
    bool closed = false;      ///< the last answer ended its turn itself
  };

  /// Between an answer and the next message.
  /// @param held by the cache
  [[nodiscard]] State state(std::span<const std::int32_t> held) const {
    const bool holds = read_.size() <= held.size() && std::equal(read_.begin(), read_.end(), held.begin());
    return {messages_, holds ? static_cast<std::int64_t>(read_.size()) : 0, closed_};
  }

  /// The dialogue that state() was asked of, and goes on as it would have.
  /// @throws std::invalid_argument when more was read than the cache holds
  void resume(State state, std::span<const std::int32_t> held) {
    require(state.n_read >= 0 && state.n_read <= static_cast<std::int64_t>(held.size()), "conversation: ", state.n_read,
            " tokens were read, the cache holds ", held.size());
    const auto read = held.first(static_cast<std::size_t>(state.n_read));
    messages_ = std::move(state.messages);
    read_.assign(read.begin(), read.end());
    closed_ = state.closed;
    prompt_ = read_.empty() ? encode_chat(tokenizer_, messages_, options_) : read_;
  }

  /// All that the model is to have read when it begins the next answer.
  [[nodiscard]] const std::vector<std::int32_t>& prompt() const { return prompt_; }

  /// The user speaks; prompt() is then up to where the answer begins.
  void say(std::string text) {
    messages_.push_back({.role = "user", .content = std::move(text)});
    prompt_ = can_go_on() ? going_on() : encode_chat(tokenizer_, messages_, options_);
  }

  /// Whether somebody spoke, here, and was not answered.
  [[nodiscard]] bool can_take_back() const {
    return messages_.size() > start_.size() && messages_.back().role == "user";
  }

  /// What was said last never was.
  void take_back() {
    require(can_take_back(), "conversation: nothing was said that could be taken back");
    messages_.pop_back();
    prompt_ = read_;
  }

  /// What the model wrote after prompt(), with the token that ended it or without one.
  void answer(std::span<const std::int32_t> tokens) {
    const bool ended = !tokens.empty() && tokenizer_.is_end(tokens.back());
    closed_ = ended && tokenizer_.vocabulary().find("<turn|>") == tokens.back();
    const std::span<const std::int32_t> written = ended ? tokens.first(tokens.size() - 1) : tokens;
    // After a tool's answer the prompt itself opens the thought that the model goes on with.
    std::string text = ends_in_thought() ? "<|channel>thought\n" : "";
    for (const std::int32_t id : written) text += tokenizer_.decode_piece(id);
    messages_.push_back({.role = "model", .content = std::move(text)});
    read_ = prompt_;
    read_.insert(read_.end(), written.begin(), closed_ ? tokens.end() : written.end());
    prompt_ = read_;
  }

  /// Whether thoughts that the template drops stand in what the model has read and written.
  [[nodiscard]] bool has_thoughts() const {
    const std::optional<std::int32_t> open = tokenizer_.vocabulary().find("<|channel>");
    if (!open) return false;
    for (auto at = read_.begin(); (at = std::find(at, read_.end(), *open)) != read_.end(); ++at) {
      const auto rest = static_cast<std::size_t>(read_.end() - at);
      const bool is_empty =
          rest >= empty_thought_.size() && std::equal(empty_thought_.begin(), empty_thought_.end(), at);
      if (!is_empty) return true;
    }
    return false;
  }

 private:
  [[nodiscard]] bool can_go_on() const { return !read_.empty() && (keep_thoughts_ || !has_thoughts()); }

  [[nodiscard]] bool ends_in_thought() const {
    const auto parts = chat_parts(messages_, options_);
    return !parts.empty() && parts.back().text.ends_with("<|channel>thought\n");
  }

  /// What was read and written, the end of that turn, and the user's.
  [[nodiscard]] std::vector<std::int32_t> going_on() const {
    ChatOptions options = options_;
    if (options.thinking == Thinking::kOn) options.thinking = Thinking::kUnset;  // the system's turn has said so
    std::vector<ChatPart> parts = chat_parts(std::span(&messages_.back(), 1), options);
    parts.insert(parts.begin(), {.text = closed_ ? "\n" : "<turn|>\n", .markup = true});
    std::vector<std::int32_t> ids = read_;
    const auto next = encode_parts(tokenizer_, parts, false, options_.allow_markers);
    ids.insert(ids.end(), next.begin(), next.end());
    return ids;
  }

  const Tokenizer& tokenizer_;
  ChatOptions options_;
  bool keep_thoughts_;
  std::vector<ChatMessage> start_;
  std::vector<std::int32_t> empty_thought_;
  std::vector<ChatMessage> messages_;
  std::vector<std::int32_t> read_;    ///< up to the end of the last answer, as it was read and written
  std::vector<std::int32_t> prompt_;  ///< what the next answer follows
  bool closed_ = false;               ///< the last answer ended its turn itself
};

/// How a cache comes to hold a text.
struct CacheSteps {
  bool reset = false;                    ///< forget everything first
  std::int64_t n_back = 0;               ///< else: tokens to take back first
  std::span<const std::int32_t> append;  ///< then read these; at least one, whose logits come next
};

/// The least work from a cache that holds `held` to one that holds `wanted`.
/// @param wanted at least one token; outlives the result
/// @param max_back tokens that the cache can take back
[[nodiscard]] inline CacheSteps cache_steps(std::span<const std::int32_t> held, std::span<const std::int32_t> wanted,
                                            std::int64_t max_back) {
  require(!wanted.empty(), "cache_steps: nothing is wanted");
  const auto same = static_cast<std::size_t>(
      std::mismatch(held.begin(), held.end(), wanted.begin(), wanted.end()).first - held.begin());
  const std::size_t keep = std::min(same, wanted.size() - 1);
  const auto n_back = static_cast<std::int64_t>(held.size() - keep);
  if (held.empty() || keep == 0 || n_back > max_back) {
    return {.reset = !held.empty(), .n_back = 0, .append = wanted};
  }
  return {.reset = false, .n_back = n_back, .append = wanted.subspan(keep)};
}

}  // namespace gemma4

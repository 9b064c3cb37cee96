// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/text/chat_message.hpp"
#include "gemma4/text/chat_writer.hpp"
#include "gemma4/text/markers.hpp"
#include "gemma4/text/tokenizer.hpp"

namespace gemma4 {

/// How the model is asked to think before it answers.
enum class Thinking {
  kOff,    ///< an empty thought stands in front of the answer, as in the template of the 31B and 12B models
  kOn,     ///< `<|think|>` opens the system turn; the model writes its thoughts first
  kUnset,  ///< neither: the turns alone, as in the template of the small models
};

struct ChatOptions {
  Thinking thinking = Thinking::kOff;
  bool generate = true;            ///< the model's turn is opened at the end
  bool preserve_thinking = false;  ///< thoughts of messages with tool calls are shown again, however old they are
  bool allow_markers = false;      ///< encode_chat(): a marker in what somebody wrote is that marker
};

namespace detail {

/// An answer without its thoughts: what stands between `<|channel>` and `<channel|>` is not shown to the model again.
/// A thought that was never closed reaches to the end.
[[nodiscard]] inline std::string without_thoughts(std::string_view text) {
  constexpr std::string_view kOpen = "<|channel>", kClose = "<channel|>";
  std::string result;
  while (!text.empty()) {
    const std::size_t close = text.find(kClose);
    const std::string_view part = text.substr(0, close);
    result += part.substr(0, part.find(kOpen));
    text.remove_prefix(close == std::string_view::npos ? text.size() : close + kClose.size());
  }
  return std::string(without_blanks(result));
}

/// Writes a dialogue, message by message.
class ChatTemplate {
 public:
  ChatTemplate(std::span<const ChatMessage> messages, const ChatOptions& options) : options_(options) {
    const bool has_system = !messages.empty() && is_system_role(messages.front().role);
    first_ = has_system ? 1 : 0;
    messages_ = messages.subspan(first_);
    check_order();
    if (thinks() || has_system) write_system(has_system ? &messages.front() : nullptr);
    for (std::size_t at = 0; at < messages_.size(); ++at) {
      if (messages_[at].role == "user") end_of_users_ = at + 1;
    }
    for (std::size_t at = 0; at < messages_.size(); ++at) {
      if (messages_[at].role != "tool") write_message(at);
    }
    if (options_.generate) open_answer();
  }

  [[nodiscard]] std::vector<ChatPart> take() { return out_.take(); }

 private:
  /// What the message before ended with.
  enum class Last { kText, kToolCall, kToolResponse };

  [[nodiscard]] bool thinks() const { return options_.thinking == Thinking::kOn; }

  /// @throws std::invalid_argument naming the message whose role is unknown, or which answers no tool call
  void check_order() const {
    bool awaits_tool = false;
    for (std::size_t at = 0; at < messages_.size(); ++at) {
      const ChatMessage& message = messages_[at];
      const bool is_tool = message.role == "tool";
      const bool known =
          is_tool || message.role == "user" || is_model_role(message.role) || is_system_role(message.role);
      require(known, "chat: message ", first_ + at, " has role '", printable(message.role),
              "', expected system, developer, user, model, assistant or tool");
      require(!is_tool || awaits_tool, "chat: message ", first_ + at,
              " has role 'tool' and answers no message with tool_calls in front of it");
      if (!is_tool) awaits_tool = !message.tool_calls.empty() && message.tool_responses.empty();
    }
  }

  void write_system(const ChatMessage* message) {
    out_.markup("<|turn>system\n");
    if (thinks()) out_.markup("<|think|>\n");
    if (message != nullptr && message->parts.empty()) out_.text(without_blanks(message->content));
    if (message != nullptr) {
      for (const std::string& part : message->parts) out_.text(concat(without_blanks(part), ' '));
    }
    out_.markup("<turn|>\n");
  }

  void write_message(std::size_t at) {
    const ChatMessage& message = messages_[at];
    const bool is_model = is_model_role(message.role);
    if (!is_model || !follows_model_) {
      out_.markup("<|turn>");
      out_.markup(is_model ? "model" : message.role);
      out_.markup("\n");
    }
    follows_model_ = is_model;
    const bool shows_thoughts = at >= end_of_users_ || (options_.preserve_thinking && !message.tool_calls.empty());
    if (!message.reasoning.empty() && shows_thoughts) {
      out_.markup("<|channel>thought\n");
      out_.text(message.reasoning);
      out_.markup("\n<channel|>");
    }
    write_calls(message);
    const bool has_response = write_responses(at);
    last_ = has_response ? Last::kToolResponse : message.tool_calls.empty() ? Last::kText : Last::kToolCall;
    const bool has_content = write_content(message, is_model);
    close(at, has_response, has_content);
  }

  void write_calls(const ChatMessage& message) {
    for (const ToolCall& call : message.tool_calls) {
      out_.markup("<|tool_call>call:");
      out_.text(call.name);
      out_.markup("{");
      if (call.arguments.object() != nullptr) out_.members(*call.arguments.object());
      out_.markup("}<tool_call|>");
    }
  }

  /// Those inside the message, else the messages of role `tool` that follow it. @return whether there was one
  bool write_responses(std::size_t at) {
    const ChatMessage& message = messages_[at];
    for (const ToolResponse& response : message.tool_responses) {
      write_response(response.name.empty() ? "unknown" : response.name, response.response);
    }
    if (!message.tool_responses.empty()) return true;
    std::size_t next = at + 1;
    for (; next < messages_.size() && messages_[next].role == "tool"; ++next) {
      const ChatMessage& answer = messages_[next];
      std::string_view name = answer.name.empty() ? "unknown" : std::string_view(answer.name);
      for (const ToolCall& call : message.tool_calls) {
        if (call.id == answer.tool_call_id) name = call.name;  // also where neither has an id
      }
      write_response(name, answer.value.value_or(JsonValue(answer.content)));
    }
    return next > at + 1;
  }

  void write_response(std::string_view name, const JsonValue& response) {
    out_.markup("<|tool_response>response:");
    out_.text(name);
    out_.markup("{");
    if (response.object() != nullptr) {
      out_.members(*response.object());
    } else {
      out_.markup("value:");
      out_.value(response);
    }
    out_.markup("}<tool_response|>");
  }

  /// @return whether there was any
  bool write_content(const ChatMessage& message, bool is_model) {
    std::string content;
    const auto add = [&](std::string_view part) {
      content += is_model ? without_thoughts(part) : std::string(without_blanks(part));
    };
    if (message.parts.empty()) add(message.content);
    for (const std::string& part : message.parts) add(part);
    out_.text(content);
    return !content.empty();
  }

  /// The end of a turn, unless it goes on: in the next message, or with what a tool will answer.
  void close(std::size_t at, bool has_response, bool has_content) {
    const ChatMessage& message = messages_[at];
    std::size_t next = at + 1;
    while (next < messages_.size() && messages_[next].role == "tool") ++next;
    const bool is_last = next == messages_.size();
    if (last_ == Last::kToolCall) {
      out_.markup("<|tool_response>");
    } else if (is_model_role(message.role) && !is_last && is_model_role(messages_[next].role)) {
      return;
    } else if (!is_last || !has_response || has_content) {
      out_.markup("<turn|>\n");
    }
  }

  void open_answer() {
    if (last_ == Last::kToolResponse && thinks()) out_.markup("<|channel>thought\n");
    if (last_ != Last::kText) return;
    out_.markup("<|turn>model\n");
    if (options_.thinking == Thinking::kOff) out_.markup("<|channel>thought\n<channel|>");
  }

  ChatOptions options_;
  std::span<const ChatMessage> messages_;  ///< without the system's
  std::size_t first_ = 0;                  ///< place of the first of them
  std::size_t end_of_users_ = 0;           ///< behind the last user's message
  bool follows_model_ = false;
  Last last_ = Last::kText;
  ChatWriter out_;
};

}  // namespace detail

/// The dialogue as Gemma 4 reads it, without the begin-of-sequence token, in parts:
///   <|turn>system\n[<|think|>\n]INSTRUCTION<turn|>\n      the first message's, or where thinking is on
///   <|turn>user\nQUESTION<turn|>\n
///   <|turn>model\n[THOUGHT][CALLS[RESPONSES]]ANSWER<turn|>\n
///   <|turn>model\n[<|channel>thought\n<channel|>]         where the answer begins
/// with <|channel>thought\nREASONING\n<channel|> only behind the last user's message (with preserve_thinking also where
/// there are tool calls), <|tool_call>call:NAME{ARGUMENTS}<tool_call|>, and <|tool_response>response:NAME{...}
/// <tool_response|> from the message itself or from those of role `tool` behind it. The model's messages in a row are
/// one turn; calls that nobody has answered leave it open. White space around a content is dropped, and thoughts inside
/// one.
/// @throws std::invalid_argument naming the message and its role when that is unknown, or answers no tool call
/// Source: the published chat template of gemma-4-31B-it, 2026-07-09; held to renderings of it (tests/data/chat). Where
/// it is lenient this refuses: a tool's message without a call. `model` is `assistant` in every respect.
[[nodiscard]] inline std::vector<ChatPart> chat_parts(std::span<const ChatMessage> messages,
                                                      const ChatOptions& options = {}) {
  return detail::ChatTemplate(messages, options).take();
}

/// The dialogue as one string; chat_parts() says how. To be encoded with parse_special. Markup inside a content then
/// counts as markup; where the contents come from others, use encode_chat().
[[nodiscard]] inline std::string chat_text(std::span<const ChatMessage> messages, const ChatOptions& options = {}) {
  std::string text;
  for (const ChatPart& part : chat_parts(messages, options)) text += part.text;
  return text;
}

/// Parts as tokens. No text that somebody wrote can open or close anything: markers are made by the markup alone, of
/// whatever type the file's tokens are.
[[nodiscard]] inline std::vector<std::int32_t> encode_parts(const Tokenizer& tokenizer, std::span<const ChatPart> parts,
                                                            bool add_bos, bool allow_markers = false) {
  std::string text;
  std::vector<TextRange> plain;
  for (const ChatPart& part : parts) {
    if (!part.markup && !allow_markers) plain.push_back({text.size(), text.size() + part.text.size()});
    text += part.text;
  }
  return tokenizer.encode(text, {.add_bos = add_bos, .parse_special = true, .plain = plain});
}

/// The dialogue as tokens, begin of sequence first where the vocabulary says so; encode_parts() says what a marker is.
[[nodiscard]] inline std::vector<std::int32_t> encode_chat(const Tokenizer& tokenizer,
                                                           std::span<const ChatMessage> messages,
                                                           const ChatOptions& options = {}) {
  return encode_parts(tokenizer, chat_parts(messages, options), tokenizer.vocabulary().add_bos(),
                      options.allow_markers);
}

/// @throws FormatError naming a marker that the markup of these parts needs and the vocabulary does not have
inline void require_markers(const Vocabulary& vocabulary, std::span<const ChatPart> parts) {
  for (const std::string_view marker : kChatMarkers) {
    if (vocabulary.find(marker)) continue;
    for (const ChatPart& part : parts) {
      require_format(!part.markup || part.text.find(marker) == std::string::npos, "chat: the vocabulary has no token '",
                     marker, "', which the chat template needs; is this a model for dialogues?");
    }
  }
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/text/tokenizer.hpp"

namespace gemma4 {

/// One message of a dialogue. Roles: `system` (or `developer`; the first message only), `user`, `model` (or
/// `assistant`).
struct ChatMessage {
  std::string role;
  std::string content;
};

/// How the model is asked to think before it answers.
enum class Thinking {
  kOff,    ///< an empty thought stands in front of the answer, as in the template of the 31B model
  kOn,     ///< `<|think|>` opens the system turn; the model writes its thoughts first
  kUnset,  ///< neither: the turns alone, as in the template of the small models
};

struct ChatOptions {
  Thinking thinking = Thinking::kOff;
  bool generate = true;  ///< the model's turn is opened at the end
};

/// A part of a dialogue: text that somebody wrote, or the markup around it.
struct ChatPart {
  std::string text;
  bool markup = false;
};

namespace detail {

[[nodiscard]] inline std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kBlank = " \t\n\r\v\f";
  const std::size_t first = text.find_first_not_of(kBlank);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kBlank) - first + 1);
}

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
  return std::string(trimmed(result));
}

/// The name of a role in a turn.
[[nodiscard]] inline std::string_view turn_role(const ChatMessage& message, std::size_t place) {
  if (message.role == "user") return "user";
  if (message.role == "model" || message.role == "assistant") return "model";
  const bool is_system = message.role == "system" || message.role == "developer";
  require(is_system, "chat: message ", place, " has role '", printable(message.role),
          "', expected system, developer, user, model or assistant");
  require(place == 0, "chat: message ", place, " has role '", message.role, "', which only the first message may have");
  return "system";
}

}  // namespace detail

/// The dialogue as Gemma 4 reads it, without the begin-of-sequence token, in parts:
///   <|turn>system\n[<|think|>\n]INSTRUCTION<turn|>\n      the first message's, or where thinking is on
///   <|turn>user\nQUESTION<turn|>\n
///   <|turn>model\nANSWER<turn|>\n                         without its thoughts
///   <|turn>model\n[<|channel>thought\n<channel|>]         where the answer begins
/// White space around a content is dropped.
/// @throws std::invalid_argument naming the message and its role when that is unknown or out of place
/// Source: Gemma 4 prompt formatting, ai.google.dev/gemma/docs/core/prompt-formatting-gemma4, and the published chat
/// template of gemma-4-31B-it (text only: no tools, no images)
[[nodiscard]] inline std::vector<ChatPart> chat_parts(std::span<const ChatMessage> messages,
                                                      const ChatOptions& options = {}) {
  std::vector<ChatPart> parts;
  const auto turn = [&](std::string_view role, std::string_view opening, std::string content) {
    parts.push_back({concat("<|turn>", role, "\n", opening), true});
    if (!content.empty()) parts.push_back({std::move(content), false});
    parts.push_back({"<turn|>\n", true});
  };
  const bool think = options.thinking == Thinking::kOn;
  const std::string_view opening = think ? "<|think|>\n" : "";
  for (std::size_t place = 0; place < messages.size(); ++place) {
    const ChatMessage& message = messages[place];
    const std::string_view role = detail::turn_role(message, place);
    if (place == 0 && think && role != "system") turn("system", opening, "");
    turn(role, role == "system" ? opening : "",
         role == "model" ? detail::without_thoughts(message.content) : std::string(detail::trimmed(message.content)));
  }
  if (messages.empty() && think) turn("system", opening, "");
  if (options.generate) {
    const bool empty_thought = options.thinking == Thinking::kOff;
    parts.push_back({concat("<|turn>model\n", empty_thought ? "<|channel>thought\n<channel|>" : ""), true});
  }
  return parts;
}

/// The dialogue as one string; chat_parts() says how. To be encoded with parse_special. Markup inside a content then
/// counts as markup; where the contents come from others, use encode_chat().
[[nodiscard]] inline std::string chat_text(std::span<const ChatMessage> messages, const ChatOptions& options = {}) {
  std::string text;
  for (const ChatPart& part : chat_parts(messages, options)) text += part.text;
  return text;
}

/// The dialogue as tokens, begin of sequence first where the vocabulary says so. No content can open or close a turn:
/// control tokens are made by the markup alone.
[[nodiscard]] inline std::vector<std::int32_t> encode_chat(const Tokenizer& tokenizer,
                                                           std::span<const ChatMessage> messages,
                                                           const ChatOptions& options = {}) {
  std::vector<std::int32_t> ids = tokenizer.encode("");
  for (const ChatPart& part : chat_parts(messages, options)) {
    const auto encoded = tokenizer.encode(part.text, {.add_bos = false, .parse_special = part.markup});
    ids.insert(ids.end(), encoded.begin(), encoded.end());
  }
  return ids;
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/json.hpp"
#include "gemma4/text/chat_message.hpp"
#include "gemma4/text/conversation.hpp"

/// A dialogue as a text that a session file keeps as its note: JSON,
///   {"messages": [{"role": ..., "content": ...}, ...], "read": <tokens of the session that it has read>,
///    "closed": <whether the last answer ended its turn>}
namespace gemma4 {

namespace detail {

/// A JSON string: quotes, backslashes and control characters escaped, all else as it is.
[[nodiscard]] inline std::string json_string(std::string_view text) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\', out += c;
    } else if (byte < 0x20) {
      out += "\\u00", out += kDigits[byte >> 4], out += kDigits[byte & 15];
    } else {
      out += c;
    }
  }
  return out + '"';
}

}  // namespace detail

/// @throws std::invalid_argument for messages with tools or in parts, which a note does not keep
[[nodiscard]] inline std::string dialogue_note(const Conversation::State& state) {
  std::string text = "{\"messages\": [";
  for (const ChatMessage& message : state.messages) {
    const bool is_plain = message.parts.empty() && message.reasoning.empty() && message.tool_calls.empty() &&
                          message.tool_responses.empty() && !message.tool_call_id && message.name.empty() &&
                          !message.value && message.role != "tool";
    require(is_plain, "a dialogue with tools, thoughts or messages in parts cannot be saved");
    text += concat(&message == &state.messages.front() ? "" : ", ", "{\"role\": ", detail::json_string(message.role),
                   ", \"content\": ", detail::json_string(message.content), "}");
  }
  return text + concat("], \"read\": ", state.n_read, ", \"closed\": ", state.closed ? "true" : "false", "}");
}

/// @param source the file's name, for messages
/// @param n_token of the session: no dialogue has read more
/// @throws FormatError naming the file and what is wrong in the note
[[nodiscard]] inline Conversation::State parse_dialogue_note(std::string_view note, const std::string& source,
                                                             std::int64_t n_token) {
  const std::string where = source + ": session.note";
  require_format(!note.empty(), where, ": no dialogue was saved here");
  const JsonValue json = parse_json(note, where);
  require_format(json.object() != nullptr, where, ": expected an object, found ", json.kind());
  const auto value = [&](std::string_view key) -> const JsonValue& {
    const auto found = json.object()->find(key);
    require_format(found != json.object()->end(), where, ": there is no '", key, "'");
    return found->second;
  };
  Conversation::State state{.messages = chat_messages(value("messages"), where)};
  const double* const read = value("read").number();
  require_format(read != nullptr && *read >= 0 && *read <= static_cast<double>(n_token) && *read == std::floor(*read),
                 where, ": 'read' is no count of the session's ", n_token, " tokens");
  state.n_read = static_cast<std::int64_t>(*read);
  const bool* const closed = value("closed").boolean();
  require_format(closed != nullptr, where, ": 'closed' is ", value("closed").kind(), ", expected a boolean");
  state.closed = *closed;
  return state;
}

}  // namespace gemma4

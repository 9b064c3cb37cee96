// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf_cursor.hpp"
#include "gemma4/json.hpp"

namespace gemma4 {

/// A function that the model wants called.
struct ToolCall {
  std::optional<std::string> id = {};  ///< what an answer refers to
  std::string name;
  JsonValue arguments = {};  ///< an object, or null for none
};

/// What a function gave, where it stands in the message that called it.
struct ToolResponse {
  std::string name;  ///< empty: unknown
  JsonValue response = {};
};

/// One message of a dialogue. Roles: `system` (or `developer`), `user`, `model` (or `assistant`), `tool`.
struct ChatMessage {
  std::string role = {};
  std::string content = {};
  std::vector<std::string> parts = {};  ///< the content as a list of texts; `content` is not read where there are some
  std::string reasoning = {};           ///< the thoughts in front of an answer
  std::vector<ToolCall> tool_calls = {};
  std::vector<ToolResponse> tool_responses = {};  ///< where they do not come as messages of role `tool`
  std::optional<std::string> tool_call_id = {};   ///< of a tool's message: the call that it answers
  std::string name = {};                          ///< of a tool's message: the function
  std::optional<JsonValue> value = {};            ///< of a tool's message: what it gave, where that is no text
};

[[nodiscard]] inline bool is_model_role(std::string_view role) {
  return role == "model" || role == "assistant";
}
[[nodiscard]] inline bool is_system_role(std::string_view role) {
  return role == "system" || role == "developer";
}

namespace detail {

/// Reads one message; every error names the file, the message and the key.
class ChatMessageReader {
 public:
  ChatMessageReader(const JsonValue& json, std::string where) : where_(std::move(where)) {
    check(json.object() != nullptr, "the message", "an object", json.kind());
    object_ = json.object();
  }

  [[nodiscard]] ChatMessage read() const {
    check_keys(*object_, {"role", "content", "name", "reasoning", "reasoning_content", "tool_calls", "tool_call_id",
                          "tool_responses"});
    ChatMessage message{.role = text(*object_, "role")};
    const bool known =
        message.role == "user" || message.role == "tool" || is_model_role(message.role) || is_system_role(message.role);
    require_format(known, where_, ": role is '", printable(message.role),
                   "', expected system, developer, user, model, assistant or tool");
    message.name = text(*object_, "name");
    message.reasoning = text(*object_, "reasoning");
    if (message.reasoning.empty()) message.reasoning = text(*object_, "reasoning_content");
    message.tool_call_id = optional_text(*object_, "tool_call_id");
    for (const JsonValue& call : list(*object_, "tool_calls")) message.tool_calls.push_back(read_call(call));
    for (const JsonValue& response : list(*object_, "tool_responses")) {
      message.tool_responses.push_back(read_response(response));
    }
    read_content(message);
    const bool calls = !message.tool_calls.empty() || !message.tool_responses.empty() || !message.reasoning.empty();
    require_format(!calls || is_model_role(message.role), where_, ": a message of role ", message.role,
                   " has thoughts, tool_calls or tool_responses, which only the model's have");
    return message;
  }

 private:
  using Object = JsonValue::Object;

  template <class TFound>
  void check(bool holds, std::string_view key, std::string_view expected, const TFound& found) const {
    require_format(holds, where_, ": ", key, " is ", found, ", expected ", expected);
  }

  /// nullptr for a key that is not there or null.
  [[nodiscard]] static const JsonValue* value(const Object& object, std::string_view key) {
    const auto found = object.find(key);
    return found == object.end() || found->second.is_null() ? nullptr : &found->second;
  }

  /// What is not known is refused where it says something: a key may be null, or an empty list.
  void check_keys(const Object& object, std::initializer_list<std::string_view> known) const {
    for (const auto& [key, found] : object) {
      const bool is_empty = found.is_null() || (found.array() != nullptr && found.array()->empty());
      require_format(is_empty || std::ranges::find(known, key) != known.end(), where_, ": '", printable(key),
                     "' is not known here; what is: ", join(known));
    }
  }
  [[nodiscard]] static std::string join(std::initializer_list<std::string_view> names) {
    std::string joined;
    for (const std::string_view name : names) joined += concat(joined.empty() ? "" : ", ", name);
    return joined;
  }

  [[nodiscard]] std::optional<std::string> optional_text(const Object& object, std::string_view key) const {
    const JsonValue* const found = value(object, key);
    if (found == nullptr) return std::nullopt;
    check(found->string() != nullptr, key, "a text", found->kind());
    return *found->string();
  }
  [[nodiscard]] std::string text(const Object& object, std::string_view key) const {
    return optional_text(object, key).value_or("");
  }
  [[nodiscard]] JsonValue::Array list(const Object& object, std::string_view key) const {
    const JsonValue* const found = value(object, key);
    if (found == nullptr) return {};
    check(found->array() != nullptr, key, "a list", found->kind());
    return *found->array();
  }
  [[nodiscard]] const Object& object(const JsonValue& json, std::string_view key) const {
    check(json.object() != nullptr, key, "an object", json.kind());
    return *json.object();
  }

  void read_content(ChatMessage& message) const {
    const auto found = object_->find("content");
    const bool is_tool = message.role == "tool";
    if (found == object_->end() || found->second.is_null()) {
      if (is_tool) message.value = JsonValue();
    } else if (found->second.string() != nullptr) {
      message.content = *found->second.string();
    } else if (found->second.array() != nullptr) {
      for (const JsonValue& part : *found->second.array()) message.parts.push_back(read_part(part));
      if (!is_tool) return;
      for (const std::string& part : std::exchange(message.parts, {})) message.content += part;
    } else {
      const bool is_value = is_tool && found->second.object() == nullptr;
      check(is_value, "content", "a text, null, or a list of {\"type\": \"text\", \"text\": ...}",
            found->second.kind());
      message.value = found->second;
    }
  }

  [[nodiscard]] std::string read_part(const JsonValue& json) const {
    const Object& part = object(json, "a part of content");
    const std::string type = text(part, "type");
    require_format(type == "text", where_, ": a part of content has type '", printable(type),
                   "', expected 'text': this model reads text alone, no images, sound or video");
    return text(part, "text");
  }

  [[nodiscard]] ToolCall read_call(const JsonValue& json) const {
    const Object& call = object(json, "a tool call");
    const JsonValue* const found = value(call, "function");
    check(found != nullptr, "function of a tool call", "an object", "not there");
    const Object& function = object(*found, "function of a tool call");
    ToolCall result{.id = optional_text(call, "id"), .name = text(function, "name")};
    require_format(!result.name.empty(), where_, ": a tool call has no function name");
    const auto arguments = function.find("arguments");
    check(arguments != function.end(), concat("arguments of ", printable(result.name)), "an object", "not there");
    result.arguments = arguments->second;
    if (const std::string* const spelled = result.arguments.string()) {  // JSON inside JSON, as some programs log it
      result.arguments = parse_json(*spelled, concat(where_, ": arguments of ", printable(result.name)));
    }
    check(result.arguments.object() != nullptr || result.arguments.is_null(),
          concat("arguments of ", printable(result.name)), "an object or null", result.arguments.kind());
    return result;
  }

  [[nodiscard]] ToolResponse read_response(const JsonValue& json) const {
    const Object& object_of = object(json, "a tool response");
    const auto found = object_of.find("response");
    check(found != object_of.end(), "response of a tool response", "a value", "not there");
    return {text(object_of, "name"), found->second};
  }

  std::string where_;
  const Object* object_ = nullptr;
};

}  // namespace detail

/// The messages of a dialogue from JSON: a list of objects, or an object whose `messages` is one. As servers of the
/// usual kind take them: role, content (a text, null, or a list of text parts), reasoning (or reasoning_content),
/// tool_calls, tool_call_id and name; tool_responses inside a message. A repeated or unknown key is refused, unless it
/// is null.
/// @param source the file's name, for messages
/// @throws FormatError naming the file, the message, the key, what was expected and what was found
[[nodiscard]] inline std::vector<ChatMessage> chat_messages(const JsonValue& json, const std::string& source) {
  const JsonValue* list = &json;
  if (json.object() != nullptr) {
    for (const auto& [key, value] : *json.object()) {
      require_format(key == "messages" || value.is_null(), source, ": '", detail::printable(key),
                     "' is not known beside messages");
    }
    const auto found = json.object()->find("messages");
    require_format(found != json.object()->end(), source, ": expected a list of messages, found an object without one");
    list = &found->second;
  }
  require_format(list->array() != nullptr, source, ": expected a list of messages, found ", list->kind());
  std::vector<ChatMessage> messages;
  for (const JsonValue& message : *list->array()) {
    messages.push_back(detail::ChatMessageReader(message, concat(source, ": message ", messages.size())).read());
  }
  return messages;
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#include "gemma4/text/chat_message.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace {

using namespace gemma4;

std::vector<ChatMessage> read(const std::string& json) {
  return chat_messages(parse_json(json, "file"), "file");
}

std::string refusal(const std::string& json) {
  try {
    (void)read(json);
  } catch (const FormatError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(ChatMessage, ReadsWhatServersTake) {
  const auto messages = read(R"({"messages": [
    {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "user", "content": "Weather?", "name": "me", "refusal": null, "annotations": []},
    {"role": "assistant", "content": null, "reasoning_content": "why",
     "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "tool", "tool_call_id": "2"}], "tools": null})");
  ASSERT_EQ(messages.size(), 5U);
  EXPECT_EQ(messages[0].parts, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(messages[1].content, "Weather?");
  EXPECT_EQ(messages[2].reasoning, "why");
  EXPECT_EQ(messages[2].content, "");
  ASSERT_EQ(messages[2].tool_calls.size(), 1U);
  EXPECT_EQ(messages[2].tool_calls[0].id, "1");
  ASSERT_NE(messages[2].tool_calls[0].arguments.object(), nullptr) << "JSON inside JSON is read";
  EXPECT_EQ(messages[2].tool_calls[0].arguments.object()->at("x").number_text()->c_str(), std::string("1"));
  EXPECT_EQ(messages[3].content, "ab");
  EXPECT_FALSE(messages[3].value.has_value());
  ASSERT_TRUE(messages[4].value.has_value());
  EXPECT_TRUE(messages[4].value->is_null());
}

TEST(ChatMessage, WhatIsNotKnownIsRefusedByName) {
  struct Case {
    std::string json, refusal;
  };
  const std::string call = R"([{"role": "assistant", "tool_calls": [)";
  for (const Case& bad : std::vector<Case>{
           {"5", "file: expected a list of messages, found a number"},
           {R"({"model": "x"})", "file: 'model' is not known beside messages"},
           {R"({"messages": [], "tools": [1]})", "file: 'tools' is not known beside messages"},
           {"{}", "an object without one"},
           {"[1]", "file: message 0: the message is a number, expected an object"},
           {R"([{"role": "user"}, {"role": "robot"}])", "file: message 1: role is 'robot', expected system"},
           {R"([{"content": "x"}])", "file: message 0: role is ''"},
           {R"([{"role": 1}])", "role is a number, expected a text"},
           {R"([{"role": "user", "contents": "x"}])", "'contents' is not known here; what is: role, content"},
           {R"([{"role": "user", "content": 5}])", "content is a number, expected a text, null, or a list of"},
           {R"([{"role": "tool", "content": {"a": 1}}])", "content is an object, expected a text"},
           {R"([{"role": "user", "content": [{"type": "image_url", "image_url": 1}]}])", "has type 'image_url'"},
           {R"([{"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}])",
            "a message of role user has thoughts, tool_calls or tool_responses"},
           {R"([{"role": "user", "reasoning": "x"}])", "which only the model's have"},
           {call + R"({"id": "1"}]}])", "function of a tool call is not there, expected an object"},
           {call + R"({"function": {"arguments": {}}}]}])", "a tool call has no function name"},
           {call + R"({"function": {"name": "f"}}]}])", "arguments of f is not there"},
           {call + R"({"function": {"name": "f", "arguments": [1]}}]}])",
            "arguments of f is an array, expected an object"},
           {call + R"({"function": {"name": "f", "arguments": "{"}}]}])", "arguments of f: JSON at byte 1"},
           {call + R"({"id": 1, "function": {"name": "f", "arguments": {}}}]}])", "id is a number, expected a text"},
           {R"([{"role": "assistant", "tool_responses": [{"name": "f"}]}])",
            "response of a tool response is not there"}}) {
    EXPECT_NE(refusal(bad.json).find(bad.refusal), std::string::npos) << bad.json << ": " << refusal(bad.json);
  }
}

}  // namespace

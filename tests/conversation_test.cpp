// SPDX-License-Identifier: Apache-2.0
#include "gemma4/text/conversation.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "gemma4/text/dialogue_note.hpp"
#include "tests/support/property.hpp"
#include "tests/support/toy_vocabulary.hpp"

namespace {

using namespace gemma4;
using Ids = std::vector<std::int32_t>;

const Tokenizer& toy() {
  static const Tokenizer tokenizer([] {
    VocabularyData data = testkit::toy_vocabulary();
    testkit::add_token(data, "<|think|>", TokenType::kControl);
    testkit::add_token(data, "<|tool_response>", TokenType::kUserDefined);
    return data;
  }());
  return tokenizer;
}

std::int32_t id_of(const char* text) {
  return toy().vocabulary().find(text).value();
}

Ids markup_ids(const char* text) {
  return toy().encode(text, {.add_bos = false, .parse_special = true});
}

Ids joined(Ids left, const Ids& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

bool starts_with(const Ids& ids, const Ids& beginning) {
  return ids.size() >= beginning.size() && std::equal(beginning.begin(), beginning.end(), ids.begin());
}

Ids without(Ids ids, const Ids& piece) {
  for (auto at = ids.begin(); (at = std::search(ids.begin(), ids.end(), piece.begin(), piece.end())) != ids.end();) {
    ids.erase(at, at + static_cast<std::ptrdiff_t>(piece.size()));
  }
  return ids;
}

std::string any_text() {
  std::string text;
  for (const std::string& part : *rc::gen::container<std::vector<std::string>>(
           rc::gen::element<std::string>("a", "b", "abc", "xyz", "é", " ", "\n", "<turn|>", "<|channel>", "\u3000"))) {
    text += part;
  }
  return text;
}

/// Any tokens that are no markers, and how an answer ends: `<turn|>`, `<eos>`, or by a limit.
Ids any_answer() {
  Ids ids;
  for (const std::int32_t id : *rc::gen::container<Ids>(rc::gen::inRange<std::int32_t>(8, 280))) {
    if (!toy().vocabulary().is_marker(id)) ids.push_back(id);
  }
  const int end = *rc::gen::inRange(0, 3);
  if (end == 1) ids.push_back(id_of("<turn|>"));
  if (end == 2) ids.push_back(id_of("<eos>"));
  return ids;
}

ChatOptions any_options() {
  return {.thinking = *rc::gen::element(Thinking::kOff, Thinking::kOn, Thinking::kUnset)};
}

std::vector<ChatMessage> any_start() {
  if (*rc::gen::arbitrary<bool>()) return {};
  return {{"system", any_text()}};
}

RC_GTEST_PROP(Conversation, GoesOnWithoutReadingAnythingTwice, ()) {
  Conversation conversation(toy(), any_options(), any_start());
  Ids held;
  const int n_turn = *rc::gen::inRange(1, 5);
  for (int turn = 0; turn < n_turn; ++turn) {
    conversation.say(any_text());
    const CacheSteps steps = cache_steps(held, conversation.prompt(), 1);
    RC_ASSERT(!steps.reset);
    RC_ASSERT(steps.n_back <= 1);  // <eos> goes: a turn ends with <turn|>
    held.resize(held.size() - static_cast<std::size_t>(steps.n_back));
    held.insert(held.end(), steps.append.begin(), steps.append.end());
    RC_ASSERT(held == conversation.prompt());
    const Ids answer = any_answer();
    conversation.answer(answer);
    held = joined(held, answer);
  }
}

/// Text that a template leaves as it is, and whose tokens are those that the model would have written.
std::string plain_text() {
  std::string text = *rc::gen::element<std::string>("a", "b", "xyz");
  for (const std::string& part : *rc::gen::container<std::vector<std::string>>(
           rc::gen::element<std::string>("a", "b", "abc", "xyz", "é", " ", "\n"))) {
    text += part;
  }
  return text + "c";
}

RC_GTEST_PROP(Conversation, IsTheWholeDialogueRenderedAfresh, ()) {
  ChatOptions options = any_options();
  Conversation conversation(toy(), options, any_start());
  const int n_turn = *rc::gen::inRange(1, 5);
  for (int turn = 0; turn < n_turn; ++turn) {
    conversation.say(any_text());
    const Ids afresh = encode_chat(toy(), conversation.messages(), options);
    if (options.thinking == Thinking::kOff) {  // all but the empty thoughts, of which the template shows the last
      const Ids thought = markup_ids("<|channel>thought\n<channel|>");
      RC_ASSERT(without(conversation.prompt(), thought) == without(afresh, thought));
    } else {
      RC_ASSERT(conversation.prompt() == afresh);
    }
    Ids answer = toy().encode(plain_text(), {.add_bos = false});
    if (*rc::gen::arbitrary<bool>()) answer.push_back(id_of("<turn|>"));
    conversation.answer(answer);
  }
}

TEST(Conversation, BlanksOfAnAnswerStayAsTheModelWroteThem) {  // where going on is not rendering afresh
  Conversation conversation(toy(), {.thinking = Thinking::kUnset});
  conversation.say("a");
  conversation.answer(toy().encode(" b ", {.add_bos = false}));
  conversation.say("c");
  EXPECT_EQ(toy().decode(conversation.prompt()),
            "<bos><|turn>user\na<turn|>\n<|turn>model\n b <turn|>\n<|turn>user\nc<turn|>\n<|turn>model\n");
  EXPECT_NE(conversation.prompt(), encode_chat(toy(), conversation.messages(), {.thinking = Thinking::kUnset}));
}

RC_GTEST_PROP(Conversation, ThoughtsOfEarlierTurnsAreDropped, ()) {
  const ChatOptions options{.thinking = *rc::gen::element(Thinking::kOff, Thinking::kOn)};
  Conversation conversation(toy(), options, any_start());
  conversation.say(any_text());
  const Ids first = conversation.prompt();
  const Ids thought = joined(markup_ids("<|channel>thought\n"), toy().encode("ab", {.add_bos = false}));
  const bool closes = *rc::gen::arbitrary<bool>();  // or was interrupted
  const Ids answer = closes ? joined(joined(thought, {id_of("<channel|>")}), any_answer()) : thought;
  conversation.answer(answer);
  RC_ASSERT(conversation.has_thoughts());
  conversation.say(any_text());
  RC_ASSERT(conversation.prompt() == encode_chat(toy(), conversation.messages(), options));
  RC_ASSERT(std::ranges::count(conversation.prompt(), id_of("<|channel>")) == (options.thinking == Thinking::kOff));
  const Ids held = joined(first, answer);  // a cache that cannot go back so far reads all of it again
  const CacheSteps steps = cache_steps(held, conversation.prompt(), 1);
  RC_ASSERT(steps.reset);
  RC_ASSERT(steps.append.size() == conversation.prompt().size());
}

TEST(Conversation, ThoughtsStayWhereThatIsAsked) {
  Conversation conversation(toy(), {.thinking = Thinking::kOn}, {}, true);
  conversation.say("a");
  const Ids read = joined(conversation.prompt(), markup_ids("<|channel>thought\nb<channel|>c<turn|>"));
  conversation.answer(markup_ids("<|channel>thought\nb<channel|>c<turn|>"));
  conversation.say("ab");
  EXPECT_TRUE(starts_with(conversation.prompt(), read));
}

TEST(Conversation, AnEmptyThoughtOfTheModelIsNone) {
  Conversation conversation(toy(), {.thinking = Thinking::kOn});
  conversation.say("a");
  conversation.answer(markup_ids("<|channel>thought\n<channel|>c"));
  EXPECT_FALSE(conversation.has_thoughts());
}

TEST(Conversation, AThoughtThatThePromptOpenedIsDroppedToo) {
  const ToolCall call{.id = {}, .name = "f", .arguments = JsonValue()};
  ChatMessage calls{.role = "model"};
  calls.tool_calls = {call};
  std::vector<ChatMessage> start = {{"user", "a"}, calls, {"tool", "b"}};
  VocabularyData data = testkit::toy_vocabulary();
  for (const char* marker :
       {"<|think|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|\"|>"}) {
    testkit::add_token(data, marker, TokenType::kControl);
  }
  const Tokenizer tokenizer(std::move(data));
  const ChatOptions options{.thinking = Thinking::kOn};
  Conversation conversation(tokenizer, options, start);
  EXPECT_TRUE(tokenizer.decode(conversation.prompt()).ends_with("<tool_response|><|channel>thought\n"));
  conversation.answer(tokenizer.encode("why<channel|>c<turn|>", {.add_bos = false, .parse_special = true}));
  conversation.say("ab");
  EXPECT_EQ(tokenizer.decode(conversation.prompt()).find("why"), std::string::npos);
}

TEST(Conversation, WhatWasSaidCanBeTakenBackAndAllBeForgotten) {
  Conversation conversation(toy(), {}, {{"system", "abc"}});
  conversation.say("a");
  const Ids first = conversation.prompt();
  conversation.answer(toy().encode("b", {.add_bos = false}));
  conversation.say("c");
  const Ids second = conversation.prompt();
  conversation.take_back();
  conversation.say("c");
  EXPECT_EQ(conversation.prompt(), second);
  EXPECT_NE(first, second);
  conversation.reset();
  EXPECT_EQ(conversation.messages().size(), 1U);
  EXPECT_THROW(conversation.take_back(), std::invalid_argument);
  conversation.say("a");
  EXPECT_EQ(conversation.prompt(), first);
}

TEST(Conversation, AVocabularyWithoutTheMarkersIsRefused) {
  const Tokenizer tokenizer(testkit::toy_vocabulary());  // without <|think|>
  EXPECT_NO_THROW(Conversation(tokenizer, {}));
  EXPECT_THROW(Conversation(tokenizer, {.thinking = Thinking::kOn}), FormatError);
}

RC_GTEST_PROP(CacheSteps, GiveWhatIsWantedWithTheLeastWork, ()) {
  const auto some = [] { return rc::gen::container<Ids>(rc::gen::inRange<std::int32_t>(0, 2)); };
  const Ids held = *some();
  const Ids wanted = *rc::gen::nonEmpty(some());
  const std::int64_t max_back = *rc::gen::inRange<std::int64_t>(0, 5);
  const CacheSteps steps = cache_steps(held, wanted, max_back);
  Ids now = steps.reset ? Ids() : held;
  RC_ASSERT(steps.n_back <= max_back && steps.n_back <= static_cast<std::int64_t>(now.size()));
  now.resize(now.size() - static_cast<std::size_t>(steps.n_back));
  RC_ASSERT(!steps.append.empty());
  RC_ASSERT(joined(now, Ids(steps.append.begin(), steps.append.end())) == wanted);
  if (starts_with(wanted, held) && wanted.size() > held.size()) RC_ASSERT(steps.n_back == 0 && !steps.reset);
}

/// A dialogue goes through a note, whatever bytes were said and written, and goes on as if it had not.
RC_GTEST_PROP(Conversation, GoesOnFromItsNote, ()) {
  const ChatOptions options = any_options();
  std::vector<ChatMessage> start;
  if (*rc::gen::arbitrary<bool>()) start.push_back({.role = "system", .content = any_text()});
  Conversation chat(toy(), options, start), other(toy(), options);
  Ids held = *rc::gen::element(Ids{}, Ids{9, 10, 11});
  const int n_turn = *rc::gen::inRange(0, 4);
  for (int turn = 0; turn < n_turn; ++turn) {
    chat.say(any_text() + *rc::gen::element(std::string("\"\\\x01\x1F"), std::string("\xFF\xC3"), std::string()));
    const Ids answer = any_answer();
    held = joined(chat.prompt(), answer);
    chat.answer(answer);
  }
  other.say(any_text());
  const std::string note = dialogue_note(chat.state(held));
  other.resume(parse_dialogue_note(note, "a", static_cast<std::int64_t>(held.size())), held);
  RC_ASSERT(other.prompt() == chat.prompt());
  RC_ASSERT(other.messages().size() == chat.messages().size());
  for (std::size_t i = 0; i < chat.messages().size(); ++i) {
    RC_ASSERT(other.messages()[i].role == chat.messages()[i].role);
    RC_ASSERT(other.messages()[i].content == chat.messages()[i].content);
  }
  const std::string next = any_text();
  chat.say(next);
  other.say(next);
  RC_ASSERT(other.prompt() == chat.prompt());
}

TEST(Conversation, ANoteThatIsNoneIsRefused) {
  const auto refused = [](const std::string& note) -> std::string {
    try {
      (void)parse_dialogue_note(note, "a.session", 5);
    } catch (const FormatError& error) {
      return error.what();
    }
    return "taken";
  };
  EXPECT_EQ(refused(R"({"messages": [], "read": 5, "closed": true})"), "taken");
  EXPECT_NE(refused("").find("a.session: session.note: no dialogue"), std::string::npos);
  for (const char* note :
       {"[]", "{", R"({"read": 0, "closed": true})", R"({"messages": [], "closed": true})",
        R"({"messages": [], "read": 6, "closed": true})", R"({"messages": [], "read": -1, "closed": true})",
        R"({"messages": [], "read": 0.5, "closed": true})", R"({"messages": [], "read": "1", "closed": true})",
        R"({"messages": [], "read": 1, "closed": 1})", R"({"messages": [], "read": 1})",
        R"({"messages": [{"role": "nobody", "content": "a"}], "read": 1, "closed": true})"}) {
    EXPECT_NE(refused(note).find("a.session: session.note"), std::string::npos) << note << ": " << refused(note);
  }
  Conversation chat(toy(), {});
  EXPECT_THROW(chat.resume({.n_read = 3}, Ids{1, 2}), std::invalid_argument);
  EXPECT_THROW((void)dialogue_note({.messages = {{.role = "tool", .content = "a"}}}), std::invalid_argument);
  EXPECT_EQ(chat.state(Ids{}).n_read, 0);
}

}  // namespace

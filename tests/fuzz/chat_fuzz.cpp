// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any JSON is read as messages or refused; whatever is read is written by the template, in which no
// text that somebody wrote makes a marker; a conversation of any texts and any answers goes on from what was read.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/json.hpp"
#include "gemma4/text/chat_message.hpp"
#include "gemma4/text/chat_template.hpp"
#include "gemma4/text/conversation.hpp"
#include "gemma4/text/markers.hpp"
#include "gemma4/text/tokenizer.hpp"
#include "tests/support/toy_vocabulary.hpp"

namespace {

using namespace gemma4;

void expect(bool holds) {
  if (!holds) __builtin_trap();
}

/// The toy vocabulary with every marker of the template; `seed` types them.
Tokenizer chat_tokenizer(std::uint8_t seed) {
  VocabularyData data = testkit::toy_vocabulary();
  constexpr TokenType kTypes[] = {TokenType::kControl, TokenType::kUserDefined, TokenType::kNormal};
  for (const std::string_view marker : kChatMarkers) {
    if (std::ranges::find(data.tokens, marker) == data.tokens.end()) testkit::add_token(data, marker);
  }
  for (std::size_t id = 0; id < data.tokens.size(); ++id) {
    const bool is_chat = std::ranges::find(kChatMarkers, data.tokens[id]) != kChatMarkers.end();
    if (is_chat) data.types[id] = static_cast<std::int32_t>(kTypes[(seed + id) % 3]);
  }
  return Tokenizer(std::move(data));
}

const Tokenizer& tokenizer_of(std::uint8_t seed) {
  static const Tokenizer tokenizers[] = {chat_tokenizer(0), chat_tokenizer(1), chat_tokenizer(2)};
  return tokenizers[seed % 3];
}

std::size_t occurrences(std::string_view text, std::string_view part) {
  std::size_t count = 0;
  for (std::size_t at = text.find(part); at != std::string_view::npos; at = text.find(part, at + part.size())) ++count;
  return count;
}

/// U+2581 and a space are one to the tokenizer.
std::string spaced(std::string text) {
  for (std::size_t at = 0; (at = text.find(kSpaceMark, at)) != std::string::npos;) {
    text.replace(at, kSpaceMark.size(), " ");
  }
  return text;
}

/// As many markers as the markup has, and the text of the rest.
void check_dialogue(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages, const ChatOptions& options) {
  const std::vector<ChatPart> parts = chat_parts(messages, options);
  std::size_t n_marker = 0;
  std::string text = "<bos>";
  for (const ChatPart& part : parts) {
    for (const std::string_view marker : kChatMarkers) n_marker += part.markup ? occurrences(part.text, marker) : 0;
    text += part.text;
  }
  const auto ids = encode_chat(tokenizer, messages, options);
  std::size_t n_found = 0;
  for (const std::int32_t id : ids) n_found += tokenizer.vocabulary().is_marker(id);
  expect(n_found == n_marker + 1);
  expect(spaced(tokenizer.decode(ids)) == spaced(text));
  ChatOptions longer = options;  // what a dialogue ends with opens the answer, and is the only difference
  longer.generate = !options.generate;
  const std::string one = chat_text(messages, options), other = chat_text(messages, longer);
  expect(options.generate ? one.starts_with(other) : other.starts_with(one));
}

void converse(const Tokenizer& tokenizer, const ChatOptions& options, std::string_view rest) {
  Conversation conversation(tokenizer, options, {});
  std::vector<std::int32_t> read;
  for (int turn = 0; turn < 8 && !rest.empty(); ++turn) {
    const std::size_t n_said = std::min<std::size_t>(rest.size(), static_cast<std::uint8_t>(rest[0]) % 24);
    conversation.say(std::string(rest.substr(0, n_said)));
    rest.remove_prefix(std::max<std::size_t>(n_said, 1));
    const CacheSteps steps = cache_steps(read, conversation.prompt(), 1);
    expect(steps.reset ? conversation.messages().size() > 2 : steps.n_back <= 1);
    read = conversation.prompt();
    const std::size_t n_answer =
        std::min<std::size_t>(rest.size(), rest.empty() ? 0 : static_cast<std::uint8_t>(rest[0]) % 16);
    std::vector<std::int32_t> answer;
    for (const char c : rest.substr(0, n_answer)) {
      const auto id = static_cast<std::int32_t>(static_cast<std::uint8_t>(c) * 7 % tokenizer.vocabulary().size());
      if (!tokenizer.is_end(id)) answer.push_back(id);
    }
    rest.remove_prefix(n_answer);
    conversation.answer(answer);
    read.insert(read.end(), answer.begin(), answer.end());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  if (size == 0) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(bytes) + 1, size - 1);
  const Tokenizer& tokenizer = tokenizer_of(bytes[0]);
  const unsigned bits = bytes[0] / 3;
  const ChatOptions options{.thinking = bits % 3 == 0   ? Thinking::kOff
                                        : bits % 3 == 1 ? Thinking::kOn
                                                        : Thinking::kUnset,
                            .generate = bits / 3 % 2 == 0,
                            .preserve_thinking = bits / 6 % 2 == 0};
  if (bits >= 60) {
    converse(tokenizer, options, rest);
    return 0;
  }
  try {
    check_dialogue(tokenizer, chat_messages(parse_json(rest, "fuzz"), "fuzz"), options);
  } catch (const FormatError&) {
  } catch (const std::invalid_argument&) {
  }
  return 0;
}

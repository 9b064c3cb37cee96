// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any text comes back from its tokens, in a fixed vocabulary and in every other that is accepted; any
// vocabulary is either accepted or refused with FormatError; any ids are either decoded or refused.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/text/chat_template.hpp"
#include "gemma4/text/id_list.hpp"
#include "gemma4/text/text_escapes.hpp"
#include "gemma4/text/tokenizer.hpp"
#include "tests/support/toy_vocabulary.hpp"

namespace {

using namespace gemma4;

/// Takes an input apart; zeros and empty strings once it is used up.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : rest_(reinterpret_cast<const char*>(data), size) {}

  [[nodiscard]] bool empty() const { return rest_.empty(); }
  std::uint8_t byte() { return take(1).empty() ? 0 : static_cast<std::uint8_t>(last_.front()); }
  std::uint32_t word() { return static_cast<std::uint32_t>(byte()) << 8 | byte(); }
  std::string_view text() { return take(byte() % 32); }
  std::string_view rest() { return std::exchange(rest_, {}); }

 private:
  std::string_view take(std::size_t count) {
    last_ = rest_.substr(0, count);
    rest_.remove_prefix(last_.size());
    return last_;
  }
  std::string_view rest_, last_;
};

/// Spaces for U+2581, which is what a vocabulary writes for a space.
std::string spaced(std::string text) {
  for (std::size_t at = 0; (at = text.find(kSpaceMark, at)) != std::string::npos;) {
    text.replace(at, kSpaceMark.size(), " ");
  }
  return text;
}

void expect(bool holds) {
  if (!holds) __builtin_trap();
}

/// With user-defined tokens that cut a U+2581 in two, the mark may come back as it was; so both sides are spaced.
void round_trip(const Tokenizer& tokenizer, std::string_view text) {
  for (const bool special : {false, true}) {
    const auto ids = tokenizer.encode(text, {.add_bos = false, .parse_special = special});
    expect(ids.size() <= 3 * text.size() + 1);
    std::string back = tokenizer.decode(ids);
    expect(spaced(back) == spaced(std::string(text)));
    for (const std::int32_t id : ids) expect(special || !tokenizer.vocabulary().is_control(id));
  }
}

void decode_any(const Tokenizer& tokenizer, Input input) {
  std::vector<std::int32_t> ids;
  while (!input.empty()) ids.push_back(static_cast<std::int32_t>(input.word()) - 1);
  try {
    static_cast<void>(tokenizer.decode(ids));
  } catch (const std::invalid_argument&) {
  }
}

VocabularyData hostile_vocabulary(Input& input) {
  VocabularyData data = testkit::toy_vocabulary();
  for (int edits = input.byte() % 16; edits > 0; --edits) {
    const std::size_t token = input.word() % data.tokens.size(), merge = input.word() % (data.merges.size() + 1);
    switch (input.byte() % 10) {
      case 0:
        testkit::add_token(data, input.text(), static_cast<TokenType>(input.byte() % 8));
        break;
      case 1:
        data.tokens[token] = input.text();
        break;
      case 2:
        data.types.resize(token);
        break;
      case 3:
        if (token < data.types.size()) data.types[token] = input.byte() % 8;
        break;
      case 4:
        data.merges.insert(data.merges.begin() + static_cast<std::ptrdiff_t>(merge), std::string(input.text()));
        break;
      case 5:
        data.merges.resize(merge);
        break;
      case 6:
        data.bos_id = static_cast<std::int64_t>(input.word()) - 2;
        break;
      case 7:
        data.eos_id = static_cast<std::int64_t>(input.word()) - 2;
        break;
      case 8: {  // two tokens, their join and the merge of it
        const std::string left = data.tokens[token], right(input.text());
        testkit::add_token(data, right);
        testkit::add_token(data, left + right, static_cast<TokenType>(1 + input.byte() % 6));
        data.merges.insert(data.merges.begin() + static_cast<std::ptrdiff_t>(merge), left + " " + right);
        break;
      }
      default:
        data.add_bos = !data.add_bos;
        data.add_space_prefix = !data.add_space_prefix;
    }
  }
  return data;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  static const Tokenizer toy(testkit::toy_vocabulary());
  Input input(bytes, size);
  const std::uint8_t mode = input.byte() % 4;
  if (mode == 0) {
    round_trip(toy, input.rest());
  } else if (mode == 1) {
    decode_any(toy, input);
  } else if (mode == 2) {
    const std::string text(input.rest());
    static_cast<void>(unescape(text));
    static_cast<void>(encode_chat(toy, std::vector<ChatMessage>{{"user", text}, {"model", text}}));
    try {
      const auto ids = parse_ids(text);
      expect(parse_ids(format_ids(ids)) == ids);
    } catch (const FormatError&) {
    }
  } else {
    try {
      const Tokenizer hostile(hostile_vocabulary(input));
      round_trip(hostile, input.rest());
    } catch (const FormatError&) {
    }
  }
  return 0;
}

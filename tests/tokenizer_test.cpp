// SPDX-License-Identifier: Apache-2.0
#include "gemma4/text/tokenizer.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/json.hpp"
#include "gemma4/text/id_list.hpp"
#include "gemma4/text/text_escapes.hpp"
#include "tests/support/property.hpp"
#include "tests/support/text_file.hpp"
#include "tests/support/toy_vocabulary.hpp"

namespace {

using namespace gemma4;
using testkit::toy_vocabulary;
using Ids = std::vector<std::int32_t>;

const std::filesystem::path kData = GEMMA4_TEST_DATA;
constexpr EncodeOptions kPlain{.add_bos = false, .parse_special = false};
constexpr EncodeOptions kSpecial{.add_bos = false, .parse_special = true};

VocabularyData file_vocabulary(const std::string& path) {
  return vocabulary_data(GgufFile::open(kData / path));
}
const VocabularyData& nano_data() {
  static const VocabularyData data = file_vocabulary("nano/nano-Q4_K_M.gguf");
  return data;
}
const Tokenizer& nano() {
  static const Tokenizer tokenizer(nano_data());
  return tokenizer;
}

std::string printed(const Ids& ids) {
  return format_ids(ids) + "\n";
}

std::string replaced(std::string text, std::string_view from, std::string_view to) {
  for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
  return text;
}

/// What decode(encode(text)) promises: U+2581 is a space.
std::string round_trip(const std::string& text) {
  return replaced(text, kSpaceMark, " ");
}

// ---- another implementation, with nothing clever in it: strings, quadratic, no ids until the end

struct Oracle {
  explicit Oracle(const VocabularyData& data) : data(data) {
    for (std::size_t i = 0; i < data.tokens.size(); ++i) ids[data.tokens[i]] = static_cast<std::int32_t>(i);
    for (std::size_t rank = 0; rank < data.merges.size(); ++rank) {
      const std::size_t space = data.merges[rank].find(' ');
      ranks[{data.merges[rank].substr(0, space), data.merges[rank].substr(space + 1)}] = rank;
    }
  }

  [[nodiscard]] bool is_user_defined(const std::string& text) const {
    const auto found = ids.find(text);
    return found != ids.end() && data.types[static_cast<std::size_t>(found->second)] == 4;
  }

  /// Valid UTF-8 only.
  [[nodiscard]] Ids encode(const std::string& text) const {
    Ids out;
    std::string plain;
    for (std::size_t at = 0; at < text.size();) {
      std::size_t longest = 0;
      for (std::size_t bytes = 1; at + bytes <= text.size() && bytes < 32; ++bytes) {
        if (is_user_defined(text.substr(at, bytes))) longest = bytes;
      }
      if (longest == 0) {
        plain += text[at++];
        continue;
      }
      encode_plain(std::exchange(plain, {}), out);
      out.push_back(ids.at(text.substr(at, longest)));
      at += longest;
    }
    encode_plain(plain, out);
    return out;
  }

  void encode_plain(const std::string& plain, Ids& out) const {
    std::vector<std::string> pieces;
    for (const char c : replaced(plain, " ", kSpaceMark)) {
      if (pieces.empty() || (c == '\n') != (pieces.back().back() == '\n')) pieces.emplace_back();
      pieces.back() += c;
    }
    for (const std::string& piece : pieces) {
      const bool whole = piece[0] == '\n' && ids.contains(piece);
      for (const std::string& symbol : whole ? std::vector{piece} : merged(piece)) emit(symbol, out);
    }
  }

  [[nodiscard]] std::vector<std::string> merged(const std::string& piece) const {
    std::vector<std::string> symbols;
    for (const char c : piece) {
      const bool continues = (static_cast<unsigned char>(c) & 0xC0) == 0x80 && !symbols.empty();
      if (!continues) symbols.emplace_back();
      symbols.back() += c;
    }
    while (true) {
      std::size_t best = 0, best_rank = std::numeric_limits<std::size_t>::max();
      for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
        const auto found = ranks.find({symbols[i], symbols[i + 1]});
        if (found != ranks.end() && found->second < best_rank) {
          best = i;
          best_rank = found->second;
        }
      }
      if (best_rank == std::numeric_limits<std::size_t>::max()) return symbols;
      symbols[best] += symbols[best + 1];
      symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    }
  }

  void emit(const std::string& symbol, Ids& out) const {
    if (const auto found = ids.find(symbol); found != ids.end()) {
      out.push_back(found->second);
      return;
    }
    for (const char c : symbol) {
      constexpr std::string_view kDigits = "0123456789ABCDEF";
      const auto byte = static_cast<unsigned char>(c);
      out.push_back(ids.at(std::string("<0x") + kDigits[byte / 16] + kDigits[byte % 16] + ">"));
    }
  }

  const VocabularyData& data;
  std::map<std::string, std::int32_t> ids;
  std::map<std::pair<std::string, std::string>, std::size_t> ranks;
};

// ---- texts

/// Fragments of every kind that the tokenizer treats in its own way, valid UTF-8.
rc::Gen<std::string> utf8_text() {
  const auto fragment = rc::gen::element<std::string>(
      " ", "  ", "\n", "\n\n\n", "\n\n\n\n\n\n\n", "\t", "\r\n", "def ", "return", "self.", "import os", "        ",
      "é", "e\u0301", "你好", "\U0001F600", "\u2581", "\u2581\u2581", "<|turn>", "<turn|>", "<bos>", "<|channel>",
      "<0x41>", "x", "0123", "\"\"\"");
  return rc::gen::map(rc::gen::container<std::vector<std::string>>(fragment),
                      [](const std::vector<std::string>& parts) {
                        std::string text;
                        for (const std::string& part : parts) text += part;
                        return text;
                      });
}

/// Bytes that mostly are no UTF-8: any bytes, and cut pieces of valid text.
rc::Gen<std::string> byte_text() {
  return rc::gen::oneOf(
      rc::gen::arbitrary<std::string>(),
      rc::gen::map(rc::gen::pair(utf8_text(), rc::gen::inRange<std::size_t>(0, 8)),
                   [](const std::pair<std::string, std::size_t>& cut) {
                     return cut.first.substr(std::min(cut.second, cut.first.size()));
                   }),
      rc::gen::container<std::string>(rc::gen::element('\xE2', '\x96', '\x81', '\xF0', '\xC3', ' ', 'a')));
}

// ---- ids that other implementations gave

TEST(Tokenizer, GoldenNanoTextHasEveryId) {
  const std::string text = unescape(testkit::read_text(kData / "tokenizer/nano-text.txt"));
  const std::string golden = testkit::read_text(kData / "tokenizer/nano-text.ids");
  EXPECT_EQ(printed(nano().encode(text, {.add_bos = {}, .parse_special = true})), golden);
  EXPECT_EQ(nano().decode(nano().encode(text, kSpecial)), text);
  // Each part of the recipe counts: special tokens, the begin of sequence, the escapes of the peer's command line.
  EXPECT_NE(printed(nano().encode(text)), golden);
  EXPECT_NE(printed(nano().encode(text, kSpecial)), golden);
  EXPECT_NE(printed(nano().encode(testkit::read_text(kData / "tokenizer/nano-text.txt"), {{}, true})), golden);
}

TEST(Tokenizer, GoldenTinyHasEveryIdAndText) {
  const Tokenizer tiny(file_vocabulary("tiny/tiny-a-Q4_K_M.gguf"));
  const JsonValue cases = parse_json(testkit::read_text(kData / "tokenizer/tiny-golden.json"), "tiny-golden.json");
  ASSERT_GE(cases.array()->size(), 14u);
  for (const JsonValue& item : *cases.array()) {
    const JsonValue::Object& golden = *item.object();
    const std::string& text = *golden.at("text").string();
    SCOPED_TRACE(text);
    Ids expected;
    for (const JsonValue& id : *golden.at("ids").array()) expected.push_back(static_cast<std::int32_t>(*id.number()));
    const Ids ids = tiny.encode(text, kSpecial);
    EXPECT_EQ(ids, expected);
    EXPECT_EQ(tiny.decode(ids), *golden.at("decoded").string());
  }
}

// ---- laws

RC_GTEST_PROP(Tokenizer, AnyBytesComeBack, ()) {
  const std::string text = *byte_text();
  RC_ASSERT(nano().decode(nano().encode(text, kPlain)) == round_trip(text));
}

RC_GTEST_PROP(Tokenizer, AnyUtf8ComesBackWithSpecialTokensParsed, ()) {
  const std::string text = *utf8_text();
  RC_ASSERT(nano().decode(nano().encode(text, kSpecial)) == round_trip(text));
}

TEST(Tokenizer, BytesDoNotComeBackWithoutByteTokens) {
  Ids ids = nano().encode("caf\xC3 你", kPlain);
  std::erase_if(ids, [](std::int32_t id) { return nano().vocabulary().type(id) == TokenType::kByte; });
  EXPECT_NE(nano().decode(ids), "caf\xC3 你");
}

RC_GTEST_PROP(Tokenizer, MergesAsTheObviousImplementationDoes, ()) {
  static const Oracle oracle(nano_data());
  const std::string text = *utf8_text();
  RC_ASSERT(nano().encode(text, kPlain) == oracle.encode(text));
}

RC_GTEST_PROP(Tokenizer, MergesAsTheObviousImplementationDoesInAToyVocabulary, ()) {
  static const VocabularyData data = toy_vocabulary();
  static const Oracle oracle(data);
  static const Tokenizer toy(data);
  const std::string text = *rc::gen::map(rc::gen::container<std::vector<std::string>>(rc::gen::element<std::string>(
                                             "a", "a", "b", "c", "x", "y", "z", " ", "\n", "é", "你", "ü")),
                                         [](const std::vector<std::string>& parts) {
                                           std::string joined;
                                           for (const std::string& part : parts) joined += part;
                                           return joined;
                                         });
  RC_ASSERT(toy.encode(text, kPlain) == oracle.encode(text));
}

TEST(Tokenizer, TheRankOfMergesDecides) {
  const std::string text = testkit::read_text(kData / "tokenizer/nano-text.txt").substr(0, 2000);
  const Ids ids = nano().encode(text, kPlain);
  EXPECT_EQ(ids, Oracle(nano_data()).encode(text));
  VocabularyData reversed = nano_data();
  std::reverse(reversed.merges.begin(), reversed.merges.end());
  EXPECT_NE(ids, Oracle(reversed).encode(text));
  EXPECT_NE(ids, Tokenizer(reversed).encode(text, kPlain));
}

RC_GTEST_PROP(Tokenizer, TextSplitsWhereNewlinesBeginAndEnd, ()) {
  const std::string left = "x" + *utf8_text() + "x", right = "x" + *utf8_text() + "x";
  const std::string newlines(*rc::gen::inRange<std::size_t>(1, 12), '\n');
  Ids parts = nano().encode(left, kPlain);
  for (const std::string& part : {newlines, right}) {
    const Ids ids = nano().encode(part, kPlain);
    parts.insert(parts.end(), ids.begin(), ids.end());
  }
  RC_ASSERT(nano().encode(left + newlines + right, kPlain) == parts);
}

TEST(Tokenizer, TextDoesNotSplitElsewhere) {
  Ids parts = nano().encode("retu", kPlain);
  const Ids rest = nano().encode("rn", kPlain);
  parts.insert(parts.end(), rest.begin(), rest.end());
  EXPECT_NE(nano().encode("return", kPlain), parts);
}

RC_GTEST_PROP(Tokenizer, PlainTextNeverBecomesAControlToken, ()) {
  for (const std::int32_t id : nano().encode(*utf8_text(), kPlain)) RC_ASSERT(!nano().vocabulary().is_control(id));
}

TEST(Tokenizer, ParsedTextBecomesControlTokens) {
  EXPECT_EQ(nano().encode("<|turn>user", kSpecial).front(), 5);
  EXPECT_GT(nano().encode("<|turn>user", kPlain).front(), 255);
}

TEST(Tokenizer, ControlTokensAreSkippedWhenAsked) {
  const Ids ids = nano().encode("<bos>a<turn|> b<|channel>", kSpecial);
  EXPECT_EQ(nano().decode(ids), "<bos>a<turn|> b<|channel>");
  EXPECT_EQ(nano().decode(ids, {.skip_control = true}), "a b<|channel>");
}

TEST(Tokenizer, PiecesJoinToTheDecodedText) {
  const std::string text = "na\u00EFve 你好 \U0001F600";
  std::string joined;
  for (const std::int32_t id : nano().encode(text, kPlain)) joined += nano().decode_piece(id);
  EXPECT_EQ(joined, text);
}

TEST(Tokenizer, AnIdOutsideTheVocabularyIsRefused) {
  for (const std::int32_t id : {-1, 4096}) {
    EXPECT_THROW(static_cast<void>(nano().decode(Ids{5, id})), std::invalid_argument);
    EXPECT_THROW(static_cast<void>(nano().decode_piece(id)), std::invalid_argument);
  }
  try {
    static_cast<void>(nano().decode(Ids{5, 4096}));
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "tokenizer: id 4096 at place 1, the vocabulary has 4096 tokens");
  }
}

}  // namespace

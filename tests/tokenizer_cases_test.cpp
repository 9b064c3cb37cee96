// SPDX-License-Identifier: Apache-2.0
#include "gemma4/text/tokenizer.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tests/support/toy_vocabulary.hpp"

/// The tokenizer on a small vocabulary, case by case: what plain text never becomes, and bytes that are no UTF-8.
namespace {

using namespace gemma4;
using testkit::add_token;
using testkit::toy_vocabulary;
using Ids = std::vector<std::int32_t>;

constexpr EncodeOptions kPlain{.add_bos = false, .parse_special = false};
constexpr EncodeOptions kSpecial{.add_bos = false, .parse_special = true};

/// A vocabulary in which merges of single letters, which do apply, end in the token `text` of any type:
/// "<" "b" "o" "s" ">" becomes "<b", "<bo", "<bos", "<bos>".
VocabularyData with_merges_to(const std::string& text, TokenType type) {
  VocabularyData data = toy_vocabulary();
  const auto known = [&](const std::string& token) {
    return std::find(data.tokens.begin(), data.tokens.end(), token) != data.tokens.end();
  };
  for (const char c : text) {
    if (!known(std::string{c})) add_token(data, std::string{c});
  }
  for (std::size_t bytes = 2; bytes <= text.size(); ++bytes) {
    const std::string left = text.substr(0, bytes - 1), joined = text.substr(0, bytes);
    if (!known(joined)) add_token(data, joined, bytes == text.size() ? type : TokenType::kNormal);
    data.merges.push_back(left + " " + text[bytes - 1]);
  }
  return data;
}

TEST(Tokenizer, AMergeThatSpellsAControlOrByteTokenIsNotUsed) {
  const std::pair<const char*, TokenType> spelt[] = {{"<bos>", TokenType::kControl},
                                                     {"<turn|>", TokenType::kControl},
                                                     {"<|turn>", TokenType::kControl},
                                                     {"<unk>", TokenType::kUnknown},
                                                     {"<0x41>", TokenType::kByte}};
  for (const auto& [text, type] : spelt) {
    const Tokenizer tokenizer(with_merges_to(text, type));
    const std::int32_t id = *tokenizer.vocabulary().find(text);
    ASSERT_EQ(tokenizer.vocabulary().type(id), type) << text;
    const std::string all_but_one(std::string_view(text).substr(0, std::string_view(text).size() - 1));
    const Ids expected = {*tokenizer.vocabulary().find(all_but_one), *tokenizer.vocabulary().find(">")};
    EXPECT_EQ(tokenizer.encode(text, kPlain), expected) << text << ": every merge but the last";
    EXPECT_EQ(tokenizer.decode(expected), text);
    for (const char* around : {"a", "\n", " "}) {
      for (const std::int32_t found : tokenizer.encode(around + std::string(text) + around + text, kPlain)) {
        EXPECT_NE(found, id) << text;
      }
    }
  }
  // The control: the same merges to a normal or an unused token are used.
  for (const TokenType type : {TokenType::kNormal, TokenType::kUnused}) {
    const Tokenizer tokenizer(with_merges_to("<new>", type));
    EXPECT_EQ(tokenizer.encode("<new>", kPlain), (Ids{*tokenizer.vocabulary().find("<new>")}));
  }
}

TEST(Tokenizer, ALoneTokenThatIsControlOrByteIsNotPlainText) {
  // One code point, and a run of newlines: neither is merged, both are looked up.
  for (const TokenType type : {TokenType::kControl, TokenType::kUnknown}) {
    VocabularyData data = toy_vocabulary();
    add_token(data, "ß", type);
    add_token(data, "\n\n\n\n", type);
    const Tokenizer tokenizer(data);
    const auto byte = [&](std::uint8_t value) { return tokenizer.vocabulary().byte_token(value); };
    const auto id = [&](std::string_view text) { return *tokenizer.vocabulary().find(text); };
    EXPECT_EQ(tokenizer.encode("ß", kPlain), (Ids{byte(0xC3), byte(0x9F)}));
    EXPECT_EQ(tokenizer.encode("\n\n\n\n", kPlain), (Ids{id("\n\n"), id("\n\n")}));
    EXPECT_EQ(tokenizer.encode("ß", kSpecial), (Ids{id("ß")})) << "parsed, it is the token";
  }
}

// ---- cases

TEST(Tokenizer, TheEarliestThenTheLongestUserDefinedTokenWins) {
  const Tokenizer toy(toy_vocabulary());
  const auto id = [&](std::string_view text) { return *toy.vocabulary().find(text); };
  EXPECT_EQ(toy.encode("xyzab", kPlain), (Ids{id("xyz"), id("ab")}));
  EXPECT_EQ(toy.encode("yzab", kPlain), (Ids{id("yzab")}));
  EXPECT_EQ(toy.encode("axya", kPlain), (Ids{id("a"), id("xy"), id("a")}));
}

TEST(Tokenizer, EqualMergesGoLeftToRight) {
  const Tokenizer toy(toy_vocabulary());
  const auto id = [&](std::string_view text) { return *toy.vocabulary().find(text); };
  EXPECT_EQ(toy.encode("aaa", kPlain), (Ids{id("aa"), id("a")}));
  EXPECT_EQ(toy.encode("aaaaaa", kPlain), (Ids{id("aaaa"), id("aa")}));
  EXPECT_EQ(toy.encode("abc", kPlain), (Ids{id("abc")}));  // "b c" first, then "a bc"
}

TEST(Tokenizer, ARunOfNewlinesThatIsATokenStaysWhole) {
  const Tokenizer toy(toy_vocabulary());  // no merge makes three newlines
  const auto id = [&](std::string_view text) { return *toy.vocabulary().find(text); };
  EXPECT_EQ(toy.encode("a\n\n\na", kPlain), (Ids{id("a"), id("\n\n\n"), id("a")}));
  EXPECT_EQ(toy.encode("\n\n\n\n\n", kPlain), (Ids{id("\n\n"), id("\n\n"), id("\n")}));
}

TEST(Tokenizer, ACodePointOutsideTheVocabularyGivesItsBytes) {
  const Tokenizer toy(toy_vocabulary());
  const auto byte = [&](std::uint8_t value) { return toy.vocabulary().byte_token(value); };
  EXPECT_EQ(toy.encode("ü", kPlain), (Ids{byte(0xC3), byte(0xBC)}));
  EXPECT_EQ(toy.encode("a\xE4\xBD", kPlain), (Ids{*toy.vocabulary().find("a"), byte(0xE4), byte(0xBD)}));
  EXPECT_EQ(toy.encode(std::string_view("\0", 1), kPlain), (Ids{byte(0)}));
}

TEST(Tokenizer, WhatIsNoUtf8GivesItsBytesAndNoOther) {
  // A lead byte without all of its continuation bytes stands for itself alone, in the middle and at the end of a text:
  // what follows it is read as if it were not there.
  const Tokenizer toy(toy_vocabulary());
  const auto byte = [&](char value) { return toy.vocabulary().byte_token(static_cast<std::uint8_t>(value)); };
  const auto id = [&](std::string_view text) { return *toy.vocabulary().find(text); };
  EXPECT_EQ(toy.encode("\xE4"
                       "a",
                       kPlain),
            (Ids{byte('\xE4'), id("a")}));
  EXPECT_EQ(toy.encode("\xF0"
                       "ab",
                       kPlain),
            (Ids{byte('\xF0'), id("ab")}));
  EXPECT_EQ(toy.encode("\xF0"
                       "abc",
                       kPlain),
            (Ids{byte('\xF0'), id("abc")}));
  EXPECT_EQ(toy.encode("\xC3"
                       "ab",
                       kPlain),
            (Ids{byte('\xC3'), id("ab")}));
  EXPECT_EQ(toy.encode("\xE4\xBD"
                       "ab",
                       kPlain),
            (Ids{byte('\xE4'), byte('\xBD'), id("ab")}));
  EXPECT_EQ(toy.encode("a\xC3", kPlain), (Ids{id("a"), byte('\xC3')}));
  EXPECT_EQ(toy.encode("a\xF0\x9F\x98", kPlain), (Ids{id("a"), byte('\xF0'), byte('\x9F'), byte('\x98')}));
  EXPECT_EQ(toy.encode("\xF0\x9F\x98"
                       "a",
                       kPlain),
            (Ids{byte('\xF0'), byte('\x9F'), byte('\x98'), id("a")}));
  // Bytes that lead nothing, before a code point that is a token.
  for (const char lead : {'\x80', '\xBF', '\xF8', '\xFF'}) {
    EXPECT_EQ(toy.encode(std::string{lead} + "é", kPlain), (Ids{byte(lead), id("é")}));
  }
  // A text cut anywhere: whole code points as before, the bytes of the cut one.
  const std::string text = "é你\U0001F600é";
  for (std::size_t cut = 0; cut <= text.size(); ++cut) {
    const std::string part = text.substr(0, cut);
    Ids expected;
    std::size_t whole = cut >= 5 ? 5 : cut >= 2 ? 2 : 0;
    if (whole > 0) expected.push_back(id(whole == 5 ? "é你" : "é"));
    for (; whole < std::min<std::size_t>(cut, 9); ++whole) expected.push_back(byte(part[whole]));
    if (cut == 10) expected.push_back(byte(part[9]));
    if (cut == 11) expected.push_back(id("é"));
    EXPECT_EQ(toy.encode(part, kPlain), expected) << "cut at " << cut;
  }
}

TEST(Tokenizer, BeginOfSequenceComesAsAskedFor) {
  VocabularyData data = toy_vocabulary();
  EXPECT_EQ(Tokenizer(data).encode(""), (Ids{2}));
  EXPECT_EQ(Tokenizer(data).encode("", kPlain), Ids{});
  data.add_bos = false;
  EXPECT_EQ(Tokenizer(data).encode(""), Ids{});
  EXPECT_EQ(Tokenizer(data).encode("", {.add_bos = true}), (Ids{2}));
  data.bos_id = -1;
  EXPECT_THROW(static_cast<void>(Tokenizer(data).encode("", {.add_bos = true})), std::invalid_argument);
}

TEST(Tokenizer, TheSpacePrefixIsAddedOnceAndTakenBack) {
  VocabularyData data = toy_vocabulary();
  data.add_space_prefix = true;
  const Tokenizer toy(data);
  const auto id = [&](std::string_view text) { return *toy.vocabulary().find(text); };
  EXPECT_EQ(toy.encode("ab", kPlain), (Ids{id(kSpaceMark), id("ab")}));
  EXPECT_EQ(toy.encode("<bos>a", kSpecial), (Ids{2, id("\u2581a")}));
  EXPECT_EQ(toy.encode("xya", kPlain), (Ids{id("xy"), id("a")}));
  for (const char* text : {"", " ", "ab", " ab", "  a", "\na", "xy a", " xy", "<bos> a", "<bos>xy a"}) {
    EXPECT_EQ(toy.decode(toy.encode(text, kSpecial)), text);
  }
}

TEST(Tokenizer, EndsAreTheEndOfSequenceAndOfATurn) {
  const Tokenizer toy(toy_vocabulary());
  EXPECT_TRUE(toy.is_end(1));
  EXPECT_TRUE(toy.is_end(5));
  EXPECT_FALSE(toy.is_end(2));
  EXPECT_FALSE(toy.is_end(300));
  EXPECT_FALSE(toy.is_end(-1));
}

TEST(Tokenizer, NoEndIsPrintedWhateverItsType) {
  for (const TokenType type : {TokenType::kNormal, TokenType::kControl, TokenType::kUserDefined, TokenType::kUnused}) {
    VocabularyData data = toy_vocabulary();
    data.types[5] = static_cast<std::int32_t>(type);
    const Tokenizer toy(data);
    EXPECT_EQ(toy.decode_piece(5, {.skip_control = true}), "");
    EXPECT_EQ(toy.decode(Ids{1, 5}, {.skip_control = true}), "");
    EXPECT_EQ(toy.decode_piece(5), "<turn|>") << "asked for everything";
  }
  VocabularyData data = toy_vocabulary();
  data.ends = {{"eos_token_ids", 8 + 'A'}};
  const Tokenizer toy(data);
  EXPECT_EQ(toy.decode_piece(8 + 'A', {.skip_control = true}), "") << "a byte that the file calls an end";
  EXPECT_EQ(toy.decode(Ids{8 + 'A', 8 + 'B'}, {.skip_control = true}), "B");
  EXPECT_EQ(toy.decode_piece(8 + 'A'), "A") << "asked for everything";
}

TEST(Tokenizer, AMillionBytesInOnePieceAreNoWork) {
  const Tokenizer toy(toy_vocabulary());
  const std::string text(1'000'000, 'a');
  const Ids ids = toy.encode(text, kPlain);
  EXPECT_EQ(ids.size(), text.size() / 4);
  EXPECT_EQ(toy.decode(ids), text);
}

TEST(Tokenizer, AMovedTokenizerWorks) {
  Tokenizer first(toy_vocabulary());
  const Tokenizer second = std::move(first);
  EXPECT_EQ(second.decode(second.encode("<bos>abc xyz", kSpecial)), "<bos>abc xyz");
}

}  // namespace

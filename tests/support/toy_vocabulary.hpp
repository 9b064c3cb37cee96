// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "gemma4/text/vocabulary.hpp"

namespace gemma4::testkit {

inline void add_token(VocabularyData& data, std::string_view text, TokenType type = TokenType::kNormal) {
  data.tokens.emplace_back(text);
  data.types.push_back(static_cast<std::int32_t>(type));
}

/// A small vocabulary in which everything that a tokenizer treats in its own way occurs. Ids: 0 <pad>, 1 <eos>, 2
/// <bos>, 3 <unk>, 4 <|turn>, 5 <turn|>, 6 <|channel> and 7 <channel|> (both user-defined), 8 to 263 the bytes, then
/// the rest.
inline VocabularyData toy_vocabulary() {
  VocabularyData data;
  data.source = "toy";
  data.bos_id = 2;
  data.eos_id = 1;
  for (const char* text : {"<pad>", "<eos>", "<bos>"}) add_token(data, text, TokenType::kControl);
  add_token(data, "<unk>", TokenType::kUnknown);
  for (const char* text : {"<|turn>", "<turn|>"}) add_token(data, text, TokenType::kControl);
  for (const char* text : {"<|channel>", "<channel|>"}) add_token(data, text, TokenType::kUserDefined);
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  for (std::size_t byte = 0; byte < 256; ++byte) {
    add_token(data, {std::string("<0x") + kDigits[byte / 16] + kDigits[byte % 16] + ">"}, TokenType::kByte);
  }
  for (const char* text : {"\n", "\n\n", "\n\n\n"}) add_token(data, text);
  for (const char* text : {"\u2581", "a", "b", "c", "é", "你"}) add_token(data, text);
  for (const char* text : {"aa", "ab", "bc", "abc", "aaaa", "\u2581a", "\u2581\u2581", "é你"}) add_token(data, text);
  for (const char* text : {"xy", "xyz", "yzab"}) add_token(data, text, TokenType::kUserDefined);
  data.merges = {"b c", "a b", "a a", "aa aa", "a bc", "\u2581 a", "\u2581 \u2581", "é 你", "\n \n"};
  return data;
}

}  // namespace gemma4::testkit

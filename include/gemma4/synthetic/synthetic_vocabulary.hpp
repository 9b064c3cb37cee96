// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/error.hpp"

namespace gemma4 {

/// A made-up vocabulary of any size with everything that a tokenizer of the gemma4 kind needs: the control tokens of
/// the chat template, a token for each byte, a small alphabet, and words that valid merges build letter by letter. Text
/// encodes to few tokens, any tokens decode to text.
struct SyntheticVocabulary {
  static constexpr std::int32_t kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kByte = 6;
  static constexpr std::int32_t kPad = 0, kEos = 1, kBos = 2, kUnk = 3;  ///< ids
  static constexpr std::int64_t kMinSize = 10 + 256 + 1;                 ///< specials, bytes, the space mark

  std::vector<std::string> tokens;
  std::vector<std::int32_t> types;
  std::vector<float> scores;
  std::vector<std::string> merges;  ///< "left right", in order of rank
};

/// @throws std::invalid_argument when `size` cannot hold the tokens that every vocabulary must have
[[nodiscard]] inline SyntheticVocabulary make_synthetic_vocabulary(std::int64_t size) {
  using V = SyntheticVocabulary;
  constexpr std::string_view kSpaceMark = "\u2581";
  require(size >= V::kMinSize, "synthetic vocabulary: ", size, " tokens, need at least ", V::kMinSize,
          " (control tokens, one token a byte, the space mark)");
  V vocabulary;
  const auto is_full = [&] { return static_cast<std::int64_t>(vocabulary.tokens.size()) == size; };
  const auto add = [&](std::string token, std::int32_t type) {
    if (is_full()) return;
    vocabulary.scores.push_back(-static_cast<float>(vocabulary.tokens.size()));
    vocabulary.tokens.push_back(std::move(token));
    vocabulary.types.push_back(type);
  };
  for (const char* name : {"<pad>", "<eos>", "<bos>"}) add(name, V::kControl);
  add("<unk>", V::kUnknown);
  for (const char* name : {"<mask>", "<|turn>", "<turn|>"}) add(name, V::kControl);
  for (const char* name : {"<|channel>", "<channel|>"}) add(name, V::kUserDefined);
  add("<|think|>", V::kControl);
  for (unsigned byte = 0; byte < 256; ++byte) {
    constexpr std::string_view kDigits = "0123456789ABCDEF";
    add(std::string("<0x") + kDigits[byte / 16] + kDigits[byte % 16] + '>', V::kByte);
  }

  std::vector<std::string> roots;  // words grow from these, in the order of their length
  add(std::string(kSpaceMark), V::kNormal);
  roots.emplace_back(kSpaceMark);
  for (const char* newlines : {"\n", "\n\n"}) add(newlines, V::kUserDefined);
  for (char letter = 'a'; letter <= 'z' && !is_full(); ++letter) {
    add(std::string(1, letter), V::kNormal);
    roots.emplace_back(1, letter);
  }
  for (char c = '!'; c <= '~'; ++c) {
    if (c < 'a' || c > 'z') add(std::string(1, c), V::kNormal);
  }
  for (std::size_t next = 0; !is_full(); ++next) {
    for (char letter = 'a'; letter <= 'z' && !is_full(); ++letter) {
      const std::string left = roots[next];  // a copy: roots grows
      add(left + letter, V::kNormal);
      vocabulary.merges.push_back(left + ' ' + letter);
      roots.push_back(left + letter);
    }
  }
  return vocabulary;
}

}  // namespace gemma4

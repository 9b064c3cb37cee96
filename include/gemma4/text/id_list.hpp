// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "gemma4/error.hpp"

/// Token ids as text: `[2, 304, 1664]`, and `[]` for none.
namespace gemma4 {

[[nodiscard]] inline std::string format_ids(std::span<const std::int32_t> ids) {
  std::string text = "[";
  for (std::size_t i = 0; i < ids.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(ids[i]);
  return text + "]";
}

/// The ids that format_ids() wrote; blanks and newlines may stand anywhere between them.
/// @throws FormatError naming the byte, what was expected there and what was found
[[nodiscard]] inline std::vector<std::int32_t> parse_ids(std::string_view text) {
  std::size_t at = 0;
  const auto peek = [&] {
    at = std::min(text.find_first_not_of(" \t\r\n", at), text.size());
    return at < text.size() ? text[at] : '\0';
  };
  const auto check = [&](bool holds, const char* expected) {
    if (holds) return;
    const std::string found = at < text.size() ? concat("'", text[at], "'") : "the end";
    require_format(false, "id list: expected ", expected, " at byte ", at, ", found ", found);
  };
  check(peek() == '[', "'['");
  ++at;
  std::vector<std::int32_t> ids;
  while (peek() != ']' || !ids.empty()) {
    std::int32_t id = 0;
    const char* const begin = text.data() + (peek(), at);
    const auto [end, error] = std::from_chars(begin, text.data() + text.size(), id);
    check(error == std::errc() && id >= 0, "an id from 0 to 2147483647");
    ids.push_back(id);
    at += static_cast<std::size_t>(end - begin);
    if (peek() == ']') break;
    check(peek() == ',', "',' or ']'");
    ++at;
  }
  ++at;
  check(peek() == '\0' && at == text.size(), "nothing after ']'");
  return ids;
}

}  // namespace gemma4

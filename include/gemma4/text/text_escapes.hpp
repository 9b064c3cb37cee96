// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace gemma4 {
namespace detail {

/// The value of a hexadecimal digit, or -1.
[[nodiscard]] constexpr int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace detail

/// Text as one types it on a command line: `\n`, `\r`, `\t`, `\'`, `\"`, `\\` and `\xHH` become the byte they name.
/// Every other backslash stays, also one at the end.
[[nodiscard]] inline std::string unescape(std::string_view text) {
  constexpr std::string_view kNames = "nrt'\"\\", kBytes = "\n\r\t'\"\\";
  std::string result;
  result.reserve(text.size());
  for (std::size_t at = 0; at < text.size(); ++at) {
    const std::string_view rest = text.substr(at + 1);
    if (text[at] != '\\' || rest.empty()) {
      result += text[at];
    } else if (const std::size_t name = kNames.find(rest[0]); name != std::string_view::npos) {
      result += kBytes[name];
      at += 1;
    } else if (rest.size() >= 3 && rest[0] == 'x' && detail::hex_digit(rest[1]) >= 0 &&
               detail::hex_digit(rest[2]) >= 0) {
      result += static_cast<char>(detail::hex_digit(rest[1]) * 16 + detail::hex_digit(rest[2]));
      at += 3;
    } else {
      result += '\\';
    }
  }
  return result;
}

}  // namespace gemma4

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/json.hpp"

/// What the chat template writes with: markup, text and values, as they stand in a turn.
namespace gemma4 {

/// A part of a dialogue: text that somebody wrote, or the markup around it.
struct ChatPart {
  std::string text;
  bool markup = false;
};

namespace detail {

/// The characters that Unicode calls white space, and the four separators of ASCII: what the template trims. NBSP
/// (U+00A0) and the ideographic space (U+3000) are among them, U+200B is not.
inline constexpr std::array<std::string_view, 29> kBlanks = {
    "\t",           "\n",           "\v",           "\f",           "\r",
    "\x1C",         "\x1D",         "\x1E",         "\x1F",         " ",
    "\xC2\x85",     "\xC2\xA0",     "\xE1\x9A\x80", "\xE2\x80\x80", "\xE2\x80\x81",
    "\xE2\x80\x82", "\xE2\x80\x83", "\xE2\x80\x84", "\xE2\x80\x85", "\xE2\x80\x86",
    "\xE2\x80\x87", "\xE2\x80\x88", "\xE2\x80\x89", "\xE2\x80\x8A", "\xE2\x80\xA8",
    "\xE2\x80\xA9", "\xE2\x80\xAF", "\xE2\x81\x9F", "\xE3\x80\x80"};

/// `text` without the blanks at its ends.
[[nodiscard]] inline std::string_view without_blanks(std::string_view text) {
  const auto drop = [&](auto&& has, auto&& remove) {
    for (bool found = true; found;) {
      found = false;
      for (const std::string_view blank : kBlanks) {
        if (!has(blank)) continue;
        remove(blank.size());
        found = true;
      }
    }
  };
  drop([&](std::string_view blank) { return text.starts_with(blank); }, [&](std::size_t n) { text.remove_prefix(n); });
  drop([&](std::string_view blank) { return text.ends_with(blank); }, [&](std::size_t n) { text.remove_suffix(n); });
  return text;
}

/// A JSON number as the template's language prints it: a whole number as it is spelled, any other with the fewest
/// digits that give the same double, from 1e-4 to below 1e16 without an exponent.
[[nodiscard]] inline std::string number_text(const std::string& spelled, double value) {
  if (spelled.find_first_of(".eE") == std::string::npos) return spelled == "-0" ? "0" : spelled;
  char buffer[40];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific).ptr;
  std::string_view text(buffer, static_cast<std::size_t>(end - buffer));
  const std::string sign = text.starts_with('-') ? "-" : "";
  text.remove_prefix(sign.size());
  const int exponent = std::atoi(std::string(text.substr(text.find('e') + 1)).c_str());
  std::string digits(1, text.front());
  if (text[1] == '.') digits += text.substr(2, text.find('e') - 2);
  const auto n_digit = static_cast<int>(digits.size());
  if (exponent < -4 || exponent >= 16) {
    const std::string fraction = n_digit > 1 ? "." + digits.substr(1) : "";
    const std::string size = std::to_string(std::abs(exponent));
    return concat(sign, digits[0], fraction, 'e', exponent < 0 ? '-' : '+', size.size() < 2 ? "0" : "", size);
  }
  if (exponent < 0) return concat(sign, "0.", std::string(static_cast<std::size_t>(-exponent - 1), '0'), digits);
  const auto whole = static_cast<std::size_t>(exponent) + 1;
  if (digits.size() <= whole) return concat(sign, digits, std::string(whole - digits.size(), '0'), ".0");
  return concat(sign, digits.substr(0, whole), '.', digits.substr(whole));
}

/// The keys of an object without regard to the case of ASCII letters; where that leaves two alike, the upper case
/// first.
[[nodiscard]] inline std::vector<std::string_view> sorted_keys(const JsonValue::Object& object) {
  const auto lower = [](std::string_view text) {
    std::string result(text);
    for (char& c : result) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    return result;
  };
  std::vector<std::string_view> keys;
  for (const auto& [key, value] : object) keys.push_back(key);
  std::ranges::stable_sort(keys, {}, lower);
  return keys;
}

/// Collects parts; neighbours of one kind become one.
class ChatWriter {
 public:
  void markup(std::string_view text) { add(text, true); }
  void text(std::string_view text) { add(text, false); }

  /// A value in the notation of tool calls: strings in `<|"|>`, keys bare (`quotes_keys`: like strings).
  void value(const JsonValue& value, bool quotes_keys = false) {
    if (value.string() != nullptr) {
      quoted(*value.string());
    } else if (value.number() != nullptr) {
      text(number_text(*value.number_text(), *value.number()));
    } else if (value.boolean() != nullptr) {
      text(*value.boolean() ? "true" : "false");
    } else if (value.object() != nullptr) {
      markup("{");
      members(*value.object(), quotes_keys);
      markup("}");
    } else if (value.array() != nullptr) {
      markup("[");
      for (std::size_t at = 0; at < value.array()->size(); ++at) {
        if (at > 0) markup(",");
        this->value((*value.array())[at], quotes_keys);
      }
      markup("]");
    } else {
      text("null");
    }
  }

  /// key:value,key:value
  void members(const JsonValue::Object& object, bool quotes_keys = false) {
    bool first = true;
    for (const std::string_view key : sorted_keys(object)) {
      if (!std::exchange(first, false)) markup(",");
      quotes_keys ? quoted(key) : text(key);
      markup(":");
      value(object.find(key)->second, quotes_keys);
    }
  }

  void quoted(std::string_view text) {
    markup("<|\"|>");
    this->text(text);
    markup("<|\"|>");
  }

  [[nodiscard]] std::vector<ChatPart> take() { return std::exchange(parts_, {}); }

 private:
  void add(std::string_view text, bool is_markup) {
    if (text.empty()) return;
    if (parts_.empty() || parts_.back().markup != is_markup) parts_.push_back({.text = {}, .markup = is_markup});
    parts_.back().text += text;
  }

  std::vector<ChatPart> parts_;
};

}  // namespace detail
}  // namespace gemma4

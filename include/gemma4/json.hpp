// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "gemma4/error.hpp"

/// A small JSON reader (RFC 8259) for files that people write by hand: numbers are doubles that remember how they were
/// spelled, a repeated key is refused, \u escapes become UTF-8, surrogate pairs joined.
namespace gemma4 {

struct JsonNumber {
  double value = 0;
  std::string text;  ///< as the file has it: 1, 1.0 and 1e0 are three texts of one value
};

class JsonValue {
 public:
  using Array = std::vector<JsonValue>;
  using Object = std::map<std::string, JsonValue, std::less<>>;
  using Storage = std::variant<std::nullptr_t, bool, JsonNumber, std::string, std::shared_ptr<const Array>,
                               std::shared_ptr<const Object>>;

  JsonValue() = default;
  explicit JsonValue(Storage value) : value_(std::move(value)) {}

  [[nodiscard]] bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  [[nodiscard]] const bool* boolean() const { return std::get_if<bool>(&value_); }
  [[nodiscard]] const double* number() const {
    const auto* const found = std::get_if<JsonNumber>(&value_);
    return found == nullptr ? nullptr : &found->value;
  }
  [[nodiscard]] const std::string* number_text() const {
    const auto* const found = std::get_if<JsonNumber>(&value_);
    return found == nullptr ? nullptr : &found->text;
  }
  [[nodiscard]] const std::string* string() const { return std::get_if<std::string>(&value_); }
  /// nullptr when the value is of another kind.
  [[nodiscard]] const Array* array() const { return pointee<Array>(); }
  [[nodiscard]] const Object* object() const { return pointee<Object>(); }

  [[nodiscard]] std::string_view kind() const {
    constexpr std::string_view kKinds[] = {"null", "a boolean", "a number", "a string", "an array", "an object"};
    return kKinds[value_.index()];
  }

 private:
  template <class T>
  [[nodiscard]] const T* pointee() const {
    const auto* const found = std::get_if<std::shared_ptr<const T>>(&value_);
    return found == nullptr ? nullptr : found->get();
  }

  Storage value_ = nullptr;
};

namespace detail {

/// Recursive descent; every error names the source and the byte.
class JsonParser {
 public:
  JsonParser(std::string_view text, std::string source) : text_(text), source_(std::move(source)) {}

  [[nodiscard]] JsonValue parse() {
    JsonValue value = parse_value(0);
    skip_space();
    check(at_ == text_.size(), "the end");
    return value;
  }

 private:
  static constexpr int kMaxDepth = 64;

  void check(bool condition, std::string_view expected) const {
    if (condition) return;
    const std::string found = at_ < text_.size() ? concat("'", text_.substr(at_, 12), "'") : "the end";
    require_format(false, source_, ": JSON at byte ", at_, ": expected ", expected, ", found ", found);
  }

  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }

  [[nodiscard]] bool take(std::string_view word) {
    skip_space();
    if (!text_.substr(at_).starts_with(word)) return false;
    at_ += word.size();
    return true;
  }

  [[nodiscard]] JsonValue parse_value(int depth) {
    check(depth < kMaxDepth, "at most 64 levels of nesting");
    if (take("{")) return parse_object(depth);
    if (take("[")) return parse_array(depth);
    if (take("null")) return JsonValue(nullptr);
    if (take("true")) return JsonValue(true);
    if (take("false")) return JsonValue(false);
    if (take("\"")) return JsonValue(parse_string());
    return parse_number();
  }

  [[nodiscard]] JsonValue parse_object(int depth) {
    JsonValue::Object object;
    if (!take("}")) {
      do {
        check(take("\""), "a key in quotes");
        std::string key = parse_string();
        check(take(":"), "':'");
        JsonValue value = parse_value(depth + 1);
        const auto [place, inserted] = object.emplace(std::move(key), std::move(value));
        require_format(inserted, source_, ": JSON at byte ", at_, ": key '", place->first, "' is there twice");
      } while (take(","));
      check(take("}"), "',' or '}'");
    }
    return JsonValue(std::make_shared<const JsonValue::Object>(std::move(object)));
  }

  [[nodiscard]] JsonValue parse_array(int depth) {
    JsonValue::Array array;
    if (!take("]")) {
      do {
        array.push_back(parse_value(depth + 1));
      } while (take(","));
      check(take("]"), "',' or ']'");
    }
    return JsonValue(std::make_shared<const JsonValue::Array>(std::move(array)));
  }

  /// After the opening quote.
  [[nodiscard]] std::string parse_string() {
    std::string string;
    for (;;) {
      check(at_ < text_.size() && static_cast<unsigned char>(text_[at_]) >= 0x20, "the rest of a string");
      const char c = text_[at_++];
      if (c == '"') return string;
      if (c == '\\') {
        append_escape(string);
      } else {
        string += c;
      }
    }
  }

  void append_escape(std::string& string) {
    constexpr std::string_view kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
    check(at_ < text_.size(), "an escape");
    const char name = text_[at_];
    if (const std::size_t index = kNames.find(name); index != kNames.npos) {
      string += kValues[index];
      ++at_;
      return;
    }
    std::uint32_t code = parse_utf16_unit();
    if (code >= 0xD800 && code < 0xDC00) {
      const std::uint32_t low = at_ < text_.size() && text_[at_] == '\\' ? (++at_, parse_utf16_unit()) : 0;
      check(low >= 0xDC00 && low < 0xE000, "the second half of a surrogate pair before this");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else {
      check(code < 0xDC00 || code >= 0xE000, "the first half of a surrogate pair before this");
    }
    append_utf8(string, code);
  }

  /// At the u of an escape.
  [[nodiscard]] std::uint32_t parse_utf16_unit() {
    std::uint32_t unit = 0;
    const std::string_view digits = text_.substr(std::min(at_ + 1, text_.size()), 4);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), unit, 16);
    check(text_[at_] == 'u' && error == std::errc() && end == digits.data() + 4, "an escape");
    at_ += 5;
    return unit;
  }

  static void append_utf8(std::string& string, std::uint32_t code) {
    const auto tail = [&](int shift) { string += static_cast<char>(0x80 | (code >> shift & 0x3F)); };
    if (code < 0x80) {
      string += static_cast<char>(code);
    } else if (code < 0x800) {
      string += static_cast<char>(0xC0 | code >> 6);
      tail(0);
    } else if (code < 0x10000) {
      string += static_cast<char>(0xE0 | code >> 12);
      tail(6), tail(0);
    } else {
      string += static_cast<char>(0xF0 | code >> 18);
      tail(12), tail(6), tail(0);
    }
  }

  [[nodiscard]] JsonValue parse_number() {
    double number = 0;
    const char* const begin = text_.data() + at_;
    const std::string_view rest = text_.substr(at_);
    const std::string_view digits = rest.starts_with('-') ? rest.substr(1) : rest;
    const bool has_leading_zero = digits.size() > 1 && digits[0] == '0' && is_digit(digits[1]);
    check(!digits.empty() && is_digit(digits[0]) && !has_leading_zero, "a value");
    const auto [end, error] = std::from_chars(begin, text_.data() + text_.size(), number);
    check(error == std::errc(), "a number that fits");
    at_ += static_cast<std::size_t>(end - begin);
    return JsonValue(JsonNumber{number, std::string(begin, end)});
  }

  [[nodiscard]] static bool is_digit(char c) { return c >= '0' && c <= '9'; }

  std::string_view text_;
  std::string source_;
  std::size_t at_ = 0;
};

}  // namespace detail

/// @param source the file's name, for messages
/// @throws FormatError with the byte where it is malformed
[[nodiscard]] inline JsonValue parse_json(std::string_view text, std::string source) {
  return detail::JsonParser(text, std::move(source)).parse();
}

}  // namespace gemma4

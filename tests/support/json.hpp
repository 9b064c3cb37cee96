// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

/// Reader for the JSON of the test data, and no more: numbers are doubles, a \u escape becomes UTF-8 (surrogate pairs
/// joined), anything malformed throws std::runtime_error with the byte offset.
namespace gemma4::testkit {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json, std::less<>>;

  Json() = default;
  explicit Json(std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value)
      : value_(std::make_shared<decltype(value)>(std::move(value))) {}

  [[nodiscard]] double number() const { return as<double>("a number"); }
  [[nodiscard]] const std::string& string() const { return as<std::string>("a string"); }
  [[nodiscard]] const Array& array() const { return as<Array>("an array"); }
  [[nodiscard]] const Object& object() const { return as<Object>("an object"); }
  [[nodiscard]] const Json& operator[](std::string_view key) const {
    const auto found = object().find(key);
    if (found == object().end()) throw std::runtime_error("json: no key '" + std::string(key) + "'");
    return found->second;
  }

  /// The items of an array of numbers.
  template <class TNumber>
  [[nodiscard]] std::vector<TNumber> numbers() const {
    std::vector<TNumber> items;
    for (const Json& item : array()) items.push_back(static_cast<TNumber>(item.number()));
    return items;
  }

 private:
  template <class T>
  const T& as(const char* wanted) const {
    const T* const found = value_ ? std::get_if<T>(value_.get()) : nullptr;
    if (found == nullptr) throw std::runtime_error(std::string("json: a value is not ") + wanted);
    return *found;
  }
  std::shared_ptr<const std::variant<std::nullptr_t, bool, double, std::string, Array, Object>> value_;
};

namespace detail {

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json document() {
    Json value = read_value();
    skip_blank();
    if (at_ != text_.size()) fail("the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& wanted) const {
    throw std::runtime_error("json: expected " + wanted + " at byte " + std::to_string(at_));
  }
  void skip_blank() { at_ = std::min(text_.find_first_not_of(" \t\r\n", at_), text_.size()); }
  bool take(std::string_view word) {
    if (!text_.substr(at_).starts_with(word)) return false;
    at_ += word.size();
    return true;
  }
  void expect(std::string_view word) {
    if (!take(word)) fail("'" + std::string(word) + "'");
  }

  Json read_value() {
    skip_blank();
    if (take("null")) return Json(nullptr);
    if (take("true")) return Json(true);
    if (take("false")) return Json(false);
    if (take("[")) return read_array();
    if (take("{")) return read_object();
    if (text_.substr(at_).starts_with('"')) return Json(read_string());
    return read_number();
  }

  Json read_array() {
    Json::Array items;
    for (skip_blank(); !take("]"); skip_blank()) {
      if (!items.empty()) expect(",");
      items.push_back(read_value());
    }
    return Json(std::move(items));
  }

  Json read_object() {
    Json::Object items;
    for (skip_blank(); !take("}"); skip_blank()) {
      if (!items.empty()) expect(",");
      skip_blank();
      std::string key = read_string();
      skip_blank();
      expect(":");
      items.emplace(std::move(key), read_value());
    }
    return Json(std::move(items));
  }

  Json read_number() {
    const std::size_t end = std::min(text_.find_first_not_of("+-.0123456789eE", at_), text_.size());
    const std::string digits(text_.substr(at_, end - at_));
    char* parsed = nullptr;
    const double value = std::strtod(digits.c_str(), &parsed);
    if (digits.empty() || *parsed != '\0') fail("a value");
    at_ = end;
    return Json(value);
  }

  std::string read_string() {
    expect("\"");
    std::string result;
    while (!take("\"")) {
      if (at_ == text_.size()) fail("'\"'");
      if (!take("\\")) {
        result += text_[at_++];
      } else if (take("u")) {
        append_utf8(result, read_code_point());
      } else {
        constexpr std::string_view kNames = "\"\\/bfnrt", kBytes = "\"\\/\b\f\n\r\t";
        const std::size_t name = at_ < text_.size() ? kNames.find(text_[at_]) : std::string_view::npos;
        if (name == std::string_view::npos) fail("an escape");
        result += kBytes[name];
        ++at_;
      }
    }
    return result;
  }

  std::uint32_t read_unit() {
    const std::string digits(text_.substr(at_, 4));
    if (digits.size() != 4 || digits.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos) {
      fail("four hexadecimal digits");
    }
    at_ += 4;
    return static_cast<std::uint32_t>(std::stoul(digits, nullptr, 16));
  }

  std::uint32_t read_code_point() {
    const std::uint32_t high = read_unit();
    if (high < 0xD800 || high > 0xDBFF) return high;
    expect("\\u");
    const std::uint32_t low = read_unit();
    if (low < 0xDC00 || low > 0xDFFF) fail("a low surrogate before this");
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
  }

  static void append_utf8(std::string& out, std::uint32_t code) {
    const auto tail = [&](int shift) { out += static_cast<char>(0x80 | (code >> shift & 0x3F)); };
    if (code < 0x80) {
      out += static_cast<char>(code);
    } else if (code < 0x800) {
      out += static_cast<char>(0xC0 | code >> 6);
      tail(0);
    } else if (code < 0x10000) {
      out += static_cast<char>(0xE0 | code >> 12);
      tail(6);
      tail(0);
    } else {
      out += static_cast<char>(0xF0 | code >> 18);
      tail(12);
      tail(6);
      tail(0);
    }
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace detail

[[nodiscard]] inline Json parse_json(std::string_view text) {
  return detail::JsonReader(text).document();
}

/// The bytes of a file of the test data.
[[nodiscard]] inline std::string read_text(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot open " + path.string());
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

}  // namespace gemma4::testkit

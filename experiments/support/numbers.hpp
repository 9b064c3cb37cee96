// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>

#include <charconv>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "gemma4/error.hpp"

/// Numbers on a command line: what is no number of the kind, or outside its limits, is refused in words.
namespace gemma4::experiment {

/// Tokens that a context, a chunk or a depth may have at most; no product of them with bytes comes near 2^63.
inline constexpr std::int64_t kMaxTokens = std::int64_t{1} << 24;

namespace detail {

/// Whether `text` is a number and nothing else: no spaces, no '+', and of whole ones no point, no exponent and no zero
/// in front, which some readers take for octal. `value` where it fits T.
enum class NumberKind { kNone, kTooLarge, kGood };
template <class T>
[[nodiscard]] NumberKind read_number(std::string_view text, T& value) {
  const std::string_view digits = text.starts_with('-') ? text.substr(1) : text;
  if (digits.size() > 1 && digits[0] == '0' && digits[1] >= '0' && digits[1] <= '9') return NumberKind::kNone;
  if constexpr (std::integral<T>) {
    if (digits.empty() || digits.find_first_not_of("0123456789") != digits.npos) return NumberKind::kNone;
  }
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::result_out_of_range) return NumberKind::kTooLarge;
  if (error != std::errc() || end != text.data() + text.size()) return NumberKind::kNone;
  if constexpr (std::floating_point<T>) {
    if (!std::isfinite(value)) return NumberKind::kNone;
  }
  return NumberKind::kGood;
}

}  // namespace detail

/// Limits of a number, both included; the largest of its type stands for none.
template <class T>
struct Limits {
  T low = 0;
  T high = std::numeric_limits<T>::max();

  [[nodiscard]] std::string text() const {
    const bool is_open = high == std::numeric_limits<T>::max() && !std::unsigned_integral<T>;
    return is_open ? concat("at least ", low) : concat("from ", low, " to ", high);
  }
};

/// Refuses what is no number within the limits, with what would be.
template <class T>
[[nodiscard]] CLI::Validator within(const Limits<T>& limits) {
  const auto check = [limits](const std::string& text) {
    T value{};
    const detail::NumberKind kind = detail::read_number(text, value);
    if (kind == detail::NumberKind::kGood && value >= limits.low && value <= limits.high) return std::string();
    return concat("'", text, "', need a ", std::integral<T> ? "whole " : "", "number, ", limits.text(),
                  kind == detail::NumberKind::kTooLarge ? ", in decimal digits that 64 bits hold" : "");
  };
  return CLI::Validator(check, limits.text(), "");
}

/// An option that takes a whole number, or several: `value` is one, or a vector of them.
template <class T>
CLI::Option* add_whole(CLI::App& app, const std::string& name, T& value, const std::string& help,
                       const Limits<std::int64_t>& limits) {
  return app.add_option(name, value, help)->check(within(limits))->capture_default_str();
}

/// One of tokens: at least `low`.
template <class T>
CLI::Option* add_tokens(CLI::App& app, const std::string& name, T& value, const std::string& help,
                        std::int64_t low = 1) {
  return add_whole(app, name, value, help, {low, kMaxTokens});
}

/// An option that takes a number that need not be whole.
template <std::floating_point T>
CLI::Option* add_real(CLI::App& app, const std::string& name, T& value, const std::string& help,
                      const Limits<double>& limits) {
  return app.add_option(name, value, help)->check(within(limits))->capture_default_str();
}

}  // namespace gemma4::experiment

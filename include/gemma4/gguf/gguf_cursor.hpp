// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "gemma4/error.hpp"

/// Checked steps through the bytes of a file from somebody else.
namespace gemma4::detail {

/// A name from a file as it may appear in a message: no control characters, no more than 80 bytes.
[[nodiscard]] inline std::string printable(std::string_view text) {
  constexpr std::size_t kMaxShown = 80;
  std::string shown(text.substr(0, kMaxShown));
  for (char& c : shown) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  return text.size() > kMaxShown ? shown + "..." : shown;
}

/// Reads through the bytes of a file; every step is checked against what is left, and every error says where.
class GgufCursor {
 public:
  GgufCursor(std::span<const std::byte> bytes, std::string file) : bytes_(bytes), file_(std::move(file)) {}

  [[nodiscard]] std::uint64_t position() const { return position_; }
  [[nodiscard]] std::uint64_t remaining() const { return bytes_.size() - position_; }

  /// Throws "FILE: THING at byte OFFSET: expected E, found F" unless `holds`.
  template <class TExpected, class TFound>
  void check(bool holds, std::string_view thing, std::uint64_t offset, const TExpected& expected,
             const TFound& found) const {
    require_format(holds, file_, ": ", thing, " at byte ", offset, ": expected ", expected, ", found ", found);
  }

  [[nodiscard]] std::span<const std::byte> take(std::uint64_t count, std::string_view thing) {
    if (count > remaining()) {
      check(false, thing, position_, concat(count, " bytes"), concat(remaining(), " before the end of the file"));
    }
    const auto taken = bytes_.subspan(position_, count);
    position_ += count;
    return taken;
  }

  template <class T>
  [[nodiscard]] T number(std::string_view thing) {
    T value;
    std::memcpy(&value, take(sizeof(T), thing).data(), sizeof(T));
    return value;
  }

  /// A string borrowed from the file.
  [[nodiscard]] std::string_view string(std::string_view thing, std::uint64_t max_bytes) {
    const std::uint64_t start = position_;
    const auto length = number<std::uint64_t>(thing);
    if (length > max_bytes) {
      check(false, thing, start, concat("at most ", max_bytes, " bytes"), concat("a length of ", length));
    }
    const auto text = take(length, thing);
    return {reinterpret_cast<const char*>(text.data()), text.size()};
  }

 private:
  std::span<const std::byte> bytes_;
  std::string file_;
  std::uint64_t position_ = 0;
};

}  // namespace gemma4::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "gemma4/gguf/gguf.hpp"

namespace gemma4 {

/// A metadata value where it lies in the file; decoded when asked for.
struct GgufValue {
  GgufType type = GgufType::kUint8;
  GgufType element = GgufType::kUint8;  ///< of the items: `type` itself unless that is an array
  std::uint64_t count = 1;              ///< of items
  std::uint64_t file_offset = 0;        ///< of the value's type field, for messages
  std::span<const std::byte> bytes;     ///< of the items; each string with its length before it

  [[nodiscard]] bool is_array() const { return type == GgufType::kArray; }
};

namespace detail {

/// Calls `visit` with the number at `bytes`, in its own C++ type. Bools, strings and arrays are not numbers.
template <class TVisitor>
auto visit_number(GgufType type, const std::byte* bytes, const TVisitor& visit) {
  const auto load = [&]<class T>(T value) {
    std::memcpy(&value, bytes, sizeof(T));
    return visit(value);
  };
  switch (type) {
    case GgufType::kUint8:
      return load(std::uint8_t{});
    case GgufType::kInt8:
      return load(std::int8_t{});
    case GgufType::kUint16:
      return load(std::uint16_t{});
    case GgufType::kInt16:
      return load(std::int16_t{});
    case GgufType::kUint32:
      return load(std::uint32_t{});
    case GgufType::kInt32:
      return load(std::int32_t{});
    case GgufType::kUint64:
      return load(std::uint64_t{});
    case GgufType::kInt64:
      return load(std::int64_t{});
    case GgufType::kFloat32:
      return load(float{});
    default:
      return load(double{});
  }
}

[[nodiscard]] constexpr bool is_float(GgufType type) {
  return type == GgufType::kFloat32 || type == GgufType::kFloat64;
}
[[nodiscard]] constexpr bool is_integer(GgufType type) {
  return scalar_bytes(type) != 0 && !is_float(type) && type != GgufType::kBool;
}

}  // namespace detail

}  // namespace gemma4

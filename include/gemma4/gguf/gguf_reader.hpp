// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf.hpp"
#include "gemma4/gguf/gguf_cursor.hpp"
#include "gemma4/gguf/gguf_split.hpp"
#include "gemma4/gguf/gguf_value.hpp"
#include "gemma4/gguf/mapped_file.hpp"
#include "gemma4/quantized_matrix.hpp"

namespace gemma4 {

/// A GGUF file, version 3, opened and checked as a whole: after open() or parse() every tensor lies inside the file,
/// aligned and alone in its bytes, and every name is unique. Only values are left to be asked for. Movable; the
/// tensors' data stays where it is. Nothing is allocated for a count before the bytes it promises have been seen.
class GgufFile {
 public:
  /// Maps and checks a file; with the first part of a split model, all parts of it, which lie in the same folder.
  /// @throws FormatError naming the key or tensor, its offset in the file, what was expected and what was found; naming
  ///         the part that is missing, in another's place, or no first one
  /// @throws std::system_error naming the path when it cannot be opened
  [[nodiscard]] static GgufFile open(const std::filesystem::path& path) {
    GgufFile file = map(path);
    const auto place = detail::split_place(file);
    if (!place) return file;
    const std::string prefix = place->count > 1 ? detail::require_first_part(path.string(), *place) : "";
    std::vector<GgufFile> parts;
    parts.push_back(std::move(file));
    for (std::int64_t no = 1; no < place->count; ++no)
      parts.push_back(map(detail::find_part(prefix, {no, place->count})));
    return join(std::move(parts));
  }

  /// One file from the parts of a split model, in order. Keys are those of the first part, tensors those of all.
  /// @throws FormatError naming the part that is not of the same model, or not in its place
  [[nodiscard]] static GgufFile join(std::vector<GgufFile> parts) {
    require(!parts.empty(), "join: no parts");
    detail::require_parts(parts);
    GgufFile whole = std::move(parts.front());
    for (GgufFile& part : std::span(parts).subspan(1)) {
      std::ranges::move(part.mapped_, std::back_inserter(whole.mapped_));
      for (GgufTensor& tensor : part.tensors_) {
        whole.tensor_index_.emplace(tensor.name, whole.tensors_.size());
        whole.tensors_.push_back(std::move(tensor));
      }
    }
    whole.n_part_ = static_cast<std::int64_t>(parts.size());
    return whole;
  }

  /// Checks a file image in memory, which must outlive the result. `name` is what messages call it.
  [[nodiscard]] static GgufFile parse(std::span<const std::byte> bytes, std::string name) {
    GgufFile file;
    file.name_ = name;
    detail::GgufCursor cursor(bytes, std::move(name));
    file.read(cursor, bytes);
    return file;
  }

  [[nodiscard]] std::filesystem::path path() const { return name_; }
  [[nodiscard]] std::uint64_t alignment() const { return alignment_; }
  [[nodiscard]] std::int64_t n_part() const { return n_part_; }  ///< files that it is made of

  /// All keys with their values, sorted by name.
  [[nodiscard]] const std::map<std::string, GgufValue, std::less<>>& values() const { return values_; }
  [[nodiscard]] bool has(std::string_view key) const { return values_.contains(key); }
  [[nodiscard]] bool is_array(std::string_view key) const { return value(key).is_array(); }

  /// @throws FormatError when there is no such key
  [[nodiscard]] const GgufValue& value(std::string_view key) const {
    const auto found = values_.find(key);
    require_format(found != values_.end(), name_, ": key '", key, "' is missing among its ", values_.size(), " keys");
    return found->second;
  }

  /// A single value. T is bool, an integer type (any stored integer type that holds a value in range), float or double
  /// (a stored float64 is rounded), std::string or std::string_view (borrowed from the file).
  /// @throws FormatError naming the key, what was expected and what was found
  template <class T>
  [[nodiscard]] T get(std::string_view key) const {
    const GgufValue& found = value(key);
    expect<T>(key, found, false);
    std::span<const std::byte> rest = found.bytes;
    return next<T>(key, found, rest);
  }

  /// As get(), with `fallback` for an absent key. A key of a wrong type is still an error.
  template <class T>
  [[nodiscard]] T get_or(std::string_view key, T fallback) const {
    return has(key) ? get<T>(key) : fallback;
  }

  /// The items of an array, converted as get() does.
  /// @throws FormatError naming the key, what was expected and what was found
  template <class T>
  [[nodiscard]] std::vector<T> array(std::string_view key) const {
    const GgufValue& found = value(key);
    expect<T>(key, found, true);
    std::vector<T> items;
    items.reserve(found.count);
    std::span<const std::byte> rest = found.bytes;
    for (std::uint64_t index = 0; index < found.count; ++index) items.push_back(next<T>(key, found, rest));
    return items;
  }

  /// In the order of the file, part after part.
  [[nodiscard]] std::span<const GgufTensor> tensors() const { return tensors_; }

  /// The tensor, or nullptr.
  [[nodiscard]] const GgufTensor* find_tensor(std::string_view name) const {
    const auto found = tensor_index_.find(name);
    return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
  }

  /// @throws FormatError when there is no such tensor
  [[nodiscard]] const GgufTensor& tensor(std::string_view name) const {
    const GgufTensor* const found = find_tensor(name);
    require_format(found != nullptr, name_, ": tensor '", name, "' is missing among its ", tensors_.size(), " tensors");
    return *found;
  }

 private:
  // Of everything a count can promise, the least that each item occupies in the file.
  static constexpr std::uint64_t kMinKeyBytes = 8 + 1 + 4 + 1;
  static constexpr std::uint64_t kMinTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;
  static constexpr std::uint64_t kMinAlignment = 8, kMaxAlignment = 65536;

  GgufFile() = default;

  /// A single file, part of a model or not.
  [[nodiscard]] static GgufFile map(const std::filesystem::path& path) {
    MappedFile mapped(path);
    GgufFile file = parse(mapped.bytes(), path.string());
    file.mapped_.push_back(std::move(mapped));
    return file;
  }

  void read(detail::GgufCursor& cursor, std::span<const std::byte> bytes) {
    const auto magic = cursor.take(kGgufMagic.size(), "magic");
    const std::string_view found_magic(reinterpret_cast<const char*>(magic.data()), magic.size());
    cursor.check(found_magic == kGgufMagic, "magic", 0, "'GGUF'", concat("'", detail::printable(found_magic), "'"));
    const auto version = cursor.number<std::uint32_t>("version");
    cursor.check(version == kGgufVersion, "version", 4, "3, little endian",
                 concat(version, version == __builtin_bswap32(kGgufVersion) ? " (a big-endian file)" : ""));
    const auto tensor_count = cursor.number<std::uint64_t>("tensor count");
    const auto key_count = cursor.number<std::uint64_t>("key count");
    check_count(cursor, "tensor count", 8, tensor_count, kMinTensorBytes);
    check_count(cursor, "key count", 16, key_count, kMinKeyBytes);
    for (std::uint64_t index = 0; index < key_count; ++index) read_key(cursor);
    read_alignment(cursor);
    for (std::uint64_t index = 0; index < tensor_count; ++index) read_tensor(cursor);
    place_tensors(cursor, bytes);
  }

  static void check_count(const detail::GgufCursor& cursor, std::string_view thing, std::uint64_t offset,
                          std::uint64_t count, std::uint64_t min_bytes_each) {
    const std::uint64_t most = cursor.remaining() / min_bytes_each;
    cursor.check(count <= most, thing, offset, concat("at most ", most, ", which the file's size allows"), count);
  }

  void read_key(detail::GgufCursor& cursor) {
    const std::uint64_t start = cursor.position();
    const std::string unnamed = concat("key number ", values_.size());
    const std::string_view key = cursor.string(unnamed, kGgufMaxKeyBytes);
    cursor.check(!key.empty(), unnamed, start, "a name", "an empty one");
    const std::string thing = concat("key '", detail::printable(key), "'");
    cursor.check(!values_.contains(key), thing, start, "unique keys", "a second one of this name");
    GgufValue value;
    value.file_offset = cursor.position();
    value.type = read_type(cursor, thing);
    value.element = value.type;
    if (value.is_array()) {
      const std::uint64_t type_offset = cursor.position();
      value.element = read_type(cursor, thing);
      cursor.check(value.element != GgufType::kArray, thing, type_offset, "an array of single values",
                   "an array of arrays");
      value.count = cursor.number<std::uint64_t>(thing);
    }
    value.bytes = read_items(cursor, thing, value);
    values_.emplace(key, value);
  }

  [[nodiscard]] static GgufType read_type(detail::GgufCursor& cursor, std::string_view thing) {
    const std::uint64_t offset = cursor.position();
    const auto number = cursor.number<std::uint32_t>(thing);
    cursor.check(number < kGgufTypeNames.size(), thing, offset, concat("a value type below ", kGgufTypeNames.size()),
                 number);
    return static_cast<GgufType>(number);
  }

  /// Steps over the items of a value, checking each one whose bytes can be wrong.
  [[nodiscard]] static std::span<const std::byte> read_items(detail::GgufCursor& cursor, std::string_view thing,
                                                             const GgufValue& value) {
    const std::uint64_t start = cursor.position();
    if (value.element == GgufType::kString) {
      detail::GgufCursor items = cursor;
      for (std::uint64_t index = 0; index < value.count; ++index) {
        static_cast<void>(items.string(thing, std::numeric_limits<std::uint64_t>::max()));
      }
      return cursor.take(items.position() - start, thing);
    }
    const std::uint64_t item_bytes = scalar_bytes(value.element);
    cursor.check(value.count <= cursor.remaining() / item_bytes, thing, start,
                 concat(value.count, " values of ", item_bytes, " bytes"),
                 concat(cursor.remaining(), " bytes before the end of the file"));
    const auto items = cursor.take(value.count * item_bytes, thing);
    if (value.element == GgufType::kBool) {
      for (std::size_t index = 0; index < items.size(); ++index) {
        const auto byte = std::to_integer<int>(items[index]);
        cursor.check(byte <= 1, thing, start + index, "a bool of 0 or 1", byte);
      }
    }
    return items;
  }

  void read_alignment(const detail::GgufCursor& cursor) {
    if (!has(kGgufAlignmentKey)) return;
    alignment_ = get<std::uint64_t>(kGgufAlignmentKey);
    cursor.check(std::has_single_bit(alignment_) && alignment_ >= kMinAlignment && alignment_ <= kMaxAlignment,
                 concat("key '", kGgufAlignmentKey, "'"), value(kGgufAlignmentKey).file_offset,
                 concat("a power of two from ", kMinAlignment, " to ", kMaxAlignment), alignment_);
  }

  void read_tensor(detail::GgufCursor& cursor) {
    const std::uint64_t start = cursor.position();
    const std::string unnamed = concat("tensor number ", tensors_.size());
    GgufTensor tensor;
    tensor.name = cursor.string(unnamed, kGgufMaxTensorNameBytes);
    cursor.check(!tensor.name.empty(), unnamed, start, "a name", "an empty one");
    const std::string thing = concat("tensor '", detail::printable(tensor.name), "'");
    cursor.check(!tensor_index_.contains(tensor.name), thing, start, "unique tensors", "a second one of this name");
    const std::int64_t size = read_dims(cursor, thing, tensor);
    const std::int64_t bytes = read_tensor_type(cursor, thing, size, tensor);
    const std::uint64_t offset_at = cursor.position();
    tensor.file_offset = cursor.number<std::uint64_t>(thing);  // relative to the data until place_tensors()
    cursor.check(tensor.file_offset % alignment_ == 0, thing, offset_at,
                 concat("an offset that ", alignment_, " divides"), tensor.file_offset);
    tensor_bytes_.push_back(static_cast<std::uint64_t>(bytes));
    tensor_index_.emplace(tensor.name, tensors_.size());
    tensors_.push_back(std::move(tensor));
  }

  /// Reads the dimensions and returns their product.
  [[nodiscard]] static std::int64_t read_dims(detail::GgufCursor& cursor, std::string_view thing, GgufTensor& tensor) {
    const std::uint64_t start = cursor.position();
    const auto n_dim = cursor.number<std::uint32_t>(thing);
    cursor.check(n_dim >= 1 && n_dim <= kGgufMaxDims, thing, start, concat("1 to ", kGgufMaxDims, " dimensions"),
                 n_dim);
    std::int64_t size = 1;
    for (std::uint32_t axis = 0; axis < n_dim; ++axis) {
      const std::uint64_t offset = cursor.position();
      const auto dim = cursor.number<std::uint64_t>(thing);
      constexpr auto kMax = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
      cursor.check(dim >= 1 && dim <= kMax, thing, offset, concat("dimension ", axis, " from 1 to 2^63 - 1"), dim);
      tensor.dims.push_back(static_cast<std::int64_t>(dim));
      cursor.check(!__builtin_mul_overflow(size, tensor.dims.back(), &size), thing, offset,
                   "a product of dimensions below 2^63", concat("dimension ", axis, " = ", dim, " that exceeds it"));
    }
    return size;
  }

  /// Reads the type and returns the bytes that `size` values take.
  [[nodiscard]] static std::int64_t read_tensor_type(detail::GgufCursor& cursor, std::string_view thing,
                                                     std::int64_t size, GgufTensor& tensor) {
    const std::uint64_t offset = cursor.position();
    const auto number = cursor.number<std::uint32_t>(thing);
    tensor.type = static_cast<TensorType>(number);
    const auto info = find_tensor_type(tensor.type);
    if (!info) {
      cursor.check(false, thing, offset, concat("a type of ggml (supported are ", weight_type_names(), ")"),
                   concat("the unknown type ", number));
    }
    cursor.check(tensor.row_len() % info->block_size == 0, thing, offset,
                 concat("rows of a multiple of ", info->block_size, " values for ", info->name), tensor.row_len());
    std::int64_t bytes = 0;
    cursor.check(!__builtin_mul_overflow(size / info->block_size, info->block_bytes, &bytes), thing, offset,
                 "fewer than 2^63 bytes", concat(size, " values of ", info->name));
    return bytes;
  }

  /// Turns offsets into spans: inside the file, and no two over the same bytes.
  void place_tensors(const detail::GgufCursor& cursor, std::span<const std::byte> bytes) {
    if (tensors_.empty()) return;
    const std::uint64_t end = cursor.position();
    const std::uint64_t data_start = (end + alignment_ - 1) / alignment_ * alignment_;
    const std::uint64_t data_size = data_start <= bytes.size() ? bytes.size() - data_start : 0;
    for (std::size_t index = 0; index < tensors_.size(); ++index) {
      GgufTensor& tensor = tensors_[index];
      const std::uint64_t offset = tensor.file_offset, needed = tensor_bytes_[index];
      cursor.check(offset <= data_size && needed <= data_size - offset, tensor_thing(tensor), data_start,
                   concat(needed, " bytes of data at offset ", offset),
                   concat(data_size, " bytes of data in the file"));
      tensor.file_offset = data_start + offset;
      tensor.data = bytes.subspan(tensor.file_offset, needed);
    }
    std::vector<const GgufTensor*> sorted;
    for (const GgufTensor& tensor : tensors_) sorted.push_back(&tensor);
    std::ranges::sort(sorted, {}, &GgufTensor::file_offset);
    for (std::size_t index = 1; index < sorted.size(); ++index) {
      const std::uint64_t previous_end = sorted[index - 1]->file_offset + sorted[index - 1]->data.size();
      cursor.check(
          previous_end <= sorted[index]->file_offset, tensor_thing(*sorted[index]), sorted[index]->file_offset,
          concat("its data at or after byte ", previous_end, ", the end of ", tensor_thing(*sorted[index - 1])),
          "an overlap");
    }
    tensor_bytes_.clear();
  }

  [[nodiscard]] static std::string tensor_thing(const GgufTensor& tensor) {
    return concat("tensor '", detail::printable(tensor.name), "'");
  }

  /// Throws unless the value is single, or an array, of items that can become T.
  template <class T>
  void expect(std::string_view key, const GgufValue& value, bool array) const {
    constexpr bool kIsText = std::is_constructible_v<T, std::string_view>;
    static_assert(std::is_arithmetic_v<T> || kIsText, "metadata holds bools, numbers and strings");
    const bool fits = kIsText                       ? value.element == GgufType::kString
                      : std::is_same_v<T, bool>     ? value.element == GgufType::kBool
                      : std::is_floating_point_v<T> ? detail::is_float(value.element)
                                                    : detail::is_integer(value.element);
    if (fits && value.is_array() == array) return;
    mismatch<T>(key, value, array,
                concat(value.is_array() ? concat("an array of ", value.count, " ") : "", type_name(value.element)));
  }

  /// Decodes the item at the front of `rest` and drops it from there. The bytes were checked when the file was read.
  template <class T>
  [[nodiscard]] T next(std::string_view key, const GgufValue& value, std::span<const std::byte>& rest) const {
    if constexpr (std::is_constructible_v<T, std::string_view>) {
      std::uint64_t length = 0;
      std::memcpy(&length, rest.data(), sizeof(length));
      const T text(std::string_view(reinterpret_cast<const char*>(rest.data() + sizeof(length)), length));
      rest = rest.subspan(sizeof(length) + length);
      return text;
    } else {
      const std::byte* const at = rest.data();
      rest = rest.subspan(scalar_bytes(value.element));
      if constexpr (std::is_same_v<T, bool>) {
        return std::to_integer<int>(*at) != 0;
      } else {
        return detail::visit_number(value.element, at, [&](auto number) { return convert<T>(key, value, number); });
      }
    }
  }

  /// A stored number as T, when T holds it.
  template <class T, class TNumber>
  [[nodiscard]] T convert(std::string_view key, const GgufValue& value, TNumber number) const {
    if constexpr (std::is_integral_v<T> && std::is_integral_v<TNumber>) {
      if (!std::in_range<T>(number)) mismatch<T>(key, value, value.is_array(), +number);
    } else if constexpr (std::is_floating_point_v<TNumber> && sizeof(T) < sizeof(TNumber)) {
      if (std::isfinite(number) && std::abs(number) > static_cast<TNumber>(std::numeric_limits<T>::max())) {
        mismatch<T>(key, value, value.is_array(), number);
      }
    }
    return static_cast<T>(number);
  }

  /// `array`: whether an array was asked for.
  template <class T, class TFound>
  [[noreturn]] void mismatch(std::string_view key, const GgufValue& value, bool array, const TFound& found) const {
    constexpr bool kIsInteger = std::is_integral_v<T> && !std::is_same_v<T, bool>;
    throw FormatError(concat(name_, ": key '", key, "' at byte ", value.file_offset, ": expected ",
                             array ? "an array of " : "",
                             !kIsInteger ? ""
                             : array     ? "integers that fit "
                                         : "an integer that fits ",
                             type_name(gguf_type_of<T>()), ", found ", found));
  }

  std::string name_;
  std::vector<MappedFile> mapped_;  ///< one a part
  std::int64_t n_part_ = 1;
  std::uint64_t alignment_ = kGgufDefaultAlignment;
  std::map<std::string, GgufValue, std::less<>> values_;
  std::vector<GgufTensor> tensors_;
  std::vector<std::uint64_t> tensor_bytes_;  ///< only while reading
  std::map<std::string, std::size_t, std::less<>> tensor_index_;
};

}  // namespace gemma4

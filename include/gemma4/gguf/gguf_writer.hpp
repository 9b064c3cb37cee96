// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf.hpp"
#include "gemma4/partial_file.hpp"

namespace gemma4 {

/// Writes a GGUF file, version 3, alignment 32, as a stream: declare keys and tensors, then append the tensors' data in
/// the order declared, in pieces of any size. Holds the metadata and one buffer of 1 MiB, however large the file.
///
/// The bytes go to a PartialFile, which finish() moves over `path` in one step: readers see the old file or the whole
/// new one. A writer that is destroyed without finish(), or interrupted, leaves nothing.
///
///   GgufWriter writer("m.gguf");
///   writer.set("general.architecture", "golden");
///   writer.add_tensor("ids", TensorType::kI32, {4096});
///   writer.append("ids", std::as_bytes(std::span(ids)));
///   writer.finish();
///
/// A model that threads make piece by piece in any order is written by place() and write_at() in place of append().
///
/// Errors: std::invalid_argument for what the caller did wrong, std::system_error naming the path when the system
/// refuses a write; after the latter the file can only be abandoned.
class GgufWriter {
 public:
  explicit GgufWriter(const std::filesystem::path& path) : file_(path) {}

  GgufWriter(const GgufWriter&) = delete;
  GgufWriter& operator=(const GgufWriter&) = delete;

  /// A single value: bool, integer of 8 to 64 bits, float, double or string; stored as exactly that type.
  template <class T>
  void set(std::string_view key, const T& value) {
    begin_key(key, gguf_type_of<T>());
    put_item(keys_, value);
  }

  /// An array of such values.
  template <class T>
  void set_array(std::string_view key, const std::vector<T>& items) {
    begin_key(key, GgufType::kArray);
    put(keys_, static_cast<std::uint32_t>(gguf_type_of<T>()));
    put(keys_, static_cast<std::uint64_t>(items.size()));
    for (std::size_t index = 0; index < items.size(); ++index) put_item(keys_, static_cast<T>(items[index]));
  }

  /// Declares the next tensor; `dims` in GGUF order, innermost first.
  void add_tensor(std::string_view name, TensorType type, std::vector<std::int64_t> dims) {
    require(!header_written_, "tensor '", name, "': declared after the first data; declare all tensors first");
    // The reader takes 64 bytes, as the specification says; llama.cpp keeps names in 64 bytes with a final zero.
    require(!name.empty() && name.size() < kGgufMaxTensorNameBytes, "tensor '", name, "': a name of ", name.size(),
            " bytes, expected 1 to ", kGgufMaxTensorNameBytes - 1);
    require(!tensor_names_.contains(name), "tensor '", name, "': declared twice");
    require(!dims.empty() && dims.size() <= kGgufMaxDims, "tensor '", name, "': ", dims.size(),
            " dimensions, expected 1 to ", kGgufMaxDims);
    Tensor tensor{std::string(name), type, std::move(dims), data_bytes_, 0};
    std::int64_t bytes = 0;
    for (std::size_t axis = 0; axis < tensor.dims.size(); ++axis) {
      const std::int64_t dim = tensor.dims[axis];
      require(dim >= 1, "tensor '", name, "': dimension ", axis, " is ", dim, ", expected at least 1");
      if (axis == 0) bytes = row_bytes(type, dim);
      const bool overflows = axis > 0 && __builtin_mul_overflow(bytes, dim, &bytes);
      require(!overflows && static_cast<std::uint64_t>(bytes) <= kMaxBytes, "tensor '", name,
              "': too large, expected at most 2^60 bytes");
    }
    tensor.bytes = static_cast<std::uint64_t>(bytes);
    require(data_bytes_ + padded(tensor.bytes) <= kMaxBytes, "tensor '", name, "': the file would exceed 2^60 bytes");
    data_bytes_ += padded(tensor.bytes);
    tensor_names_.emplace(name);
    tensors_.push_back(std::move(tensor));
  }

  /// Bytes that all tensors will occupy, padding included; for progress and for a look at the free space.
  [[nodiscard]] std::uint64_t data_bytes() const { return data_bytes_; }

  /// All that stands in front of the tensors' data, as it is written, once append() or place() has written it.
  [[nodiscard]] std::string_view header() const { return header_; }

  /// Appends a piece of the tensor `name`, which must be the first one that is not yet complete.
  void append(std::string_view name, std::span<const std::byte> bytes) {
    require(!failed_, where(), ": an earlier write failed");
    require(!is_placed_, "tensor '", name, "': appended after place(), which leaves write_at() alone");
    if (!header_written_) write_header();
    require(current_ < tensors_.size(), "tensor '", name, "': all ", tensors_.size(), " tensors are complete already");
    const Tensor& tensor = tensors_[current_];
    require(tensor.name == name, "tensor '", name, "': appended out of order, expected '", tensor.name, "' (",
            tensor.bytes - current_bytes_, " bytes to go)");
    require(bytes.size() <= tensor.bytes - current_bytes_, "tensor '", name, "': ", current_bytes_ + bytes.size(),
            " bytes appended, expected ", tensor.bytes);
    write(bytes);
    current_bytes_ += bytes.size();
    if (current_bytes_ < tensor.bytes) return;
    write_padding(padded(tensor.bytes) - tensor.bytes);
    ++current_;
    current_bytes_ = 0;
  }

  /// Gives every tensor its place in the file, at the full length of the file; from here on write_at() alone.
  void place() {
    require(!header_written_, where(), ": placed after the first data");
    write_header();
    flush();
    is_placed_ = true;
    attempt([&] { file_.resize(data_begin_ + data_bytes_); });
  }

  /// Writes bytes of the tensor declared as number `index`, from its byte `offset` on. Any thread may call this at any
  /// time; the caller sees to it that each byte is written once, finish() only counts them.
  void write_at(std::size_t index, std::uint64_t offset, std::span<const std::byte> bytes) {
    require(is_placed_, where(), ": write_at() before place()");
    require(!failed_, where(), ": an earlier write failed");
    require(index < tensors_.size(), "tensor number ", index, ": there are ", tensors_.size());
    const Tensor& tensor = tensors_[index];
    require(offset <= tensor.bytes && bytes.size() <= tensor.bytes - offset, "tensor '", tensor.name, "': bytes ",
            offset, " to ", offset + bytes.size(), ", it has ", tensor.bytes);
    placed_bytes_ += bytes.size();
    attempt([&] { file_.write_at(data_begin_ + tensor.offset + offset, bytes); });
  }

  /// Completes the file under its own name.
  void finish() {
    require(!finished_, where(), ": finished twice");
    require(!failed_, where(), ": an earlier write failed");
    if (!header_written_) write_header();
    if (is_placed_) {
      std::uint64_t expected = 0;
      for (const Tensor& tensor : tensors_) expected += tensor.bytes;
      require(placed_bytes_ == expected, where(), ": ", placed_bytes_.load(), " bytes of tensors written, expected ",
              expected);
    } else if (current_ < tensors_.size()) {
      const Tensor& tensor = tensors_[current_];
      require(false, "tensor '", tensor.name, "': ", current_bytes_, " bytes appended, expected ", tensor.bytes);
    }
    flush();
    attempt([&] { file_.commit(); });
    finished_ = true;
  }

 private:
  struct Tensor {
    std::string name;
    TensorType type;
    std::vector<std::int64_t> dims;
    std::uint64_t offset;  ///< from the start of the data
    std::uint64_t bytes;
  };

  static constexpr std::size_t kBufferBytes = std::size_t{1} << 20;
  static constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 60;  ///< keeps sums of sizes far from overflow

  [[nodiscard]] static constexpr std::uint64_t padded(std::uint64_t bytes) {
    return (bytes + kGgufDefaultAlignment - 1) / kGgufDefaultAlignment * kGgufDefaultAlignment;
  }

  template <class T>
  static void put(std::string& to, T number) {
    static_assert(std::is_arithmetic_v<T>);
    to.append(reinterpret_cast<const char*>(&number), sizeof(T));
  }

  static void put_string(std::string& to, std::string_view text) {
    put(to, static_cast<std::uint64_t>(text.size()));
    to.append(text);
  }

  template <class T>
  static void put_item(std::string& to, const T& value) {
    if constexpr (std::is_same_v<T, bool>) {
      put(to, static_cast<std::uint8_t>(value ? 1 : 0));
    } else if constexpr (std::is_arithmetic_v<T>) {
      put(to, value);
    } else {
      put_string(to, value);
    }
  }

  void begin_key(std::string_view key, GgufType type) {
    require(!header_written_, "key '", key, "': set after the first data; set all keys first");
    require(!key.empty() && key.size() <= kGgufMaxKeyBytes, "key of ", key.size(), " bytes, expected 1 to ",
            kGgufMaxKeyBytes);
    require(key != kGgufAlignmentKey, "key '", key, "': not settable, this writer aligns to ", kGgufDefaultAlignment);
    require(key_names_.emplace(key).second, "key '", key, "': set twice");
    put_string(keys_, key);
    put(keys_, static_cast<std::uint32_t>(type));
  }

  void write_header() {
    header_written_ = true;
    std::string header(kGgufMagic);
    put(header, kGgufVersion);
    put(header, static_cast<std::uint64_t>(tensors_.size()));
    put(header, static_cast<std::uint64_t>(key_names_.size()));
    header += keys_;
    for (const Tensor& tensor : tensors_) {
      put_string(header, tensor.name);
      put(header, static_cast<std::uint32_t>(tensor.dims.size()));
      for (const std::int64_t dim : tensor.dims) put(header, static_cast<std::uint64_t>(dim));
      put(header, static_cast<std::uint32_t>(tensor.type));
      put(header, tensor.offset);
    }
    header.resize(padded(header.size()), '\0');
    data_begin_ = header.size();
    header_ = std::move(header);
    keys_ = {};
    write(std::as_bytes(std::span(header_)));
  }

  void write_padding(std::uint64_t count) {
    static constexpr std::array<std::byte, kGgufDefaultAlignment> kZeros{};
    write(std::span(kZeros).first(count));
  }

  void write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const std::size_t count = std::min(bytes.size(), kBufferBytes - buffer_.size());
      buffer_.insert(buffer_.end(), bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(count));
      bytes = bytes.subspan(count);
      if (buffer_.size() == kBufferBytes) flush();
    }
  }

  void flush() {
    attempt([&] { file_.write(buffer_); });
    buffer_.clear();
  }

  /// After a write that failed the file can only be abandoned.
  template <class TWrite>
  void attempt(TWrite&& write) {
    try {
      write();
    } catch (...) {
      failed_ = true;
      throw;
    }
  }

  [[nodiscard]] std::string where() const { return file_.path().string(); }

  PartialFile file_;
  bool header_written_ = false;
  bool finished_ = false;
  std::atomic<bool> failed_ = false;
  bool is_placed_ = false;
  std::string keys_;    ///< encoded
  std::string header_;  ///< these and all else in front of the data
  std::set<std::string, std::less<>> key_names_;
  std::vector<Tensor> tensors_;
  std::set<std::string, std::less<>> tensor_names_;
  std::uint64_t data_bytes_ = 0;
  std::size_t current_ = 0;                      ///< tensor that is being written
  std::uint64_t current_bytes_ = 0;              ///< of it
  std::uint64_t data_begin_ = 0;                 ///< in the file
  std::atomic<std::uint64_t> placed_bytes_ = 0;  ///< by write_at()
  std::vector<std::byte> buffer_;
};

}  // namespace gemma4

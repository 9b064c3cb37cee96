// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

/// GGUF files spelled byte by byte, with every field labelled, so that a test can break exactly one of them. Written
/// from the specification, apart from the reader and the writer under test, and with numbers in place of their enums.
namespace gemma4::testkit {

class GgufImage {
 public:
  template <class T>
  GgufImage& put(const std::string& label, T number) {
    mark(label);
    const auto* const bytes = reinterpret_cast<const std::byte*>(&number);
    bytes_.insert(bytes_.end(), bytes, bytes + sizeof(T));
    return *this;
  }

  /// A string: its length is labelled `label`, its characters `label.text`.
  GgufImage& put_string(const std::string& label, std::string_view text) {
    put<std::uint64_t>(label, text.size());
    mark(label + ".text");
    for (const char c : text) bytes_.push_back(static_cast<std::byte>(c));
    return *this;
  }

  GgufImage& put_fill(const std::string& label, std::size_t count, int value) {
    mark(label);
    bytes_.insert(bytes_.end(), count, static_cast<std::byte>(value));
    return *this;
  }

  GgufImage& align(std::size_t alignment) {
    while (bytes_.size() % alignment != 0) bytes_.push_back(std::byte{0});
    return *this;
  }

  /// Replaces the number at a label.
  template <class T>
  GgufImage& patch(const std::string& label, T number) {
    std::memcpy(bytes_.data() + at(label), &number, sizeof(T));
    return *this;
  }

  /// Replaces characters from a label on, as many as `text` has.
  GgufImage& patch_text(const std::string& label, std::string_view text) {
    std::memcpy(bytes_.data() + at(label), text.data(), text.size());
    return *this;
  }

  GgufImage& truncate(std::size_t size) {
    bytes_.resize(size);
    return *this;
  }

  /// Inserts bytes before a label; labels behind it move.
  GgufImage& insert(const std::string& label, std::size_t count, int value) {
    const std::size_t where = at(label);
    bytes_.insert(bytes_.begin() + static_cast<std::ptrdiff_t>(where), count, static_cast<std::byte>(value));
    for (auto& [name, offset] : labels_) {
      if (offset >= where) offset += count;
    }
    return *this;
  }

  [[nodiscard]] std::size_t at(const std::string& label) const {
    const auto found = labels_.find(label);
    if (found == labels_.end()) throw std::logic_error("no field '" + label + "' in the image");
    return found->second;
  }
  [[nodiscard]] std::size_t size() const { return bytes_.size(); }
  [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }

 private:
  void mark(const std::string& label) { labels_[label] = bytes_.size(); }

  std::vector<std::byte> bytes_;
  std::map<std::string, std::size_t> labels_;
};

/// One of each thing: keys "general.architecture" string, "general.alignment" u32, "depth" u32, "flag" bool, "flags"
/// bool[3], "numbers" i32[4], "words" string[3]; tensors "alpha" F32 [2, 8], "beta" Q8_0 [32], "gamma" I8 [5].
/// Labels: "magic", "version", "tensor_count", "key_count"; for key K "K", "K.type", "K.element", "K.count", "K.value";
/// for tensor T "T", "T.n_dim", "T.dim0".., "T.type", "T.offset", "T.data".
inline GgufImage valid_gguf_image() {
  GgufImage image;
  image.put<std::uint32_t>("magic", 0x46554747).put<std::uint32_t>("version", 3);
  image.put<std::uint64_t>("tensor_count", 3).put<std::uint64_t>("key_count", 7);
  const auto key = [&](const std::string& name, std::uint32_t type) {
    image.put_string(name, name).put<std::uint32_t>(name + ".type", type);
  };
  const auto array_key = [&](const std::string& name, std::uint32_t element, std::uint64_t count) {
    key(name, 9);
    image.put<std::uint32_t>(name + ".element", element).put<std::uint64_t>(name + ".count", count);
  };
  key("general.architecture", 8);
  image.put_string("general.architecture.value", "golden");
  key("general.alignment", 4);
  image.put<std::uint32_t>("general.alignment.value", 32);
  key("depth", 4);
  image.put<std::uint32_t>("depth.value", 60);
  key("flag", 7);
  image.put<std::uint8_t>("flag.value", 1);
  array_key("flags", 7, 3);
  image.put<std::uint8_t>("flags.value", 1).put<std::uint8_t>("flags.1", 0).put<std::uint8_t>("flags.2", 1);
  array_key("numbers", 5, 4);
  image.put<std::int32_t>("numbers.value", 7).put<std::int32_t>("numbers.1", -1);
  image.put<std::int32_t>("numbers.2", 0).put<std::int32_t>("numbers.3", 2147483647);
  array_key("words", 8, 3);
  image.put_string("words.value", "one").put_string("words.1", "").put_string("words.2", "three");

  const auto tensor = [&](const std::string& name, const std::vector<std::uint64_t>& dims, std::uint32_t type,
                          std::uint64_t offset) {
    image.put_string(name, name).put<std::uint32_t>(name + ".n_dim", static_cast<std::uint32_t>(dims.size()));
    for (std::size_t axis = 0; axis < dims.size(); ++axis) image.put(name + ".dim" + std::to_string(axis), dims[axis]);
    image.put<std::uint32_t>(name + ".type", type).put<std::uint64_t>(name + ".offset", offset);
  };
  tensor("alpha", {8, 2}, 0, 0);
  tensor("beta", {32}, 8, 64);
  tensor("gamma", {5}, 24, 128);
  image.put_fill("end_of_tensors", 0, 0).align(32);
  image.put<float>("alpha.data", 1.5f);
  image.put_fill("alpha.rest", 60, 0).put<std::uint16_t>("beta.data", 0x3C00).put_fill("beta.quants", 32, 3).align(32);
  image.put_fill("gamma.data", 5, 0xFF);
  return image;
}

}  // namespace gemma4::testkit

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/synthetic/synthetic_model.hpp"
#include "tests/support/temp_dir.hpp"

/// Models as other people's converters write them: a good file with some keys and tensors changed.
namespace gemma4::testkit {

/// Keys and tensors of a file, to be changed and written again; the writer under test has no part in it.
class GgufEdit {
 public:
  struct Key {
    std::uint32_t type = 0;
    std::uint32_t element = 0;  ///< of an array
    std::uint64_t count = 1;
    std::vector<std::byte> bytes;
  };
  struct Tensor {
    std::string name;
    std::uint32_t type = 0;
    std::vector<std::int64_t> dims;
    std::vector<std::byte> data;
  };

  GgufEdit() = default;
  explicit GgufEdit(const GgufFile& file) {
    for (const auto& [name, value] : file.values()) {
      keys_[name] = {static_cast<std::uint32_t>(value.type), static_cast<std::uint32_t>(value.element), value.count,
                     std::vector<std::byte>(value.bytes.begin(), value.bytes.end())};
    }
    for (const GgufTensor& tensor : file.tensors()) {
      tensors_.push_back({tensor.name, static_cast<std::uint32_t>(tensor.type), tensor.dims,
                          std::vector<std::byte>(tensor.data.begin(), tensor.data.end())});
    }
  }

  /// A single value, stored as exactly the type of T.
  template <class T>
  GgufEdit& set(const std::string& key, const T& value) {
    Key made{static_cast<std::uint32_t>(gguf_type_of<T>()), static_cast<std::uint32_t>(gguf_type_of<T>()), 1, {}};
    put_item(made.bytes, value);
    keys_[key] = std::move(made);
    return *this;
  }

  template <class T>
  GgufEdit& set_array(const std::string& key, const std::vector<T>& items) {
    Key made{9, static_cast<std::uint32_t>(gguf_type_of<T>()), items.size(), {}};
    for (std::size_t i = 0; i < items.size(); ++i) put_item(made.bytes, static_cast<T>(items[i]));
    keys_[key] = std::move(made);
    return *this;
  }

  /// A value of any type, its bytes as they are to stand in the file.
  GgufEdit& set_raw(const std::string& key, Key value) {
    keys_[key] = std::move(value);
    return *this;
  }

  GgufEdit& drop_key(const std::string& key) {
    if (keys_.erase(key) != 1) throw std::logic_error("no key '" + key + "'");
    return *this;
  }
  GgufEdit& drop_keys() {
    keys_.clear();
    return *this;
  }

  [[nodiscard]] bool has_key(const std::string& key) const { return keys_.contains(key); }

  [[nodiscard]] std::vector<Tensor>& tensors() { return tensors_; }
  [[nodiscard]] Tensor& tensor(std::string_view name) {
    for (Tensor& tensor : tensors_) {
      if (tensor.name == name) return tensor;
    }
    throw std::logic_error("no tensor '" + std::string(name) + "'");
  }
  GgufEdit& drop_tensor(const std::string& name) {
    if (std::erase_if(tensors_, [&](const Tensor& tensor) { return tensor.name == name; }) != 1) {
      throw std::logic_error("no tensor '" + name + "'");
    }
    return *this;
  }
  /// A tensor of floats.
  GgufEdit& add(const std::string& name, std::vector<std::int64_t> dims, const std::vector<float>& values) {
    const auto bytes = std::as_bytes(std::span(values));
    tensors_.push_back({name, 0, std::move(dims), std::vector<std::byte>(bytes.begin(), bytes.end())});
    return *this;
  }

  /// The file, as a whole.
  [[nodiscard]] std::vector<std::byte> image() const {
    std::vector<std::byte> out;
    for (const char c : std::string_view("GGUF")) out.push_back(static_cast<std::byte>(c));
    put<std::uint32_t>(out, 3);
    put<std::uint64_t>(out, tensors_.size());
    put<std::uint64_t>(out, keys_.size());
    for (const auto& [name, key] : keys_) {
      put_item(out, name);
      put(out, key.type);
      if (key.type == 9) {
        put(out, key.element);
        put(out, key.count);
      }
      out.insert(out.end(), key.bytes.begin(), key.bytes.end());
    }
    std::uint64_t offset = 0;
    for (const Tensor& tensor : tensors_) {
      put_item(out, tensor.name);
      put(out, static_cast<std::uint32_t>(tensor.dims.size()));
      for (const std::int64_t dim : tensor.dims) put(out, static_cast<std::uint64_t>(dim));
      put(out, tensor.type);
      put(out, offset);
      offset += (tensor.data.size() + 31) / 32 * 32;
    }
    out.resize((out.size() + 31) / 32 * 32);
    for (const Tensor& tensor : tensors_) {
      out.insert(out.end(), tensor.data.begin(), tensor.data.end());
      out.resize((out.size() + 31) / 32 * 32);
    }
    return out;
  }

  void write(const std::filesystem::path& path) const {
    const std::vector<std::byte> bytes = image();
    std::ofstream stream(path, std::ios::binary);
    stream.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    if (!stream.good()) throw std::runtime_error("cannot write " + path.string());
  }

 private:
  template <class T>
  static void put(std::vector<std::byte>& to, T number) {
    const auto* const bytes = reinterpret_cast<const std::byte*>(&number);
    to.insert(to.end(), bytes, bytes + sizeof(T));
  }
  template <class T>
  static void put_item(std::vector<std::byte>& to, const T& value) {
    if constexpr (std::is_same_v<T, bool>) {
      put<std::uint8_t>(to, value ? 1 : 0);
    } else if constexpr (std::is_arithmetic_v<T>) {
      put(to, value);
    } else {
      const std::string_view text(value);
      put<std::uint64_t>(to, text.size());
      const auto bytes = std::as_bytes(std::span(text));
      to.insert(to.end(), bytes.begin(), bytes.end());
    }
  }

  std::map<std::string, Key> keys_;
  std::vector<Tensor> tensors_;
};

/// The shape of the small inputs that went wrong: two layers, 320 tokens.
[[nodiscard]] inline ModelConfig micro_config() {
  ModelConfig config = gemma4_tiny();
  config.vocab = 320;
  config.ffn_hidden = 256;
  config.context = 4096;
  config.sliding.n_head_kv = 1;
  config.is_sliding = {1, 0};
  return config;
}

/// A whole model of that shape with random weights, to be changed.
[[nodiscard]] inline GgufEdit micro_model(std::uint64_t seed = 0) {
  const TempDir folder;
  write_synthetic_model(folder.file("micro.gguf"), micro_config(), {.seed = seed});
  return GgufEdit(GgufFile::open(folder.file("micro.gguf")));
}

}  // namespace gemma4::testkit

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/gguf/block_quantise.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/gguf_writer.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/synthetic/synthetic_weights.hpp"
#include "tests/support/temp_dir.hpp"

/// Copies of model files in which matrices have other types.
namespace gemma4::testkit {

namespace detail {

template <class T>
void copy_key(const GgufFile& from, GgufWriter& to, const std::string& key) {
  from.is_array(key) ? to.set_array(key, from.array<T>(key)) : to.set(key, from.get<T>(key));
}

/// All keys, with the types that they have.
inline void copy_keys(const GgufFile& from, GgufWriter& to) {
  for (const auto& [key, value] : from.values()) {
    switch (value.element) {
      case GgufType::kUint32:
        copy_key<std::uint32_t>(from, to, key);
        break;
      case GgufType::kInt32:
        copy_key<std::int32_t>(from, to, key);
        break;
      case GgufType::kFloat32:
        copy_key<float>(from, to, key);
        break;
      case GgufType::kBool:
        copy_key<bool>(from, to, key);
        break;
      case GgufType::kString:
        copy_key<std::string>(from, to, key);
        break;
      default:
        require(false, "copy_keys: '", key, "' is ", type_name(value.element), ", which no test model has");
    }
  }
}

/// Row `index` of `tensor` in another type: decoded and encoded; where there is no encoder, random weights of the usual
/// size; zeros where there is no decoder either.
inline void retype_row(const GgufTensor& tensor, std::int64_t index, TensorType type, std::span<std::byte> out) {
  const std::int64_t n = tensor.row_len();
  if (!is_weight_type(type)) {
    std::ranges::fill(out, std::byte{0});
  } else if (gemma4::detail::random_block_format(type)) {
    static const SyntheticRows rows(1);
    rows.fill(tensor.name, index, type, n, 1 / std::sqrt(static_cast<double>(n)), out);
  } else {
    std::vector<float> values(static_cast<std::size_t>(n));
    dequantise_row(tensor.type, tensor.row(index), values);
    encode_row(type, values, out);
  }
}

}  // namespace detail

/// The type that a tensor gets; nothing: its own, and its bytes as they are.
using TypeOf = std::function<std::optional<TensorType>(const GgufTensor&)>;

/// Every matrix in one type.
[[nodiscard]] inline TypeOf all_matrices(TensorType type) {
  return [type](const GgufTensor& tensor) { return tensor.dims.size() > 1 ? std::optional(type) : std::nullopt; };
}

/// One tensor in another type.
[[nodiscard]] inline TypeOf one_tensor(std::string name, TensorType type) {
  return [name, type](const GgufTensor& tensor) { return tensor.name == name ? std::optional(type) : std::nullopt; };
}

/// Writes the copy: keys, names, shapes and order of the source.
inline void write_retyped(const GgufFile& source, const std::filesystem::path& path, const TypeOf& type_of) {
  GgufWriter writer(path);
  detail::copy_keys(source, writer);
  for (const GgufTensor& tensor : source.tensors()) {
    writer.add_tensor(tensor.name, type_of(tensor).value_or(tensor.type), tensor.dims);
  }
  for (const GgufTensor& tensor : source.tensors()) {
    const std::optional<TensorType> type = type_of(tensor);
    if (!type) {
      writer.append(tensor.name, tensor.data);
      continue;
    }
    std::vector<std::byte> row(static_cast<std::size_t>(row_bytes(*type, tensor.row_len())));
    for (std::int64_t index = 0; index < tensor.rows(); ++index) {
      detail::retype_row(tensor, index, *type, row);
      writer.append(tensor.name, row);
    }
  }
  writer.finish();
}

/// A copy of a model file, opened; `weights()` binds it.
class RetypedModel {
 public:
  RetypedModel(const GgufFile& source, const TypeOf& type_of) {
    write_retyped(source, directory_.file("model.gguf"), type_of);
    file_.emplace(GgufFile::open(directory_.file("model.gguf")));
  }
  RetypedModel(const std::filesystem::path& source, const TypeOf& type_of)
      : RetypedModel(GgufFile::open(source), type_of) {}

  [[nodiscard]] const GgufFile& file() const { return *file_; }
  [[nodiscard]] ModelWeights weights() const { return weights_from_gguf(*file_); }

 private:
  TempDir directory_;
  std::optional<GgufFile> file_;
};

}  // namespace gemma4::testkit

// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any bytes are either refused with FormatError or a file whose every key, tensor and weight can be
// read without leaving the bytes. Build it with the `fuzz` preset; seeds are in tests/fuzz/gguf_seeds/.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/gguf/gguf_reader.hpp"

namespace {

using gemma4::FormatError;
using gemma4::GgufFile;
using gemma4::GgufTensor;

/// Asks for the key as T, single and as an array; at most one of the two exists.
template <class T>
void read_key(const GgufFile& file, const std::string& key) {
  try {
    static_cast<void>(file.get<T>(key));
  } catch (const FormatError&) {
  }
  try {
    static_cast<void>(file.array<T>(key));
  } catch (const FormatError&) {
  }
}

void read_tensor(const GgufFile& file, const GgufTensor& tensor) {
  if (file.find_tensor(tensor.name) != &tensor) __builtin_trap();
  // A long row is cut: the checks have promised all of it, and its end is read below.
  const std::int64_t n = std::min<std::int64_t>(tensor.row_len(), 1 << 16);
  std::vector<float> values(
      static_cast<std::size_t>(n / gemma4::block_size(tensor.type) * gemma4::block_size(tensor.type)));
  const auto bytes = static_cast<std::size_t>(gemma4::row_bytes(tensor.type, static_cast<std::int64_t>(values.size())));
  try {
    gemma4::dequantise_row(tensor.type, tensor.row(0).first(bytes), values);
    gemma4::dequantise_row(tensor.type, tensor.row(tensor.rows() - 1).last(bytes), values);
  } catch (const std::invalid_argument&) {  // integers hold no weights
  }
  try {
    static_cast<void>(gemma4::data_as<std::int32_t>(tensor));
  } catch (const FormatError&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::vector<std::uint64_t> aligned(size / sizeof(std::uint64_t) + 1);  // as a mapped file would be
  if (size != 0) std::memcpy(aligned.data(), data, size);
  try {
    const GgufFile file = GgufFile::parse(std::as_bytes(std::span(aligned)).first(size), "fuzz");
    for (const auto& [key, value] : file.values()) {
      read_key<bool>(file, key);
      read_key<std::int8_t>(file, key);
      read_key<std::uint64_t>(file, key);
      read_key<float>(file, key);
      read_key<std::string>(file, key);
    }
    for (const GgufTensor& tensor : file.tensors()) read_tensor(file, tensor);
  } catch (const FormatError&) {
  }
  return 0;
}

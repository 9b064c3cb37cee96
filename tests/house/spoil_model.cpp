// SPDX-License-Identifier: Apache-2.0
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>

#include "gemma4/gguf/block_formats.hpp"
#include "gemma4/gguf/gguf_reader.hpp"

/// Copies a model with NaN in the first value, or in the scale of the first block, of one tensor.
/// Usage: spoil_model FROM TO TENSOR
int main(int argc, char** argv) {
  using namespace gemma4;
  try {
    require(argc == 4, "usage: spoil_model FROM TO TENSOR");
    const GgufFile file = GgufFile::open(argv[1]);
    const GgufTensor& tensor = file.tensor(argv[3]);
    const MappedFile bytes(argv[1]);
    const std::size_t size = bytes.bytes().size();
    std::size_t at = 0;  // of the tensor: where the file has its bytes
    while (at + tensor.data.size() <= size &&
           std::memcmp(bytes.bytes().data() + at, tensor.data.data(), tensor.data.size()) != 0) {
      at += 32;
    }
    require(at + tensor.data.size() <= size, "the tensor's bytes are not in the file");
    std::filesystem::copy_file(argv[1], argv[2], std::filesystem::copy_options::overwrite_existing);
    std::fstream to(argv[2], std::ios::binary | std::ios::in | std::ios::out);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const std::uint16_t half_nan = 0x7E00;
    switch (tensor.type) {
      case TensorType::kF32:
        to.seekp(static_cast<std::streamoff>(at)).write(reinterpret_cast<const char*>(&nan), sizeof(nan));
        break;
      case TensorType::kQ4K:
        to.seekp(static_cast<std::streamoff>(at + offsetof(Q4KBlock, d)))
            .write(reinterpret_cast<const char*>(&half_nan), sizeof(half_nan));
        break;
      case TensorType::kQ6K:
        to.seekp(static_cast<std::streamoff>(at + offsetof(Q6KBlock, d)))
            .write(reinterpret_cast<const char*>(&half_nan), sizeof(half_nan));
        break;
      default:
        require(false, "a type without a place for NaN");
    }
    to.close();
    require(to.good(), "cannot write ", argv[2]);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}

// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/gguf/gguf_reader.hpp"

/// Random blocks of each type, and the values that a peer decodes from them.
namespace {

using namespace gemma4;

GgufFile golden() {
  return GgufFile::open(std::filesystem::path(GEMMA4_TEST_DATA) / "blocks/blocks.gguf");
}

/// Values of all blocks of a type, and how many differ from the peer's in a bit.
struct Decoded {
  std::size_t n_value = 0, n_wrong = 0;
};

Decoded decode(const GgufFile& file, TensorType type, std::vector<std::byte> blocks) {
  const auto expected = data_as<float>(file.tensor(concat(type_name(type), ".values")));
  std::vector<float> values(expected.size());
  dequantise_row(type, blocks, values);
  Decoded decoded{values.size(), 0};
  for (std::size_t i = 0; i < values.size(); ++i) {
    decoded.n_wrong += std::bit_cast<std::uint32_t>(values[i]) != std::bit_cast<std::uint32_t>(expected[i]);
  }
  return decoded;
}

std::vector<std::byte> blocks_of(const GgufFile& file, TensorType type) {
  const auto bytes = file.tensor(concat(type_name(type), ".blocks")).data;
  return {bytes.begin(), bytes.end()};
}

std::vector<TensorType> block_types() {
  std::vector<TensorType> types;
  std::ranges::copy_if(kWeightTypes, std::back_inserter(types), [](TensorType type) { return block_size(type) > 1; });
  return types;
}

TEST(BlockDequantiseGolden, EqualsAPeersValuesBitForBit) {
  const GgufFile file = golden();
  for (const TensorType type : block_types()) {
    const Decoded decoded = decode(file, type, blocks_of(file, type));
    EXPECT_GE(decoded.n_value, 8192u) << type_name(type);
    EXPECT_EQ(decoded.n_wrong, 0u) << type_name(type) << ", of " << decoded.n_value;
  }
  EXPECT_EQ(block_types().size(), 12u);
}

// The control: a single bit of the quants, and the f16 step of one block, are seen.
TEST(BlockDequantiseGolden, ADamagedBlockIsSeen) {
  const GgufFile file = golden();
  for (const TensorType type : block_types()) {
    const auto n_byte = static_cast<std::size_t>(block_bytes(type));
    for (std::size_t at = 0; at < n_byte; ++at) {
      std::vector<std::byte> blocks = blocks_of(file, type);
      blocks[3 * n_byte + at] ^= std::byte{1};
      const Decoded decoded = decode(file, type, std::move(blocks));
      EXPECT_GE(decoded.n_wrong, 1u) << type_name(type) << " byte " << at;
      EXPECT_LE(decoded.n_wrong, static_cast<std::size_t>(block_size(type))) << type_name(type) << " byte " << at;
    }
  }
}

// The file has types that nothing here decodes, too: their numbers, names and sizes are as the peer says.
TEST(BlockDequantiseGolden, TheTablesOfTypesAreAPeers) {
  const GgufFile file = golden();
  std::vector<TensorTypeInfo> all(kTensorTypes.begin(), kTensorTypes.end());
  all.insert(all.end(), kForeignTensorTypes.begin(), kForeignTensorTypes.end());
  int compared = 0;
  for (const TensorTypeInfo& info : all) {
    EXPECT_EQ(std::ranges::count(all, info.type, &TensorTypeInfo::type), 1) << info.name;
    const std::string key = concat("blocks.", info.name, ".");
    if (!file.has(key + "type")) continue;
    ++compared;
    EXPECT_EQ(file.get<std::uint32_t>(key + "type"), static_cast<std::uint32_t>(info.type)) << info.name;
    EXPECT_EQ(file.get<std::int64_t>(key + "values_a_block"), info.block_size) << info.name;
    EXPECT_EQ(file.get<std::int64_t>(key + "bytes_a_block"), info.block_bytes) << info.name;
  }
  EXPECT_EQ(compared, 18) << "types that the file has";
}

}  // namespace

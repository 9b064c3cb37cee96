// SPDX-License-Identifier: Apache-2.0
#include "cuda/weights/layout.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/weights/packing.cuh"
#include "cuda/weights/repack.cuh"
#include "tests/support/packed_types.hpp"
#include "tests/support/property.hpp"
#include "tests/support/random_weights.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

/// Every bit of every block at random: NaN and infinite steps and unused code points too.
OwnedMatrix random_bits(TensorType type, std::int64_t rows, std::int64_t cols, std::uint32_t seed) {
  OwnedMatrix matrix{type, rows, cols, {}};
  matrix.bytes.resize(static_cast<std::size_t>(rows * row_bytes(type, cols)));
  std::mt19937 random(seed);
  for (std::byte& byte : matrix.bytes) byte = static_cast<std::byte>(random());
  return matrix;
}

OwnedMatrix any_matrix() {
  const auto type = *rc::gen::elementOf(kWeightTypes);
  const std::int64_t blocks = *rc::gen::element<std::int64_t>(1, 2, 3, 20, 21, 22, 43, 64, 84);
  const std::int64_t cols = block_size(type) == 32 ? 32 * *rc::gen::inRange<std::int64_t>(1, 400) : 256 * blocks;
  return random_bits(type, *rc::gen::inRange<std::int64_t>(1, 6), cols, *rc::gen::arbitrary<std::uint32_t>());
}

template <class TBlock>
void pack_on_host(const OwnedMatrix& matrix, std::vector<std::byte>& packed) {
  const std::int64_t row_blocks = matrix.cols / TBlock::kSize,
                     per_chunk = chunk_groups(matrix.cols) * 32 / TBlock::kSize;
  const std::int64_t stride = packed_row_bytes(matrix.type, matrix.cols);
  for (std::int64_t row = 0; row < matrix.rows; ++row) {
    for (std::int64_t block = 0; block < row_blocks; ++block) {
      TBlock from;
      std::memcpy(&from, matrix.bytes.data() + static_cast<std::size_t>(row * row_blocks + block) * sizeof(TBlock),
                  sizeof(TBlock));
      const std::int64_t chunk = block / per_chunk;
      auto* const to = reinterpret_cast<std::uint8_t*>(packed.data()) + row * stride +
                       chunk * chunk_bytes(matrix.type, chunk_groups(matrix.cols));
      detail::BlockPacking<TBlock>::pack(from, to, groups_of_chunk(matrix.cols, chunk),
                                         static_cast<int>(block % per_chunk));
    }
  }
}

std::vector<std::byte> packed_on_host(const OwnedMatrix& matrix) {
  if (!is_packed_type(matrix.type)) return matrix.bytes;
  std::vector<std::byte> packed(static_cast<std::size_t>(matrix.rows * packed_row_bytes(matrix.type, matrix.cols)));
  detail::for_packed_block(matrix.type,
                           [&]<TensorType kType, class TBlock>() { pack_on_host<TBlock>(matrix, packed); });
  return packed;
}

TEST(WeightLayoutPlan, BitsOfAWeightAtTheShapesOfThe31B) {
  for (const std::int64_t cols : {5376, 8192, 16384, 21504}) {
    const auto bits = [cols](TensorType type) {
      return 8.0 * static_cast<double>(packed_row_bytes(type, cols)) / static_cast<double>(cols);
    };
    EXPECT_EQ(bits(TensorType::kQ4K), 4.5) << cols;
    EXPECT_EQ(bits(TensorType::kQ5K), 5.5) << cols;
    EXPECT_LE(bits(TensorType::kQ6K), 6.58) << cols;
    EXPECT_EQ(bits(TensorType::kQ8_0), 8.5) << cols;
    EXPECT_EQ(bits(TensorType::kQ4_0), 4.5) << cols;
    EXPECT_EQ(bits(TensorType::kQ4_1), 5.0) << cols;
    EXPECT_EQ(bits(TensorType::kQ5_0), 5.5) << cols;
    EXPECT_EQ(bits(TensorType::kQ5_1), 6.0) << cols;
    EXPECT_EQ(bits(TensorType::kIq4Nl), 4.5) << cols;
    EXPECT_LE(bits(TensorType::kIq4Xs), 4.27) << cols;
    EXPECT_LE(bits(TensorType::kQ3K), 3.46) << cols;
    EXPECT_LE(bits(TensorType::kQ2K), 2.65) << cols;
  }
}

RC_GTEST_PROP(WeightLayoutPlan, ChunksCoverARowInWholePieces, ()) {
  const std::int64_t cols = 32 * *rc::gen::inRange<std::int64_t>(1, 20000);
  std::int64_t groups = 0;
  for (std::int64_t chunk = 0; chunk < row_chunks(cols); ++chunk) {
    const int n = groups_of_chunk(cols, chunk);
    RC_ASSERT(n >= 1 && n <= chunk_groups(cols) && n <= kMaxChunkGroups);
    groups += n;
  }
  RC_ASSERT(groups == row_groups(cols));
  RC_ASSERT(chunk_groups(cols) % 8 == 0);
  for (const TensorType type : kPackedTypes) {
    if (cols % block_size(type) == 0) RC_ASSERT(packed_row_bytes(type, cols) % 16 == 0);
  }
}

RC_GTEST_PROP(WeightRepack, RoundTripKeepsEveryBit, ()) {
  const OwnedMatrix matrix = any_matrix();
  const DeviceBuffer<std::byte> file(matrix.bytes);
  DeviceBuffer<std::byte> packed(matrix.rows * packed_row_bytes(matrix.type, matrix.cols));
  packed.fill_bytes(0xA5);
  pack_rows(matrix.type, matrix.rows, matrix.cols, file.data(), packed.data(), 1, nullptr);
  RC_ASSERT(packed.to_host() == packed_on_host(matrix));
  DeviceBuffer<std::byte> back(file.size());
  back.fill_bytes(0x5A);
  unpack_rows(matrix.type, matrix.rows, matrix.cols, packed.data(), back.data(), 1, nullptr);
  RC_ASSERT(back.to_host() == matrix.bytes);

  // Control: a bit changed in the packed codes of a row changes the file that comes back. (The codes of the narrowest
  // format, which come first in a chunk, have 8 bytes a group.)
  std::vector<std::byte> bytes = packed.to_host();
  const std::int64_t n_code_byte = 8 * groups_of_chunk(matrix.cols, 0);
  const auto at = static_cast<std::size_t>(*rc::gen::inRange<std::int64_t>(0, n_code_byte));
  bytes[at] ^= static_cast<std::byte>(1 << *rc::gen::inRange(0, 8));
  const DeviceBuffer<std::byte> changed(bytes);
  unpack_rows(matrix.type, matrix.rows, matrix.cols, changed.data(), back.data(), 1, nullptr);
  RC_ASSERT(back.to_host() != matrix.bytes);
}

/// No bit of a block is lost or shared: each one, set alone in a block of zeros, sets one bit of the packed chunk, each
/// its own; the zeros set none. Needs no device.
template <class TBlock>
void expect_permutation(TensorType type) {
  constexpr int kGroups = static_cast<int>(TBlock::kSize) / kGroup, kChunkGroups = 3 * kGroups, kAt = 1;
  const auto size = static_cast<std::size_t>(chunk_bytes(type, kChunkGroups));
  const auto packed_with = [&](std::size_t bit) {  // 8 * sizeof(TBlock): none
    std::vector<std::uint8_t> file(sizeof(TBlock) + 1), chunk(size);
    file[bit / 8] = static_cast<std::uint8_t>(1u << (bit % 8));
    TBlock block;
    std::memcpy(&block, file.data(), sizeof(TBlock));
    detail::BlockPacking<TBlock>::pack(block, chunk.data(), kChunkGroups, kAt);
    return chunk;
  };
  std::vector<std::uint8_t> seen = packed_with(8 * sizeof(TBlock));
  ASSERT_TRUE(std::all_of(seen.begin(), seen.end(), [](std::uint8_t byte) { return byte == 0; })) << type_name(type);
  for (std::size_t bit = 0; bit < 8 * sizeof(TBlock); ++bit) {
    const std::vector<std::uint8_t> chunk = packed_with(bit);
    int n_bit = 0;
    for (std::size_t i = 0; i < size; ++i) {
      n_bit += std::popcount(chunk[i]);
      ASSERT_EQ(seen[i] & chunk[i], 0) << type_name(type) << ": bit " << bit << " and one before it share byte " << i;
      seen[i] = static_cast<std::uint8_t>(seen[i] | chunk[i]);
    }
    ASSERT_EQ(n_bit, 1) << type_name(type) << ": bit " << bit;
  }
}
TEST(WeightLayoutPlan, EveryBitOfABlockHasItsPlace) {
  for (const TensorType type : kPackedTypes) {
    detail::for_packed_block(type, [type]<TensorType kType, class TBlock>() { expect_permutation<TBlock>(type); });
  }
}

/// A gate and its up, row by row in turn, through a staging buffer that holds only some rows.
RC_GTEST_PROP(WeightRepack, InterleavedUploadTouchesOnlyItsRows, ()) {
  const OwnedMatrix matrix = any_matrix();
  const std::int64_t file_row = row_bytes(matrix.type, matrix.cols);
  const std::int64_t row = packed_row_bytes(matrix.type, matrix.cols);
  DeviceBuffer<std::byte> staging(file_row * *rc::gen::inRange<std::int64_t>(1, 4) + *rc::gen::inRange(0, 30));
  DeviceBuffer<std::byte> packed(2 * matrix.rows * row);
  packed.fill_bytes(0xA5);
  upload_packed(matrix.view(), packed.data() + row, 2, staging, nullptr);
  const std::vector<std::byte> actual = packed.to_host(), expected = packed_on_host(matrix);
  for (std::int64_t i = 0; i < matrix.rows; ++i) {
    const auto even = actual.begin() + 2 * i * row, odd = even + row;
    RC_ASSERT(std::equal(odd, odd + row, expected.begin() + i * row));
    RC_ASSERT(std::all_of(even, odd, [](std::byte byte) { return byte == std::byte{0xA5}; }));
  }
}

TEST(WeightRepackPlan, RefusesWhatItCannotPack) {
  EXPECT_TRUE(
      refuses([] { pack_rows(TensorType::kQ4K, 1, 128, nullptr, nullptr, 1, nullptr); }, {"128 columns", "256"}));
  EXPECT_TRUE(
      refuses([] { pack_rows(TensorType::kI32, 1, 256, nullptr, nullptr, 1, nullptr); }, {"I32", "no weights"}));
  const OwnedMatrix matrix = random_bits(TensorType::kQ6K, 2, 256, 1);
  DeviceBuffer<std::byte> none;
  EXPECT_TRUE(refuses([&] { upload_packed(matrix.view(), nullptr, 1, none, nullptr); }, {"0 B", "210 B"}));
}

}  // namespace
}  // namespace gemma4::cuda

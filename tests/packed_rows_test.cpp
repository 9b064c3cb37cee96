// SPDX-License-Identifier: Apache-2.0
#include "gemma4/plan/packed_rows.hpp"

#include <gtest/gtest.h>

#include <cstdint>

#include "gemma4/quantized_matrix.hpp"

/// Bytes of rows as they lie on a device, by figures worked out by hand from the formats.
namespace {

using namespace gemma4;

TEST(PackedRows, ChunksAreAsFewAndAsEvenAsTheyDivide) {
  struct Case {
    std::int64_t cols, n_chunk;
    int groups, last;
  };
  // 168 groups of 32 at most, whole super-blocks of 8 groups but at the end.
  for (const Case& c :
       {Case{256, 1, 8, 8}, Case{512, 1, 16, 16}, Case{800, 1, 32, 25}, Case{5376, 1, 168, 168}, Case{5632, 2, 88, 88},
        Case{8192, 2, 128, 128}, Case{16384, 4, 128, 128}, Case{21504, 4, 168, 168}, Case{5664, 2, 96, 81}}) {
    EXPECT_EQ(row_groups(c.cols), (c.cols + 31) / 32) << c.cols;
    EXPECT_EQ(row_chunks(c.cols), c.n_chunk) << c.cols;
    EXPECT_EQ(chunk_groups(c.cols), c.groups) << c.cols;
    EXPECT_EQ(groups_of_chunk(c.cols, 0), c.n_chunk == 1 ? c.last : c.groups) << c.cols;
    EXPECT_EQ(groups_of_chunk(c.cols, c.n_chunk - 1), c.last) << c.cols;
  }
}

TEST(PackedRows, BytesAreThoseOfTheFormatsAndEveryChunkAMultipleOf16) {
  struct Case {
    TensorType type;
    std::int64_t cols, bytes;
  };
  const Case cases[] = {{TensorType::kQ4K, 256, 144},
                        {TensorType::kQ4K, 5376, 21 * 144},
                        {TensorType::kQ4K, 21504, 84 * 144},
                        {TensorType::kQ5K, 256, 176},
                        {TensorType::kQ5K, 5376, 21 * 176},
                        {TensorType::kQ6K, 256, 26 * 8 + 16},  // 210 bytes and 14 of padding
                        {TensorType::kQ6K, 512, 26 * 16 + 16},
                        {TensorType::kQ6K, 768, 26 * 24 + 16},
                        {TensorType::kQ6K, 5376, 26 * 168 + 48},  // 4410 and 6
                        {TensorType::kQ6K, 21504, 4 * (26 * 168 + 48)},
                        {TensorType::kQ8_0, 256, 32 * 8 + 16},
                        {TensorType::kQ8_0, 800, 32 * 25 + 64},  // scales of 2 bytes: 50 to 64
                        {TensorType::kQ8_0, 5376, 32 * 168 + 336},
                        {TensorType::kQ8_0, 5664, 32 * 96 + 192 + 32 * 81 + 176},  // 162 to 176
                        {TensorType::kQ4_0, 32, 32},                               // 18 bytes and 14 of padding
                        {TensorType::kQ4_0, 800, 16 * 25 + 64},                    // steps of 2 bytes: 50 to 64
                        {TensorType::kQ4_0, 5376, 168 * 18},
                        {TensorType::kQ4_0, 21504, 672 * 18},
                        {TensorType::kIq4Nl, 5664, 96 * 18 + 81 * 16 + 176},  // 162 to 176
                        {TensorType::kQ4_1, 96, 64},                          // 60 and 4
                        {TensorType::kQ4_1, 5376, 168 * 20},
                        {TensorType::kQ5_0, 32, 32},  // 22 and 10
                        {TensorType::kQ5_0, 5376, 168 * 22},
                        {TensorType::kQ5_1, 32, 32},  // 24 and 8
                        {TensorType::kQ5_1, 5376, 168 * 24},
                        {TensorType::kIq4Xs, 256, 144},    // 136 and 8
                        {TensorType::kIq4Xs, 5376, 2864},  // 21 times 136 and 8
                        {TensorType::kIq4Xs, 8192, 32 * 136},
                        {TensorType::kQ3K, 256, 112},    // 110 and 2
                        {TensorType::kQ3K, 5376, 2320},  // 21 times 110 and 10
                        {TensorType::kQ3K, 21504, 4 * 2320},
                        {TensorType::kQ2K, 256, 96},     // 84 and 12
                        {TensorType::kQ2K, 5376, 1776},  // 21 times 84 and 12
                        {TensorType::kQ2K, 8192, 2 * 1344},
                        {TensorType::kBf16, 300, 600},
                        {TensorType::kF16, 300, 600},
                        {TensorType::kF32, 300, 1200}};
  for (const Case& c : cases)
    EXPECT_EQ(packed_row_bytes(c.type, c.cols), c.bytes) << type_name(c.type) << ' ' << c.cols;
  for (const TensorType type : kWeightTypes) {
    if (block_size(type) == 1) continue;
    EXPECT_TRUE(is_packed_type(type)) << type_name(type);
    for (std::int64_t groups = 8; groups <= 168; groups += 8) EXPECT_EQ(chunk_bytes(type, groups) % 16, 0) << groups;
  }
  for (const TensorType type : {TensorType::kF32, TensorType::kF16, TensorType::kBf16, TensorType::kI32}) {
    EXPECT_FALSE(is_packed_type(type));
  }
}

}  // namespace

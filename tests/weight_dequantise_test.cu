// SPDX-License-Identifier: Apache-2.0
#include "cuda/weights/dequantise.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <vector>

#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "tests/support/device_weights.cuh"
#include "tests/support/packed_types.hpp"
#include "tests/support/property.hpp"
#include "tests/support/random_weights.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

/// Rows first, first + step, ... as the host dequantises them, rounded to bf16.
std::vector<Bf16> on_host(const OwnedMatrix& matrix, std::int64_t first, std::int64_t count, std::int64_t step) {
  const auto row_size = static_cast<std::size_t>(row_bytes(matrix.type, matrix.cols));
  std::vector<Bf16> rows;
  std::vector<float> row(static_cast<std::size_t>(matrix.cols));
  for (std::int64_t i = 0; i < count; ++i) {
    dequantise_row(matrix.type,
                   std::span(matrix.bytes).subspan(static_cast<std::size_t>(first + i * step) * row_size, row_size),
                   row);
    std::transform(row.begin(), row.end(), std::back_inserter(rows), to_bf16);
  }
  return rows;
}

std::vector<Bf16> on_device(const PackedMatrix& matrix, std::int64_t first, std::int64_t count, std::int64_t step) {
  DeviceBuffer<Bf16> out((count + 1) * matrix.cols);
  out.fill_bytes(0x5A);
  dequantise_rows(matrix, first, count, step, out.data(), nullptr);
  std::vector<Bf16> rows = out.to_host();
  const auto end = rows.begin() + count * matrix.cols;
  EXPECT_TRUE(std::all_of(end, rows.end(), [](Bf16 value) { return value.bits == 0x5A5A; }))
      << "written beyond the rows";
  rows.erase(end, rows.end());
  return rows;
}

/// Every type, some rows of them, one chunk and several: bit for bit. Control: another first row.
RC_GTEST_PROP(WeightDequantiseGpu, HasTheBitsOfTheHost, ()) {
  const auto type = *rc::gen::elementOf(kWeightTypes);
  const std::int64_t cols = 256 * *rc::gen::element<std::int64_t>(1, 2, 3, 21, 22, 32, 84);
  const auto count = *rc::gen::inRange<std::int64_t>(1, 12), step = *rc::gen::inRange<std::int64_t>(1, 3);
  const auto first = *rc::gen::inRange<std::int64_t>(0, 3);
  const std::int64_t rows = first + count * step + 1;
  const float scale = *rc::gen::element(1.0f, 1e-3f, 100.0f);
  const OwnedMatrix matrix = random_weights(type, rows, cols, *rc::gen::arbitrary<std::uint32_t>(), scale);
  const DeviceWeights packed(matrix);
  const std::vector<Bf16> dequantised = on_device(packed.view(), first, count, step);
  RC_ASSERT(dequantised == on_host(matrix, first, count, step));
  RC_ASSERT(dequantised != on_host(matrix, first + 1, count, step));
}

/// A peer's blocks, repacked and dequantised, have the bits of the peer's values rounded to bf16. Control: one bit of a
/// block is seen.
TEST(WeightDequantiseGpu, PeersBlocksHaveThePeersValues) {
  const GgufFile file = GgufFile::open(std::filesystem::path(GEMMA4_TEST_DATA) / "blocks/blocks.gguf");
  for (const TensorType type : kPackedTypes) {
    const auto values = data_as<float>(file.tensor(concat(type_name(type), ".values")));
    const auto blocks = file.tensor(concat(type_name(type), ".blocks")).data;
    const auto n_value = static_cast<std::int64_t>(values.size());
    ASSERT_GE(n_value, 8192) << type_name(type);
    std::vector<Bf16> expected(values.size());
    std::transform(values.begin(), values.end(), expected.begin(), to_bf16);
    for (const std::int64_t rows : {1, 4}) {  // several chunks, one chunk
      ASSERT_EQ(n_value % (rows * block_size(type)), 0) << type_name(type);
      OwnedMatrix matrix{type, rows, n_value / rows, {blocks.begin(), blocks.end()}};
      EXPECT_EQ(on_device(DeviceWeights(matrix).view(), 0, rows, 1), expected) << type_name(type) << ", rows " << rows;
      matrix.bytes[static_cast<std::size_t>(block_bytes(type) + block_bytes(type) / 2)] ^= std::byte{1};
      EXPECT_NE(on_device(DeviceWeights(matrix).view(), 0, rows, 1), expected) << type_name(type);
    }
  }
}

/// Widths that no block format has.
RC_GTEST_PROP(WeightDequantiseGpu, PlainRowsOfAnyWidth, ()) {
  const auto type = *rc::gen::element(TensorType::kBf16, TensorType::kF16, TensorType::kF32);
  const auto cols = *rc::gen::inRange<std::int64_t>(1, 100), rows = *rc::gen::inRange<std::int64_t>(1, 10);
  const OwnedMatrix matrix = random_weights(type, rows, cols, *rc::gen::arbitrary<std::uint32_t>());
  const DeviceWeights packed(matrix);
  RC_ASSERT(on_device(packed.view(), 0, rows, 1) == on_host(matrix, 0, rows, 1));
}

TEST(WeightDequantisePlan, Refusals) {
  const PackedMatrix matrix{TensorType::kQ4K, 8, 256, nullptr};
  EXPECT_TRUE(refuses([&] { dequantise_rows(matrix, 4, 5, 1, nullptr, nullptr); }, {"5 rows from 4", "of 8"}));
  EXPECT_TRUE(refuses([&] { dequantise_rows(matrix, 0, 5, 2, nullptr, nullptr); }, {"in steps of 2"}));
}

}  // namespace
}  // namespace gemma4::cuda

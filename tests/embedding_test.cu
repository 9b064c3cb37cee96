// SPDX-License-Identifier: Apache-2.0
#include "cuda/embedding.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <span>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "gemma4/gguf/gguf_reader.hpp"
#include "reference/embedding.hpp"
#include "tests/support/device_weights.cuh"
#include "tests/support/packed_types.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

template <class TOut>
std::vector<TOut> embedded(const std::vector<std::int32_t>& tokens, const PackedMatrix& table, float scale) {
  const auto count = static_cast<std::int64_t>(tokens.size());
  const DeviceBuffer<std::int32_t> ids(tokens);
  DeviceBuffer<TOut> out(count * table.cols);
  out.fill_bytes(0xFF);
  embedding<TOut>({.device = ids.data(), .count = count}, table, scale, make_view(out.data(), count, table.cols),
                  nullptr);
  return out.to_host();
}

RC_GTEST_PROP(EmbeddingGpu, HasTheBitsOfTheReferenceInEveryFormat, ()) {
  const auto type = *rc::gen::elementOf(kWeightTypes);
  const std::int64_t cols = block_size(type) * *rc::gen::element<std::int64_t>(1, 2, 21, 22, 43);
  const auto vocab = *rc::gen::inRange<std::int32_t>(1, 50);
  const OwnedMatrix table = random_weights(type, vocab, cols, *rc::gen::arbitrary<std::uint32_t>());
  const auto tokens = *rc::gen::container<std::vector<std::int32_t>>(1 + *rc::gen::inRange<std::size_t>(0, 20),
                                                                     rc::gen::inRange<std::int32_t>(0, vocab));
  const float scale = std::sqrt(static_cast<float>(cols));
  reference::Matrix<float> expected(static_cast<Eigen::Index>(tokens.size()), cols);
  reference::embedding<float>(tokens, table.view(), scale, expected);
  const DeviceWeights weights(table);
  const std::vector<float> out = embedded<float>(tokens, weights.view(), scale);
  RC_ASSERT(std::equal(out.begin(), out.end(), expected.data(), expected.data() + expected.size()));
  const std::vector<Bf16> rounded = embedded<Bf16>(tokens, weights.view(), scale);
  RC_ASSERT(std::equal(out.begin(), out.end(), rounded.begin(), [](float a, Bf16 b) { return to_bf16(a) == b; }));
  // Control: another scale is seen.
  const std::vector<float> other = embedded<float>(tokens, weights.view(), 2.0f * scale);
  RC_ASSERT(!std::equal(other.begin(), other.end(), expected.data()));
}

/// Rows of a peer's blocks have the peer's values to the bit. Control: one bit of a block is seen.
TEST(EmbeddingGpu, PeersBlocksHaveThePeersValues) {
  constexpr std::int32_t kRows = 8;
  const GgufFile file = GgufFile::open(std::filesystem::path(GEMMA4_TEST_DATA) / "blocks/blocks.gguf");
  const auto has_bits = [](const std::vector<float>& a, std::span<const float> b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), b.size_bytes()) == 0;
  };
  for (const TensorType type : kPackedTypes) {
    const auto values = data_as<float>(file.tensor(concat(type_name(type), ".values")));
    const auto blocks = file.tensor(concat(type_name(type), ".blocks")).data;
    const auto n_value = static_cast<std::int64_t>(values.size());
    ASSERT_EQ(n_value % (kRows * block_size(type)), 0) << type_name(type);
    OwnedMatrix table{type, kRows, n_value / kRows, {blocks.begin(), blocks.end()}};
    const std::vector<std::int32_t> tokens = {0, 1, 2, 3, 4, 5, 6, 7};
    EXPECT_TRUE(has_bits(embedded<float>(tokens, DeviceWeights(table).view(), 1.0f), values)) << type_name(type);
    table.bytes[static_cast<std::size_t>(block_bytes(type) + block_bytes(type) / 2)] ^= std::byte{1};
    EXPECT_FALSE(has_bits(embedded<float>(tokens, DeviceWeights(table).view(), 1.0f), values)) << type_name(type);
  }
}

TEST(EmbeddingGpu, AnUnknownTokenIsNaN) {
  const OwnedMatrix table = random_weights(TensorType::kQ6K, 3, 256, 1);
  const DeviceWeights weights(table);
  const std::vector<float> out = embedded<float>({0, 3, -1, 2}, weights.view(), 1.0f);
  for (std::size_t i = 0; i < out.size(); ++i) EXPECT_EQ(std::isnan(out[i]), i / 256 == 1 || i / 256 == 2) << i;
}

TEST(EmbeddingPlan, Refusals) {
  std::vector<float> memory(512);
  const PackedMatrix table{TensorType::kQ6K, 3, 256, nullptr};
  const std::vector<std::int32_t> tokens = {0, 3};
  EXPECT_TRUE(refuses(
      [&] {
        embedding<float>({.device = nullptr, .count = 2, .host = tokens}, table, 1.0f, make_view(memory.data(), 2, 256),
                         nullptr);
      },
      {"token 3 at 1", "[0, 3)"}));
}

}  // namespace
}  // namespace gemma4::cuda

// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/synthetic/synthetic_model.hpp"
#include "tests/support/temp_dir.hpp"

/// The types of the matrices of a model that is written here: mixes of published files, and one type for all.
namespace {

using namespace gemma4;
using testkit::TempDir;

TEST(WeightMix, AnyTypeOfMatrixLoads) {
  const TempDir folder;
  for (const TensorType type : {TensorType::kQ4_0, TensorType::kQ4K, TensorType::kQ8_0, TensorType::kBf16,
                                TensorType::kF16, TensorType::kF32}) {
    write_synthetic_model(folder.file("m.gguf"), gemma4_tiny(), {.only = type});
    const GgufFile file = GgufFile::open(folder.file("m.gguf"));
    const ModelWeights weights = weights_from_gguf(file);
    EXPECT_EQ(weights.token_embd.type, type);
    EXPECT_EQ(weights.layers[5].ffn_down.type, type);
  }
}

/// Types of the matrices of a model: how many tensors have each.
std::map<TensorType, int> matrix_types(const std::vector<ModelTensor>& tensors) {
  std::map<TensorType, int> counts;
  for (const ModelTensor& tensor : tensors) counts[tensor.type] += tensor.dims.size() > 1;
  counts.erase(TensorType::kF32);
  return counts;
}

TEST(WeightMix, TheQatMixIsQ4_0UnderAnEmbeddingInQ6_K) {
  const TempDir folder;
  write_synthetic_model(folder.file("m.gguf"), gemma4_tiny(), {.mix = WeightMix::kQatQ40});
  const GgufFile file = GgufFile::open(folder.file("m.gguf"));
  EXPECT_EQ(file.get<int>("general.file_type"), 2) << "llama.cpp's number of Q4_0";
  const auto tensors = model_tensors(file);
  EXPECT_EQ(tensors, model_tensors(gemma4_tiny(), std::nullopt, WeightMix::kQatQ40));
  // 6 layers of 7 matrices, less attn_v of the one full layer.
  EXPECT_EQ(matrix_types(tensors), (std::map<TensorType, int>{{TensorType::kQ4_0, 41}, {TensorType::kQ6K, 1}}));
  EXPECT_EQ(weights_from_gguf(file).token_embd.type, TensorType::kQ6K);
  for (const auto& tensor : tensors) EXPECT_TRUE(tensor.dims.size() > 1 || tensor.type == TensorType::kF32);
}

// 29 286 727 680 weights of the layers at 4.5 bits and 1 409 286 144 of the embedding at 6.5625, by hand from the shape
// of the model; the published file of that layout is 16.44 GiB with its vocabulary. With the embedding in Q4_0 too, as
// others publish it, 16.1 GiB. The control is the other mix.
TEST(WeightMix, TheQatMixOfThe31BHasTheBytesOfThePublishedFile) {
  const auto bytes = [](std::optional<TensorType> only, WeightMix mix) {
    std::int64_t sum = 0;
    for (const ModelTensor& tensor : model_tensors(gemma4_31b(), only, mix)) {
      if (tensor.dims.size() > 1) sum += tensor.bytes();
    }
    return sum;
  };
  constexpr std::int64_t kLayers = 29'286'727'680, kEmbedding = 1'409'286'144;
  const std::int64_t qat = bytes(std::nullopt, WeightMix::kQatQ40);
  EXPECT_EQ(qat, kLayers / 32 * 18 + kEmbedding / 256 * 210);
  EXPECT_NEAR(static_cast<double>(qat) / 0x1p30, 16.42, 0.005);
  EXPECT_EQ(bytes(TensorType::kQ4_0, WeightMix::kQatQ40), (kLayers + kEmbedding) / 32 * 18);
  EXPECT_NEAR(static_cast<double>((kLayers + kEmbedding) / 32 * 18) / 0x1p30, 16.08, 0.005);
  EXPECT_GT(bytes(std::nullopt, WeightMix::kQ4KM), qat + (std::int64_t{1} << 29));
}

}  // namespace
